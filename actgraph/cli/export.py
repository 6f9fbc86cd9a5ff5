"""``actgraph export``: a model in another format."""

from __future__ import annotations

import typer

from actgraph.cli import options
from actgraph.cli.options import example

EXAMPLE = example(
    "actgraph export stories260k -o stories.onnx",
    "actgraph export my.module:build --inline all -o model.onnx",
    "actgraph export stories260k --genai -o genai_model",
)


def export(
    model: options.Model,
    output: options.Output = None,
    inline: options.Inline = "none",
    external_data: options.ExternalData = False,
    genai: options.Genai = False,
    tokenizer: options.Tokenizer = None,
    dtype: options.Dtype = None,
    dry_run: options.DryRun = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Write a model as .onnx or .pt2, a program as a folder, or a folder for onnxruntime-genai (--genai).

    The same as `run` without passes.
    """
    from actgraph.cli.models import check_save, open_any
    from actgraph.cli.run import SUFFIXES, save, with_cache
    from actgraph.formats import kind_of

    if output is None:
        raise typer.BadParameter("say where to write the result: -o OUT.onnx or -o OUT.pt2")
    several = kind_of(model) == "program"
    check_save(output, SUFFIXES, inline=inline, external_data=external_data, several=several, genai=genai)
    program = open_any(model, tokenizer, dtype=dtype, quiet=quiet)
    if dry_run:
        print(f"would write {program!r} to {output}{' for onnxruntime-genai' if genai else ''}")
        return
    if genai:
        program = with_cache(program)
    save(program, output, inline=inline, external_data=external_data, genai=genai, quiet=quiet)
    print(output)


command = export
