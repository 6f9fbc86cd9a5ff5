"""A dimension made a constant: the same numbers from a smaller graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.errors import InputError
from actgraph.formats.onnx_export import to_onnx
from actgraph.graph import Graph
from actgraph.graph.slots import slots_of, with_initial_slots
from actgraph.graph.specialise import dimensions, fixed_size, specialise
from tests import zoo


def variant(name: str, source: str) -> Graph:
    graph = zoo.captured(name)
    if source == "torch":
        return graph
    if source == "onnx":
        return to_onnx(graph)
    stock = ag.load(zoo.stock_onnx(name))
    stock.companions = graph.companions
    return stock


def mentions(graph: Graph, dim: str) -> list[str]:
    values = [*graph.inputs(), *(value for node in graph.nodes() for value in node.outputs)]
    return [v.name for v in values if any(isinstance(size, str) and dim in size for size in v.shape or ())]


@pytest.mark.parametrize("source", ["torch", "onnx", "stock"])
@pytest.mark.parametrize(("name", "size"), [("llama", 1), ("gpt2", 1), ("opt", 5), ("bert", 16)])
def test_the_special_graph_equals_the_general_one(name: str, size: int, source: str) -> None:
    graph = variant(name, source)
    before = graph.content_hash()
    fixed = specialise(graph, {"seq": size})
    fixed.verify()
    assert graph.content_hash() == before
    assert not mentions(fixed, "seq") and len(fixed.nodes()) < len(graph.nodes())
    inputs = ag.sample_inputs(fixed, batch=2)
    assert all(array.shape[1] == size for array in inputs.values())
    expected, found = graph.run(inputs), fixed.run(inputs)
    for label, array in expected.items():
        np.testing.assert_allclose(found[label], array, atol=1e-6)
    assert [site.name for site in fixed.sites()] == [site.name for site in graph.sites()]
    assert [node.origin for node in fixed.nodes() if node.origin.created_by] == []
    assert {p.name for p in graph.parameters() if p.name.endswith("weight")} <= {p.name for p in fixed.parameters()}


@pytest.mark.parametrize("source", ["torch", "onnx"])
def test_a_graph_with_a_cache_keeps_its_slots(source: str) -> None:
    cached = ag.run(variant("llama", source), "kv_cache{graphs=combined}").graph
    fixed = specialise(cached, {"seq": 1})
    fixed.verify()
    assert dimensions(cached) == ["batch", "seq", "past"] and dimensions(fixed) == ["batch", "past"]
    assert slots_of(fixed) == slots_of(cached)
    assert fixed.value("attention_mask").shape == ("batch", "past + 1")
    assert [(n, fixed.role(n)) for n, _ in fixed.outputs()] == [(n, cached.role(n)) for n, _ in cached.outputs()]
    assert fixed.history == cached.history
    pattern = fixed.site("blocks.0.attn.pattern")
    assert pattern.type.shape == ("batch", 4, 1, "past + 1")
    rng = np.random.default_rng(0)
    feed = {
        "input_ids": rng.integers(1, 96, (2, 1)),
        "position_ids": np.full((2, 1), 6),
        "attention_mask": np.ones((2, 7), int),
    }
    feed |= {slot.input: rng.normal(size=(2, 2, 6, 8)).astype(np.float32) for slot in slots_of(cached).values()}
    expected, found = cached.run(feed), fixed.run(feed)
    for label, array in expected.items():
        np.testing.assert_allclose(found[label], array, atol=1e-6)
    edited = ag.run(fixed, "tap{site=blocks.0.attn.pattern}", parity="none").graph
    assert edited.run(with_initial_slots(edited, feed))["blocks.0.attn.pattern"].shape == (2, 4, 1, 7)


def test_several_dimensions_at_once_and_files(tmp_path: Path) -> None:
    graph = zoo.captured("gpt2")
    fixed = specialise(graph, {"batch": 2, "seq": 4})
    assert dimensions(fixed) == []
    inputs = ag.sample_inputs(fixed)
    for suffix in (".pt2", ".onnx"):
        again = ag.load(fixed.save(tmp_path / f"fixed{suffix}"))
        assert again.inputs()[0].shape == (2, 4)
        np.testing.assert_allclose(again.run(inputs)["logits"], graph.run(inputs)["logits"], atol=1e-5)


def test_clear_errors() -> None:
    graph = zoo.captured("llama")
    with pytest.raises(InputError, match=r"no input of .* has the dimension 'length'") as caught:
        specialise(graph, {"length": 1})
    assert "batch, seq" in caught.value.hint
    for size in (0, -1, True, 1.5):
        with pytest.raises(InputError, match="the size of seq is"):
            specialise(graph, {"seq": size})  # type: ignore[dict-item]
    with pytest.raises(InputError, match=r"all its sizes are fixed|no input"):
        specialise(specialise(graph, {"seq": 1, "batch": 1}), {"seq": 2})


def test_sizes_that_do_not_divide() -> None:
    class Halves(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(x.shape[0], 2, x.shape[1] // 2).sum(1)

    graph = ag.trace(Halves(), (torch.zeros(2, 6),), dynamic={"x": (None, "seq")}, name="halves")
    assert specialise(graph, {"seq": 8}).outputs()[0][1].shape == (2, 4)
    with pytest.raises(InputError, match=r"seq.*7"):
        specialise(graph, {"seq": 7})
    assert fixed_size("2*seq + past", {"seq": 3}) == "past + 6"
    assert fixed_size("sequel", {"seq": 3}) == "sequel"
