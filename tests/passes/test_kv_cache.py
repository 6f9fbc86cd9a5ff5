"""A cache inserted into decoders that have none: nothing changes but what a call has to compute."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.errors import OptionError, PassError
from actgraph.formats.onnx_export import to_onnx
from actgraph.graph import Graph
from actgraph.graph.executor import Runner, executor_for
from actgraph.graph.graph import Array
from actgraph.graph.slots import slots_of, with_initial_slots
from actgraph.ops.dtypes import DType
from actgraph.passes.cache.masks import recognise
from tests import zoo
from tests.graph import onnx_models
from tests.passes.conftest import apply

DECODERS = ("llama", "qwen3", "gemma3", "gpt2", "gpt_neox", "phi3", "opt", "mixtral_batched")
LENGTH, PADDED = 11, 4
VECTOR = "[" + ", ".join(repr(round(float(v), 4)) for v in np.random.default_rng(2).normal(0, 0.3, 64)) + "]"


def tokens(graph: Graph, seed: int = 0) -> Array:
    vocabulary = int(graph.companions.config["vocab_size"])
    return np.random.default_rng(seed).integers(1, vocabulary, (2, LENGTH))


@functools.lru_cache(maxsize=4)
def opened(graph: Graph) -> Runner:
    """A graph that is run in many ways is opened once. It must not be edited in place afterwards."""
    return executor_for(graph).open(graph)


def whole(graph: Graph, ids: Array, mask: Array) -> Array:
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    return opened(graph)({"input_ids": ids, "attention_mask": mask, "position_ids": positions})["logits"]


def stepwise(graph: Graph, ids: Array, mask: Array, steps: tuple[int, ...], garbage: float = 0.0) -> Array:
    """The logits of ``ids`` fed in steps; places of a fixed cache that hold nothing yet start as ``garbage``."""
    run = opened(graph)
    slots = slots_of(graph).values()
    state: dict[str, Array] = {}
    for slot in slots:
        shape = [len(ids) if axis == 0 else size if isinstance(size, int) else 0 for axis, size in enumerate(slot.shape)]
        state[slot.input] = np.full(shape, min(garbage, 127) if slot.dtype is DType.I8 else garbage, slot.dtype.numpy)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    parts, done = [], 0
    for count in steps:
        feed: dict[str, Any] = {"input_ids": ids[:, done : done + count], "position_ids": positions[:, done : done + count]}
        feed["attention_mask"] = mask[:, : done + count]
        if any(value.name == "cache_position" for value in graph.inputs()):
            feed["cache_position"] = np.asarray([done])
        results = run({**feed, **state})
        state = {slot.input: results[slot.output] for slot in slots}
        parts.append(results["logits"])
        done += count
    return np.concatenate(parts, axis=1)


def error(found: Array, expected: Array, mask: Array) -> float:
    valid = mask.astype(bool)
    assert (found.argmax(-1) == expected.argmax(-1))[valid].all()
    return float(np.abs(found - expected)[valid].max() / np.abs(expected[valid]).max())


def left_padded() -> Array:
    mask = np.ones((2, LENGTH), np.int64)
    mask[1, :PADDED] = 0
    return mask


SIZES = ("growing", "static max_length=32")
#: Every decoder from both sources and in both forms, in turn.
IN_TURN = [(name, source, SIZES[(n + other) % 2]) for n, name in enumerate(DECODERS)
           for other, source in enumerate(("torch", "stock"))]  # fmt: skip


@pytest.mark.parametrize(("name", "source", "form"), IN_TURN)
def test_prompt_and_steps_equal_one_forward(name: str, source: str, form: str) -> None:
    """Any chunking, with padding on the left, in torch and for the file that stock torch exports."""
    graph = zoo.captured(name) if source == "torch" else ag.load(zoo.stock_onnx(name))
    graph.companions = zoo.captured(name).companions
    cached = apply(graph, f"kv_cache{{graphs=combined form={form}}}")
    ids = tokens(graph)
    for mask in (np.ones((2, LENGTH), np.int64), left_padded()):
        expected = whole(graph, ids, mask)
        for steps in ((LENGTH,), (4, 5, 2), (1,) * LENGTH):
            assert error(stepwise(cached, ids, mask, steps), expected, mask) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma3"])
def test_garbage_beyond_the_valid_length_is_never_seen(name: str) -> None:
    graph = zoo.captured(name)
    cached, ids, mask = apply(graph, "kv_cache{graphs=combined form=static max_length=24}"), tokens(graph), left_padded()
    clean = stepwise(cached, ids, mask, (5, 3, 3))
    assert np.array_equal(clean, stepwise(cached, ids, mask, (5, 3, 3), garbage=3e4))


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_a_batch_of_different_lengths_equals_separate_runs(name: str) -> None:
    """Learned positions: a wrong position moves the logits."""
    graph = zoo.captured(name)
    cached, ids, mask = apply(graph, "kv_cache{graphs=combined}"), tokens(graph), left_padded()
    together = stepwise(cached, ids, mask, (6, 1, 1, 1, 1, 1))
    alone = stepwise(cached, ids[1:, PADDED:], mask[1:, PADDED:], (2, 1, 1, 1, 1, 1))
    assert np.abs(together[1, PADDED:] - alone[0]).max() < 1e-5 * np.abs(alone).max()


def test_the_cache_holds_key_heads_only() -> None:
    graph = zoo.captured("llama")  # 4 heads, 2 key heads of 8
    cached = apply(graph, "kv_cache{graphs=combined}")
    assert {slot.shape for slot in slots_of(cached).values()} == {("batch", 2, "past", 8)}
    session = ag.compile(cached).session(batch=3)
    session.feed(np.ones((3, 10), np.int64))
    assert session.bytes == 2 * 2 * 3 * 2 * 10 * 8 * 4  # layers, key and value, rows, key heads, tokens, head, float32
    names = [value.name for value in cached.inputs()]
    assert names[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert names[3:] == [f"past_key_values.{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert [n for n, _ in cached.outputs()] == ["logits", *(f"present.{i}.{p}" for i in range(2) for p in ("key", "value"))]
    assert cached.value("attention_mask").shape == ("batch", "past + seq")


def test_masks_are_recognised_by_value() -> None:
    graph = zoo.captured("gemma3")
    seen = {str(mask) for mask in recognise(graph, graph.views.attentions(), 64)}
    assert seen == {"causal, window 4, without padding", "causal, without padding"}


class Attends(torch.nn.Module):
    """One attention whose mask is made by ``rule`` from the positions of queries and keys."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rule = rule
        self.embed = torch.nn.Embedding(32, 8)
        self.q, self.k, self.v, self.o = (torch.nn.Linear(8, 8) for _ in range(4))
        self.head = torch.nn.Linear(8, 32)
        self.mix = torch.nn.Conv1d(8, 8, 2)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        if self.rule == "conv":  # a causal convolution over tokens, beside the attention
            x = x + self.mix(torch.nn.functional.pad(x.transpose(1, 2), (1, 0))).transpose(1, 2)
        if self.rule == "batch":
            x = x + x.mean(dim=0, keepdim=True)
        length = input_ids.shape[1]
        i, j = torch.arange(length)[:, None], torch.arange(length)[None]
        mask = {
            "chunk": (j <= i) & (i // 3 == j // 3), "window": (j <= i) & (i - j < 5), "ahead": j <= i + 1,
            "stripes": (j <= i) & ((i - j) % 2 == 0), "all": (j >= 0) & (i >= 0),
        }.get(self.rule, j <= i)  # fmt: skip
        q, k, v = (m(x).unflatten(-1, (2, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.head(x + self.o(y.transpose(1, 2).flatten(2)))


def attends(rule: str) -> Graph:
    ids = torch.arange(18).reshape(2, 9)
    return ag.trace(Attends(rule).eval(), (ids,), dynamic={"input_ids": ("batch", "seq")}, name=rule)


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize("rule", ["causal", "chunk", "window"])
def test_masks_that_count_positions(rule: str, dialect: str) -> None:
    graph = attends(rule) if dialect == "fx" else to_onnx(attends(rule))
    expected = {"causal": "causal", "chunk": "causal, chunks of 3", "window": "causal, window 5"}[rule]
    result = ag.run(graph, "kv_cache{graphs=combined}")
    assert [row["mask"] for row in result.report[0].details] == [expected]
    assert result.report[0].change is not None and result.report[0].change.relative < 1e-5


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ("ahead", "see later ones"),
        ("all", "see later ones"),
        ("stripes", "neither causal nor a window nor in chunks"),
        ("batch", "rows of a batch of batch influence each other"),
        ("conv", "with a cache the logits of conv move"),
    ],
)
def test_what_cannot_have_a_cache_is_refused(rule: str, why: str) -> None:
    graph = attends(rule)
    before = graph.content_hash()
    with pytest.raises(PassError, match=why):
        ag.run(graph, "kv_cache{graphs=combined}")
    assert graph.content_hash() == before


@pytest.mark.parametrize(
    ("name", "why"), [("bert", "language model|later ones"), ("t5", "encoder-decoder"), ("mamba", "no attention")]
)
def test_models_without_a_causal_attention_are_refused(name: str, why: str) -> None:
    with pytest.raises(PassError, match=why):
        ag.run(zoo.captured(name), "kv_cache{graphs=combined}")


def test_a_cache_is_inserted_once() -> None:
    cached = apply(attends("causal"), "kv_cache{graphs=combined}")
    with pytest.raises(PassError, match="has state already"):
        ag.run(cached, "kv_cache{graphs=combined form=static max_length=8}")
    with pytest.raises(PassError, match="names no limit"):
        ag.run(attends("causal"), "kv_cache{graphs=combined form=static}")


def test_a_length_is_for_caches_of_fixed_size() -> None:
    with pytest.raises(OptionError, match="max_length is for caches of fixed size") as caught:
        ag.run(zoo.captured("gpt2"), "kv_cache{max_length=32}")
    assert "form=static" in str(caught.value)


def test_a_pattern_that_is_read_stays_readable() -> None:
    graph = zoo.captured("stories260k")
    tapped = apply(graph, "tap{site=blocks.1.attn.pattern}")
    both = apply(tapped, "kv_cache{graphs=combined}")
    ids, mask = tokens(graph), np.ones((2, LENGTH), np.int64)
    feed = {"input_ids": ids, "attention_mask": mask, "position_ids": np.cumsum(mask, axis=1) - 1}
    expected = tapped.run(feed)
    empty = {slot.input: np.zeros((2, 4, 0, 8), np.float32) for slot in slots_of(both).values()}
    found = both.run({**feed, **empty})
    name = next(label for label in expected if label != "logits")
    np.testing.assert_allclose(found[name], expected[name], atol=1e-6)


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sites_and_views_are_what_they_were(name: str, dialect: str) -> None:
    """All but the masks that modules were given; a pattern can still be taken out of an attention."""
    graph = zoo.captured(name) if dialect == "fx" else zoo.exported(name)
    cached = apply(graph, "kv_cache{graphs=combined}")
    before, after = ({site.name for site in g.sites()} for g in (graph, cached))
    assert after <= before and all(re.fullmatch(r"(model|transformer)(\..*)?:in\[\d\]", site) for site in before - after)
    assert len(cached.views.blocks()) == len(graph.views.blocks())
    for old, new in zip(graph.views.attentions(), cached.views.attentions(), strict=True):
        assert (new.heads, new.kv_heads, new.scale) == (old.heads, old.kv_heads, old.scale)
        assert [v.name for v in (new.q, new.k, new.v) if v] == [v.name for v in (old.q, old.k, old.v) if v]
    tapped, reference = (apply(g, "tap{site=blocks.1.attn.pattern}") for g in (cached, graph))
    ids, mask = tokens(graph), np.ones((2, LENGTH), np.int64)
    feed = {"input_ids": ids, "attention_mask": mask, "position_ids": np.cumsum(mask, axis=1) - 1}
    expected = reference.run(feed)
    found = tapped.run(with_initial_slots(tapped, feed))
    label = next(label for label, _ in reference.outputs() if label != "logits")
    np.testing.assert_allclose(found[label], expected[label], atol=1e-6)


@pytest.mark.parametrize(
    "before",
    [
        f"steer{{vector={VECTOR} site=blocks.2.resid_post fold=false}}",
        "sparsify{threshold=0.05}",
        "quantize{weights=int8}",
        "prune{ratio=0.25 importance=magnitude}",
    ],
)
@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_after_other_passes(before: str, dialect: str) -> None:
    graph = zoo.captured("stories260k")
    edited = apply(graph if dialect == "fx" else to_onnx(graph), before)
    cached = apply(edited, "kv_cache{graphs=combined}")
    ids, mask = tokens(graph), left_padded()
    assert error(stepwise(cached, ids, mask, (5, 1, 4, 1)), whole(edited, ids, mask), mask) < 1e-4


@pytest.mark.parametrize("form", ["growing", "static max_length=32"])
def test_files_keep_their_state(form: str, tmp_path: Path) -> None:
    """Through .pt2 and ONNX, functions kept and inlined: the slots, the hash and the numbers."""
    graph = zoo.captured("gpt2")
    cached, ids, mask = apply(graph, f"kv_cache{{graphs=combined form={form}}}"), tokens(graph), left_padded()
    expected = whole(graph, ids, mask)
    again = ag.load(cached.save(tmp_path / "cached.pt2"))
    assert again.content_hash() == cached.content_hash() and slots_of(again) == slots_of(cached)
    for inline in ("none", "all"):
        loaded = ag.load(cached.save(tmp_path / f"{inline}.onnx", inline=inline))
        assert slots_of(loaded) == slots_of(cached)
        assert error(stepwise(loaded, ids, mask, (4, 5, 1, 1)), expected, mask) < 1e-5


def test_a_model_without_input_ids_is_no_decoder() -> None:
    with pytest.raises(ag.ActgraphError, match="no language model"):
        ag.run(onnx_models.mlp(), "kv_cache{graphs=combined}")


@pytest.mark.parametrize("places", [2, 4])
def test_a_cache_of_few_places_is_compared_on_as_many_tokens(places: int) -> None:
    """What watches passes runs the graph before and after on one set of inputs, which must fit the cache."""
    graph = zoo.captured("llama")
    result = ag.run(graph, f"kv_cache{{form=static max_length={places} graphs=combined}}, dce", parity="each", reproducer=False)
    assert f"input_ids [2, {places}]" in result.report.parity and result.report[0].change is not None
    assert ag.sample_inputs(result.graph)["input_ids"].shape == (2, places)
