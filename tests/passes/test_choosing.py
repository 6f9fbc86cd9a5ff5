"""Which operators a selector chooses: every operand of an edge, patterns to ignore, and selectors that name nothing."""

from __future__ import annotations

import pytest

from actgraph.errors import PassError, SiteError
from actgraph.graph import Graph, SiteKind
from actgraph.passes.linears import Places, edge_name
from tests.passes.conftest import apply, relative, run


def gates(graph: Graph) -> int:
    return sum(node.op == "actgraph.gate" for node in graph.nodes())


def test_an_edge_of_several_operands_chooses_all_its_readers(stories: Graph) -> None:
    """What a feed-forward reads is read by its gate and its up projection."""
    site = "model.layers.1.mlp:in"
    assert len(stories.site(site).anchor.edges) == 2
    assert gates(apply(stories, f"sparsify{{threshold=0.1 site='{site}'}}")) == 2
    assert gates(apply(stories, f"sparsify{{threshold=0.1 ignore='{site}'}}")) == 5 * 7 - 2
    packed = apply(stories, f"quantize{{weights=int8 site='{site}'}}")
    assert sum(node.op == "actgraph.dequantize" for node in packed.nodes()) == 2


def test_an_operator_is_named_by_its_own_edge(stories: Graph) -> None:
    """Not by an edge that holds operands of others, too: a statistic or a report would speak of the wrong place."""
    for linear in stories.views.linears():
        site = stories.site(edge_name(stories, linear))
        assert site.kind is SiteKind.EDGE and site.anchor.edges == ((linear.input.node, linear.input.index),)


def test_patterns_to_ignore_may_match_nothing_but_names_may_not(stories: Graph) -> None:
    assert gates(apply(stories, "sparsify{threshold=0.1 ignore='*.no_such_module'}")) == 5 * 7
    for step in (
        "sparsify{threshold=0.1 ignore=logitz}",
        "quantize{weights=int8 ignore=logitz}",
        "prune{ratio=0.5 ignore=logitz}",
    ):
        with pytest.raises(SiteError, match="logitz"):
            apply(stories, step)


def test_ignored_places_include_the_edges_of_what_a_pattern_names(stories: Graph) -> None:
    places = Places.ignored(stories, "model.layers.0.mlp.*_proj")
    covered = [linear for linear in stories.views.linears() if places.covers_input(linear)]
    assert len(covered) == 3 and not Places.ignored(stories, ()).edges


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("quantize{weights=int8 site=['linear.1', 'blocks.0.attn.norm']}", "'blocks.0.attn.norm' names no linear"),
        ("prune{ratio=0.5 site=['blocks.0.mlp.hidden', 'blocks.0.attn.out']}", "'blocks.0.attn.out' names no feed-forward"),
        ("sparsify{threshold=0.1 site=['blocks.0.mlp.hidden', logits]}", "'logits' names no input of a linear"),
        ("sparsify{method=cats threshold=0.1 site=['blocks.0.mlp.act', 'blocks.0.mlp.norm']}", "names no gated activation"),
    ],
)
def test_a_selector_that_names_nothing_the_pass_acts_on_is_an_error(stories: Graph, step: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        apply(stories, step)


def test_a_dynamic_quantizer_cannot_be_pruned_through(stories: Graph) -> None:
    """Its scale is taken over all neurons together."""
    with pytest.raises(PassError, match=r"actgraph.fake_quant reads"):
        apply(stories, "quantize{weights=none activations=dynamic site='*.down_proj'}, prune{ratio=0.5 importance=magnitude}")


def test_a_static_quantizer_can_be_pruned_through(stories: Graph) -> None:
    quantized = apply(stories, "quantize{weights=none activations=static site='*.down_proj'}")
    removed, masked = (apply(quantized, f"prune{{ratio=0.5 importance=magnitude mode={m}}}") for m in ("remove", "mask"))
    assert relative(run(masked), run(removed)) < 1e-4
    assert relative(run(quantized), run(removed)) > 1e-3
