"""``actgraph build-plugin``: the kernels as a shared library for hosts without Python."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actgraph.cli import options
from actgraph.cli.options import example

EXAMPLE = example("actgraph build-plugin -o libactgraph.so", "actgraph build-plugin --cpu v3 --op linear -o libactgraph.so")


def build_plugin(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT.so", help="The shared library to write.", show_default=False)
    ] = None,
    cpu: Annotated[
        str,
        typer.Option(
            metavar="LEVEL",
            help="x86-64-v2, x86-64-v3, x86-64-v4, x86-64-v4+vnni; all: these four, of which the library takes one when it is "
            "loaded; host: the highest that this processor has.",
        ),
    ] = "all",
    op: Annotated[
        list[str] | None,
        typer.Option(
            "--op", metavar="OP", help="Take kernels of this op only; may be repeated.", show_default="all but dequantize"
        ),
    ] = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Compile the kernels into a shared library for onnxruntime in hosts without Python.

    A host registers it with RegisterCustomOpsLibrary and opens files with kept functions (the default of `run` and `export`).
    Needs a C compiler (CC names one); compiled kernels are kept in a cache (ACTGRAPH_CACHE).
    """
    from actgraph.cli.models import check_output
    from actgraph.cli.output import counting, remark

    if output is None:
        raise typer.BadParameter("say where to write the library: -o libactgraph.so")
    check_output(output, (".so",))
    from actgraph.runtime.native.build import build

    with counting("compiling kernels", quiet=quiet) as progress:
        plugin = build(output, cpu, ops=op or (), progress=progress)
    remark(f"{', '.join(plugin.ops)} for {', '.join(plugin.levels)}", quiet=quiet)
    for name, why in plugin.left_out.items():
        remark(f"left out: {name}: {why}; it runs by its body", quiet=quiet)
    print(output)


command = build_plugin
