"""Shared fixtures. Goldens live in tests/golden and are rewritten with ``pytest --update-golden``."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest

for _variable in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
    os.environ.setdefault(_variable, "1" if _variable == "OMP_NUM_THREADS" else "false")

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files with what the tests see now")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the variants of ``tests/variants.py`` slow, before tests are chosen by marks."""
    from tests.variants import SLOW

    seen: dict[str, set[str]] = {}
    for item in items:
        test, _, variant = item.nodeid.partition("[")
        seen.setdefault(test, set()).add(variant.removesuffix("]"))
        if variant.removesuffix("]") in SLOW.get(test, ()):
            item.add_marker(pytest.mark.slow)
    for test, variants in seen.items() if not any("::" in argument for argument in config.args) else ():
        gone = set(SLOW.get(test, ())) - variants
        if gone:
            raise pytest.UsageError(f"tests/variants.py names variants of {test} that are no more: {sorted(gone)}")


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    """Small models on shared cores: one thread is fastest and makes sums reproducible."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _few_collections() -> None:
    """What is imported is never garbage, and graphs that tests share hardly ever: full collections walked over all of it
    again and again, which took a tenth of the time of the suite."""
    import onnx_ir  # noqa: F401
    import onnxruntime  # noqa: F401
    import torch.export  # noqa: F401

    gc.collect()
    gc.freeze()
    gc.set_threshold(1000, 10, 1000)


@pytest.fixture(autouse=True)
def _one_thread_in_onnxruntime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of sessions wait for work by spinning, on cores that other tests need. Tests of the runtime keep them."""
    if "runtime" in request.path.parts:
        return
    from actgraph.runtime import ort_engine, threads

    monkeypatch.setattr(ort_engine, "wanted_threads", lambda: threads.wanted_threads() or 1)


@pytest.fixture(scope="session")
def _compiled_kernels() -> None:
    """Kernels are compiled into the usual cache, which is chosen once in a process: not into the folder of a test that has a
    cache of its own, where every kernel would be compiled again."""
    from actgraph.runtime.kernels.numba import objects

    objects._folder()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)``: ``text`` equals the file ``tests/golden/<name>.txt`` (or becomes it, with --update-golden)."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        text = text if text.endswith("\n") else text + "\n"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        assert path.is_file(), f"no golden {path.name}: run pytest --update-golden and read the diff"
        assert text == path.read_text(encoding="utf-8")

    return check


@pytest.fixture(scope="session")
def stories() -> Callable[[], object]:
    """``stories()`` gives a fresh clone of the packaged model's graph."""
    from tests import zoo

    return lambda: zoo.captured("stories260k")
