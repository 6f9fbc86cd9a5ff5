"""Documentation is true: its code runs, its links lead somewhere, and the reference pages are those of the source."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
_FENCE = re.compile(r"^```(\w*)[ ]?([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: language, target file (for blocks that are files) and text."""

    language: str
    file: str
    text: str


def blocks(page: str) -> list[Block]:
    found = []
    for language, info, text in _FENCE.findall((ROOT / page).read_text(encoding="utf-8")):
        found.append(Block(language, info.removeprefix("file=") if info.startswith("file=") else "", text))
    return found


def surroundings(folder: Path, repository: Path) -> dict[str, str]:
    """An environment in which ``actgraph`` and ``python`` are this interpreter with the package of ``repository``."""
    tools = folder / "tools"
    tools.mkdir()
    for name, module in (("actgraph", "-m actgraph"), ("python", "")):
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        (tools / name).chmod(0o755)
    return {**os.environ, "PYTHONPATH": str(repository), "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}


def execute(page: str, cwd: Path, environment: dict[str, str]) -> None:
    """Run the blocks of a page in order: consecutive Python blocks in one interpreter, files written, commands run."""
    python: list[str] = []

    def flush() -> None:
        if python:
            run([sys.executable, "-c", "\n".join(python)], page, cwd, environment)
            python.clear()

    for block in blocks(page):
        if block.language == "python" and not block.file:
            python.append(block.text)
            continue
        if block.file:
            flush()
            (cwd / block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "bash":
            flush()
            run(["bash", "-euo", "pipefail", "-c", block.text], page, cwd, environment)
    flush()


def run(command: list[str], page: str, cwd: Path, environment: dict[str, str]) -> None:
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{page}: {command[-1]}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"


RUN = ["README.md", *(page for page in PAGES if page.startswith("docs/"))]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_code_of_a_page_runs(page: str, tmp_path: Path) -> None:
    execute(page, tmp_path, surroundings(tmp_path, ROOT))


@pytest.mark.slow
def test_walk_throughs_of_contributing_run(tmp_path: Path) -> None:
    """In a copy of the repository, because they add files to it."""
    copy = tmp_path / "repository"
    skipped = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=skipped)
    execute("CONTRIBUTING.md", copy, surroundings(tmp_path, copy))
    assert (copy / "passes" / "sparsify" / "shrink.py").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name: str, tmp_path: Path) -> None:
    run([sys.executable, str(ROOT / "examples" / name)], name, tmp_path, surroundings(tmp_path, ROOT))


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = _FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target


def test_reference_pages_are_up_to_date() -> None:
    from actgraph.cli.reference import PAGES as generated

    for name, page in generated.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == page(), f"docs/{name} is old: run `make reference`"


def test_the_readme_begins_with_the_two_commands() -> None:
    first = blocks("README.md")[0].text
    assert [line.split("#")[0].strip() for line in first.splitlines()] == ["make demo", "make test"]


def test_the_pictures_of_the_readme_are_what_is_printed(tmp_path: Path) -> None:
    """The first block as the embedded model is printed, the second after the pipeline that the text names."""
    import numpy as np

    import actgraph as ag
    from tests import zoo

    def lines(text: str) -> list[str]:
        return [" ".join(line.split()) for line in text.splitlines()]

    before, after = (block.text for block in blocks("README.md") if block.language == "text")
    graph = zoo.captured("stories260k")
    ag.SteeringVector({"": np.ones(64, np.float32)}).save(tmp_path / "happy.safetensors")
    named = re.search(r"and after `(.*?)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert named is not None
    out = ag.run(graph, named.group(1).replace("happy.safetensors", str(tmp_path / "happy.safetensors")), parity="none")
    for text, picture in ((graph.text(), before), (out.graph.text(), after)):
        printed = lines(text)
        start = printed.index(lines(picture)[0])
        assert printed[start : start + len(lines(picture))] == lines(picture)
