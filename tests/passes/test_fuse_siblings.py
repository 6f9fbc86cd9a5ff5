"""Gated linears of the same x as one: equal numbers, and what is left apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from actgraph.graph import Graph
from actgraph.graph.fusion import Fused, fuse
from actgraph.graph.graph import Node
from tests import zoo
from tests.passes.conftest import apply, relative, run

GATE = "sparsify{threshold=0.2}"


def linears(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes() if node.op == "actgraph.linear" and node.attributes.get("layout") == "in_out"]


def merged(graph: Graph) -> tuple[Graph, Graph, Fused]:
    apart, together = graph.clone(), graph.clone()
    fuse(apart, norms=False, rotary=False, feed_forwards=False)
    return apart, together, fuse(together, norms=False, rotary=False, feed_forwards=False, siblings=True)


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize("weights", ["", ", quantize{weights=int8}", ", quantize{weights=int4 group_size=8}"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_siblings_are_one(name: str, weights: str, dialect: str) -> None:
    """Queries, keys and values, and gates with their ups; OPT's have biases."""
    graph = apply(zoo.captured(name) if dialect == "fx" else zoo.exported(name), GATE + weights)
    apart, together, found = merged(graph)
    assert found.counts["siblings"] == (4 if name == "llama" else 2)
    assert len(linears(apart)) - len(linears(together)) == (6 if name == "llama" else 4)
    inputs = zoo.inputs(name)
    assert relative(run(apart, inputs), run(together, inputs)) < 1e-5
    for site in ("blocks.0.attn.q", "blocks.1.attn.v"):
        assert together.sites(site), f"{site} is still a place"
    assert set(together.site_table.all_names()) == set(apart.site_table.all_names())


def test_one_scale_for_all_and_biases_of_some() -> None:
    """A scale of a whole weight is repeated, and a missing bias is zeros."""
    graph = apply(zoo.captured("llama"), f"{GATE}, quantize{{weights=int8}}")
    fuse(graph, norms=False, rotary=False, feed_forwards=False)
    nodes = [node for node in linears(graph) if node.output.shape is not None]
    first, second = nodes[0], next(node for node in nodes[1:] if node.operands[0] == nodes[0].operands[0])
    with graph.edit(by="test") as editor:
        editor.set_operand(first, 2, _array(0.01))
        bias = np.arange(second.output.shape[-1], dtype=np.float32)  # type: ignore[index, arg-type]
        operands = [*second.operands, *[None] * (8 - len(second.operands))]
        biased = editor.insert(second.op, [*operands[:4], bias, *operands[5:]], second.attributes, after=second)
        editor.redirect(second.output, biased.output)
        editor.erase_dead()
    inputs = zoo.inputs("llama")
    apart = run(graph, inputs)
    assert fuse(graph, norms=False, rotary=False, feed_forwards=False, siblings=True).counts["siblings"] == 4
    assert relative(apart, run(graph, inputs)) < 1e-5


def test_what_stays_apart() -> None:
    """Other gates, and linears that are not gated."""
    gates = (f"sparsify{{threshold={t} site=model.layers.0.self_attn.{name}_proj:in}}" for name, t in (("q", 0.2), ("k", 0.3)))
    graph = apply(zoo.captured("llama"), ", ".join(gates))
    _, together, found = merged(graph)
    assert found.counts["siblings"] == 0
    assert len(linears(together)) == 2
    _, _, dense = merged(apply(zoo.captured("llama"), "quantize{weights=int8}"))
    assert dense.counts["siblings"] == 0


def _array(*numbers: float) -> np.ndarray[Any, Any]:
    return np.array(numbers, np.float32)
