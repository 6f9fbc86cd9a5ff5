"""Kernels as object code: compiled once for a processor, kept in a cache, loaded into the process or linked into a library.

What numba makes of a function is taken as LLVM code, stripped of everything that belongs to Python, and given a plain C face
``int64_t name(int64_t frame, int64_t part, int64_t nparts)``. The object refers to nothing outside itself. The cache is keyed
by the sources of this folder, the layout of frames, the versions of the compilers, and the processor.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
from numba import types

from actgraph.errors import UnsupportedError
from actgraph.runtime.kernels.numba.target import target
from actgraph.runtime.native.library import HEAD, MOST_TENSORS, RANK, TENSOR

Function = Callable[..., Any]  # a numba dispatcher
_ARGUMENTS = (types.intp, types.intp, types.intp)

_FACE = """
define i64 @{name}(i64 %frame, i64 %part, i64 %nparts) {{
  %result = alloca i64
  %error = alloca ptr
  store i64 0, ptr %result
  store ptr null, ptr %error
  %status = call i32 @{native}(ptr %result, ptr %error, i64 %frame, i64 %part, i64 %nparts)
  %value = load i64, ptr %result
  ret i64 %value
}}
"""


def compiled(name: str, function: Function) -> bytes:
    """The object code of a kernel function, whose symbol is ``name``. Raises UnsupportedError when it needs Python."""
    file = _folder() / f"{name}.o"
    with contextlib.suppress(OSError):
        return file.read_bytes()
    code = _compile(name, function)
    with contextlib.suppress(OSError):  # a cache that cannot be written is no cache
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, staged = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        with os.fdopen(handle, "wb") as stream:
            stream.write(code)
        os.replace(staged, file)
    return code


def _compile(name: str, function: Function) -> bytes:
    function.compile(_ARGUMENTS)  # type: ignore[attr-defined]
    native = function.overloads[_ARGUMENTS].fndesc.llvm_func_name  # type: ignore[attr-defined]
    module = llvm.parse_assembly(function.inspect_llvm(_ARGUMENTS))  # type: ignore[attr-defined]
    for symbol in (*module.functions, *module.global_variables):
        if not symbol.is_declaration and not symbol.name.startswith("llvm."):
            symbol.linkage = "internal"
    text = str(module) + _FACE.format(name=name, native=f'"{native}"')
    module = llvm.parse_assembly(text)
    machine = _machine()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(module, passes)
    outside = [f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")]
    if outside:
        raise UnsupportedError(f"kernel {name} calls {', '.join(outside)}, which is not part of it")
    return bytes(machine.emit_object(module))


@functools.cache
def _machine() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    chosen = target()
    triple = llvm.Target.from_triple(llvm.get_process_triple())
    return triple.create_target_machine(cpu=chosen.name, features=chosen.text, opt=3, reloc="pic", codemodel="small")


@functools.cache
def _folder() -> Path:
    """Where objects of these sources for this processor are kept."""
    key = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        key.update(source.read_bytes())
    layout = HEAD, TENSOR, RANK, MOST_TENSORS  # of frames: it stands in the code
    key.update(repr((numba.__version__, llvmlite.__version__, sys.platform, target().name, target().text, layout)).encode())
    return cache_folder() / "kernels" / key.hexdigest()[:24]


def cache_folder() -> Path:
    """ACTGRAPH_CACHE, or the folder for caches of this user."""
    given = os.environ.get("ACTGRAPH_CACHE")
    if given:
        return Path(given)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "actgraph"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "actgraph"


_LOADED: dict[str, tuple[int, Any]] = {}
_LOADING = threading.Lock()


def loaded(name: str, function: Function) -> int:
    """The address of a kernel function in this process. It stays loaded."""
    if name not in _LOADED:
        with _LOADING:  # sessions in several threads take their first steps at once, and a name can be linked once only
            if name not in _LOADED:
                builder = llvm.JITLibraryBuilder().add_object_img(compiled(name, function)).export_symbol(name)
                library = builder.link(_jit(), name)
                _LOADED[name] = (library[name], library)
    return _LOADED[name][0]


@functools.cache
def _jit() -> Any:
    return llvm.create_lljit_compiler(_machine_for_process())


def _machine_for_process() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(reloc="pic")
