"""Caches in half precision and in 8 bits: smaller, and as lossy as they say."""

from __future__ import annotations

import copy
import functools
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import actgraph as ag
from actgraph import formats
from actgraph.errors import PassError
from actgraph.graph import Graph
from actgraph.graph.graph import Array
from actgraph.graph.parity import sample_inputs
from actgraph.graph.slots import slots_of
from actgraph.ops.dtypes import DType
from actgraph.passes.cache import proof
from actgraph.passes.cache.precision import in_float32
from tests import zoo
from tests.passes.conftest import apply, as_dialect, in_dialect
from tests.passes.test_kv_cache import LENGTH, Attends, error, left_padded, stepwise, tokens, whole

FORMS = ("growing", "static", "ring")
quick = functools.partial(apply, parity="none", reproducer=False)


class Rounding(DynamicCache):
    """transformers' own cache, which gives attentions what int8 or float16 storage would have kept."""

    def __init__(self, storage: str) -> None:
        super().__init__()
        self.storage = storage

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any) -> Any:
        return self._kept(keys), self._kept(values)

    def _kept(self, x: torch.Tensor) -> torch.Tensor:
        if self.storage == "float16":
            return x.half().float()
        scale = x.abs().amax(-1, keepdim=True) / 127
        return torch.clamp(torch.round(x / scale), -127, 127) * scale


@pytest.mark.parametrize(
    ("name", "storage", "dialect"),
    [("stories260k", "float16", "fx"), ("stories260k", "int8", "onnx"), ("qwen3", "float16", "onnx"), ("qwen3", "int8", "fx")],
)
def test_the_error_told_is_that_of_an_independent_reference(name: str, storage: str, dialect: str) -> None:
    """The same tokens, through transformers with a cache that rounds."""
    graph = in_dialect(name, dialect)
    result = ag.run(graph, f"kv_cache{{graphs=combined storage={storage}}}")
    told = proof.measure(graph, result.graph)
    relative, divergences, same = 0.0, [], []
    for padding in ("none", "left"):
        inputs = sample_inputs(graph, batch=2, seq=12, padding=padding)
        valid = inputs["attention_mask"].astype(bool)
        tensors = {key: torch.from_numpy(array) for key, array in inputs.items()}
        with torch.no_grad():
            exact = zoo.model(name)(**tensors, use_cache=False).logits[torch.from_numpy(valid)]
            lossy = zoo.model(name)(**tensors, past_key_values=Rounding(storage)).logits[torch.from_numpy(valid)]
        relative = max(relative, float((lossy - exact).abs().max() / exact.abs().max()))
        log = torch.nn.functional.log_softmax
        divergences.append(torch.nn.functional.kl_div(log(lossy.double(), -1), log(exact.double(), -1), log_target=True,
                                                      reduction="none").sum(-1))  # fmt: skip
        same.append(lossy.argmax(-1) == exact.argmax(-1))
    assert relative > (1e-3 if storage == "int8" else 1e-5)  # there is something to tell
    near = 0.05 if storage == "int8" else 0.2  # in float16 more numbers are close to where rounding turns
    assert told.relative == pytest.approx(relative, rel=near)
    assert told.divergence == pytest.approx(float(torch.cat(divergences).mean()), rel=near)
    assert told.agreement == pytest.approx(float(torch.cat(same).float().mean()))
    report = result.report[0]
    assert f"stored in {storage}: {told}" in report.messages
    assert report.expected_change == f"keys and values are stored in {storage}"
    assert report.change is not None and 0 < report.change.relative < 2 * told.relative


@pytest.mark.parametrize(("source", "storage"), [("fx", "float16"), ("onnx", "int8"), ("stock", "float16"), ("stock", "int8")])
def test_forms_and_chunks_agree(source: str, storage: str) -> None:
    """What is stored is what is read, in the call that writes it as well: no form and no division differs from another."""
    if source == "stock":
        graph: Graph = ag.load(zoo.stock_onnx("gemma3"))
        graph.companions = zoo.captured("gemma3").companions
    else:
        graph = in_dialect("gemma3", source)
    ids, mask = tokens(graph), left_padded()
    exact = whole(graph, ids, mask)
    valid = mask.astype(bool)
    size = np.abs(exact[valid]).max()
    found: list[Array] = []
    for form in FORMS:
        cached = quick(graph, f"kv_cache{{graphs=combined form={form} storage={storage}}}")
        found += [stepwise(cached, ids, mask, steps, 1e4) for steps in ((LENGTH,), (7, 4), (1,) * LENGTH)]
    lost = float(np.abs(found[0] - exact)[valid].max() / size)
    assert lost > (1e-3 if storage == "int8" else 2e-5)
    for other in found[1:]:
        assert float(np.abs(other - found[0])[valid].max() / size) < lost / 10


@pytest.mark.parametrize(("storage", "per_head"), [("same", 4 * 8), ("float16", 2 * 8), ("int8", 8 + 4)])
def test_bytes(storage: str, per_head: int) -> None:
    """One byte a number, and a scale for each token and key head."""
    cached = quick(zoo.captured("llama"), f"kv_cache{{graphs=combined storage={storage}}}")
    session = ag.compile(cached).session(batch=3)
    session.feed(np.ones((3, 10), np.int64))
    assert session.bytes == 2 * 2 * 3 * 2 * 10 * per_head  # layers, key and value, rows, key heads, tokens
    kinds = {slot.name.split(".", 2)[2]: (slot.dtype, slot.shape) for slot in slots_of(cached).values()}
    stored = {"same": DType.F32, "float16": DType.F16, "int8": DType.I8}[storage]
    expected = dict.fromkeys(("key", "value"), (stored, ("batch", 2, "past", 8)))
    if storage == "int8":
        expected |= dict.fromkeys(("key_scale", "value_scale"), (DType.F32, ("batch", 2, "past", 1)))
    assert kinds == expected
    assert all(slot.output == slot.input.replace("past_key_values", "present") for slot in slots_of(cached).values())


def perplexity(graph: Graph) -> float:
    """Of the first documents of the packaged sample text."""
    compiled, tokenizer = ag.compile(graph), graph.companions.tokenizer
    assert tokenizer is not None
    losses: list[Array] = []
    for line in (resources.files("actgraph") / "data/tinystories_sample.txt").read_text(encoding="utf-8").splitlines()[:12]:
        ids = np.asarray([tokenizer.encode(line).ids[:256]])
        logits = compiled.session().feed(ids)["logits"][0, :-1].astype(np.float64)
        shifted = logits - logits.max(-1, keepdims=True)
        losses.append(np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(shifted)), ids[0, 1:]])
    return float(np.exp(np.concatenate(losses).mean()))


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_the_real_model_keeps_its_perplexity(storage: str, stories: Graph) -> None:
    cached = quick(stories, f"kv_cache{{graphs=combined storage={storage}}}")
    exact, lossy = perplexity(stories), perplexity(cached)
    assert 2 < exact < 20
    assert exact != lossy and abs(lossy / exact - 1) < (0.01 if storage == "int8" else 1e-4)


def test_rows_of_zeros_are_stored_as_zeros() -> None:
    """A value projection of nothing: no scale is zero, and no logit is NaN."""
    module = Attends("causal").eval()
    torch.nn.init.zeros_(module.v.weight)
    torch.nn.init.zeros_(module.v.bias)
    graph = ag.trace(module, (torch.arange(18).reshape(2, 9),), dynamic={"input_ids": ("batch", "seq")}, name="zeros")
    result = ag.run(graph, "kv_cache{graphs=combined storage=int8}")
    out = result.graph.run({
        "input_ids": np.arange(6).reshape(2, 3),
        **{slot.input: np.zeros((2, 2, 0, slot.shape[3]), slot.dtype.numpy) for slot in slots_of(result.graph).values()},
    })  # fmt: skip
    assert np.array_equal(out["present.0.value_scale"], np.ones((2, 2, 3, 1), np.float32))
    assert not out["present.0.value"].any() and out["present.0.key"].any() and np.isfinite(out["output"]).all()


def test_what_does_not_fit_into_half_precision_is_refused() -> None:
    module = Attends("causal").eval()
    module.v.weight.data *= 1e6
    graph = ag.trace(module, (torch.arange(18).reshape(2, 9),), dynamic={"input_ids": ("batch", "seq")}, name="large")
    before = graph.content_hash()
    with pytest.raises(PassError, match=r"do not fit into what they are stored in.*storage=int8"):
        ag.run(graph, "kv_cache{graphs=combined storage=float16}")
    assert graph.content_hash() == before
    apply(graph, "kv_cache{graphs=combined storage=int8}")


def test_files_and_sessions_keep_the_codes(tmp_path: Path) -> None:
    graph = zoo.captured("gpt2")
    cached, ids, mask = quick(graph, "kv_cache{graphs=combined form=static storage=int8}"), tokens(graph), left_padded()
    expected = stepwise(cached, ids, mask, (LENGTH,))
    again = ag.load(cached.save(tmp_path / "cached.pt2"))
    assert again.content_hash() == cached.content_hash() and slots_of(again) == slots_of(cached)
    for inline in ("none", "all"):
        loaded = ag.load(cached.save(tmp_path / f"{inline}.onnx", inline=inline))
        assert slots_of(loaded) == slots_of(cached)
        assert error(stepwise(loaded, ids, mask, (4, 5, 1, 1)), expected, mask) < 1e-3
    compiled = ag.compile(cached)
    assert compiled.capacity == 64
    prompt = [int(token) for token in ids[0]]
    assert ag.generate(compiled, prompt, 8).tokens == ag.generate(graph, prompt, 8).tokens


VECTOR = "[" + ", ".join(repr(round(float(v), 4)) for v in np.random.default_rng(2).normal(0, 0.3, 64)) + "]"


@pytest.mark.parametrize(
    "before",
    [
        f"steer{{vector={VECTOR} site=blocks.2.resid_post fold=false}}",
        "sparsify{threshold=0.05}",
        "quantize{weights=int8}",
        "prune{ratio=0.25 importance=magnitude}",
    ],
)
def test_after_other_passes(before: str, stories: Graph) -> None:
    """The loss is that of the storage, whatever was edited before."""
    edited = quick(stories, before)
    cached, plain = (quick(edited, f"kv_cache{{graphs=combined storage={s}}}") for s in ("int8", "same"))
    ids, mask = tokens(stories), left_padded()
    expected = whole(edited, ids, mask)
    assert error(stepwise(plain, ids, mask, (5, 1, 4, 1)), expected, mask) < 1e-4
    valid = mask.astype(bool)
    lost = np.abs(stepwise(cached, ids, mask, (5, 1, 4, 1)) - expected)[valid].max() / np.abs(expected[valid]).max()
    assert 1e-4 < lost < 0.2


@pytest.mark.parametrize(
    ("source", "kind", "storage"),
    [("fx", "f16", "int8"), ("fx", "bf16", "same"), ("onnx", "f16", "same"), ("onnx", "f16", "int8")],
)
def test_graphs_in_half_precision(source: str, kind: str, storage: str) -> None:
    """The cache is shown to be right in float32, and what rounding in another order costs is told."""
    graph = apply(in_dialect("llama", source), f"cast{{dtype={kind}}}")
    result = ag.run(graph, f"kv_cache{{graphs=combined storage={storage}}}")
    rows, cached = result.report[0], result.graph
    assert any(m.startswith(("computed in ", "stored in ")) for m in rows.messages)
    shown = next(message for message in rows.messages if "over chunks and single tokens" in message)
    assert float(shown.split()[0]) < 1e-5
    stored = {"f16": DType.F16, "bf16": DType.BF16}[kind] if storage == "same" else DType.I8
    assert {slot.dtype for slot in slots_of(cached).values() if not slot.name.endswith("_scale")} == {stored}
    ids, mask = tokens(graph), left_padded()
    found, expected = stepwise(cached, ids, mask, (5, 1, 4, 1)), whole(graph, ids, mask)
    valid = mask.astype(bool)
    assert np.abs(found - expected)[valid].max() < 0.05 * np.abs(expected[valid]).max()


@functools.cache
def _in_half(name: str, kind: torch.dtype) -> Graph:
    """Captured from a model in half precision, whose matrices are large enough for its rounding to show in every logit."""
    module = copy.deepcopy(zoo.model(name))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return formats.load(module.to(kind), name=name, length=8)


@pytest.mark.parametrize(
    ("name", "source", "kind"),
    [("gpt2", "fx", torch.float16), ("qwen3", "fx", torch.bfloat16), ("qwen3", "onnx", torch.float16)],
    ids=["gpt2-fx-f16", "qwen3-fx-bf16", "qwen3-onnx-f16"],
)
def test_models_in_half_precision(name: str, source: str, kind: torch.dtype) -> None:
    """They cast to half behind norms and give logits in half: that is rounding, not something that looks at other tokens."""
    graph = as_dialect(_in_half(name, kind).clone(), source)
    plain = in_float32(graph, "test")
    assert not [v.name for node in plain.nodes() for v in node.outputs if v.dtype in (DType.F16, DType.BF16)]
    result = ag.run(graph, "kv_cache", parity="none", reproducer=False)
    report = next(iter(result.reports.values()))[0]
    shown = next(message for message in report.messages if "over chunks and single tokens" in message)
    assert float(shown.split()[0]) < 2e-5
    assert any(m.startswith("computed in ") for m in report.messages)
    assert {slot.dtype for slot in slots_of(result.program.graphs["decode"]).values()} == {DType.of(kind)}
    prompt = [5, 17, 3, 80, 41, 9]
    assert ag.generate(result.program, prompt, 4, stop_at_end=False) == ag.generate(graph, prompt, 4, stop_at_end=False)
