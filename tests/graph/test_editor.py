"""The transaction around edits: what a rollback forgets."""

from __future__ import annotations

import numpy as np
import pytest

from actgraph.errors import SiteError
from actgraph.graph.graph import Use, Value
from actgraph.graph.sites import SiteTable, edge_anchor, value_anchor
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


def sited() -> tuple[ToyGraph, Value, Value]:
    """``y = b(a(x))`` with a site on ``a`` and one on its edge into ``b``."""
    graph = ToyGraph()
    first = graph.add_node("toy.a", graph.add_input("x"), name="a")
    second = graph.add_node("toy.b", first, name="b")
    graph.add_result("y", second)
    graph.site_table.add("here", value_anchor(first), "value")
    graph.site_table.add("there", edge_anchor([(second.producer, 0)]), "value")
    return graph, first, second


@pytest.mark.parametrize("change", ["move", "forget", "forget edge"])
def test_a_rollback_restores_sites_that_were_the_first_change(change: str) -> None:
    graph, first, second = sited()

    def edit() -> None:
        with graph.edit("test") as editor:
            if change == "move":
                editor.move_sites(first, second)
            elif change == "forget":
                editor.forget_sites(first, "test")
            else:
                editor.forget_edge(Use(second.producer, 0), "test")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        edit()
    assert graph.site("here").value.name == first.name
    assert [use.node.name for use in graph.site("there").uses(graph)] == ["b"]


def test_sites_change_where_nothing_fails() -> None:
    graph, first, second = sited()
    with graph.edit("test") as editor:
        editor.move_sites(first, second)
        editor.forget_edge(Use(second.producer, 0), "test")
    assert graph.site("here").value == second
    with pytest.raises(SiteError, match="there was removed by test"):
        graph.site("there")
    with graph.edit("test") as editor:
        editor.forget_sites(second, "again")
    with pytest.raises(SiteError, match="here was removed by again"):
        graph.site("here")


def test_a_rollback_forgets_what_was_to_be_erased() -> None:
    graph, first, _ = sited()
    graph.add_node("toy.dead", first, name="dead")
    with graph.edit("test") as editor:
        editor.erase_later()
        editor.rollback()
    assert "dead" in [node.name for node in graph.nodes()]


def test_an_error_while_erasing_at_the_end_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, first, second = sited()
    before = graph.content_hash()
    monkeypatch.setattr(SiteTable, "mark_removed", lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))

    def edit() -> None:
        with graph.edit("test") as editor:
            editor.erase_later()
            editor.redirect(second, first)  # nothing reads b now

    with pytest.raises(RuntimeError, match="stop"):
        edit()
    assert graph.content_hash() == before
    assert [node.name for node in graph.nodes()] == ["a", "b"]
