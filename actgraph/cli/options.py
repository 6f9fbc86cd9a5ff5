"""Arguments and options that several verbs share, so that they read the same everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass
class State:
    """What the shared flags set for the running command."""

    debug: bool = False


state = State()


def example(*lines: str) -> str:
    """The examples at the foot of a verb's help, kept as they are written."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def _set_debug(value: bool) -> bool:
    state.debug = value
    return value


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face directory, an .onnx or .pt2 file, package.module:factory, stories260k, or a folder of "
        "several graphs. A .pt2 file and a factory run code: give only what you trust.",
    ),
]
Pipeline = Annotated[
    str | None, typer.Option("-p", "--passes", metavar="PIPELINE", help="The passes as text: name{key=value ...}, name ...")
]
Recipe = Annotated[Path | None, typer.Option("-r", "--recipe", metavar="FILE", help="The passes as a YAML recipe.")]
Corpus = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Calibration data: .txt (a document a line), .jsonl, .npz, .safetensors, or a folder of images.",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="OUT", help="What to write: .onnx or .pt2, or a folder for several graphs."),
]
Genai = Annotated[
    bool,
    typer.Option(
        "--genai",
        help="Write a folder for onnxruntime-genai: model.onnx with a cache that grows (inserted where MODEL has none), "
        "genai_config.json, tokenizer.",
    ),
]
Inline = Annotated[
    str,
    typer.Option(
        metavar="WHICH", help="ONNX: none keeps our ops as functions, which kernels can claim; all leaves standard ops only."
    ),
]
ExternalData = Annotated[bool, typer.Option("--external-data", help="ONNX: put the weights in a file of their own.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn at random.")]
Tokenizer = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where the tokenizer is (tokenizer.json), if not beside the model.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        help="Weights of a Hugging Face model: float32 (the default), float16, bfloat16, or auto (the checkpoint's).",
        show_default=False,
    ),
]
Inputs = Annotated[
    list[str],
    typer.Option(
        "--input",
        metavar="NAME=VALUE",
        help="A value for an optional input, such as steer.scale=2: a number, a list with one for each row, or a file "
        "(.npy, .safetensors). May be repeated.",
        show_default=False,
    ),
]
Text = Annotated[bool, typer.Option("--text", help="Print the canonical text of the graph instead.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print results only.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Print every place, not only totals.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done and write nothing.")]


def _import(value: list[str] | None) -> list[str] | None:
    from actgraph.cli.models import import_passes

    for name in value or ():
        import_passes(name)
    return value


Import = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="MODULE",
        callback=_import,
        help="Import a Python module first, for the passes that it registers with @ag.register. It runs code: give only "
        "what you trust.",
        show_default=False,
    ),
]
Debug = Annotated[
    bool,
    typer.Option("--debug", callback=_set_debug, is_eager=True, help="Show the traceback of an error.", show_default=False),
]
