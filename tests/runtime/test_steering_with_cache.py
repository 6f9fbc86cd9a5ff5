"""Steering that asks where a token stands means the same with and without a cache, in batches with padding as well.

GPT-2 learns its positions, so that a wrong one moves every logit; Llama rotates keys and queries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.errors import PassError
from actgraph.formats.onnx_export import to_onnx
from actgraph.graph import Editor, Graph, Value
from actgraph.graph.context import graph_context
from actgraph.graph.graph import Array
from actgraph.graph.program import Program
from actgraph.ops.dtypes import DType
from actgraph.passes.cache.kv_cache import KeyValueCache
from actgraph.passes.steer.steer import Steer
from tests import zoo

PROMPTS = [[5, 17, 3, 80, 41, 9], [22, 7, 64], [33]]
NEW = 7
WIDTH = zoo.WIDTH
run = functools.partial(ag.run, parity="none", reproducer=False)
VECTOR = np.random.default_rng(3).normal(0, 2.0, WIDTH).astype(np.float32)


def _told(graph: Graph, editor: Editor, name: str) -> Value:
    """A context value with one entry a row, as a column."""
    return editor.insert("reshape", [graph_context(graph, editor, name)], {"shape": (-1, 1)}).output


def _zero(editor: Editor, number: Value) -> Value:
    """1 where an integer is 0, else 0."""
    square = editor.insert("cast", [editor.insert("mul", [number, number]).output], {"to": DType.F32}).output
    other = editor.insert("clip", [square, 0.0, 1.0]).output
    return editor.insert("add", [editor.insert("mul", [other, np.float32(-1)]).output, np.float32(1)]).output


def last_of_the_prompt(graph: Graph, editor: Editor) -> Value:
    following = editor.insert("add", [graph_context(graph, editor, "positions"), np.asarray(1)]).output
    return _zero(editor, editor.insert("sub", [following, _told(graph, editor, "prompt_lengths")]).output)


def one_row(graph: Graph, editor: Editor) -> Value:
    return _zero(editor, editor.insert("sub", [_told(graph, editor, "row_index"), np.asarray(1)]).output)


def tokens_only(graph: Graph, editor: Editor) -> Value:
    return editor.insert("cast", [graph_context(graph, editor, "valid_tokens")], {"to": DType.F32}).output


Clause = Callable[[Graph, Editor], Value]
#: What the option ``where`` of steer does not say (yet), built by hand.
BY_HAND: dict[str, Clause] = {f.__name__: f for f in (last_of_the_prompt, one_row, tokens_only)}
WHERE = ("prompt", "generated", "4:", ":4", "2:8", "generated & 5:9")
CLAUSES = (*WHERE, *BY_HAND)


#: Every clause in both dialects and in both models: GPT-2 in one dialect, Llama in the other, in turn.
PAIRS = [(name, ("fx", "onnx")[(n + other) % 2], clause) for n, clause in enumerate(CLAUSES)
         for other, name in enumerate(("gpt2", "llama"))]  # fmt: skip


def applies(clause: str, positions: Array, prompt: int, row: int) -> Array:
    """Which tokens of a row the clause is about, said once more in numpy."""
    found: dict[str, Array] = {
        "prompt": positions < prompt,
        "generated": positions >= prompt,
        "4:": positions >= 4,
        ":4": positions < 4,
        "2:8": (positions >= 2) & (positions < 8),
        "generated & 5:9": (positions >= prompt) & (positions >= 5) & (positions < 9),
        "last_of_the_prompt": positions == prompt - 1,
        "one_row": np.full(len(positions), row == 1),
        "tokens_only": np.full(len(positions), True),
        "": np.full(len(positions), False),
    }
    return found[clause]


def steer(clause: str) -> Steer:
    return Steer(site="blocks.0.resid_post", vector=tuple(VECTOR.tolist()), where=clause)


def _captured(name: str, dialect: str) -> Graph:
    return zoo.captured(name) if dialect == "fx" else zoo.exported(name)


@functools.cache
def _steered(name: str, dialect: str, clause: str) -> Graph:
    graph = _captured(name, dialect)
    if clause not in BY_HAND:
        return run(graph, steer(clause)).graph
    with graph.edit("test") as editor:
        strength = BY_HAND[clause](graph, editor)
        editor.insert_at(graph.site("blocks.0.resid_post"), "actgraph.shift", [VECTOR, None, strength])
    graph.verify()
    return graph


@functools.cache
def cached(name: str, dialect: str, clause: str, form: str) -> ag.Compiled:
    return ag.compile(run(_steered(name, dialect, clause), KeyValueCache(form=form, graphs="combined")).graph)


@functools.cache
def reference(name: str, clause: str, row: int, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> Array:
    """Logits [prompt + tokens, vocabulary] of one row from the eager model, with a hook that adds the vector."""
    model = zoo.model(name)
    ids = torch.tensor([[*prompt, *tokens]])
    place = applies(clause, np.arange(ids.shape[1]), len(prompt), row)
    shift = torch.from_numpy(place[None, :, None] * VECTOR)
    block = model.transformer.h[0] if name == "gpt2" else model.model.layers[0]

    def add(module: torch.nn.Module, args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> object:
        return output + shift if isinstance(output, torch.Tensor) else (output[0] + shift, *output[1:])

    handle = block.register_forward_hook(add)
    try:
        with torch.no_grad():
            result: Array = model(ids).logits[0].numpy()
    finally:
        handle.remove()
    return result


def batch(prompts: list[list[int]]) -> tuple[Array, Array]:
    """Padded on the left."""
    longest = max(map(len, prompts))
    ids = np.asarray([[0] * (longest - len(p)) + p for p in prompts])
    return ids, np.asarray([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])


def fed(compiled: ag.Compiled, prompts: list[list[int]], following: Array) -> Array:
    """Logits [rows, places, vocabulary] at every place: the prompts in one call, the ``following`` tokens one by one."""
    session = compiled.session(len(prompts))
    parts = [session.feed(*batch(prompts))["logits"]]
    parts += [session.feed(column[:, None])["logits"][:, -1:] for column in following.T]
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize(("name", "dialect", "clause"), PAIRS)
def test_logits_at_every_place(name: str, dialect: str, clause: str) -> None:
    """Of prompts padded on the left and of tokens after them, against the eager model with a hook, row by row."""
    following = np.random.default_rng(5).integers(1, zoo.VOCAB, (len(PROMPTS), 5))
    compiled = {form: cached(name, dialect, clause, form) for form in ("growing", "static")}
    compiled["none"] = ag.compile(_steered(name, dialect, clause))
    logits = {form: fed(each, PROMPTS, following) for form, each in compiled.items()}
    moved = 0.0
    for row, prompt in enumerate(PROMPTS):
        expected = reference(name, clause, row, tuple(prompt), tuple(following[row].tolist()))
        moved += float(np.abs(expected - reference(name, "", row, tuple(prompt), tuple(following[row].tolist()))).max())
        for form, found in logits.items():
            np.testing.assert_allclose(found[row, -len(expected) :], expected, atol=2e-5 * np.abs(expected).max(), err_msg=form)
    assert moved > 0.1, "the clause applies to something"


def test_a_prompt_in_chunks_is_one_prompt() -> None:
    """The length of the prompt is that of all its chunks, and a chunk goes on where the last one ended."""
    for clause in ("prompt", "generated", "last_of_the_prompt", "4:", "tokens_only"):
        whole = cached("gpt2", "fx", clause, "growing")
        pieces = ag.compile(whole.graph, chunk=2)
        assert ag.generate(pieces, PROMPTS, NEW, stop_at_end=False) == ag.generate(whole, PROMPTS, NEW, stop_at_end=False)


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_a_step_is_not_a_place(dialect: str) -> None:
    """The step is one number for all tokens of a call: computed again at a later step, a token would be another one."""
    graph = _captured("gpt2", dialect)
    with graph.edit("test") as editor:
        strength = editor.insert("cast", [graph_context(graph, editor, "step")], {"to": DType.F32}).output
        editor.insert_at(graph.site("blocks.0.resid_post"), "actgraph.shift", [VECTOR, strength])
    with pytest.raises(PassError, match="asks for the number of the step"):
        ag.run(graph, "kv_cache")


@pytest.mark.parametrize(("name", "dialect", "clause"), PAIRS)
def test_generation(name: str, dialect: str, clause: str) -> None:
    """The same tokens without a cache, with one that grows and one of fixed size; together and, where rows are alone, alone."""
    graph = _steered(name, dialect, clause)
    uncached = ag.generate(graph, PROMPTS, NEW, stop_at_end=False)
    for row, made in enumerate(uncached):
        logits = reference(name, clause, row, made.prompt_tokens, made.tokens)
        assert logits[len(made.prompt_tokens) - 1 : -1].argmax(-1).tolist() == list(made.tokens)
    for form in ("growing", "static"):
        assert ag.generate(cached(name, dialect, clause, form), PROMPTS, NEW, stop_at_end=False) == uncached
    if clause != "one_row":
        alone = [ag.generate(cached(name, dialect, clause, "growing"), p, NEW, stop_at_end=False) for p in PROMPTS]
        assert alone == uncached
    plain = ag.generate(_captured(name, dialect), PROMPTS, NEW, stop_at_end=False)
    assert plain != uncached, "the clause applies to something"


# --- programs, either order, rings, masks without position ids --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dialect", "clause"),
    [("gpt2", "fx", "prompt"), ("gpt2", "onnx", "generated"), ("llama", "fx", "2:8"), ("llama", "onnx", "prompt")],
)
def test_programs_and_a_cache_that_was_there_before(name: str, dialect: str, clause: str) -> None:
    """Steering, then the cache; or the cache, then steering each graph of the program, or the combined one."""
    expected = ag.generate(_steered(name, dialect, clause), PROMPTS, NEW, stop_at_end=False)
    made = {
        "program": run(_steered(name, dialect, clause), KeyValueCache()).program,
        "program, then steer": run(_plain_cache(name, dialect, "program"), steer(clause)).program,
        "combined, then steer": run(_plain_cache(name, dialect, "combined"), steer(clause)).program,
    }
    assert len(made["program, then steer"]) == 2
    for what, program in made.items():
        for chunk in (512, 2):
            found = ag.generate(ag.compile(program, chunk=chunk), PROMPTS, NEW, stop_at_end=False)
            assert found == expected, (what, chunk)
    assert expected != ag.generate(_captured(name, dialect), PROMPTS, NEW, stop_at_end=False), "the clause applies"


@functools.cache
def _plain_cache(name: str, dialect: str, graphs: Literal["program", "combined"]) -> Program:
    return run(_captured(name, dialect), KeyValueCache(graphs=graphs)).program


@pytest.mark.parametrize(("dialect", "clause"), [("fx", "prompt"), ("onnx", "generated"), ("fx", "5:12")])
def test_a_ring_gives_what_a_whole_cache_does(dialect: str, clause: str) -> None:
    """Gemma 3 with windows of 4: positions go on where rings go around, as a program and as one graph, in either order."""
    plain = _captured("gemma3", dialect)
    graph, ring = run(plain, steer(clause)).graph, KeyValueCache(form="ring", max_length=24)
    following = np.random.default_rng(5).integers(1, zoo.VOCAB, (len(PROMPTS), 12))
    valid = np.concatenate([batch(PROMPTS)[1], np.ones_like(following)], axis=1).astype(bool)
    whole = fed(ag.compile(graph), PROMPTS, following)
    expected, size = whole[valid], np.abs(whole[valid]).max()
    assert np.abs(expected - fed(ag.compile(plain), PROMPTS, following)[valid]).max() > 0.01 * size, "the clause applies"
    programs = (run(graph, ring).program, run(run(plain, ring).program, steer(clause)).program)
    for program in programs:
        np.testing.assert_allclose(fed(ag.compile(program), PROMPTS, following)[valid], expected, atol=2e-5 * size)
        last = fed(ag.compile(program, chunk=4), PROMPTS, following)[:, -12:]
        np.testing.assert_allclose(last, whole[:, -12:], atol=2e-5 * size)


@functools.cache
def _without_position_ids() -> Graph:
    """Llama as it is when nobody gives positions: it counts places, padding included (rotary does not mind)."""
    given = {
        "input_ids": torch.arange(3, 12).reshape(1, -1).expand(2, -1),
        "attention_mask": torch.ones(2, 9, dtype=torch.long),
    }
    dims: dict[str, Sequence[str | None]] = dict.fromkeys(given, ("batch", "seq"))
    graph = ag.trace(zoo.model("llama"), (), {**given, "use_cache": False}, dynamic=dims, name="llama")
    assert {value.name for value in graph.inputs()} == set(given)
    graph.companions = zoo.captured("llama").companions
    return graph


@pytest.mark.parametrize(("dialect", "clause"), [("fx", "generated"), ("onnx", ":4")])
def test_a_mask_without_position_ids_counts_real_tokens(dialect: str, clause: str) -> None:
    plain = _without_position_ids().clone() if dialect == "fx" else to_onnx(_without_position_ids())
    graph = run(plain, steer(clause)).graph
    following = np.random.default_rng(5).integers(1, zoo.VOCAB, (len(PROMPTS), 5))
    programs = {
        "uncached": graph,
        "growing": run(graph, KeyValueCache()).program,
        "static": run(graph, KeyValueCache(form="static", graphs="combined")).program,
        "kv_cache first": run(run(plain, KeyValueCache()).program, steer(clause)).program,
    }
    for what, model in programs.items():
        found = fed(ag.compile(model, chunk=4), PROMPTS, following)
        for row, prompt in enumerate(PROMPTS):
            expected = reference("llama", clause, row, tuple(prompt), tuple(following[row].tolist()))
            last = found[row, -5:]
            np.testing.assert_allclose(last, expected[-5:], atol=2e-5 * np.abs(expected).max(), err_msg=f"{what}, row {row}")
