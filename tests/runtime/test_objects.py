"""Object code of kernels in the process."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from actgraph.runtime.kernels.numba import objects
from actgraph.runtime.kernels.numba.plain import PLAIN


def test_threads_that_need_a_kernel_at_once_load_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    code = objects.compiled("plain_add", PLAIN["add"])
    fresh = objects.llvm.create_lljit_compiler(objects._machine_for_process())
    monkeypatch.setattr(objects, "_LOADED", {})
    monkeypatch.setattr(objects, "_jit", lambda: fresh)

    def slowly(name: str, function: Any) -> bytes:
        time.sleep(0.1)
        return code

    monkeypatch.setattr(objects, "compiled", slowly)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: objects.loaded("plain_add", PLAIN["add"]), range(4)))
    assert len(set(found)) == 1 and found[0]
