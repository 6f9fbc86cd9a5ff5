"""``actgraph sites``: what can be named in a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from actgraph.cli import options
from actgraph.cli.options import example

if TYPE_CHECKING:
    from actgraph.graph import Site

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
    means the same in every architecture. -v lists the other accepted spellings. Of a program each graph's are listed.
    """
    from actgraph.cli.models import open_any
    from actgraph.cli.output import dump_json, remark, table

    program = open_any(model, dtype=dtype, quiet=quiet)
    listed = {name: graph.sites(selector or None, ignore or ()) for name, graph in program.graphs.items()}
    if json:
        facts = {name: [_facts(site) for site in found] for name, found in listed.items()}
        dump_json(facts if len(program) > 1 else facts[program.graph.name])
        return
    columns = ["site", "kind", "type", "role", *(["also called"] if verbose else [])]
    for name, found in listed.items():
        if len(program) > 1:
            print(f"# {name}")
        rows = [(s.name, s.kind.value, s.type, s.role, " ".join(s.aliases)) for s in found]
        table(columns, [row[: len(columns)] for row in rows])
        remark(f"{len(found)} sites", quiet=quiet)


def _facts(site: Site) -> dict[str, Any]:
    return {
        "name": site.name,
        "kind": site.kind.value,
        "role": site.role,
        "dtype": site.type.dtype,
        "shape": site.type.shape,
        "aliases": list(site.aliases),
    }


command = sites
