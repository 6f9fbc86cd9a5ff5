"""The processor that kernels are compiled for: the one that this runs on, unless said otherwise."""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """name: LLVM's name of the processor. features: what it has, as LLVM calls them."""

    name: str
    features: frozenset[str]

    @property
    def vnni(self) -> bool:
        return {"avx512vnni", "avx512vl"} <= self.features


@functools.cache
def host() -> Target:
    """What numba compiles for: this processor, or what NUMBA_CPU_NAME and NUMBA_CPU_FEATURES say."""
    import llvmlite.binding as llvm
    from numba.core import config

    if config.CPU_NAME or config.CPU_FEATURES:
        given = (config.CPU_FEATURES or "").split(",")
        return Target(config.CPU_NAME or "generic", frozenset(name[1:] for name in given if name.startswith("+")))
    return Target(llvm.get_host_cpu_name(), frozenset(name for name, has in llvm.get_host_cpu_features().items() if has))


_CHOSEN: list[Target] = []


def target() -> Target:
    """The processor that the code being generated is for."""
    return _CHOSEN[-1] if _CHOSEN else host()


class compiling_for:
    """A context in which code is generated for another processor."""

    def __init__(self, chosen: Target) -> None:
        self._chosen = chosen

    def __enter__(self) -> None:
        _CHOSEN.append(self._chosen)

    def __exit__(self, *exception: object) -> None:
        _CHOSEN.pop()
