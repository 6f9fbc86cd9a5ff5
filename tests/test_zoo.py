"""The cache of exported models follows what makes them."""

from __future__ import annotations

import pytest

from tests import zoo


def test_the_cache_key_follows_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = zoo._recipe_hash("llama")
    assert before == zoo._recipe_hash("llama")
    monkeypatch.setattr(zoo, "_seed", lambda name: 5)
    assert zoo._recipe_hash("llama") != before
