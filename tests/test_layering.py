"""Imports point one way, and importing actgraph is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: What a folder may import besides itself, ``actgraph.errors`` and third parties. ``runtime`` is imported by nobody but
#: ``actgraph/__init__`` and ``cli``: the others run graphs through ``graph/executor.py``.
ALLOWED = {
    "errors": set(),
    "ops": set(),
    "graph": {"ops"},
    "formats": {"graph", "ops"},
    "calibrate": {"formats", "graph", "ops"},
    "pipeline": {"calibrate", "formats", "graph", "ops"},
    "passes": {"pipeline", "calibrate", "formats", "graph", "ops"},
    "runtime": {"ops", "graph", "formats"},
    "__main__": {"cli"},
    "cli": {"ops", "graph", "formats", "calibrate", "pipeline", "passes", "runtime", "", "data"},
}

#: Upward imports inside functions that exist so that ``graph.save(...)`` can be a method: the face of ``Graph`` calls the
#: layer above when it is asked to, never at import time. (folder, what it may reach for in a function body.)
DEFERRED = {("graph", "formats")}


def sources() -> Iterator[tuple[str, Path]]:
    """Every Python file with its layer. The folders passes/ and runtime/ are read through their real path, once."""
    for path in sorted((ROOT / "actgraph").rglob("*.py")):
        parts = path.relative_to(ROOT / "actgraph").parts
        if parts[0] in ("passes", "runtime"):
            continue  # symbolic links to the folders below, which rglob may or may not follow
        yield (parts[0] if len(parts) > 1 else path.stem), path
    for folder in ("passes", "runtime"):
        assert (ROOT / "actgraph" / folder).resolve() == ROOT / folder, f"actgraph/{folder} must link to {folder}/"
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield folder, path


def imports(path: Path) -> Iterator[tuple[str, bool, int]]:
    """``(module, deferred, line)`` of every import of actgraph in a file, those under TYPE_CHECKING left out."""
    package = dotted(path).split(".")
    tree = ast.parse(path.read_text(encoding="utf-8"))

    def walk(node: ast.AST, deferred: bool) -> Iterator[tuple[str, bool, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, deferred, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                if child.level:
                    here = package if path.name == "__init__.py" else package[:-1]
                    base = ".".join([*here[: len(here) - child.level + 1], *([child.module] if child.module else [])])
                else:
                    base = child.module or ""
                yield base, deferred, child.lineno
                yield from ((f"{base}.{alias.name}", deferred, child.lineno) for alias in child.names)
            else:
                yield from walk(child, deferred or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    yield from ((m, d, line) for m, d, line in walk(tree, False) if m.split(".")[0] in ("actgraph", "passes", "runtime"))


def dotted(path: Path) -> str:
    relative = path.relative_to(ROOT)
    parts = relative.parts if relative.parts[0] == "actgraph" else ("actgraph", *relative.parts)
    parts = parts[:-1] if path.name == "__init__.py" else (*parts[:-1], path.stem)
    return ".".join(parts)


def wrong_imports(layer: str, path: Path) -> Iterator[str]:
    if layer == "__init__":
        return
    where = path.relative_to(ROOT)
    if layer not in ALLOWED:
        yield f"{where}: a new layer {layer!r}: say in tests/test_layering.py what it may import"
        return
    for module, deferred, line in imports(path):
        head, *rest = module.split(".")
        if head in ("passes", "runtime"):
            yield f"{where}:{line}: import actgraph.{head}, not {head}"
            continue
        target = rest[0] if rest else ""
        known = target in ALLOWED or target == ""
        if not known or target in (layer, "errors") or target in ALLOWED[layer]:
            continue
        if target == "" and any(m.startswith("actgraph.") for m, _, at in imports(path) if at == line):
            continue  # `from actgraph import x` is judged by the name x
        if deferred and (layer, target) in DEFERRED:
            continue
        yield f"{where}:{line}: {layer} imports {module}"


def test_imports_point_one_way() -> None:
    files = list(sources())
    assert {layer for layer, _ in files} >= {"ops", "graph", "passes", "runtime"}
    wrong = [problem for layer, path in files for problem in wrong_imports(layer, path)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("code", "caught"),
    [
        ("import actgraph.graph.graph", True),
        ("from actgraph.passes import steer", True),
        ("from actgraph import runtime", True),
        ("from ..graph import editor", True),
        ("def f():\n    import actgraph.formats", True),
        ("from passes import steer", True),
        ("from actgraph.errors import InputError\nfrom actgraph.ops import get_op\nimport numpy", False),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from actgraph.graph import Graph", False),
    ],
)
def test_the_scan_sees_what_it_should(code: str, caught: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The test above has power: each spelling of a wrong import is found in a file of ``ops``."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "actgraph" / "ops" / "new.py"
    path.parent.mkdir(parents=True)
    path.write_text(code, encoding="utf-8")
    assert bool(list(wrong_imports("ops", path))) is caught


HEAVY = ("torch", "onnxruntime", "numba", "transformers", "onnxscript", "scipy", "pandas", "matplotlib", "sklearn")


@pytest.mark.parametrize(
    "module", ["actgraph", "actgraph.graph", "actgraph.ops", "actgraph.ops.registry", "actgraph.pipeline", "actgraph.errors"]
)
def test_importing_is_cheap(module: str) -> None:
    """Heavy packages are imported where they are used. (The time is printed, not judged: machines differ.)"""
    code = (
        "import sys, time; start = time.perf_counter(); import " + module + "; "
        "print(round(time.perf_counter() - start, 3)); "
        f"print(*sorted(m for m in {HEAVY} if m in sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    seconds, *loaded = run.stdout.split("\n")
    print(f"import {module}: {seconds} s")
    assert loaded[0] == "", f"import {module} imports {loaded[0]}"


def test_all_op_definitions_are_cheap() -> None:
    """Listing the ops needs no engine either: references and bodies import torch when they run."""
    code = (
        "import sys; from actgraph.ops import all_ops; from actgraph.ops.reference_docs import ops_markdown; "
        "assert all_ops() and ops_markdown(); "
        "print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "False"
