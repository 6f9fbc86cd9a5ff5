"""Facades over interfaces of torch that are not public: one small module per supported release.

Everything else in actgraph uses public torch. A new release is supported by copying the newest file, adapting it, and
adding a line to ``_SUPPORTED``.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from actgraph.errors import UnsupportedError

_SUPPORTED = {"2.13": "actgraph.formats.compat.torch_2_13"}


@functools.cache
def torch_facade() -> ModuleType:
    """The facade for the installed torch. Raises UnsupportedError for a release without one."""
    import torch

    release = ".".join(torch.__version__.split(".")[:2])
    if release not in _SUPPORTED:
        raise UnsupportedError(
            f"torch {torch.__version__} is not supported for export to ONNX", f"install torch {', '.join(_SUPPORTED)}"
        )
    return importlib.import_module(_SUPPORTED[release])
