"""Rings: attentions that see a window keep the last W tokens only, and nobody can tell."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actgraph as ag
from actgraph import formats
from actgraph.errors import PassError
from actgraph.graph import Graph
from actgraph.graph.executor import executor_for
from actgraph.graph.graph import Array
from actgraph.graph.slots import slots_of
from actgraph.graph.specialise import specialise
from actgraph.passes.cache.ring import attend_after_write
from tests import zoo
from tests.passes import conftest
from tests.passes.conftest import as_dialect
from tests.passes.test_kv_cache import error, stepwise, whole

apply = functools.partial(conftest.apply, parity="none", reproducer=False)
WINDOW = 4
LENGTH, PADDED = 3 * WINDOW + 3, WINDOW + 1  # at some time a ring holds nothing but padding
STEPS = ((LENGTH,), (2 * WINDOW - 1, WINDOW + 1, 3), (2, 9, 1, 1, 1, 1), (1,) * LENGTH)
GARBAGE = 1e4


@functools.cache
def _windowed(name: str, window: int = WINDOW) -> Graph:
    """Tiny models all of whose attentions see a window."""
    import transformers

    options: dict[str, Any] = {**zoo._LLAMA, "sliding_window": window, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "batched_mm"}
    if name == "mistral":
        model: Any = transformers.MistralForCausalLM(transformers.MistralConfig(**options))
    elif name == "mixtral":
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**options, **experts))
    else:
        config = transformers.Phi3Config(**options, original_max_position_embeddings=64)
        model = transformers.Phi3ForCausalLM(config)
    return formats.load(zoo._random(model, name), name=name, length=8)


def graph_of(name: str, source: str = "fx") -> Graph:
    if source == "stock":
        graph = ag.load(zoo.stock_onnx(name))
        graph.companions = zoo.captured(name).companions
        return graph
    return as_dialect(zoo.captured(name) if name == "gemma3" else _windowed(name).clone(), source)


def tokens(rows: int = 2) -> Array:
    return np.random.default_rng(3).integers(3, zoo.VOCAB, (rows, LENGTH))


def masks() -> list[Array]:
    padded = np.ones((2, LENGTH), np.int64)
    padded[1, :PADDED] = 0
    return [np.ones((2, LENGTH), np.int64), padded]


CASES = [("gemma3", "fx"), ("gemma3", "stock"), ("mistral", "onnx"), ("mixtral", "fx"), ("phi3", "fx")]


@pytest.mark.parametrize(("name", "source"), CASES)
def test_growing_static_and_ring_are_equal(name: str, source: str) -> None:
    """For any chunks, shorter and longer than the window, around the ring more than three times, with padding on the left
    and with garbage in every place that holds nothing yet."""
    graph = graph_of(name, source)
    chosen = ("growing", "static", "ring") if (name, source) in (("gemma3", "fx"), ("mistral", "onnx")) else ("ring",)
    forms = {form: apply(graph, f"kv_cache{{graphs=combined form={form}}}") for form in chosen}
    for mask in masks():
        expected = whole(graph, tokens(), mask)
        for cached in forms.values():
            for steps in STEPS:
                assert error(stepwise(cached, tokens(), mask, steps, GARBAGE), expected, mask) < 1e-5
    for steps in STEPS:  # what is not valid is not even read: the same bits
        clean = stepwise(forms["ring"], tokens(), masks()[1], steps)
        assert np.array_equal(clean, stepwise(forms["ring"], tokens(), masks()[1], steps, GARBAGE))


def test_the_window_matters() -> None:
    """The test above has power: a ring of one place less moves the logits."""
    graph = graph_of("mistral")
    cached = apply(graph, "kv_cache{graphs=combined form=ring}")
    mask = masks()[0]
    run, slots = executor_for(cached).open(cached), slots_of(cached).values()
    first = run({
        "input_ids": tokens()[:, :-1], "attention_mask": mask[:, :-1], "position_ids": np.cumsum(mask, 1)[:, :-1] - 1,
        **{slot.input: np.zeros((2, *slot.shape[1:]), np.float32) for slot in slots},
    })  # fmt: skip
    last = {"input_ids": tokens()[:, -1:], "attention_mask": mask, "position_ids": np.full((2, 1), LENGTH - 1),
            "cache_position": np.asarray([LENGTH - 1])}  # fmt: skip
    state = {slot.input: first[slot.output] for slot in slots}
    expected = whole(graph, tokens(), mask)[:, -1:]
    assert np.abs(run({**last, **state})["logits"] - expected).max() < 1e-5 * np.abs(expected).max()
    for position in range(LENGTH - 4, LENGTH - 1):  # W - 1 older keys are seen, and the fourth is where the new one goes
        broken = {name: array.copy() for name, array in state.items()}
        for array in broken.values():
            array[:, :, position % WINDOW] = 0
        assert np.abs(run({**last, **broken})["logits"] - expected).max() > 1e-3 * np.abs(expected).max()
    oldest = {name: array.copy() for name, array in state.items()}
    for array in oldest.values():
        array[:, :, (LENGTH - 1 - WINDOW) % WINDOW] = GARBAGE
    assert np.abs(run({**last, **oldest})["logits"] - expected).max() < 1e-5 * np.abs(expected).max()


def test_rings_hold_the_window_and_full_layers_all() -> None:
    cached = apply(graph_of("gemma3"), "kv_cache{graphs=combined form=ring max_length=24}")
    kinds = [(slot.update, slot.shape) for slot in slots_of(cached).values()]
    ring, full = ("ring", ("batch", 2, WINDOW, 8)), ("scatter", ("batch", 2, 24, 8))
    assert kinds == [ring] * 4 + [full] * 2
    compiled = ag.compile(cached)
    session = compiled.session(batch=3)
    assert compiled.capacity == 24  # of the full layer, not of the rings
    session.feed(np.ones((3, 20), np.int64))
    assert session.bytes == 4 * 3 * 2 * 8 * (2 * 2 * WINDOW + 2 * 24)  # float32, rows, key heads, head; key and value
    whole_cache = ag.compile(apply(graph_of("gemma3"), "kv_cache{graphs=combined form=static max_length=24}")).session(batch=3)
    assert session.bytes == whole_cache.bytes - 4 * 3 * 2 * 8 * 4 * (24 - WINDOW)


def test_a_session_goes_around_the_ring() -> None:
    """Only windows: the model's limit is all that ends a session, and nothing grows."""
    graph = graph_of("mistral")
    ring, growing = (ag.compile(apply(graph, f"kv_cache{{graphs=combined form={f}}}"), chunk=6) for f in ("ring", "growing"))
    assert ring.capacity == growing.capacity == 64
    prompt = [int(token) for token in tokens(1)[0]]
    assert ag.generate(ring, prompt, 30).tokens == ag.generate(growing, prompt, 30).tokens
    session = ring.session()
    before = session.bytes
    session.feed(np.asarray([prompt]))
    assert session.bytes == before == 4 * 2 * 2 * WINDOW * 8 * 2


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize(("name", "storage"), [("mistral", "same"), ("gemma3", "same"), ("gemma3", "int8")])
def test_one_token_attends_after_the_write(name: str, storage: str, dialect: str) -> None:
    """The graph for one token reads W places, without a copy of the ring, from the first token on and around it."""
    graph = graph_of(name, dialect)
    cached = apply(graph, f"kv_cache{{graphs=combined form=ring storage={storage}}}")
    with cached.clone().edit(by="test") as editor, pytest.raises(PassError, match="may be several tokens"):
        attend_after_write(editor)
    single = specialise(cached, {"seq": 1})
    rings = [slot for slot in slots_of(single).values() if slot.update == "ring"]
    with single.edit(by="test") as editor:
        assert attend_after_write(editor) == len(rings) > 0
    single.verify()
    ops = [node.op for node in single.nodes()]
    assert "actgraph.cache_append" not in ops and ops.count("actgraph.cache_write") == len(slots_of(single))
    masks_seen = [node.output.shape for node in single.nodes() if node.op == "actgraph.position_mask"]
    assert any(shape is not None and shape[-1] == WINDOW for shape in masks_seen)
    for mask in masks():
        expected = stepwise(cached, tokens(), mask, (1,) * LENGTH, GARBAGE)
        assert error(stepwise(single, tokens(), mask, (1,) * LENGTH, GARBAGE), expected, mask) < 1e-5


def test_a_window_of_all_that_fits_is_no_ring() -> None:
    for places, expected in ((9, ("scatter", 9)), (12, ("ring", 10))):
        cached = apply(_windowed("mistral", 10), f"kv_cache{{graphs=combined form=ring max_length={places}}}")
        assert {(slot.update, slot.shape[2]) for slot in slots_of(cached).values()} == {expected}


def test_a_model_without_a_window_is_refused() -> None:
    graph = zoo.captured("llama")
    before = graph.content_hash()
    with pytest.raises(PassError, match=r"no attention has a sliding window.*use form=static"):
        ag.run(graph, "kv_cache{graphs=combined form=ring}")
    assert graph.content_hash() == before


def test_files_keep_rings(tmp_path: Path) -> None:
    graph, mask = graph_of("gemma3"), masks()[1]
    cached = apply(graph, "kv_cache{graphs=combined form=ring}")
    expected = whole(graph, tokens(), mask)
    assert slots_of(ag.load(cached.save(tmp_path / "cached.pt2"))) == slots_of(cached)
    for inline in ("none", "all"):
        loaded = ag.load(cached.save(tmp_path / f"{inline}.onnx", inline=inline))
        assert slots_of(loaded) == slots_of(cached)
        assert error(stepwise(loaded, tokens(), mask, STEPS[1], GARBAGE), expected, mask) < 1e-5


VECTOR = "[" + ", ".join(repr(round(float(v), 4)) for v in np.random.default_rng(2).normal(0, 0.3, zoo.WIDTH)) + "]"


@pytest.mark.parametrize(
    "before",
    [
        f"steer{{vector={VECTOR} site=blocks.1.resid_post fold=false}}",
        "sparsify{threshold=0.05}",
        "quantize{weights=int8}",
        "prune{ratio=0.25 importance=magnitude}",
    ],
)
@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_after_other_passes(before: str, dialect: str) -> None:
    edited, mask = apply(graph_of("gemma3", dialect), before), masks()[1]
    cached = apply(edited, "kv_cache{graphs=combined form=ring}")
    assert error(stepwise(cached, tokens(), mask, STEPS[2], GARBAGE), whole(edited, tokens(), mask), mask) < 1e-4
