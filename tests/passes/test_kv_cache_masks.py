"""What the masks of decoders are is found out by their values, however a model writes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import actgraph as ag
from actgraph.errors import PassError
from actgraph.formats.onnx_export import to_onnx
from actgraph.graph import Graph
from actgraph.graph.graph import Array
from actgraph.passes.cache import masks
from actgraph.passes.cache.recurrence import unrolled_steps
from tests import zoo
from tests.passes.conftest import as_dialect, in_dialect
from tests.passes.test_kv_cache import error

LENGTH, PADDED = 11, 4
LOWEST = float(torch.finfo(torch.float32).min)


class Masked(torch.nn.Module):
    """One attention, whose mask mixes what is causal with padding as ``rule`` says. ``written``: scores are written out."""

    def __init__(self, rule: str, written: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.rule, self.written = rule, written
        self.embed = torch.nn.Embedding(64, 8)
        self.q, self.k, self.v, self.o = (torch.nn.Linear(8, 8) for _ in range(4))
        self.head = torch.nn.Linear(8, 64)

    def mask(self, attention_mask: torch.Tensor) -> torch.Tensor:
        length = attention_mask.shape[1]
        i, j = torch.arange(length)[:, None], torch.arange(length)[None]
        seen = (j <= i) & (i - j < 3) if self.rule == "window" else j <= i
        later = torch.where(seen, 0.0, LOWEST)[None, None]
        empty = attention_mask[:, None, None, :] == 0
        if self.rule in ("added", "window"):  # both hidden: -infinity
            return later + torch.where(empty, LOWEST, 0.0)
        if self.rule == "least":
            return torch.minimum(later, (1.0 - attention_mask[:, None, None, :].float()) * LOWEST)
        if self.rule == "filled":  # transformers 4: only where both have something to say
            return later.expand(attention_mask.shape[0], 1, -1, -1).masked_fill((later == 0) & empty, LOWEST)
        if self.rule == "thousands":
            return torch.where(seen, 0.0, -1e4)[None, None] + (1.0 - attention_mask[:, None, None, :].float()) * -1e4
        if self.rule == "heads":  # by head, as some exporters leave it
            return (later + torch.where(empty, LOWEST, 0.0)).expand(-1, 2, -1, -1)
        if self.rule == "bias":
            return later - 0.1 * (i - j).abs()[None, None].float()
        if self.rule == "rolled":  # the padding of the token beside
            return torch.where(seen[None, None] & ~empty.roll(1, -1), 0.0, LOWEST)
        return torch.where(empty, LOWEST, 0.0).expand(-1, 1, length, -1)  # padding only

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        q, k, v = (m(x).unflatten(-1, (2, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
        mask = self.mask(attention_mask)
        if self.written:
            y = torch.softmax(q @ k.transpose(-1, -2) / 2 + mask, -1) @ v
        else:
            y = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.head(x + self.o(y.transpose(1, 2).flatten(2)))


def masked(rule: str, written: bool = False, batch: int = 3) -> Graph:
    ids = torch.arange(batch * 9).reshape(batch, 9)
    dims = {"input_ids": ("batch", "seq"), "attention_mask": ("batch", "seq")}
    return ag.trace(Masked(rule, written).eval(), (ids, torch.ones_like(ids)), dynamic=dims, name=rule)


def inputs(graph: Graph, rows: int = 3) -> dict[str, Array]:
    mask = np.ones((rows, LENGTH), np.int64)
    mask[1, :PADDED] = 0
    mask[2, :1] = 0
    return {"input_ids": np.random.default_rng(5).integers(1, 64, (rows, LENGTH)), "attention_mask": mask}


@pytest.mark.parametrize(
    ("rule", "written", "dialect"),
    [
        (rule, (n + m) % 2 == 1, dialect)
        for n, rule in enumerate(("added", "least", "filled", "thousands", "heads", "window"))
        for m, dialect in enumerate(("fx", "onnx"))
    ],
)
def test_numbers_that_mix_causal_and_padding(rule: str, written: bool, dialect: str) -> None:
    """The causal part becomes ``position_mask`` and the padding its ``valid``, for three rows padded differently."""
    graph = as_dialect(masked(rule, written), dialect)
    result = ag.run(graph, "kv_cache{graphs=combined}", parity="none", reproducer=False)
    expected = "causal, window 3, without padding" if rule == "window" else "causal, without padding"
    assert [row["mask"] for row in result.report[0].details] == [expected]
    given = inputs(graph)
    name = next(label for label, _ in graph.outputs())
    whole, valid = graph.run(given)[name], given["attention_mask"]
    for steps in ((LENGTH,), (5, 4, 2), (1,) * LENGTH):
        found = in_steps(result.graph, given, steps, name)
        assert error(found, whole, valid) < 1e-5
    blind = {**given, "attention_mask": np.ones_like(valid)}  # the padding matters
    assert np.abs(graph.run(blind)[name] - whole)[valid.astype(bool)].max() > 1e-2


def in_steps(graph: Graph, given: dict[str, Array], steps: tuple[int, ...], name: str) -> Array:
    from actgraph.graph.slots import slots_of, with_initial_slots

    parts: list[Array] = []
    state: dict[str, Array] = {}
    done = 0
    for count in steps:
        feed = {"input_ids": given["input_ids"][:, done : done + count]}
        if "attention_mask" in given:
            feed["attention_mask"] = given["attention_mask"][:, : done + count]
        if "position_ids" in given:
            feed["position_ids"] = given["position_ids"][:, done : done + count]
        results = graph.run(with_initial_slots(graph, {**feed, **state}))
        state = {slot.input: results[slot.output] for slot in slots_of(graph).values()}
        parts.append(results[name])
        done += count
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ("bias", "adds numbers to the scores"),
        ("rolled", "neither causal nor a window nor in chunks"),
        ("padding", "see later"),
    ],
)
def test_other_numbers_are_refused(rule: str, why: str) -> None:
    with pytest.raises(PassError, match=why):
        ag.run(masked(rule), "kv_cache{graphs=combined}")


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_masks_of_any_batch_captured(batch: int) -> None:
    graph = masked("added", batch=batch)
    attentions = graph.views.attentions()
    assert [str(mask) for mask in masks.recognise(graph, attentions, 64)] == ["causal, without padding"]


@pytest.mark.parametrize(("name", "dialect"), [("llama", "onnx"), ("gemma3", "fx")])
def test_packed_sequences_are_detected_without_an_attention_mask(name: str, dialect: str) -> None:
    """Without attention_mask transformers looks for positions that start anew, and hides the sequence before: with a cache
    there is one sequence, whose mask is the same as that of positions that count up."""
    ids = torch.arange(18).reshape(2, 9)
    dims = {"input_ids": ("batch", "seq"), "position_ids": ("batch", "seq")}
    given = {"input_ids": ids, "position_ids": torch.arange(9).expand(2, -1)}
    graph = ag.trace(zoo.model(name), (), {**given, "use_cache": False}, dynamic=dims, name=name)
    graph.companions = zoo.captured(name).companions
    tokens = {
        "input_ids": np.random.default_rng(1).integers(1, 96, (2, LENGTH)),
        "position_ids": np.tile(np.arange(LENGTH), (2, 1)),
    }
    whole = graph.run(tokens)["logits"]
    packed = {**tokens, "position_ids": np.stack([np.arange(LENGTH), np.r_[:5, : LENGTH - 5]])}
    again = graph.run({**packed, "input_ids": np.where(np.arange(LENGTH) < 5, 3, tokens["input_ids"])})["logits"]
    assert np.abs(again[1, 5:] - graph.run(packed)["logits"][1, 5:]).max() < 1e-5  # the graph does look for them
    graph = graph if dialect == "fx" else to_onnx(graph)
    result = ag.run(graph, "kv_cache{graphs=combined}", parity="none", reproducer=False)
    seen = {row["mask"] for row in result.report[0].details}
    assert seen == ({"causal"} if name == "llama" else {"causal", "causal, window 4"})
    for steps in ((LENGTH,), (5, 4, 2), (1,) * LENGTH):
        assert error(in_steps(result.graph, tokens, steps, "logits"), whole, np.ones((2, LENGTH))) < 1e-5


class Far(torch.nn.Module):
    """A window that is wider than the lengths that every mask is looked at."""

    def __init__(self, window: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.window = window
        self.embed, self.head = torch.nn.Embedding(16, 4), torch.nn.Linear(4, 16)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        i, j = torch.arange(input_ids.shape[1])[:, None], torch.arange(input_ids.shape[1])[None]
        q = (x * 2)[:, None]
        y = scaled_dot_product_attention(q, x[:, None], x[:, None], attn_mask=(j <= i) & (j > i - self.window))
        return self.head(x + y[:, 0])


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_a_window_wider_than_the_usual_look_is_no_causal_mask(dialect: str) -> None:
    ids = torch.arange(10).reshape(2, 5)
    for window, expected in ((1500, "causal, window 1500"), (masks.FARTHEST + 5, "causal")):
        graph = ag.trace(Far(window).eval(), (ids,), dynamic={"input_ids": ("batch", "seq")}, name="far")
        result = ag.run(as_dialect(graph, dialect), "kv_cache{graphs=combined}", parity="none", reproducer=False)
        assert [row["mask"] for row in result.report[0].details] == [expected]
        told = [message for message in result.report[0].messages if "looked at for" in message]
        assert bool(told) == (window > masks.FARTHEST)  # out of reach: it says so
        graph.companions.config = {"max_position_embeddings": 1200}  # the model never gets there
        near = ag.run(graph, "kv_cache{graphs=combined}", parity="none", reproducer=False).report[0]
        assert [row["mask"] for row in near.details] == ["causal"] and not any("looked at for" in m for m in near.messages)


@pytest.mark.parametrize("source", ["fx", "onnx", "stock"])
def test_an_unrolled_recurrence_is_named(source: str) -> None:
    graph = ag.load(zoo.stock_onnx("mamba")) if source == "stock" else in_dialect("mamba", source)
    with pytest.raises(PassError, match=r"no attention.*of a state-space model is unrolled in the graph \(8 steps\)"):
        ag.run(graph, "kv_cache")


@pytest.mark.parametrize("name", ["gpt2", "mlp", "albert", "resnet"])
def test_other_models_have_no_recurrence(name: str) -> None:
    from actgraph.graph.specialise import specialise

    graph = zoo.captured(name)
    fixed = specialise(graph, {"seq": 8}) if any("seq" in (v.shape or ()) for v in graph.inputs()) else graph
    assert unrolled_steps(fixed) == 0
