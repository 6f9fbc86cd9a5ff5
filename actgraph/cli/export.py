"""``actgraph export``: a model in another format."""

from __future__ import annotations

import typer

from actgraph.cli import options
from actgraph.cli.options import example

EXAMPLE = example("actgraph export stories260k -o stories.onnx", "actgraph export my.module:build --inline all -o model.onnx")


def export(
    model: options.Model,
    output: options.Output = None,
    inline: options.Inline = "none",
    external_data: options.ExternalData = False,
    tokenizer: options.Tokenizer = None,
    dtype: options.Dtype = None,
    dry_run: options.DryRun = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Write a model as .onnx or .pt2.

    The same as `run` without passes.
    """
    from actgraph.cli.models import check_save, open_model
    from actgraph.cli.run import SUFFIXES, save

    if output is None:
        raise typer.BadParameter("say where to write the result: -o OUT.onnx or -o OUT.pt2")
    check_save(output, SUFFIXES, inline=inline, external_data=external_data)
    graph = open_model(model, tokenizer, dtype=dtype, quiet=quiet)
    if dry_run:
        print(f"would write {graph!r} to {output}")
        return
    save(graph, output, inline=inline, external_data=external_data, quiet=quiet)
    print(output)


command = export
