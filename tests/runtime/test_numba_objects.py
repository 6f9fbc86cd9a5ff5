"""Object code of kernels: loaded once by any number of threads, and for the processor that there is."""

from __future__ import annotations

import ctypes
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import llvmlite.binding as llvm
import pytest
from numba import njit

from actgraph.runtime.kernels.numba import objects, target
from actgraph.runtime.kernels.numba.memory import OPTIONS, f32s


@njit(**OPTIONS)
def doubled(frame: Any, part: Any, nparts: Any) -> Any:
    x = f32s(frame)
    for i in range(part):
        x[i] += x[i]
    return 5


def test_threads_load_a_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    code, asked = objects._compile("doubled_by_threads", doubled), []

    def slow(name: str, function: Any) -> bytes:
        asked.append(name)
        time.sleep(0.05)
        return code

    monkeypatch.setattr(objects, "compiled", slow)
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: objects.loaded("doubled_by_threads", doubled), range(4)))
    assert len(found) == 1 and asked == ["doubled_by_threads"]
    numbers = (ctypes.c_float * 20)(*range(20))
    function = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(found.pop())
    assert function(ctypes.addressof(numbers), 19, 1) == 5
    assert list(numbers) == [2 * i if i < 19 else i for i in range(20)]


@pytest.fixture
def forgetful() -> Any:
    """What is known of the processor is found out anew, before and after."""
    known = (target.target, objects._machine, objects._folder)
    for each in known:
        each.cache_clear()
    yield
    for each in known:
        each.cache_clear()


@pytest.mark.skipif("x86_64" not in llvm.get_process_triple(), reason="features of x86-64")
@pytest.mark.usefixtures("forgetful")
def test_what_a_virtual_machine_hides_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor whose name stands for AVX-512, and which does not show it: no instruction of its kind."""
    shown = dict.fromkeys(llvm.get_host_cpu_features(), False) | dict.fromkeys(("sse", "sse2", "cx8", "64bit"), True)
    shown |= {"avx512f": False, "avx512vl": False, "avx512bw": False, "avx": False, "avx2": False}
    monkeypatch.setattr(llvm, "get_host_cpu_name", lambda: "icelake-server")
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: shown)
    assert not target.target().vnni and "-avx512f" in target.target().text
    module = llvm.parse_assembly("""
        define void @add(ptr %a) {
          %v = load <16 x float>, ptr %a
          %s = fadd <16 x float> %v, %v
          store <16 x float> %s, ptr %a
          ret void
        }""")
    text = objects._machine().emit_assembly(module)
    assert "xmm" in text and "ymm" not in text and "zmm" not in text


@pytest.mark.usefixtures("forgetful")
def test_frames_of_another_layout_have_other_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = objects._folder()
    objects._folder.cache_clear()
    assert objects._folder() == folder
    objects._folder.cache_clear()
    monkeypatch.setattr(objects, "TENSOR", 13)
    assert objects._folder() != folder
