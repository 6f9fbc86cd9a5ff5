"""``actgraph sites``: what can be named in a model."""

from __future__ import annotations

from typing import Annotated

import typer

from actgraph.cli import options
from actgraph.cli.options import example

EXAMPLE = example(
    "actgraph sites stories260k 'blocks.*.mlp.hidden'",
    "actgraph sites model.onnx --json",
)


def sites(
    model: options.Model,
    selector: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SELECTOR]...", help="Names, globs, {ranges} or re:patterns; all sites without one.", show_default=False
        ),
    ] = None,
    ignore: Annotated[list[str] | None, typer.Option(metavar="SELECTOR", help="Leave these out (may be repeated).")] = None,
    dtype: options.Dtype = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """List the sites of a model.

    A site is a named activation: the names by which passes know where to act. A role site such as blocks.2.mlp.hidden
    means the same in every architecture. -v lists the other accepted spellings.
    """
    from actgraph.cli.models import open_model
    from actgraph.cli.output import dump_json, remark, table

    graph = open_model(model, dtype=dtype, quiet=quiet)
    found = graph.sites(selector or None, ignore or ())
    if json:
        dump_json(
            [
                {
                    "name": site.name,
                    "kind": site.kind.value,
                    "role": site.role,
                    "dtype": site.type.dtype,
                    "shape": site.type.shape,
                    "aliases": list(site.aliases),
                }
                for site in found
            ]
        )
        return
    if verbose:
        table(
            ["site", "kind", "type", "role", "also called"],
            [(s.name, s.kind.value, s.type, s.role, " ".join(s.aliases)) for s in found],
        )
    else:
        table(["site", "kind", "type", "role"], [(s.name, s.kind.value, s.type, s.role) for s in found])
    remark(f"{len(found)} sites", quiet=quiet)


command = sites
