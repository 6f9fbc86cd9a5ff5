"""Steering that asks where a token stands means the same with and without a cache, in batches with padding as well.

GPT-2 learns its positions, so that a wrong one moves every logit; Llama rotates keys and queries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.errors import PassError
from actgraph.formats.onnx_export import to_onnx
from actgraph.graph import Editor, Graph, Value
from actgraph.graph.context import graph_context
from actgraph.graph.graph import Array
from actgraph.ops.dtypes import DType
from tests import zoo

PROMPTS = [[5, 17, 3, 80, 41, 9], [22, 7, 64], [33]]
NEW = 7
WIDTH = zoo.WIDTH
VECTOR = np.random.default_rng(3).normal(0, 2.0, WIDTH).astype(np.float32)


def _told(graph: Graph, editor: Editor, name: str) -> Value:
    """A context value with one entry a row, as a column."""
    return editor.insert("reshape", [graph_context(graph, editor, name)], {"shape": (-1, 1)}).output


def _positive(editor: Editor, number: Value) -> Value:
    """1 where an integer is above 0, else 0."""
    return editor.insert("clip", [editor.insert("cast", [number], {"to": DType.F32}).output, 0.0, 1.0]).output


def _zero(editor: Editor, number: Value) -> Value:
    """1 where an integer is 0, else 0."""
    other = _positive(editor, editor.insert("mul", [number, number]).output)
    return editor.insert("add", [editor.insert("mul", [other, np.float32(-1)]).output, np.float32(1)]).output


def after(graph: Graph, editor: Editor) -> Value:
    """Tokens from position 4 on."""
    return _positive(editor, editor.insert("sub", [graph_context(graph, editor, "positions"), np.asarray(3)]).output)


def prompt_only(graph: Graph, editor: Editor) -> Value:
    operands = [_told(graph, editor, "prompt_lengths"), graph_context(graph, editor, "positions")]
    return _positive(editor, editor.insert("sub", operands).output)


def generated_only(graph: Graph, editor: Editor) -> Value:
    following = editor.insert("add", [graph_context(graph, editor, "positions"), np.asarray(1)]).output
    return _positive(editor, editor.insert("sub", [following, _told(graph, editor, "prompt_lengths")]).output)


def last_of_the_prompt(graph: Graph, editor: Editor) -> Value:
    following = editor.insert("add", [graph_context(graph, editor, "positions"), np.asarray(1)]).output
    return _zero(editor, editor.insert("sub", [following, _told(graph, editor, "prompt_lengths")]).output)


def one_row(graph: Graph, editor: Editor) -> Value:
    return _zero(editor, editor.insert("sub", [_told(graph, editor, "row_index"), np.asarray(1)]).output)


def tokens_only(graph: Graph, editor: Editor) -> Value:
    return editor.insert("cast", [graph_context(graph, editor, "valid_tokens")], {"to": DType.F32}).output


Clause = Callable[[Graph, Editor], Value]
CLAUSES: dict[str, Clause] = {
    f.__name__: f for f in (after, prompt_only, generated_only, last_of_the_prompt, one_row, tokens_only)
}


def applies(clause: str, positions: Array, prompt: int, row: int) -> Array:
    """Which tokens of a row the clause is about, said once more in numpy."""
    return {
        "after": positions >= 4,
        "prompt_only": positions < prompt,
        "generated_only": positions >= prompt,
        "last_of_the_prompt": positions == prompt - 1,
        "one_row": np.full(len(positions), row == 1),
        "tokens_only": np.full(len(positions), True),
        "": np.full(len(positions), False),
    }[clause]


@functools.cache
def _captured(name: str, dialect: str) -> Graph:
    graph = zoo.captured(name)
    return graph if dialect == "fx" else to_onnx(graph)


@functools.cache
def _steered(name: str, dialect: str, clause: str) -> Graph:
    graph = _captured(name, dialect).clone()
    with graph.edit("test") as editor:
        strength = CLAUSES[clause](graph, editor)
        editor.insert_at(graph.site("blocks.0.resid_post"), "actgraph.shift", [VECTOR, None, strength])
    graph.verify()
    return graph


@functools.cache
def cached(name: str, dialect: str, clause: str, form: str) -> ag.Compiled:
    return ag.compile(ag.run(_steered(name, dialect, clause), f"kv_cache{{form={form} graphs=combined}}").graph)


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


@pytest.mark.parametrize("clause", CLAUSES)
@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
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
    for clause in ("prompt_only", "generated_only", "last_of_the_prompt", "after", "tokens_only"):
        whole = cached("gpt2", "fx", clause, "growing")
        pieces = ag.compile(whole.graph, chunk=2)
        assert ag.generate(pieces, PROMPTS, NEW, stop_at_end=False) == ag.generate(whole, PROMPTS, NEW, stop_at_end=False)


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_a_step_is_not_a_place(dialect: str) -> None:
    """The step is one number for all tokens of a call: computed again at a later step, a token would be another one."""
    graph = _captured("gpt2", dialect).clone()
    with graph.edit("test") as editor:
        strength = editor.insert("cast", [graph_context(graph, editor, "step")], {"to": DType.F32}).output
        editor.insert_at(graph.site("blocks.0.resid_post"), "actgraph.shift", [VECTOR, strength])
    with pytest.raises(PassError, match="asks for the number of the step"):
        ag.run(graph, "kv_cache")


@pytest.mark.parametrize("clause", CLAUSES)
@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
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
