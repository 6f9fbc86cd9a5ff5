"""Where sessions meet their edges: full buffers that change hands, what cannot be told or does not fit, other state."""

from __future__ import annotations

import functools
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.errors import InputError, UnsupportedError
from actgraph.formats.genai import genai_config
from actgraph.formats.onnx_export import to_onnx
from actgraph.graph.graph import Array
from actgraph.graph.slots import Slot
from actgraph.graph.specialise import specialise
from actgraph.ops.dtypes import DType
from tests import zoo

every_engine = pytest.mark.parametrize("engine", ["torch", "onnxruntime"])


@functools.cache
def _llama(key_heads: int) -> ag.Graph:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(key_heads)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=key_heads, intermediate_size=48,
        vocab_size=64, max_position_embeddings=512,
    )  # fmt: skip
    return ag.load(LlamaForCausalLM(config).eval())


@functools.cache
def cached(key_heads: int) -> ag.Program:
    return ag.run(_llama(key_heads), "kv_cache", parity="none", reproducer=False).program


@functools.cache
def compiled(key_heads: int, engine: str, lowering: str) -> ag.Compiled:
    return ag.compile(cached(key_heads), engine, lowering=lowering, chunk=100)


def talk(made: ag.Compiled, batch: int, counts: tuple[int, ...], padded: int | None = None) -> list[Array]:
    """The last logits of each call; in the call ``padded`` the last row ends."""
    tokens = np.random.default_rng(1).integers(0, 64, (batch, sum(counts)))
    session, found, done = made.session(batch), [], 0
    for number, count in enumerate(counts):
        valid = np.ones((batch, count), np.int64)
        if number == padded:
            valid[-1] = 0
        found.append(session.feed(tokens[:, done : done + count], valid)["logits"][: batch - (number == padded), -1])
        done += count
    return found


@every_engine
@pytest.mark.parametrize(
    ("key_heads", "batch", "counts", "padded"),
    [
        (2, 2, (64, 6, 1, 1), None),  # a first call fills its buffer to the last place; several rows go on with several tokens
        (2, 2, (200, 1, 5, 1), None),  # a prompt in chunks
        (2, 2, (130, 1, 1), 2),
        (1, 1, (200, 1, 1), 1),  # one key head: a row's entries are one piece of memory
    ],
)
def test_a_full_buffer_changes_hands(
    engine: str, key_heads: int, batch: int, counts: tuple[int, ...], padded: int | None
) -> None:
    expected = talk(compiled(key_heads, engine, "explicit"), batch, counts, padded)
    for _ in range(3):  # freed memory is not always written over at once
        found = talk(compiled(key_heads, engine, "held"), batch, counts, padded)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_torch_compile_in_batches_turns_threads_and_growing_buffers() -> None:
    made, reference = compiled(2, "torch.compile", "held"), compiled(2, "torch", "explicit")
    ways: list[tuple[int, tuple[int, ...], int | None]] = [
        (1, (60, *[1] * 8, 3, 1), None), (2, (60, *[1] * 8), None), (2, (9, 1, 1, 1), 2), (3, (130, 1, 1), None),
    ]  # fmt: skip
    expected = [talk(reference, *way) for way in ways]
    for way, logits in zip(ways, expected, strict=True):
        for one, other in zip(talk(made, *way), logits, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    with ThreadPoolExecutor(4) as pool:
        for found, logits in zip(pool.map(lambda way: talk(made, *way), ways * 2), expected * 2, strict=True):
            for one, other in zip(found, logits, strict=True):
                np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_sizes_are_marked_as_torch_marks_them() -> None:
    """By us, because torch's function fails while another thread compiles."""
    from actgraph.runtime.torch_held import _mark_static

    ours, theirs = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5)
    _mark_static(ours, [1, 3])
    torch._dynamo.mark_static(theirs, [1, 3])
    assert vars(ours) == vars(theirs) != {}


@every_engine
def test_padding_that_cannot_be_told_is_refused(engine: str) -> None:
    made = ag.compile(_without_mask(), engine)
    valid = np.ones((2, 6), np.int64)
    made.session(2).feed(np.ones((2, 6), np.int64), valid)
    valid[1, :3] = 0
    with pytest.raises(InputError, match="takes no attention_mask, so that padding cannot be told"):
        made.session(2).feed(np.ones((2, 6), np.int64), valid)


class _OnlyTokens(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.model(input_ids=input_ids, use_cache=False).logits}


@functools.cache
def _without_mask() -> ag.Program:
    graph = ag.trace(
        _OnlyTokens(zoo.model("gpt2")), (torch.zeros((2, 8), dtype=torch.int64),), dynamic={"input_ids": ("batch", "seq")}
    )
    return ag.run(graph, "kv_cache", parity="none", reproducer=False).program


@every_engine
def test_what_are_no_tokens_is_refused_and_changes_nothing(engine: str) -> None:
    session = compiled(2, engine, "held").session()
    session.feed(np.array([[3, 4]]))
    for tokens, message in (
        ([[64]], "there is no token 64"), ([[-1]], "there is no token -1"), ([[1.0]], "tokens are of type float64"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            session.feed(np.array(tokens))
    assert session.length == 2
    session.feed(np.array([[5]]))


def test_a_prompt_longer_than_the_cache_is_refused() -> None:
    program = ag.run(_llama(2), "kv_cache{form=static max_length=16}", parity="none", reproducer=False).program
    with pytest.raises(InputError, match="the prompt has 20 tokens and the model's context holds 16"):
        ag.generate(program, list(range(20)), 3)


def test_the_order_of_inputs_does_not_matter() -> None:
    made = ag.run(_llama(2), "kv_cache{form=static max_length=16 graphs=combined}", parity="none", reproducer=False).graph
    inputs = {
        "cache_position": np.array([0]), "input_ids": np.ones((2, 4), np.int64),
        "attention_mask": np.ones((2, 4), np.int64), "position_ids": np.arange(4)[None].repeat(2, axis=0),
    }  # fmt: skip
    found = ag.compile(made)(inputs)["logits"]
    assert np.array_equal(found, ag.compile(made)(dict(reversed(inputs.items())))["logits"]) and found.shape[:2] == (2, 4)


def test_decode_alone_and_what_is_no_model() -> None:
    program = cached(2)
    with pytest.raises(InputError, match="takes 1 token at a time") as caught:
        ag.generate(program.graphs["decode"], [3, 4], 2)
    assert "give its folder" in str(caught.value)
    for wrong in ("gpt2", None):
        with pytest.raises(InputError, match=r"ag\.load opens a model"):
            ag.generate(wrong, [1], 2)  # type: ignore[call-overload]
        with pytest.raises(InputError, match=r"ag\.load opens a model"):
            ag.compile(wrong)  # type: ignore[arg-type]


def _counting(reset: str) -> ag.Graph:
    """GPT-2 without a cache that counts its calls."""
    graph = zoo.captured("gpt2").clone()
    slot = Slot("calls", DType.F32, (1,), reset=reset)
    with graph.edit(by="test") as editor:
        old = editor.add_slot(slot)
        new = editor.insert("add", [old, 1.0]).output
        editor.write_slot(slot, new)
        editor.add_output(editor.insert("mul", [new, 1.0]).output, "count")
    return graph


@every_engine
@pytest.mark.parametrize("lowering", ["held", "explicit"])
def test_state_that_is_no_cache(engine: str, lowering: str) -> None:
    """The tokens are computed anew, and scopes are kept: ``request`` begins anew at a reset, ``session`` does not."""
    plain = ag.generate(zoo.captured("gpt2"), [5, 6, 7], 6, stop_at_end=False)
    for reset, after in (("request", 1.0), ("session", 3.0)):
        graph = _counting(reset)
        made = ag.compile(graph if engine == "torch" else to_onnx(graph), lowering=lowering)
        assert ag.generate(made, [5, 6, 7], 6, stop_at_end=False) == plain
        session = made.session()
        counts = [float(session.feed(np.array([[5]]))["count"][0]) for _ in range(2)]
        session.reset()
        assert [*counts, float(session.feed(np.array([[5]]))["count"][0])] == [1.0, 2.0, after]
    with pytest.raises(UnsupportedError, match="slot calls outlives sessions"):
        ag.compile(_counting("never"))


def test_prefixes_are_refused_when_the_model_is_compiled() -> None:
    program = ag.run(zoo.captured("gemma3"), "kv_cache{form=ring max_length=24}", parity="none", reproducer=False).program
    with pytest.raises(UnsupportedError, match="cannot reuse prefixes: its slot"):
        ag.compile(program, prefixes=ag.PrefixCache())


def test_a_batch_of_fixed_size_is_refused_with_the_reason() -> None:
    with pytest.raises(ag.ActgraphError, match=r"the batch of .* is fixed to 1"):
        ag.run(specialise(zoo.captured("gpt2"), {"batch": 1}), "kv_cache", reproducer=False)


def test_genai_is_told_what_it_can_tell() -> None:
    graph = zoo.captured("llama").clone()
    graph.companions.config |= {"eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 64}
    graph.companions.generation_config["bos_token_id"] = None
    cached = ag.run(graph, "kv_cache{graphs=combined}", parity="none", reproducer=False).graph
    config = genai_config(cached, "model.onnx")["model"]
    assert config["pad_token_id"] == 0 and config["bos_token_id"] is not None
    ones = [1.0] * zoo.captured("llama").site("blocks.1.resid_post").type.shape[-1]  # type: ignore[index, operator]
    steered = ag.run(cached, f"steer{{site=blocks.1.resid_post vector={ones} where=generated}}", reproducer=False).graph
    with pytest.raises(UnsupportedError, match="cannot tell the graph its prompt_lengths"):
        genai_config(steered, "model.onnx")
