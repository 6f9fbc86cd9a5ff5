"""The options at which a pass says that it is the identity: they are accepted, and it is."""

from __future__ import annotations

import numpy as np
import pytest

import actgraph as ag
from actgraph.graph import Graph
from actgraph.pipeline.registry import all_passes
from tests.passes.conftest import run

REST: dict[str, dict[str, object]] = {
    "clip": {"site": "blocks.0.mlp.hidden"},
    "steer": {"site": "blocks.0.resid_post", "vector": (1.0,) * 8},
}


def off_passes() -> list[str]:
    return sorted(name for name, cls in all_passes().items() if cls.off)


def test_they_are_the_known_ones() -> None:
    assert {"clip", "sparsify", "steer"} <= set(off_passes())


@pytest.mark.parametrize("name", off_passes())
def test_off_is_the_identity(tiny: Graph, name: str) -> None:
    cls = all_passes()[name]
    step = cls(**{**REST.get(name, {}), **cls.off})
    assert np.array_equal(run(tiny), run(ag.run(tiny, [step]).graph))
    assert np.array_equal(run(tiny), run(ag.run(tiny, str(step)).graph)), "as pipeline text, too"
