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

    Nodes, weights, signature, sites and passes are compared. A torch and an ONNX graph have no nodes in common;
    between them signature, sites and views are compared. The exit code is 0 when nothing differs and 1 when something
    does.
    """
    import actgraph as ag
    from actgraph.cli.models import open_model
    from actgraph.cli.output import dump_json

    graphs = open_model(left, quiet=quiet, notes=False), open_model(right, quiet=quiet, notes=False)
    changes = ag.diff(*graphs)
    # Both files often hold one model under one name: the header says which file is which.
    shown = [left, right]
    if graphs[0].dialect != graphs[1].dialect:
        shown = [f"{source} ({graph.dialect})" for source, graph in zip(shown, graphs, strict=True)]
    changes = replace(changes, left=shown[0], right=shown[1])
    if json:
        dump_json(changes.to_dict())
    elif not quiet:
        print(changes.text(), end="")
    if changes:
        raise typer.Exit(1)


command = diff
