"""Toy passes are registered; caches and reproducers of these tests are their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline import toys


@pytest.fixture(autouse=True)
def _own_folders(_compiled_kernels: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTGRAPH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACTGRAPH_REPRODUCERS", str(tmp_path / "reproducers"))


@pytest.fixture(autouse=True)
def _toy_passes() -> Iterator[None]:
    with toys.registered():
        yield
