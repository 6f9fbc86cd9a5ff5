"""Fused attentions, rotary embeddings and norms of onnxruntime: where they are used, where not, and that no number tells."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import actgraph as ag
from actgraph import formats
from actgraph.errors import UnsupportedError
from actgraph.formats.onnx_export import to_onnx
from actgraph.graph import Editor, Graph
from actgraph.graph.executor import executor_for
from actgraph.graph.graph import Array
from actgraph.graph.onnx import OnnxGraph
from actgraph.ops.dtypes import DType
from actgraph.runtime.ort_fused import fuse
from actgraph.runtime.ort_held import HeldOnnx
from tests import zoo

pytestmark = pytest.mark.usefixtures("without_kernels")

LENGTH = 22
TOKENS = np.random.default_rng(2).integers(3, zoo.VOCAB, (2, LENGTH))
#: One call; a prompt and single tokens; pieces shorter and longer than Gemma's window of 4.
STEPS = ((LENGTH,), (9, 1, 1, 1, 5, 1, 4), (3, 2, 1, 13, 1, 1, 1))
#: Of each model: attentions, rotary embeddings and RMS norms that are fused, in our export and in the stock exporter's file.
EXPECTED: dict[tuple[str, str], tuple[int, int, int]] = {
    ("llama", "ours"): (2, 4, 5), ("llama", "stock"): (2, 4, 5),
    ("qwen3", "ours"): (2, 4, 9), ("qwen3", "stock"): (2, 4, 9),
    ("gemma3", "ours"): (3, 6, 19), ("gemma3", "stock"): (3, 6, 19),
    ("mixtral", "ours"): (2, 4, 5), ("mixtral_batched", "stock"): (2, 4, 5),
    ("phi3", "ours"): (2, 0, 5), ("phi3", "stock"): (2, 4, 5),
    ("gpt2", "ours"): (2, 0, 0), ("gpt2", "stock"): (2, 0, 0),
    ("opt", "ours"): (2, 0, 0), ("opt", "stock"): (2, 0, 0),
    ("gpt_neox", "ours"): (2, 0, 0), ("gpt_neox", "stock"): (2, 0, 0),
}  # fmt: skip
MODELS = sorted(EXPECTED)


@functools.cache
def _source(name: str, exporter: str) -> Graph:
    if exporter == "ours":
        return zoo.exported(name)
    graph = ag.load(zoo.stock_onnx(name))
    graph.companions = zoo.captured(name).companions
    return graph


def source(name: str, exporter: str = "ours") -> Graph:
    return _source(name, exporter).clone()


@functools.cache
def _cached(name: str, exporter: str) -> Graph:
    return ag.run(source(name, exporter), "kv_cache{graphs=combined}", parity="none", reproducer=False).graph


def cached(name: str, exporter: str = "ours") -> Graph:
    return _cached(name, exporter).clone()


def held(graph: Graph, limit: int | None = 64) -> HeldOnnx:
    return HeldOnnx(graph, limit)


def fused_ops(graph: Graph, limit: int | None = 64) -> Counter[str]:
    """How often each operator stands in the fused graph."""
    assert isinstance(graph, OnnxGraph)
    return Counter(node.op_type for node in fuse(graph, limit).model.graph)


def of_kind(ops: Counter[str]) -> tuple[int, int, int]:
    norms = ops["SimplifiedLayerNormalization"] + ops["SkipSimplifiedLayerNormalization"]  # the latter with the sum before it
    return ops["GroupQueryAttention"], ops["RotaryEmbedding"], norms


def error(found: Array, expected: Array) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def stepwise(graph: Graph | ag.Compiled, steps: Sequence[int] = STEPS[1], rows: int = 1, lowering: str = "held") -> Array:
    """The logits at all positions, from calls of so many tokens."""
    session = (graph if isinstance(graph, ag.Compiled) else ag.compile(graph, lowering=lowering)).session(rows)
    edges = np.cumsum([0, *steps])
    return np.concatenate([session.feed(TOKENS[:rows, a:b])["logits"] for a, b in itertools.pairwise(edges)], axis=1)


def whole(graph: Graph, rows: int = 1) -> Array:
    """The logits at all positions of a graph without a cache."""
    names = {value.name for value in graph.inputs()}
    inputs = {"input_ids": TOKENS[:rows], "attention_mask": np.ones((rows, LENGTH), np.int64)}
    inputs["position_ids"] = np.tile(np.arange(LENGTH), (rows, 1))
    return executor_for(graph).open(graph)({name: inputs[name] for name in names})["logits"]


# --- models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "exporter"), MODELS)
def test_what_is_fused(name: str, exporter: str) -> None:
    graph = cached(name, exporter)
    before = graph.text()
    ops = fused_ops(graph)
    assert of_kind(ops) == EXPECTED[name, exporter]
    assert not ops["PositionMask"] and not ops["CacheAppend"] and not ops["Attention"]
    assert ops["Softmax"] == (2 if "mixtral" in name else 0), "of routers"
    assert graph.text() == before, "what is saved and shown is the graph as it was"
    assert "GroupQueryAttention" not in before
    assert held(graph).fused is not None and held(graph).why_plain == ""


@pytest.mark.parametrize(("name", "exporter"), MODELS)
def test_logits_at_every_position(name: str, exporter: str) -> None:
    """As the model without a cache, and as the plain graph, for prompts, pieces and single tokens, one row and two."""
    graph = cached(name, exporter)
    expected = whole(source(name, exporter), 2)
    made = ag.compile(graph)
    for rows, steps in ((1, STEPS[0]), (1, STEPS[1]), (2, STEPS[1]), (2, STEPS[2])):
        assert error(stepwise(made, steps, rows), expected[:rows]) < 1e-5, (rows, steps)
    assert made.why_explicit == ""


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_graphs_of_a_program(name: str) -> None:
    program = ag.run(source(name), "kv_cache", parity="none", reproducer=False).program
    expected = whole(source(name))
    for graph in program:
        assert of_kind(fused_ops(graph)) == EXPECTED[name, "ours"]
    session = ag.compile(program).session()
    edges = np.cumsum([0, *STEPS[1]])
    for start, stop in itertools.pairwise(edges):
        assert error(session.feed(TOKENS[:1, start:stop])["logits"], expected[:, start:stop]) < 1e-5
    assert session._state._fused  # type: ignore[attr-defined]


@functools.cache
def _llama(head: int, **options: Any) -> Graph:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**zoo._LLAMA, "num_hidden_layers": 1}, head_dim=head, **options)
    return to_onnx(formats.load(zoo._random(LlamaForCausalLM(config), f"llama {head}"), name=f"llama_{head}", length=8))


@pytest.mark.parametrize(("head", "kinds"), [(16, (1, 0, 3)), (24, (1, 2, 3)), (12, None)])
def test_sizes_of_heads(head: int, kinds: tuple[int, int, int] | None) -> None:
    """The attention turns queries and keys itself where heads are multiples of 16; below 8 nothing is fused."""
    graph = ag.run(_llama(head).clone(), "kv_cache{graphs=combined}", parity="none", reproducer=False).graph
    made, expected = ag.compile(graph), whole(_llama(head))
    for steps in STEPS:
        assert error(stepwise(made, steps), expected) < 1e-5
    if kinds is None:
        assert held(graph).fused is None
        assert held(graph).why_plain == "the heads of attention.0 have 12 features, no multiple of 8"
        return
    assert of_kind(fused_ops(graph)) == kinds
    assert isinstance(graph, OnnxGraph)
    (attention,) = (node for node in fuse(graph, 64).model.graph if node.op_type == "GroupQueryAttention")
    turns = attention.attributes.get("do_rotary")
    assert (turns is not None and turns.as_int() == 1) == (head % 16 == 0)


def test_windows_are_those_of_the_masks() -> None:
    graph = cached("gemma3")
    assert isinstance(graph, OnnxGraph)
    attentions = [node for node in fuse(graph, 64).model.graph if node.op_type == "GroupQueryAttention"]
    assert [node.attributes["local_window_size"].as_int() for node in attentions] == [4, 4, -1]


# --- angles ---------------------------------------------------------------------------------------------------------------


def _scaled(kind: str) -> Graph:
    from transformers import LlamaConfig, LlamaForCausalLM

    base = {**zoo._LLAMA, "num_hidden_layers": 1}
    scaling = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = 16
    made = LlamaForCausalLM(LlamaConfig(**base, rope_parameters=scaling))
    return to_onnx(formats.load(zoo._random(made, kind), name=kind, length=8))


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scaled_angles(kind: str) -> None:
    """Angles of the position alone become tables, whatever their scale."""
    plain = _scaled(kind)
    graph = ag.run(plain.clone(), "kv_cache{graphs=combined}", parity="none", reproducer=False).graph
    assert fused_ops(graph)["GroupQueryAttention"] == 1
    assert fused_ops(graph)["RotaryEmbedding"] == 2
    made, expected = ag.compile(graph), stepwise(graph, lowering="explicit")
    for steps in STEPS:
        assert error(stepwise(made, steps), expected) < 1e-5


def test_angles_that_depend_on_the_length_are_no_table() -> None:
    """Scale the cosines by how many tokens there are in all: the numbers stay right, and the attention is still fused."""
    graph = cached("llama")
    with graph.edit("test") as editor:
        mask = editor.insert("cast", [graph.value("attention_mask")], {"to": DType.F32}).output
        total = editor.insert("sum", [mask], {"axes": (1,), "keepdims": True}).output
        factor = editor.insert(
            "reshape", [editor.insert("mul", [total, np.float32(0.01)]).output], {"shape": (-1, 1, 1)}
        ).output
        for node in [node for node in graph.nodes() if node.prim is not None and node.prim.op == "cos"]:
            users = node.output.uses
            editor.redirect(node.output, editor.insert("mul", [node.output, factor]).output, users)
    assert of_kind(fused_ops(graph))[:2] == (2, 0)
    for steps in STEPS:
        assert error(stepwise(graph, steps), stepwise(graph, steps, lowering="explicit")) < 1e-5
    assert error(stepwise(graph), whole(source("llama"))) > 1e-3


@pytest.mark.parametrize("limit", [None, 1 << 18])
def test_without_a_limit_there_are_no_tables(limit: int | None) -> None:
    assert of_kind(fused_ops(cached("llama"), limit)) == (2, 0, 5)


# --- padding --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_padding_in_the_middle(name: str) -> None:
    """A row that ends, from one call on: the same entries in plain graphs."""
    graph = cached(name)
    made, plain = ag.compile(graph).session(2), ag.compile(graph, lowering="explicit").session(2)
    at, valid = 0, np.ones((2, LENGTH), np.int64)
    valid[1, 11:] = 0
    for count in (9, 1, 1, 1, 1, 4, 1):
        piece = slice(at, at + count)
        found, expected = (session.feed(TOKENS[:, piece], valid[:, piece])["logits"] for session in (made, plain))
        assert error(found[0], expected[0]) < 1e-5
        if at < 11:
            assert error(found, expected) < 1e-5
        at += count
        assert made._state._fused == (at <= 11)  # type: ignore[attr-defined]
        assert made.bytes == plain.bytes
    contents, reference = made.read(0, at), plain.read(0, at)
    assert all(error(contents[slot][0], reference[slot][0]) < 1e-5 for slot in reference)
    made.reset()
    made.feed(TOKENS[:, :5])
    assert made._state._fused  # type: ignore[attr-defined]


def test_several_tokens_of_several_rows() -> None:
    """Onnxruntime's operator takes them as a prompt only: such a call is plain, and the next ones are fused again."""
    session = ag.compile(cached("llama")).session(2)
    expected, at, fused = whole(source("llama"), 2), 0, []
    for count in (5, 1, 3, 1, 2, 1):
        assert error(session.feed(TOKENS[:, at : at + count])["logits"], expected[:, at : at + count]) < 1e-5
        fused.append(session._state._fused)  # type: ignore[attr-defined]
        at += count
    assert fused == [True, True, False, True, False, True]


# --- graphs that were edited ----------------------------------------------------------------------------------------------


def _own_mask(graph: Graph, editor: Editor) -> None:
    """Masks that somebody else made: every token sees all others."""
    mask = editor.insert("cast", [graph.value("attention_mask")], {"to": DType.BOOL}).output
    mask = editor.insert("reshape", [mask], {"shape": (1, 1, 1, -1)}).output
    for node in [node for node in graph.nodes() if node.op == "actgraph.attention"]:
        editor.set_operand(node, 3, mask)


def _added_mask(graph: Graph, editor: Editor) -> None:
    """A number on the scores of the first token."""
    first = next(node for node in graph.nodes() if node.op == "actgraph.attention")
    made = first.operands[3]
    assert made is not None
    number = editor.insert("cast", [made], {"to": DType.F32}).output
    bias = editor.insert("add", [editor.insert("mul", [number, np.float32(1e9)]).output, np.float32(-1e9)]).output
    editor.set_operand(first, 3, bias)


def _other_padding(graph: Graph, editor: Editor) -> None:
    """A mask of positions whose valid ones are told by something else than the attention mask."""
    node = next(node for node in graph.nodes() if node.op == "actgraph.position_mask")
    other = editor.insert("add", [graph.value("attention_mask"), np.asarray(-1)]).output
    editor.set_operand(node, 2, editor.insert("sub", [graph.value("attention_mask"), other]).output)


def _read_keys(graph: Graph, editor: Editor) -> None:
    editor.add_output(editor.insert("tanh", [dict(graph.outputs())["present.0.key"]]).output, "seen")


def _shown_keys(graph: Graph, editor: Editor) -> None:
    editor.add_output(dict(graph.outputs())["present.0.key"], "seen")


def _read_past(graph: Graph, editor: Editor) -> None:
    editor.add_output(editor.insert("tanh", [graph.value("past_key_values.1.value")]).output, "seen")


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (_own_mask, "the mask of .* was not made by kv_cache"),
        (_added_mask, "the mask of .* was not made by kv_cache"),
        (_other_padding, "the mask of .* was not made by kv_cache"),
        (_read_keys, "present.0.key is read by more than its attention"),
        (_shown_keys, "present.0.key is read by more than its attention"),
        (_read_past, "slot past_key_values.1.value is read by more than its attention"),
    ],
)
def test_graphs_that_are_not_fused(edit: Callable[[Graph, Editor], None], why: str) -> None:
    graph = cached("llama")
    with graph.edit("test") as editor:
        edit(graph, editor)
        editor.erase_dead()
    with pytest.raises(UnsupportedError, match=why):
        fuse(graph, 64)  # type: ignore[arg-type]
    made = held(graph)
    assert made.fused is None and made.why_plain
    session, explicit = ag.compile(graph).session(), ag.compile(graph, lowering="explicit").session()
    at = 0
    for count in STEPS[1]:
        found, expected = (each.feed(TOKENS[:1, at : at + count]) for each in (session, explicit))
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
        at += count


@pytest.mark.parametrize("form", ["static", "growing storage=int8", "growing storage=float16"])
def test_other_caches_are_not_fused(form: str) -> None:
    graph = ag.run(source("llama"), f"kv_cache{{graphs=combined form={form}}}", parity="none", reproducer=False).graph
    assert held(graph).why_plain.endswith("is no growing cache of float32")
    assert held(source("llama")).why_plain == "the graph has no slots"


def _vector(width: int, scale: float = 0.8) -> str:
    return "[" + ", ".join(f"{v:.4f}" for v in np.random.default_rng(6).normal(0, scale, width)) + "]"


@pytest.mark.parametrize(
    ("before", "after", "kinds"),
    [
        (f"steer{{vector={_vector(zoo.WIDTH)} site=blocks.0.resid_post fold=false}}", "", (2, 4, 5)),
        ("", f"steer{{vector={_vector(zoo.WIDTH)} site=blocks.0.resid_post fold=false}}", (2, 4, 5)),
        (f"steer{{vector={_vector(32)} site=blocks.0.attn.q fold=false}}", "", (2, 4, 5)),
        (f"steer{{vector={_vector(16)} site=blocks.0.attn.k fold=false}}", "", (2, 4, 5)),
        ("sparsify{method=teal threshold=0.3}", "", (2, 4, 5)),
        ("", "quantize{weights=int8}", (2, 4, 5)),
        ("", "tap{site=blocks.*.resid_post}", (2, 4, 5)),
    ],
)
def test_passes_before_and_after(before: str, after: str, kinds: tuple[int, int, int]) -> None:
    """Edits that leave the attentions as they are leave them fused, and are in what is computed."""
    text = ", ".join(part for part in (before, "kv_cache{graphs=combined}", after) if part)
    graph = ag.run(source("llama"), text, parity="none", reproducer=False).graph
    assert of_kind(fused_ops(graph)) == kinds
    for rows in (1, 2):
        found, expected = (stepwise(graph, STEPS[1], rows, lowering) for lowering in ("held", "explicit"))
        assert error(found, expected) < 1e-5
    if "tap" not in text:
        assert error(found, whole(source("llama"), 2)) > 1e-4


@pytest.mark.parametrize("place", ["query", "key", "value"])
def test_edits_between_rotation_and_attention(place: str) -> None:
    """Another scale of each feature that the attention reads, after it was turned: that part is turned as it was, the other by
    the operator."""
    graph = cached("llama")
    with graph.edit("test") as editor:
        node = next(node for node in graph.nodes() if node.op == "actgraph.attention")
        index = ("query", "key", "value").index(place)
        if place != "query":
            operand = node.operands[index]
            assert operand is not None and operand.producer is not None
            node, index = operand.producer, 1
        operand = node.operands[index]
        assert operand is not None
        vector = np.random.default_rng(4).normal(1, 0.7, 8).astype(np.float32)
        editor.set_operand(node, index, editor.insert("mul", [operand, vector], before=node).output)
        editor.erase_dead()
    assert of_kind(fused_ops(graph)) == (2, 4 if place == "value" else 3, 5)
    made, expected = ag.compile(graph), stepwise(graph, lowering="explicit")
    for steps in STEPS:
        assert error(stepwise(made, steps), expected) < 1e-5
    assert error(stepwise(graph), whole(source("llama"))) > 1e-3
