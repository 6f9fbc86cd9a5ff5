"""The package installs and imports alike from a clone, an editable install, a wheel and an sdist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "onnxruntime", "onnx", "onnx_ir", "numba", "transformers", "sympy", "networkx")


def python(code: str, *, cwd: Path | str = "/", executable: str = sys.executable, path: str | None = None) -> str:
    """What ``code`` prints in a fresh interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = path
    result = subprocess.run([executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_is_cheap() -> None:
    """Neither the package nor the parts that users subclass import an engine."""
    code = (
        "import sys, actgraph, actgraph.graph, actgraph.ops.registry, actgraph.pipeline, actgraph.passes, actgraph.cli.app;"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    assert python(code, path=str(ROOT)) == "[]"


def test_links_are_relative() -> None:
    if (ROOT / ".git").exists():  # an sdist holds the folders themselves
        for name in ("passes", "runtime"):
            assert os.readlink(ROOT / "actgraph" / name) == f"../{name}"


def test_constraints_are_exact_and_cover_the_dependencies() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert pins["torch"] == "2.13.0"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["hf"] + project["optional-dependencies"]["dev"]
    canonical = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    for requirement in wanted:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        assert name is not None and re.sub(r"[-_.]+", "-", name.group()).lower() in canonical, requirement


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files under version control, as a fresh clone has them (or this tree itself when it is no checkout)."""
    target = tmp_path_factory.mktemp("clone") / "actgraph"
    if not (ROOT / ".git").exists():
        shutil.copytree(ROOT, target, symlinks=True, ignore=shutil.ignore_patterns(".venv", "build", "*.egg-info"))
        return target
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in files.split("\0"):
        source = ROOT / name
        if name and (source.is_symlink() or source.exists()):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name, follow_symlinks=False)
    return target


@pytest.fixture(scope="module")
def distributions(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist of the clone and the wheel built from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(out), str(clone)], check=True, capture_output=True)
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def environment(folder: Path, *install: str) -> str:
    """A virtual environment that sees this one's dependencies, with ``install`` installed; returns its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    executable = str(folder / "bin" / "python")
    site = Path(python("import sysconfig; print(sysconfig.get_path('purelib'))", executable=executable))
    # Dependencies only: a .pth file puts the folder at the end of the path, and actgraph itself is hidden by the install.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([executable, "-m", "pip", "install", "-q", "--no-deps", *install], check=True, capture_output=True)
    return executable


WHERE = (
    "import actgraph, actgraph.passes, actgraph.runtime, actgraph.passes.tap; "
    "print(actgraph.__file__, actgraph.passes.__file__)"
)
NO_TOP_LEVEL = "import importlib.util as u; print(u.find_spec('passes'), u.find_spec('runtime'))"


@pytest.mark.slow
def test_wheel_and_sdist_hold_everything(distributions: tuple[Path, Path], clone: Path) -> None:
    sdist, wheel = distributions
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
        assert not [member.name for member in archive if member.issym()]
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    modules = [
        path.relative_to(clone).as_posix() for top in ("actgraph", "passes", "runtime") for path in (clone / top).rglob("*.py")
    ]
    modules = [m if m.startswith("actgraph/") else f"actgraph/{m}" for m in modules]
    data = [p.relative_to(clone).as_posix() for p in (clone / "actgraph" / "data").rglob("*") if p.is_file()]
    assert any(name.endswith("model.safetensors") for name in data)
    sources = [f"actgraph/{p.relative_to(clone).as_posix()}" for p in (clone / "runtime" / "native").glob("*.[ch]")]
    assert {"actgraph/runtime/native/plugin.c", "actgraph/runtime/native/kernel.h"} <= set(sources)  # for build-plugin
    for name in [*modules, *data, *sources, "actgraph/py.typed"]:
        assert name in in_wheel, name
        assert name in in_sdist, name
    assert {name.partition("/")[0] for name in in_wheel} == {
        "actgraph",
        next(n for n in in_wheel if n.endswith("/METADATA")).split("/")[0],
    }


@pytest.mark.slow
def test_regular_install_from_wheel_and_clone(distributions: tuple[Path, Path], clone: Path, tmp_path: Path) -> None:
    for number, source in enumerate((distributions[1], clone)):
        executable = environment(tmp_path / str(number), str(source))
        for place in ("/", str(ROOT / "docs")):
            assert f"{tmp_path / str(number)}/lib" in python(WHERE, executable=executable, cwd=place)
            assert python(NO_TOP_LEVEL, executable=executable, cwd=place) == "None None"
        loaded = python(
            "import actgraph as ag; print(len(ag.load('stories260k').sites('blocks.*.resid_post')))", executable=executable
        )
        assert loaded.splitlines()[-1] == "5"
        command = subprocess.run([str(Path(executable).parent / "actgraph"), "--version"], capture_output=True, text=True)
        assert command.returncode == 0 and command.stdout.startswith("actgraph ")


@pytest.mark.slow
def test_editable_install(clone: Path, tmp_path: Path) -> None:
    executable = environment(tmp_path / "editable", "-e", str(clone))
    for place in ("/", str(clone)):
        assert (
            python(WHERE, executable=executable, cwd=place)
            == f"{clone}/actgraph/__init__.py {clone}/actgraph/passes/__init__.py"
        )
    assert python(NO_TOP_LEVEL, executable=executable, cwd="/") == "None None"
