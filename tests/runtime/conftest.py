"""Buffers begin small, so that every session of a test has to move into larger ones."""

from __future__ import annotations

import pytest

from actgraph.runtime import state


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "FIRST_ROOM", 16)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where the kernels' library was not built: what is tested are the engines' own results, to the bit."""
    monkeypatch.setenv("ACTGRAPH_LIBRARY", "")
