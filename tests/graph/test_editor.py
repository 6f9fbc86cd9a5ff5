"""The transaction around edits: what a rollback forgets."""

from __future__ import annotations

import numpy as np

from actgraph.graph.graph import Use
from tests.graph.toy import ToyGraph


def test_a_rollback_forgets_what_was_counted_and_said() -> None:
    graph = ToyGraph()
    x = graph.add_input("x")
    weight = graph.add_parameter("w", np.ones(4, np.float32))
    first = graph.add_node("toy.a", x, weight, name="a")
    graph.add_result("y", graph.add_node("toy.b", first, weight, name="b"))
    before = graph.content_hash()
    with graph.edit("test") as editor:
        node = graph.nodes()[0]
        editor.set_parameter(weight, np.zeros(4, np.float32), uses=[Use(node, 1)])
        assert editor.messages and editor.touched and editor.counts
        editor.rollback()
        assert not editor.messages and not editor.touched and not editor.counts
    assert graph.content_hash() == before
