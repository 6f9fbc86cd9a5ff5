"""Buffers begin small, so that every session of a test has to move into larger ones."""

from __future__ import annotations

import pytest

from actgraph.runtime import state


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "FIRST_ROOM", 16)
