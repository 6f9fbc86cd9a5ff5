"""``actgraph export-adapter``: values of a model's optional inputs as a file that onnxruntime swaps without a new session."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actgraph.cli import options
from actgraph.cli.options import example

EXAMPLE = example(
    "actgraph export-adapter steered.onnx --input steer.scale=2 -o strong.onnx_adapter",
    "actgraph generate steered.onnx 'Once upon a time' --adapter strong.onnx_adapter",
)


def export_adapter(
    model: options.Model,
    given: options.Inputs,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The .onnx_adapter file to write.")],
    version: Annotated[int, typer.Option(min=0, help="A number that the file carries for its host.")] = 1,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Write values of a model's optional inputs as an .onnx_adapter file.

    Plain onnxruntime loads it with LoraAdapter and applies it to a call with RunOptions.add_active_adapter: one session, many
    edits. `actgraph generate --adapter` takes it, too. What is fed under the same name is overridden by onnxruntime without a
    word, and is an error here.
    """
    from actgraph.cli.input_values import read_inputs
    from actgraph.cli.models import check_output, open_any
    from actgraph.cli.output import dump_json, remark
    from actgraph.formats.adapters import SUFFIX, load_adapter, save_adapter

    check_output(output, (SUFFIX,))
    values = read_inputs(given)
    program = open_any(model, None, quiet=quiet)
    save_adapter(output, values, program, version=version)
    written = {name: f"{array.dtype}{list(array.shape)}" for name, array in load_adapter(output).items()}
    if json:
        dump_json({"file": str(output), "inputs": written})
        return
    for name, kind in written.items():
        remark(f"{name}: {kind}", quiet=quiet)
    print(output)


command = export_adapter
