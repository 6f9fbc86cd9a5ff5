"""Programs in sessions: which graph computes what, in which engine, and what ``compile`` refuses."""

from __future__ import annotations

import functools
import itertools
import shutil
from collections.abc import Sequence

import numpy as np
import pytest

import actgraph as ag
from actgraph.errors import InputError, UnsupportedError
from actgraph.formats.onnx_export import to_onnx
from actgraph.graph.graph import Array
from actgraph.graph.slots import initial
from tests import zoo

PROMPTS = [[5, 17, 3, 80, 41, 9], [22, 7, 64], [33]]
NEW = 7
TOKENS = np.random.default_rng(8).integers(3, zoo.VOCAB, (1, 20))
every_dialect = pytest.mark.parametrize("dialect", ["fx", "onnx"])


@functools.cache
def _source(dialect: str) -> ag.Graph:
    graph = zoo.captured("llama")
    return graph if dialect == "fx" else to_onnx(graph)


@functools.cache
def combined(dialect: str, options: str = "") -> ag.Graph:
    return ag.run(_source(dialect).clone(), f"kv_cache{{graphs=combined {options}}}").graph


@functools.cache
def _program(dialect: str, options: str = "") -> ag.Program:
    return ag.run(_source(dialect).clone(), f"kv_cache{{{options}}}" if options else "kv_cache").program


def program(dialect: str, options: str = "") -> ag.Program:
    return _program(dialect, options).clone()


def steered(graph: ag.Graph, scale: float = 3.0) -> ag.Graph:
    """A vector behind the first block."""
    vector = ", ".join(f"{value:.4f}" for value in np.random.default_rng(3).normal(0, scale, zoo.WIDTH))
    return ag.run(graph.clone(), f"steer{{vector=[{vector}] site=blocks.0.resid_post fold=false}}").graph


def calls(session: ag.Session, turns: Sequence[int]) -> list[Array]:
    edges = np.cumsum([0, *turns]) + session.length
    return [session.feed(TOKENS[:, start:stop])["logits"] for start, stop in itertools.pairwise(edges)]


def error(found: Array, expected: Array) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def tokens(made: ag.Compiled | ag.Graph | ag.Program, **options: object) -> list[tuple[int, ...]]:
    found = ag.generate(made, PROMPTS, NEW, stop_at_end=False, **options)  # type: ignore[call-overload]
    return [generation.tokens for generation in found]


# --- which graph ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["", "form=static"])
@every_dialect
def test_decode_alone_is_steered(dialect: str, options: str) -> None:
    """Prompts and turns of several tokens are computed by prefill, single tokens by decode."""
    plain = program(dialect, options)
    edited = ag.Program({"prefill": plain.graphs["prefill"], "decode": steered(plain.graphs["decode"])}, plain.driver)
    whole, other = combined(dialect, options), steered(combined(dialect, options))
    session, unsteered, everywhere = (ag.compile(model).session() for model in (edited, whole, other))
    first = calls(session, (6,))[0]
    assert error(first, calls(unsteered, (6,))[0]) < 1e-5
    assert error(first, calls(everywhere, (6,))[0]) > 1e-2
    # The reference: each call with the graph that is to compute it, on the state that the others left.
    reference, state = [], {slot.input: initial(slot, 1) for slot in plain.slots.values()}
    for stage, start, stop in (("", 0, 6), ("s", 6, 7), ("s", 7, 8), ("", 8, 11), ("s", 11, 12)):
        graph = other if stage else whole
        inputs = {
            "input_ids": TOKENS[:, start:stop], "attention_mask": np.ones((1, stop), np.int64),
            "position_ids": np.arange(start, stop)[None], "cache_position": np.array([start]), **state,
        }  # fmt: skip
        results = graph.run({value.name: inputs[value.name] for value in graph.inputs() if value.name in inputs})
        state = {slot.input: results[slot.output] for slot in plain.slots.values()}
        reference.append(results["logits"])
    found = [first, *calls(session, (1, 1, 3, 1))]
    assert all(error(a, b) < 1e-5 for a, b in zip(found, reference, strict=True))
    assert error(found[1], calls(unsteered, (1,))[0]) > 1e-2


@pytest.mark.parametrize("options", ["", "last_logits=true", "form=static"])
@every_dialect
def test_a_program_says_what_one_graph_says(dialect: str, options: str) -> None:
    expected = tokens(_source("fx"))
    both = ag.compile(program(dialect, options)), ag.compile(combined(dialect, options.replace("last_logits=true", "")))
    for made in both:
        assert tokens(made) == expected
        assert [ag.generate(made, prompt, NEW, stop_at_end=False).tokens for prompt in PROMPTS] == expected
    drawn = [tokens(made, temperature=1.5, seed=4) for made in both]
    assert drawn[0] == drawn[1] != expected


@every_dialect
def test_every_single_token_is_decoded(dialect: str) -> None:
    """A prompt of one token is still a prompt, and pieces of a prompt are one."""
    made = ag.compile(program(dialect), chunk=4)
    stages: list[tuple[str, int]] = []
    session = made.session()
    run = session._state.run

    def noted(stage: str, inputs: dict[str, Array], used: int) -> dict[str, Array]:
        stages.append((stage, used))
        return run(stage, inputs, used)

    session._state.run = noted  # type: ignore[method-assign]
    calls(session, (9, 1, 2, 1))
    assert stages == [("prefill", 0), ("prefill", 4), ("prefill", 8), ("decode", 9), ("prefill", 10), ("decode", 12)]
    stages.clear()
    session.reset()
    calls(session, (1, 1))
    assert stages == [("prefill", 0), ("decode", 1)]


# --- engines --------------------------------------------------------------------------------------------------------------


def test_onnxruntime_exports_every_graph() -> None:
    source = program("fx")
    made = ag.compile(source, engine="onnxruntime")
    assert {name: graph.dialect for name, graph in made.program.graphs.items()} == {"prefill": "onnx", "decode": "onnx"}
    assert {graph.dialect for graph in source} == {"fx"}, "what is given is left as it is"
    assert made.program.driver == source.driver and made.program.slots.keys() == source.slots.keys()
    assert made.program.shared().keys(), "weights stay shared"
    made.program.verify()
    assert tokens(made) == tokens(_source("fx"))
    turns = (6, 1, 1, 4, 1)
    pairs = zip(calls(made.session(), turns), calls(ag.compile(source).session(), turns), strict=True)
    assert all(error(a, b) < 1e-5 for a, b in pairs)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("options", ["", "form=static"])
def test_torch_compile_says_the_same(options: str) -> None:
    made = ag.compile(program("fx", options), engine="torch.compile")
    turns = (6, 1, 1, 1)
    found = calls(made.session(), turns)
    assert all(
        error(a, b) < 1e-5 for a, b in zip(found, calls(ag.compile(_program("fx", options)).session(), turns), strict=True)
    )
    assert (made.engine, made.lowering, made.why_explicit) == ("torch.compile", "held", "")
    expected = ag.generate(_source("fx"), PROMPTS[0], NEW, stop_at_end=False)
    assert ag.generate(made, PROMPTS[0], NEW, stop_at_end=False) == expected


# --- compile --------------------------------------------------------------------------------------------------------------


def test_how_a_compiled_model_shows() -> None:
    name = _source("fx").name
    assert repr(ag.compile(_source("fx"))) == f"<Compiled {name} for torch>"
    assert repr(ag.compile(combined("fx"))) == f"<Compiled {name} for torch, 4 slots held>"
    assert repr(ag.compile(combined("fx"), lowering="explicit")) == f"<Compiled {name} for torch, 4 slots explicit>"
    made = ag.compile(program("onnx"))
    assert repr(made) == f"<Compiled {made.program.name} for onnxruntime, 4 slots held>"
    assert made.capacity == 64 and made.graph is made.program.graphs["prefill"]
    assert {"input_ids", "attention_mask"} <= made.inputs.keys()


@every_dialect
def test_what_cannot_be_compiled(dialect: str) -> None:
    model = combined(dialect)
    with pytest.raises(InputError, match="there is no engine 'tensorrt'") as caught:
        ag.compile(model, engine="tensorrt")
    assert "choose auto, torch, torch.compile, onnxruntime" in str(caught.value)
    with pytest.raises(InputError, match="there is no lowering 'implicit'") as caught:
        ag.compile(model, lowering="implicit")
    assert "choose held, explicit" in str(caught.value)
    with pytest.raises(InputError, match="chunk is 0"):
        ag.compile(model, chunk=0)
    if dialect == "fx":  # nothing would be compiled
        with pytest.raises(UnsupportedError, match=r"generates code for graphs that hold their slots, .*: no slots"):
            ag.compile(_source(dialect), engine="torch.compile")
        with pytest.raises(UnsupportedError, match=r"generates code for graphs that hold their slots, .*: asked for"):
            ag.compile(model, engine="torch.compile", lowering="explicit")
    if dialect == "onnx":
        for engine in ("torch", "torch.compile"):
            with pytest.raises(UnsupportedError, match="is an ONNX graph, which torch does not run"):
                ag.compile(model, engine=engine)


@every_dialect
def test_edits_after_compiling_change_nothing(dialect: str) -> None:
    source = program(dialect)
    made = ag.compile(source)
    key = made.key
    before = calls(made.session(), (6, 1))
    source.apply(lambda graph: _cut(graph))
    assert all(np.array_equal(a, b) for a, b in zip(calls(made.session(), (6, 1)), before, strict=True))
    assert made.key == key != ag.compile(source).key
    assert error(calls(ag.compile(source).session(), (6,))[0], before[0]) > 1e-2


def _cut(graph: ag.Graph) -> None:
    with graph.edit("test") as editor:
        logits = dict(graph.outputs())["logits"]
        editor.redirect(logits, editor.insert("mul", [logits, np.float32(0.5)]).output)


@every_dialect
def test_a_call_without_a_session(dialect: str) -> None:
    """Empty slots, and the outputs without them."""
    made = ag.compile(program(dialect))
    inputs = {"input_ids": TOKENS[:, :6], "attention_mask": np.ones((1, 6), np.int64), "position_ids": np.arange(6)[None]}
    results = made({name: array for name, array in inputs.items() if name in made.inputs})
    assert list(results) == ["logits"]
    assert error(results["logits"], calls(made.session(), (6,))[0]) < 1e-5
