"""Finding and calling the C library. See kernel.h for what a kernel is to it."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

from actgraph.errors import UnsupportedError

#: The layout of frames: words before the first tensor, words of a tensor, its most axes. See kernel.h.
HEAD, TENSOR, RANK = 4, 12, 8
#: The word of a tensor, behind its sizes, that says for how many rows its buffer has room where it is the front of one.
ROOM = 11
STAGES, KEY, MOST_TENSORS, CHOICES = 6, 8, 24, 8

Function = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)


class Variant(ctypes.Structure):
    """``ag_variant``."""

    _fields_ = (
        ("key", ctypes.c_int64 * KEY),
        ("shape", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("stages", ctypes.c_int64),
        ("stage", ctypes.c_void_p * STAGES),
        ("parallel", ctypes.c_int64 * STAGES),
    )


class Attribute(ctypes.Structure):
    """``ag_attribute``."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("kind", ctypes.c_int64),
        ("fallback", ctypes.c_int64),
        ("choices", ctypes.c_char_p),
        ("required", ctypes.c_int64),
    )


class Op(ctypes.Structure):
    """``ag_op``."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("attributes", ctypes.c_int64),
        ("input_type", ctypes.c_int64 * MOST_TENSORS),
        ("accepts", ctypes.c_int64 * MOST_TENSORS),
        ("input_names", ctypes.c_char_p),
        ("optional", ctypes.c_int64 * MOST_TENSORS),
        ("output_type", ctypes.c_int64 * MOST_TENSORS),
        ("follows", ctypes.c_int64),
        ("result_attribute", ctypes.c_int64),
        ("result_type", ctypes.c_int64 * CHOICES),
        ("written_type", ctypes.c_int64 * CHOICES),
        ("key_input", ctypes.c_int64 * KEY),
        ("key_inputs", ctypes.c_int64),
        ("key_attribute", ctypes.c_int64 * KEY),
        ("key_attributes", ctypes.c_int64),
        ("attribute", ctypes.POINTER(Attribute)),
        ("error", ctypes.POINTER(ctypes.c_char_p)),
        ("errors", ctypes.c_int64),
    )


def path() -> Path | None:
    """Where the library is: ACTGRAPH_LIBRARY, or beside this file, where the package's build puts it."""
    given = os.environ.get("ACTGRAPH_LIBRARY")
    if given is not None:
        return Path(given) if given and Path(given).exists() else None
    suffix = ".pyd" if sys.platform == "win32" else ".so"
    return next(iter(sorted(Path(__file__).parent.glob(f"actgraph_native*{suffix}"))), None)


@functools.cache
def library() -> ctypes.CDLL:
    """The library, loaded. Raises UnsupportedError where it was not built."""
    found = path()
    if found is None:
        raise UnsupportedError(
            "the kernels' library was not built", "install actgraph where there is a C compiler, or go on without kernels"
        )
    try:
        lib = ctypes.CDLL(str(found))
    except OSError as error:
        raise UnsupportedError(f"the kernels' library cannot be loaded: {error}", "install actgraph again") from error
    for name, result, arguments in (
        ("ag_run", ctypes.c_int64, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("ag_replay", ctypes.c_int64, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)),
        ("ag_parallel", ctypes.c_int64, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("ag_add_op", ctypes.c_int64, (ctypes.c_void_p,)),
        ("ag_add_variant", ctypes.c_int64, (ctypes.c_char_p, ctypes.c_void_p)),
        ("ag_set_parts", None, (ctypes.c_int64,)),
        ("ag_runs", ctypes.c_int64, ()),
        ("ag_variant_size", ctypes.c_int64, ()),
        ("ag_op_size", ctypes.c_int64, ()),
    ):
        function = getattr(lib, name, None)
        if function is None:
            raise UnsupportedError(f"{found} is not the kernels' library of this version of actgraph", "install actgraph again")
        function.restype, function.argtypes = result, arguments
    if (lib.ag_variant_size(), lib.ag_op_size()) != (ctypes.sizeof(Variant), ctypes.sizeof(Op)):
        raise UnsupportedError(f"{found.name} belongs to another version of actgraph", "install actgraph again")
    return lib


_SAID: list[str] = []


def available(*, asked: bool = False) -> bool:
    """Whether the library is there. ``asked``: by someone who wants it; the first time that it is not, one line says so."""
    there = path() is not None
    if asked and not there and not _SAID:
        _SAID.append("said")
        given = os.environ.get("ACTGRAPH_LIBRARY")
        why = f"ACTGRAPH_LIBRARY names no file ({given})" if given else "its kernels were not built (no C compiler?)"
        print(f"actgraph: {why}: everything runs without them, slower", file=sys.stderr)
    return there


def words(tensors: int, attributes: int) -> int:
    """The length of a frame."""
    return HEAD + TENSOR * tensors + attributes
