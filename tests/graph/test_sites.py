"""The site table: names follow edits, spellings resolve, errors help. On a toy container; real models in test_architectures."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actgraph.errors import SiteError
from actgraph.graph.sites import SiteKind, SiteTable, edge_anchor, value_anchor, virtual_anchor
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import TensorType
from tests.graph.toy import ToyGraph


@pytest.fixture
def graph() -> ToyGraph:
    """x -> a -> b -> (c, d) -> e, with hand-made sites."""
    g = ToyGraph()
    x = g.add_input("x")
    w = g.add_parameter("w", np.ones(4, np.float32))
    a = g.add_node("toy.a", x, w, name="a")
    b = g.add_node("toy.b", a, name="b")
    c = g.add_node("toy.c", b, name="c")
    d = g.add_node("toy.d", b, name="d")
    e = g.add_node("toy.e", c, d, name="e")
    g.add_result("logits", e)
    table = SiteTable()
    table.add("embed", value_anchor(a), "embed", ["blocks.0.resid_pre", "linear.0"], ["embed", "blocks.0.resid_pre"])
    nodes = {n.name: n for n in g.nodes()}
    table.add("blocks.0.resid_post", value_anchor(b), "resid_post", ["blocks.1.resid_pre", "linear.1", "model.layers.0"],
              ["blocks.0.resid_post", "blocks.1.resid_pre"])  # fmt: skip
    table.add("linear.2:in", edge_anchor([(nodes["c"], 0)]), "linear", ["model.layers.1.c:in"])
    table.add("norm.0:in", edge_anchor([(nodes["c"], 0), (nodes["d"], 0)]), "norm")
    pattern = TensorType(DType.F32, ("batch", 2, "seq", "seq"))
    table.add(
        "blocks.1.attn.pattern",
        virtual_anchor(nodes["d"], "attention_pattern", pattern),
        "pattern",
        (),
        ["blocks.1.attn.pattern"],
    )
    table.add("blocks.1.resid_post", value_anchor(e), "resid_post", ["logits"], ["blocks.1.resid_post", "logits"])
    g._sites = table
    return g


def names(graph: ToyGraph, *selectors: str, ignore: tuple[str, ...] = ()) -> list[str]:
    return [site.name for site in graph.sites(list(selectors), ignore=ignore)]


def test_listing_is_canonical_and_in_order(graph: ToyGraph) -> None:
    assert [s.name for s in graph.sites()] == [
        "embed", "blocks.0.resid_post", "linear.2:in", "norm.0:in", "blocks.1.attn.pattern", "blocks.1.resid_post",
    ]  # fmt: skip
    assert [s.kind for s in graph.sites()][2:5] == [SiteKind.EDGE, SiteKind.EDGE, SiteKind.VIRTUAL]


def test_a_role_name_is_shown_as_it_was_asked_for(graph: ToyGraph) -> None:
    assert names(graph, "blocks.*.resid_pre") == ["blocks.0.resid_pre", "blocks.1.resid_pre"]
    assert names(graph, "blocks.1.resid_pre") == ["blocks.1.resid_pre"]
    assert names(graph, "linear.1") == ["blocks.0.resid_post"]
    assert names(graph, "model.layers.0") == ["blocks.0.resid_post"]
    site = graph.site("blocks.1.resid_pre")
    assert site.role == "resid_pre" and "blocks.0.resid_post" in site.aliases and "blocks.1.resid_pre" not in site.aliases


def test_one_place_is_listed_once(graph: ToyGraph) -> None:
    assert names(graph, "blocks.0.resid_post", "blocks.1.resid_pre", "linear.1") == ["blocks.0.resid_post"]
    assert names(graph, "blocks.*.resid_*") == ["blocks.0.resid_pre", "blocks.0.resid_post", "blocks.1.resid_post"]
    assert names(graph, "%b", "blocks.0.resid_post") == ["blocks.0.resid_post"]


def test_values_by_their_own_name(graph: ToyGraph) -> None:
    assert graph.site("%c").value.name == "c"
    assert {s.value.name for s in graph.sites("%{c,d}")} == {"c", "d"}
    assert len(graph.sites("%*")) == 7
    with pytest.raises(SiteError, match="no value is called"):
        graph.sites("%nothing")


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("blocks.0.hook_resid_post", "blocks.0.resid_post"),
        ("blocks.0.hook_out", "blocks.0.resid_post"),
        ("blocks.1.hook_resid_pre", "blocks.0.resid_post"),
        ("hook_embed", "embed"),
        ("lm_head", "blocks.1.resid_post"),
        ("layer=0,component=block_output", "blocks.0.resid_post"),
        ("layer=0, component=block_output", "blocks.0.resid_post"),
        ("blocks.{0..0}.hook_resid_post", "blocks.0.resid_post"),
    ],
)
def test_other_tools_spellings(graph: ToyGraph, spelling: str, name: str) -> None:
    assert names(graph, spelling) == [name]


def test_spellings_do_not_shadow_the_models_own_names(graph: ToyGraph) -> None:
    assert "model.layers.0" not in graph.site_table.spellings()


def test_no_match_names_the_nearest(graph: ToyGraph) -> None:
    with pytest.raises(SiteError) as error:
        graph.sites("blocks.0.resid_psot")
    assert "blocks.0.resid_post" in error.value.hint
    with pytest.raises(SiteError):
        graph.sites("blocks.7.*")


def test_ignore(graph: ToyGraph) -> None:
    assert names(graph, "blocks.*", ignore=("blocks.0.*",)) == ["blocks.1.attn.pattern", "blocks.1.resid_post"]
    # A pattern without a suffix leaves out the edges of what it names as well.
    assert names(graph, "*:in", ignore=("re:.*layers.1.c",)) == ["norm.0:in"]
    assert names(graph, "*:in", ignore=("linear.2",)) == ["norm.0:in"]
    assert names(graph, "blocks.0.resid_post", ignore=("re:.*nothing",)) == ["blocks.0.resid_post"]
    with pytest.raises(SiteError):  # a plain name that is not there is a typing error
        graph.sites("blocks.0.resid_post", ignore="nothing")
    with pytest.raises(SiteError, match="ignored"):
        graph.sites("blocks.0.resid_post", ignore="blocks.*")


def test_one_wants_exactly_one(graph: ToyGraph) -> None:
    with pytest.raises(SiteError, match="stands for 3 sites"):
        graph.site("blocks.*.resid_*")


def test_sites_follow_edits_in_pipeline_order(graph: ToyGraph) -> None:
    """A second edit at a site acts on what the first one made: b -> first -> second -> readers."""
    site = graph.site("blocks.0.resid_post")
    with graph.edit("first") as editor:
        editor.insert_at(site, "toy.first", name="first")
        editor.insert_at(site, "toy.second", name="second")
    nodes = {n.name: n for n in graph.nodes()}
    assert nodes["first"].operands[0].name == "b"
    assert nodes["second"].operands[0].name == "first"
    assert nodes["c"].operands[0].name == "second" and nodes["d"].operands[0].name == "second"
    assert graph.site("blocks.1.resid_pre").value.name == "second"
    assert graph.site("%b").value.name == "second"  # what the readers of b see now
    assert all(not s.name.startswith("%") for s in graph.sites())


def test_an_edge_is_one_operand(graph: ToyGraph) -> None:
    with graph.edit("gate") as editor:
        editor.insert_at(graph.site("model.layers.1.c:in"), "toy.gate", name="gate")
    nodes = {n.name: n for n in graph.nodes()}
    assert nodes["c"].operands[0].name == "gate" and nodes["d"].operands[0].name == "b"
    assert graph.site("blocks.0.resid_post").value.name == "b"
    with pytest.raises(SiteError, match="no longer see one value"):
        _ = graph.site("norm.0:in").value


def test_an_edge_of_several_operands_moves_them_all(graph: ToyGraph) -> None:
    with graph.edit("gate") as editor:
        editor.insert_at(graph.site("norm.0:in"), "toy.gate", name="gate")
    nodes = {n.name: n for n in graph.nodes()}
    assert nodes["c"].operands[0].name == nodes["d"].operands[0].name == "gate"


def test_removed_sites_name_the_pass(graph: ToyGraph) -> None:
    nodes = {n.name: n for n in graph.nodes()}
    before = graph.site("blocks.1.attn.pattern")
    with graph.edit("shrink") as editor:
        b = graph.value("b")
        editor.redirect(graph.value("d"), b)
        assert editor.erase_dead() == 1
    assert nodes["d"].name not in {n.name for n in graph.nodes()}
    for selector in ("blocks.1.attn.pattern", "blocks.1.attn.*", "blocks.1.attn.hook_pattern"):
        with pytest.raises(SiteError, match="removed by shrink"):
            graph.sites(selector)
    with pytest.raises(SiteError, match="removed by shrink"):
        graph.site_table.current(before)
    # The edge of two operands keeps the one that is left, and values that moved are still there.
    assert [u.node.name for u in graph.site("norm.0:in").uses(graph)] == ["c"]


def test_rollback_restores_names(graph: ToyGraph) -> None:
    with pytest.raises(RuntimeError), graph.edit("first") as editor:
        editor.insert_at(graph.site("blocks.0.resid_post"), "toy.first", name="first")
        raise RuntimeError
    assert graph.site("blocks.0.resid_post").value.name == "b"


def test_round_trip_through_data_and_clones(graph: ToyGraph) -> None:
    with graph.edit("first") as editor:
        editor.insert_at(graph.site("blocks.0.resid_post"), "toy.first", name="first")
    data = graph.site_table.to_dict()
    assert SiteTable.from_dict(graph, data).to_dict() == data
    copy = graph.clone()
    assert [repr(s) for s in copy.sites()] == [repr(s) for s in graph.sites()]
    assert copy.site("%b").value.name == "first" and copy.site("%b").value.graph is copy
    # Another container with other names, which lost a node.
    renamed = graph.clone()
    for node in renamed.body:
        node.name = node.outputs[0].name = f"v_{node.name}"
    mapping = {n.name: f"v_{n.name}" for n in graph.nodes()}
    other = graph.site_table.remap(renamed, mapping, {**mapping, "d": "lost"})
    renamed._sites = other
    assert renamed.site("blocks.0.resid_pre").value.name == "v_a"
    with pytest.raises(SiteError, match="another tool"):
        renamed.sites("blocks.1.attn.pattern")


def test_two_sites_cannot_share_a_name(graph: ToyGraph) -> None:
    with pytest.raises(ValueError, match=r"linear\.0"):
        graph.site_table.add("linear.0", value_anchor(graph.value("c")), "linear")


@given(st.lists(st.sampled_from(["value.a", "value.b", "edge.c:in", "edge.d:in", "pair:in"]), max_size=8), st.booleans())
def test_any_sequence_of_edits_composes(places: list[str], copy: bool) -> None:
    """A reader sees the edits at its value in the order they were made, then those at its own edge.

    An edit that reaches every reader of a value is an edit of the value, however its site is called.
    """
    g = ToyGraph()
    x = g.add_input("x")
    a = g.add_node("toy.a", x, name="a")
    b = g.add_node("toy.b", a, name="b")
    c = g.add_node("toy.c", b, name="c")
    d = g.add_node("toy.d", b, name="d")
    g.add_result("y", g.add_node("toy.e", c, d, name="e"))
    nodes = {n.name: n for n in g.nodes()}
    g._sites = SiteTable()
    for value in (a, b):
        g._sites.add(f"value.{value.name}", value_anchor(value), "value")
    for name in ("c", "d"):
        g._sites.add(f"edge.{name}:in", edge_anchor([(nodes[name], 0)]), "edge")
    g._sites.add("pair:in", edge_anchor([(nodes["c"], 0), (nodes["d"], 0)]), "pair")
    seen: dict[str, list[str]] = {"value.a": [], "value.b": [], "edge.c:in": [], "edge.d:in": []}
    for step, place in enumerate(places):
        apart = bool(seen["edge.c:in"] or seen["edge.d:in"])
        try:
            with g.edit(f"pass{step}") as editor:
                editor.insert_at(g.site(place), "toy.edit", name=f"edit{step}")
        except SiteError:
            assert place == "pair:in" and apart
            continue
        seen["value.b" if place == "pair:in" else place].append(f"edit{step}")
        if copy:
            g = g.clone()  # type: ignore[assignment]
    g.verify()

    def above(reader: str) -> tuple[list[str], str]:
        found: list[str] = []
        value = next(n for n in g.nodes() if n.name == reader).operands[0]
        while value is not None and value.producer is not None and value.name.startswith("edit"):
            found.insert(0, value.name)
            value = value.producer.operands[0]
        return found, value.name if value is not None else ""

    assert above("b") == (seen["value.a"], "a")
    assert above("c") == (seen["value.b"] + seen["edge.c:in"], "b")
    assert above("d") == (seen["value.b"] + seen["edge.d:in"], "b")
    assert above("a") == ([], "x")


def test_listing_ten_thousand_sites_is_fast() -> None:
    graph = ToyGraph()
    value = graph.add_input("x")
    table = SiteTable()
    for i in range(10_000):
        value = graph.add_node("toy.f", value, name=f"n{i}")
        table.add(f"blocks.{i}.resid_post", value_anchor(value), "resid_post", [f"linear.{i}"], [f"blocks.{i}.resid_post"])
    graph.add_result("y", value)
    graph._sites = table
    start = time.perf_counter()
    assert len(graph.sites()) == 10_000
    assert len(graph.sites("blocks.*.resid_post")) == 10_000
    assert len(graph.sites("blocks.{2..4}.resid_post")) == 3
    assert time.perf_counter() - start < 3  # tens of milliseconds on an idle machine


def test_an_edge_is_named_by_its_own_name_only(graph: ToyGraph) -> None:
    """``norm.0:in`` holds the operands of two nodes: it is the name of neither."""
    nodes = {node.name: node for node in graph.nodes()}
    assert graph.site_table.edge_name(nodes["c"], 0) == "linear.2:in"
    assert graph.site_table.edge_name(nodes["d"], 0) == ""


def test_forgetting_a_value_forgets_the_edges_that_read_it(graph: ToyGraph) -> None:
    table = graph.site_table
    table.forget(graph.value("b"), "ablate")
    assert {"blocks.0.resid_post", "linear.2:in", "model.layers.1.c:in", "norm.0:in"} <= set(table.removed)
    assert names(graph, "*") == ["embed", "blocks.1.attn.pattern", "blocks.1.resid_post"]
    with pytest.raises(SiteError, match=r"norm\.0:in was removed by ablate"):
        graph.site("norm.0:in")


def test_forgetting_an_edge_forgets_those_that_include_it(graph: ToyGraph) -> None:
    nodes = {node.name: node for node in graph.nodes()}
    graph.site_table.forget_edge(nodes["d"], 0, "ablate")
    assert "norm.0:in" in graph.site_table.removed and graph.site("linear.2:in").anchor.edges == ((nodes["c"], 0),)


def test_a_removed_name_is_not_read_as_a_foreign_spelling(graph: ToyGraph) -> None:
    """``blocks.0.hook_resid_post`` is a spelling of a site; where a site of that very name was removed, it is gone."""
    spelling = "blocks.0.hook_resid_post"
    assert graph.site(spelling).name == "blocks.0.resid_post"
    graph.site_table.removed[spelling] = "ablate"
    with pytest.raises(SiteError, match="removed by ablate"):
        graph.site(spelling)


def test_ignored_places(graph: ToyGraph) -> None:
    table = graph.site_table
    assert [anchor.edges for anchor in table.ignored(graph, "model.layers.1.*")] == [graph.site("linear.2:in").anchor.edges]
    assert table.ignored(graph, "no.such.*") == [] and table.ignored(graph, ()) == []
    with pytest.raises(SiteError, match=r"no\.such\.site"):
        table.ignored(graph, "no.such.site")


def test_a_table_read_back_spells_only_the_sites_it_found(graph: ToyGraph) -> None:
    data = graph.site_table.to_dict()
    row = next(row for row in data["sites"] if row["name"] == "blocks.0.resid_post")
    row["value"] = "a value that the other container does not have"
    table = SiteTable.from_dict(graph, data)
    assert not {"blocks.0.resid_post", "blocks.1.resid_pre"} & table.role_names
    graph._sites = table
    assert graph.site("blocks.0.hook_resid_pre").name == "embed"
    with pytest.raises(SiteError, match="removed by another tool"):
        graph.site("blocks.0.hook_resid_post")
