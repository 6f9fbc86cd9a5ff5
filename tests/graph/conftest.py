"""Fixtures that several tests of graphs share."""

from __future__ import annotations

import pytest

from actgraph.graph.fx import FxGraph
from tests.graph.fx_models import traced


@pytest.fixture
def small() -> FxGraph:
    return traced()
