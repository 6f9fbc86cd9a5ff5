"""The processor that kernels are compiled for: the one that this runs on, unless said otherwise."""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """name: LLVM's name of the processor. features: what it has, as LLVM calls them.

    lacks: what it has not though others of its name may, such as AVX-512 where a virtual machine hides it.
    """

    name: str
    features: frozenset[str]
    lacks: frozenset[str] = frozenset()

    @property
    def text(self) -> str:
        """The features as LLVM takes them."""
        return ",".join([*(f"+{name}" for name in sorted(self.features)), *(f"-{name}" for name in sorted(self.lacks))])

    @property
    def vnni(self) -> bool:
        return {"avx512vnni", "avx512vl"} <= self.features


@functools.cache
def target() -> Target:
    """What code is generated for: this processor, or what NUMBA_CPU_NAME and NUMBA_CPU_FEATURES say."""
    import llvmlite.binding as llvm
    from numba.core import config

    if config.CPU_NAME or config.CPU_FEATURES:
        given = (config.CPU_FEATURES or "").split(",")
        has, lacks = (frozenset(name[1:] for name in given if name.startswith(sign)) for sign in "+-")
        return Target(config.CPU_NAME or "generic", has, lacks)
    known = llvm.get_host_cpu_features()
    features = frozenset(name for name, has in known.items() if has)
    return Target(llvm.get_host_cpu_name(), features, frozenset(known) - features)
