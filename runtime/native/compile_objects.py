"""Compiles kernels for the processor that NUMBA_CPU_NAME names: ``python -m ... FOLDER TAG [--only STAGE ...] OP ...``.

In a process of its own, because numba generates code for one processor in a process. Prints each name as its object is done.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from actgraph.runtime.kernels.numba.kernel import NumbaKernel, OpKernels, Stage


def kernels_of(kernels: OpKernels, only: Sequence[str]) -> list[NumbaKernel]:
    """The kernels of an op, or those that have a stage called as one of ``only``."""
    return [k for k in kernels.kernels if not only or any(stage.name in only for stage in k.stages)]


def stages_of(kernels: OpKernels, only: Sequence[str]) -> dict[str, Stage]:
    """The functions of the kernels of an op, by name."""
    found = [stage for k in kernels_of(kernels, only) for stage in (k.shape, k.scratch, *k.stages) if stage is not None]
    return {stage.name: stage for stage in found}


def symbol(tag: str, stage: Stage) -> str:
    """What a function is called in a library of several levels."""
    return f"ag_{tag}_{stage.name}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("tag")
    parser.add_argument("ops", nargs="+")
    parser.add_argument("--only", action="append", default=[])
    given = parser.parse_args()

    from actgraph.runtime.kernels.numba.objects import compiled
    from actgraph.runtime.kernels.registry import all_kernels

    stages: dict[str, Stage] = {}
    for op in given.ops:
        stages |= stages_of(all_kernels()[op], given.only)
    for stage in stages.values():
        name = symbol(given.tag, stage)
        (given.folder / f"{name}.o").write_bytes(compiled(name, stage.function))
        print(name, flush=True)


if __name__ == "__main__":
    main()
