"""How many threads compute one operator, in every engine of this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from actgraph.errors import InputError

_WANTED = [0]


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Let sessions that are opened in the block, torch and kernels use ``count`` threads; 0: what they use by themselves.

    Raises InputError for a negative number.
    """
    if count < 0:
        raise InputError(f"threads are {count}", "give at least 1")
    if not count:
        yield
        return
    from actgraph.runtime.native.library import available, library

    torch = sys.modules.get("torch")
    before, own = _WANTED[0], torch.get_num_threads() if torch is not None else 0

    def use(wanted: int, torch_threads: int) -> None:
        _WANTED[0] = wanted
        if available():
            library().ag_set_parts(wanted)
        if torch is not None:
            torch.set_num_threads(torch_threads)

    try:
        use(count, count)
        yield
    finally:
        use(before, own)


def wanted_threads() -> int:
    """What ``using_threads`` asks for now, 0 for nothing."""
    return _WANTED[0]


def threads() -> int:
    """How many there are at most."""
    return _WANTED[0] or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
