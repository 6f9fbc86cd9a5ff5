"""A plugin: kernels compiled ahead of time, with everything that they need, as one shared library for hosts without Python.

Each processor level is compiled in a process of its own, objects come from the same cache as those of this process, and the C
compiler links them with a table of what there is. The library needs the C library, and nothing else.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from actgraph.errors import InputError, UnsupportedError
from actgraph.runtime.kernels.numba.kernel import OpKernels
from actgraph.runtime.kernels.registry import all_kernels
from actgraph.runtime.native.c_tables import source
from actgraph.runtime.native.compile_objects import stages_of
from actgraph.runtime.native.levels import Level, chosen

_FOLDER = Path(__file__).parent
_SOURCES = ("plugin.c", "convert.c", "infer.c", "pool.c")
_EXPORTS = "{ global: RegisterCustomOps; ag_runs; local: *; };\n"

#: Ops whose kernels take what they decline in sessions: operands of element types that the library converts, and what is faster
#: without them.
TOTAL = frozenset(
    {
        "linear", "feed_forward", "attention", "shift", "channel_scale", "lowrank_map", "target_angle", "latent_edit",
        "quantize", "dequantize",
    }
)  # fmt: skip

#: Ops that are in a plugin only where they are asked for.
ASKED_FOR = {"dequantize": "onnxruntime runs products with its body faster than with its results; --op dequantize takes it"}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Plugin:
    """What was built: its file, the processor levels in it, the ops in it, and why others are not."""

    path: Path
    levels: tuple[str, ...]
    ops: tuple[str, ...]
    left_out: Mapping[str, str]


def why_left_out(kernels: OpKernels) -> str:
    """Why an op cannot be in a plugin; empty where it can.

    A host chooses by the op alone, and a registered op hides the body: its kernels must take every call.
    """
    if any(attribute.kind == "floats" for attribute in kernels.definition.attributes):
        return "its kernels are for some values of its lists only"
    if kernels.claims is not None and kernels.op not in TOTAL:
        return "its kernels take some of its calls only"
    return ""


def build(
    output: Path, cpu: str = "all", *, ops: Sequence[str] = (), only: Sequence[str] = (), progress: Progress | None = None
) -> Plugin:
    """Write the shared library ``output`` and say what is in it.

    cpu: see ``levels.chosen``. ops: the ops to take, by default all that can be in a plugin but
    those of ``ASKED_FOR``. only: names of stages; kernels
    without one of them are left out. progress: called with how many of how many functions are compiled. Raises InputError and
    UnsupportedError; then nothing is written.
    """
    if not sys.platform.startswith("linux"):
        raise UnsupportedError(f"plugins are not built on {sys.platform}", "build on Linux")
    compiler, levels = c_compiler(), chosen(cpu)
    known = all_kernels()
    for op in ops:
        if op not in known:
            raise InputError(f"no op {op!r} has kernels", f"give some of {', '.join(known)}")
        if why_left_out(known[op]):
            raise InputError(f"{op} cannot be in a plugin: {why_left_out(known[op])}", "it runs by its body")
    left_out = {} if ops else {op: why for op, each in known.items() if (why := why_left_out(each) or ASKED_FOR.get(op, ""))}
    taken = {op: each for op, each in known.items() if (op in ops if ops else op not in left_out)}
    if not output.parent.is_dir():
        raise InputError(f"there is no folder {output.parent}", "make it first")
    try:
        folder = tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.")
    except OSError as error:
        raise InputError(f"cannot write to the folder {output.parent}: {error.strerror or error}", "choose another") from error
    with folder as name:
        work = Path(name)
        _compile(levels, work, list(taken), only, len(_names(taken, only)), progress or (lambda done, total: None))
        (work / "tables.c").write_text(source(taken, levels, only), encoding="utf-8")
        (work / "exports").write_text(_EXPORTS, encoding="utf-8")
        _link(compiler, work)
        os.chmod(work / "plugin.so", 0o755 & ~_umask())
        os.replace(work / "plugin.so", output)
    return Plugin(output, tuple(level.name for level in levels), tuple(taken), left_out)


def _names(kernels: Mapping[str, OpKernels], only: Sequence[str]) -> set[str]:
    return {name for each in kernels.values() for name in stages_of(each, only)}


def c_compiler() -> list[str]:
    """The C compiler: what CC says, else cc, gcc or clang. Raises UnsupportedError where there is none."""
    given = shlex.split(os.environ.get("CC", ""))
    found = next((name for name in (given[:1] or ("cc", "gcc", "clang")) if shutil.which(name)), None)
    if found is None:
        what = f"the C compiler {given[0]} (CC) was not found" if given else "there is no C compiler"
        raise UnsupportedError(what, "install gcc or clang, or name one: CC=...")
    return [found, *given[1:]]


def _compile(levels: Sequence[Level], folder: Path, ops: Sequence[str], only: Sequence[str], each: int, said: Progress) -> None:
    """The objects of all levels, several levels at a time where there are processors for them."""
    lock, done = threading.Lock(), [0]

    def work(level: Level) -> None:
        arguments = [*(f"--only={name}" for name in only), str(folder), level.tag, *ops]
        with (folder / f"{level.tag}.log").open("w+", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "actgraph.runtime.native.compile_objects", *arguments],
                env=_environment(level), stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
            assert process.stdout is not None
            for _ in process.stdout:
                with lock:
                    done[0] += 1
                    said(done[0], each * len(levels))
            if process.wait():
                log.seek(0)
                why = next((line.strip() for line in reversed(log.readlines()) if line.strip()), "no reason was given")
                raise UnsupportedError(f"the kernels do not compile for {level.name}: {why}")

    with ThreadPoolExecutor(min(len(levels), os.cpu_count() or 1)) as pool:
        list(pool.map(work, levels))


def _environment(level: Level) -> dict[str, str]:
    """Numba's own settings change what it generates, so those of this process do not count."""
    package = find_spec(__name__.partition(".")[0])
    assert package is not None and package.origin is not None
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    paths = [str(Path(package.origin).parent.parent), *filter(None, [kept.get("PYTHONPATH")])]
    return {**kept, **level.environment, "PYTHONPATH": os.pathsep.join(paths)}


def _link(compiler: Sequence[str], work: Path) -> None:
    flags = ["-O2", "-std=gnu11", "-fPIC", "-fvisibility=hidden", "-DAG_ALONE", f"-I{_FOLDER}", "-shared", "-pthread", "-s"]
    linked = [f"-Wl,{flag}" for flag in ("-z,defs", "-z,nodelete", "-z,noexecstack", f"--version-script={work / 'exports'}")]
    files = [*(str(_FOLDER / name) for name in _SOURCES), str(work / "tables.c"), *map(str, sorted(work.glob("*.o")))]
    result = subprocess.run([*compiler, *flags, "-o", str(work / "plugin.so"), *files, *linked], capture_output=True, text=True)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "error" in line.lower()] or result.stderr.splitlines()
        raise UnsupportedError(f"{compiler[0]} cannot link the plugin: {lines[0] if lines else 'it gave no reason'}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
