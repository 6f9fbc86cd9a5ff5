"""``actgraph build-plugin``: what it prints, and what it says of bad input."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Outcome

Cli = Callable[..., Outcome]


def test_help_shows_an_example(cli: Cli) -> None:
    shown = cli("build-plugin", "--help")
    assert shown.code == 0 and "Example:\n    actgraph build-plugin -o libactgraph.so" in shown.out
    assert "build-plugin" in cli("--help").out


def test_it_prints_the_file_and_says_what_is_in_it(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from actgraph.runtime.native import build as module

    asked: list[Any] = []

    def build(output: Path, cpu: str, *, ops: Any, progress: Any) -> module.Plugin:
        asked.append((output, cpu, list(ops)))
        progress(1, 2)
        return module.Plugin(output, ("x86-64-v3",), ("linear",), {"cat": "it is not total"})

    monkeypatch.setattr(module, "build", build)
    done = cli("build-plugin", "--cpu", "v3", "--op", "linear", "-o", tmp_path / "lib.so")
    assert (done.code, done.out) == (0, f"{tmp_path / 'lib.so'}\n") and asked == [(tmp_path / "lib.so", "v3", ["linear"])]
    assert done.err == "linear for x86-64-v3\nleft out: cat: it is not total; it runs by its body\n"
    assert cli("build-plugin", "-q", "-o", tmp_path / "lib.so").err == "" and asked[-1][1:] == ("all", [])


@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no C compiler")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "say where to write the library: -o libactgraph.so"),
        (["-o", "plugin.dll"], "cannot write plugin.dll"),
        (["-o", "none/lib.so"], "there is no folder none"),
        (["-o", "lib.so", "--cpu", "v9"], "there is no processor level 'v9'"),
        (["-o", "lib.so", "--op", "nothing"], "no op 'nothing' has kernels"),
    ],
)
def test_bad_input_is_one_line(
    cli: Cli, arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("build-plugin", *arguments)
    assert done.code == 2 and done.out == "" and said in done.err and done.err.count("\n") == 1
    assert not os.listdir(tmp_path)


def test_without_a_c_compiler(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    done = cli("build-plugin", "-o", tmp_path / "lib.so")
    assert done.code == 2 and done.err.startswith("error: the C compiler no-such-compiler (CC) was not found")
    assert not os.listdir(tmp_path)
