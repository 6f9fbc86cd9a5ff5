"""``actgraph diff``: what changed from one graph to another."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from actgraph.cli import options
from actgraph.cli.options import example

EXAMPLE = example("actgraph diff stories260k steered.pt2", "actgraph diff before.onnx after.onnx --json")


def diff(
    left: options.Model,
    right: Annotated[str, typer.Argument(metavar="MODEL", help="The other model, in any of the same forms.")],
    json: options.Json = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print nothing; the exit code is the answer.")] = False,
    debug: options.Debug = False,
) -> None:
    """Compare two models as graphs.

    Nodes, weights, signature, sites and passes are compared; of programs also driver and slots, and graphs of equal name.
    A torch and an ONNX graph have no nodes in common; between them signature, sites and views are compared. The exit code
    is 0 when nothing differs and 1 when something does.
    """
    import actgraph as ag
    from actgraph.cli.models import open_any
    from actgraph.cli.output import dump_json

    programs = open_any(left, quiet=quiet, notes=False), open_any(right, quiet=quiet, notes=False)
    changes = ag.diff(*programs)
    # Both files often hold one model under one name: the header says which file is which.
    shown = [left, right]
    dialects = [next(iter(program)).dialect for program in programs]
    if dialects[0] != dialects[1]:
        shown = [f"{source} ({dialect})" for source, dialect in zip(shown, dialects, strict=True)]
    changes = replace(changes, left=shown[0], right=shown[1])
    if json:
        dump_json(changes.to_dict())
    elif not quiet:
        print(changes.text(), end="")
    if changes:
        raise typer.Exit(1)


command = diff
