"""Compiles all kernels into the cache, on several cores: ``python -m tests.compile_kernels PROCESSES``.

Tests would compile each one when they first meet it, several processes the same ones at once. Nothing is done where the
cache has them.
"""

from __future__ import annotations

import multiprocessing
import sys

from actgraph.runtime.kernels.registry import all_kernels
from actgraph.runtime.native.library import available


def compile_op(name: str) -> int:
    """Compile the kernels of an op; how many functions they are."""
    from actgraph.runtime.kernels.numba.objects import compiled
    from actgraph.runtime.native.compile_objects import stages_of

    stages = stages_of(all_kernels()[name], ())
    for stage in stages.values():
        compiled(stage.name, stage.function)
    return len(stages)


def main(processes: int) -> None:
    if not available():
        return
    names = sorted(all_kernels(), key=lambda name: -len(all_kernels()[name].kernels))  # the longest first
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        print(f"{sum(pool.imap_unordered(compile_op, names))} functions of kernels are compiled")


if __name__ == "__main__":
    main(int(sys.argv[1]))
