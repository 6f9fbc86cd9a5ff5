"""The program that kv_cache gives: prefill for prompts, decode for one token, with equal numbers and equal slots."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.errors import ActgraphError, InputError, OptionError, PassError
from actgraph.formats.onnx_export import to_onnx
from actgraph.graph import Graph
from actgraph.graph.graph import Array
from actgraph.graph.program import Driver, Program
from actgraph.graph.slots import advance, slots_of, with_initial_slots
from actgraph.passes.cache.program import PREFILL, keep_last_logits
from actgraph.passes.cache.proof import feed
from tests import zoo

LENGTH = 11
VECTOR = "[" + ", ".join(["0.2"] * 32) + "]"


def variant(name: str, dialect: str) -> Graph:
    return zoo.captured(name) if dialect == "fx" else zoo.exported(name)


def inputs_of(graph: Graph, padding: str = "none") -> dict[str, Array]:
    return ag.sample_inputs(graph, batch=2, seq=LENGTH, padding=padding)


def through(program: Program, inputs: dict[str, Array], chunks: tuple[int, ...]) -> Array:
    """The last logits of each call: a prompt in ``chunks``, then single tokens."""
    state: dict[str, Array] = {}
    parts, done = [], 0
    calls = [("prefill", count) for count in chunks] + [("decode", 1)] * (LENGTH - sum(chunks))
    for name, count in calls:
        graph = program.graphs[name]
        results = graph.run(with_initial_slots(graph, {**feed(graph, inputs, done, done + count), **state}))
        state = advance(slots_of(graph).values(), results)
        parts.append(results["logits"][:, -1])
        done += count
    return np.stack(parts, axis=1)


@pytest.mark.parametrize(
    ("name", "options", "dialect"),
    [
        ("llama", "", "onnx"), ("gpt2", "last_logits=true", "fx"), ("gpt2", "last_logits=true", "onnx"),
        ("gemma3", "form=ring max_length=24", "fx"), ("opt", "form=static max_length=24", "onnx"),
    ],
)  # fmt: skip
def test_prefill_and_decode_give_the_logits_of_one_forward(name: str, options: str, dialect: str) -> None:
    graph = variant(name, dialect)
    program = ag.run(graph, f"kv_cache{{{options}}}" if options else "kv_cache", parity="none", reproducer=False).program
    program.verify()
    assert program.driver == Driver.prefill_then_decode() and list(program.graphs) == ["prefill", "decode"]
    assert slots_of(program.graphs["prefill"]) == slots_of(program.graphs["decode"]) != {}
    assert program.graphs["decode"].input("input_ids").shape == ("batch", 1)
    for padding in ("none", "left"):
        inputs = inputs_of(graph, padding)
        whole = graph.run(inputs)["logits"]
        for chunks in ((8,), (2, 2, 3)):
            ends = [*np.cumsum(chunks) - 1, *range(sum(chunks), LENGTH)]
            real = inputs["attention_mask"].astype(bool)[:, ends]
            found = through(program, inputs, chunks)
            assert np.abs(found - whole[:, ends])[real].max() < 1e-5 * np.abs(whole).max()


def attentions(graph: Graph) -> list[list[str]]:
    return [[o.name if o is not None else "" for o in n.operands] for n in graph.nodes() if n.op == "actgraph.attention"]


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_decode_has_no_mask_but_the_padding(dialect: str) -> None:
    program = ag.run(variant("llama", dialect), "kv_cache", parity="none", reproducer=False).program
    prefill, decode = program.graphs["prefill"], program.graphs["decode"]
    counting = ("actgraph.position_mask", "actgraph.positions", "actgraph.length")
    assert {node.op for node in prefill.nodes()} >= set(counting)
    assert not {node.op for node in decode.nodes()} & set(counting)
    assert len(decode.nodes()) < len(prefill.nodes())
    assert all(operands[3] for operands in attentions(decode))  # the padding


class Attends(torch.nn.Module):
    """A causal attention that takes no mask, a head, and what ``tail`` says behind it."""

    def __init__(self, tail: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tail = tail
        self.embed = torch.nn.Embedding(32, 8)
        self.q, self.k, self.v, self.o = (torch.nn.Linear(8, 8) for _ in range(4))
        self.head = torch.nn.Linear(8, 32)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        q, k, v = (m(x).unflatten(-1, (2, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        logits = self.head(x + self.o(y.transpose(1, 2).flatten(2)))
        if self.tail == "softcap":
            return torch.tanh(logits / 5.0) * 5.0
        if self.tail == "softmax":
            return torch.log_softmax(logits, -1)
        return logits


def attends(tail: str, dialect: str) -> Graph:
    ids = torch.arange(18).reshape(2, 9)
    graph = ag.trace(Attends(tail).eval(), (ids,), dynamic={"input_ids": ("batch", "seq")}, name="attends")
    return graph if dialect == "fx" else to_onnx(graph)


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_without_padding_the_attention_takes_no_mask(dialect: str) -> None:
    graph = attends("", dialect)
    program = ag.run(graph, "kv_cache").program
    assert [any(operands[3:]) for operands in attentions(program.graphs["decode"])] == [False]
    inputs = {"input_ids": np.random.default_rng(0).integers(0, 32, (2, LENGTH))}
    whole = graph.run(inputs)["logits" if "logits" in dict(graph.outputs()) else "output"]
    state: dict[str, Array] = {}
    for done, (name, count) in zip((0, 9, 10), (("prefill", 9), ("decode", 1), ("decode", 1)), strict=True):
        member = program.graphs[name]
        results = member.run(with_initial_slots(member, {**feed(member, inputs, done, done + count), **state}))
        state = advance(slots_of(member).values(), results)
        np.testing.assert_allclose(results[member.outputs()[0][0]][:, -1], whole[:, done + count - 1], atol=1e-5)


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_last_logits_are_those_of_the_last_position(dialect: str) -> None:
    for tail in ("", "softcap"):
        graph = attends(tail, dialect)
        program = ag.run(graph, "kv_cache{last_logits=true}", parity="none", reproducer=False).program
        prefill = program.graphs["prefill"]
        label = prefill.outputs()[0][0]
        assert prefill.outputs()[0][1].shape == ("batch", 1, 32)
        assert program.graphs["decode"].outputs()[0][1].shape == ("batch", 1, 32)
        ids = {"input_ids": np.random.default_rng(0).integers(0, 32, (2, LENGTH))}
        found = prefill.run(with_initial_slots(prefill, ids))[label]
        np.testing.assert_allclose(found, graph.run(ids)[label][:, -1:], atol=1e-5)


def test_last_logits_are_refused_with_the_reason() -> None:
    graph = attends("softmax", "fx")
    with pytest.raises(PassError, match=r"last_logits: .* come from log_softmax.*not from a linear head"):
        ag.run(graph, "kv_cache{last_logits=true}", reproducer=False)
    tapped = zoo.captured("llama").clone()
    with tapped.edit("t") as editor:
        editor.add_output(dict(tapped.outputs())["logits"], "seen")
    with pytest.raises(PassError, match="read elsewhere as well"), tapped.edit("t") as editor:
        keep_last_logits(editor)
    with pytest.raises(OptionError, match="last_logits is for the prefill graph"):
        ag.run(graph, "kv_cache{last_logits=true graphs=combined}")


def test_later_passes_run_on_each_graph() -> None:
    graph = zoo.captured("llama")
    result = ag.run(graph, f"kv_cache, steer{{vector={VECTOR} site=blocks.1.resid_post fold=false}}, dce")
    assert list(result.reports) == ["prefill", "decode"]
    assert all([row.name for row in report.rows] == ["kv_cache", "steer", "dce"] for report in result.reports.values())
    steered = ag.run(graph, f"steer{{vector={VECTOR} site=blocks.1.resid_post fold=false}}").graph
    inputs = inputs_of(graph)
    whole = steered.run(inputs)["logits"][:, [7, 8, 9, 10]]
    assert np.abs(through(result.program, inputs, (8,)) - whole).max() < 1e-5 * np.abs(whole).max()
    assert np.abs(whole - graph.run(inputs)["logits"][:, [7, 8, 9, 10]]).max() > 1e-2
    assert [record.name for record in result.program.graphs["decode"].history] == ["kv_cache", "steer", "dce"][:2]


def test_what_a_program_cannot_take_is_said() -> None:
    graph = zoo.captured("llama")
    result = ag.run(graph, "kv_cache", parity="none", reproducer=False)
    with pytest.raises(InputError, match="program of 2 graphs") as caught:
        _ = result.graph
    assert "kv_cache{graphs=combined}" in caught.value.hint
    assert len(result.report.rows) == 1  # one pass, one report
    with pytest.raises(PassError, match="it needs statistics, and llama computes one token at a time") as refused:
        ag.run(result.program.graphs["decode"], "sparsify{sparsity=0.4}", reproducer=False)
    assert "before the pass" in refused.value.hint
    with pytest.raises(PassError, match="has state already"):
        ag.run(graph, "kv_cache, kv_cache{form=static max_length=9}", reproducer=False)


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_a_program_is_a_folder_with_one_file_of_weights(tmp_path: Path, dialect: str) -> None:
    graph = variant("llama", dialect)
    program = ag.run(graph, "kv_cache{last_logits=true}", parity="none", reproducer=False).program
    folder = program.save(tmp_path / "cached")
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".onnx", ".json", ".data"))
    assert {"prefill.onnx", "decode.onnx", "program.json"} <= set(names) and len([n for n in names if n.endswith(".data")]) == 1
    weights = sum(p.dtype.bits // 8 * int(np.prod(p.shape)) for p in graph.parameters() if p.dtype and p.shape)
    data = next(path for path in folder.iterdir() if path.suffix == ".data")
    assert data.stat().st_size < 1.2 * weights
    again = ag.load(folder)
    assert again.slots == program.slots and again.driver == program.driver
    inputs = inputs_of(graph)
    np.testing.assert_allclose(through(again, inputs, (4, 3)), through(program, inputs, (4, 3)), atol=1e-5)


def test_a_wrong_graph_is_not_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof by running: a decode graph that leaves the padding out is refused."""
    from actgraph.passes.cache import program as module

    right = module.for_one_token

    def wrong(combined: Graph, options: str = "") -> Graph:
        graph = right(combined, options)
        with graph.edit("wrong") as editor:
            for node in [node for node in graph.nodes() if node.op == "actgraph.attention"]:
                editor.set_operand(node, 3, None)
        return graph

    monkeypatch.setattr(module, "for_one_token", wrong)
    with pytest.raises(ActgraphError, match=r"the decode graph moves by"):
        ag.run(zoo.captured("gpt2"), "kv_cache", reproducer=False)
    assert PREFILL == "prefill"
