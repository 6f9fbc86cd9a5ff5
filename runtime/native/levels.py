"""The levels of x86-64 that a plugin holds kernels for, and how it finds out at load time which of them a processor has."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from actgraph.errors import InputError
from actgraph.runtime.kernels.numba.target import Target, target

_V2 = ("cx16", "popcnt", "sse3", "sse4.1", "sse4.2", "ssse3")
_V3 = (*_V2, "avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave")
_V4 = (*_V3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")


@dataclass(frozen=True)
class Level:
    """tag: part of its functions' names. cpu, features: as LLVM calls them. test: C code that is true on such processors."""

    name: str
    tag: str
    cpu: str
    features: tuple[str, ...]
    test: str

    @property
    def environment(self) -> dict[str, str]:
        """What makes numba compile for it."""
        return {"NUMBA_CPU_NAME": self.cpu, "NUMBA_CPU_FEATURES": ",".join(f"+{name}" for name in self.features)}


def _supports(*names: str) -> str:
    return " && ".join(f'__builtin_cpu_supports("{name}")' for name in names)


_TEST_V2 = _supports("sse4.2", "ssse3", "popcnt")
_TEST_V3 = f"{_TEST_V2} && {_supports('avx2', 'fma', 'bmi', 'bmi2')} && has_rest_of_v3()"
_TEST_V4 = f"{_TEST_V3} && {_supports('avx512f', 'avx512bw', 'avx512cd', 'avx512dq', 'avx512vl')}"
#: From the lowest to the highest.
LEVELS = (
    Level("x86-64-v2", "v2", "x86-64-v2", _V2, _TEST_V2),
    Level("x86-64-v3", "v3", "x86-64-v3", _V3, _TEST_V3),
    Level("x86-64-v4", "v4", "x86-64-v4", _V4, _TEST_V4),
    Level("x86-64-v4+vnni", "v4_vnni", "x86-64-v4", (*_V4, "avx512vnni"), f"{_TEST_V4} && {_supports('avx512vnni')}"),
)
CHOICES = ("all", "host", *(level.name for level in LEVELS))


def chosen(cpu: str) -> tuple[Level, ...]:
    """The levels that ``cpu`` names: one of CHOICES, or short as v3.

    "host" is the highest level that this processor has, so that the library runs on others like it. Away from x86-64 there is
    one level, this processor. Raises InputError.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        if cpu not in ("all", "host"):
            raise InputError(f"this processor is no x86-64, so it cannot compile for {cpu}", "give --cpu host")
        here = target()
        return (Level("host", "host", here.name, tuple(sorted(here.features)), "1"),)
    if cpu == "all":
        return LEVELS
    if cpu == "host":
        return (highest(target()),)
    found = [level for level in LEVELS if cpu in (level.name, level.name.removeprefix("x86-64-"))]
    if not found:
        raise InputError(f"there is no processor level {cpu!r}", f"give one of {', '.join(CHOICES)}")
    return tuple(found)


def highest(processor: Target) -> Level:
    """The highest level whose features a processor has. Raises InputError where it has none."""
    names = {"lzcnt" if name == "abm" else name for name in processor.features}
    fits = [level for level in LEVELS if names.issuperset(level.features)]
    if not fits:
        raise InputError(f"{processor.name} is older than {LEVELS[0].name}", "kernels need at least that")
    return fits[-1]
