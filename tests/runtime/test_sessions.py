"""Sessions of one compiled model: apart from each other, clean when they start, whatever became of others."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import actgraph as ag
from actgraph.errors import InputError
from actgraph.formats.onnx_export import to_onnx
from actgraph.graph.graph import Array
from tests import zoo

FORMS = ("growing", "static", "growing graphs=combined", "static graphs=combined")
PROMPTS = [[5, 17, 3, 80, 41, 9], [22, 7, 64], [33], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
NEW = 8
every_form = pytest.mark.parametrize("form", FORMS)
every_dialect = pytest.mark.parametrize("dialect", ["fx", "onnx"])


@functools.cache
def model(dialect: str, form: str) -> ag.Graph | ag.Program:
    graph = zoo.captured("gpt2")
    result = ag.run(graph if dialect == "fx" else to_onnx(graph), f"kv_cache{{form={form}}}")
    return result.graph if "combined" in form else result.program


@functools.cache
def compiled(dialect: str, form: str) -> ag.Compiled:
    return ag.compile(model(dialect, form))


def generate(made: ag.Compiled | ag.Graph, prompt: list[int]) -> ag.Generation:
    return ag.generate(made, prompt, NEW, stop_at_end=False)


@functools.cache
def expected(row: int) -> ag.Generation:
    """Without a cache."""
    return generate(zoo.captured("gpt2"), PROMPTS[row])


@every_form
@every_dialect
def test_generation_again_and_again(dialect: str, form: str) -> None:
    """A graph or a program, compiled or not; the second time as the first, drawn or not; and nothing at all."""
    made = compiled(dialect, form)
    for _ in range(2):
        assert [generate(made, prompt) for prompt in PROMPTS] == [expected(row) for row in range(len(PROMPTS))]
    assert generate(model(dialect, form), PROMPTS[0]) == expected(0)  # type: ignore[arg-type]
    assert ag.generate(made, PROMPTS, NEW, stop_at_end=False) == [expected(row) for row in range(len(PROMPTS))]
    draws = [ag.generate(made, PROMPTS[0], NEW, temperature=2.0, seed=seed, stop_at_end=False).tokens for seed in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]
    nothing = ag.generate(made, PROMPTS[0], 0)
    assert (nothing.tokens, nothing.text, nothing.reason) == ((), "", "length")
    assert list(ag.stream(made, PROMPTS[0], 0)) == []


@every_form
@every_dialect
def test_interleaved_sessions(dialect: str, form: str) -> None:
    """In turns, of different lengths, and some that are left in the middle."""
    streams = [ag.stream(compiled(dialect, form), prompt, NEW, stop_at_end=False) for prompt in PROMPTS]
    made: list[list[int | None]] = [[] for _ in PROMPTS]
    for turn in range(NEW):
        left = ag.stream(compiled(dialect, form), [turn + 1, 50], NEW)
        next(left)
        left.close()  # type: ignore[attr-defined]
        for row, steps in enumerate(streams):
            made[row].append(next(steps).token)
    assert [tuple(tokens) for tokens in made] == [expected(row).tokens for row in range(len(PROMPTS))]


@every_form
@every_dialect
def test_threads_share_one_compiled(dialect: str, form: str) -> None:
    fresh = ag.compile(model(dialect, form))  # opened by whoever comes first
    rows = [row for _ in range(3) for row in range(len(PROMPTS))]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda row: generate(fresh, PROMPTS[row]), rows)) == [expected(row) for row in rows]


class Killed(BaseException):
    """What a user's interrupt is."""


@pytest.mark.parametrize("late", [False, True])
@every_form
@every_dialect
def test_a_session_that_was_killed(dialect: str, form: str, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before or after its slots were written: a new session is clean; the old one, of which it is not known what it holds, says
    that it must be reset, and is clean then."""
    made = compiled(dialect, form)

    def logits(session: ag.Session, tokens: list[int]) -> Array:
        return session.feed(np.asarray([tokens]))["logits"][0, -1]

    whole = made.session()
    reference = [logits(whole, PROMPTS[0]), logits(whole, [11]), logits(whole, [12])]
    session = made.session()
    assert np.array_equal(logits(session, PROMPTS[0]), reference[0])
    state, run = session._state, session._state.run

    def killed(*args: object) -> dict[str, Array]:
        if late:
            run(*args)  # type: ignore[arg-type]
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(state, "run", killed)
        with pytest.raises(Killed):
            logits(session, [60])
    new = made.session()
    assert [np.array_equal(logits(new, t), r) for t, r in zip((PROMPTS[0], [11], [12]), reference, strict=True)] == [True] * 3
    assert session.length == len(PROMPTS[0])
    with pytest.raises(InputError, match="reset"):
        logits(session, [11])
    session.reset()
    assert session.length == 0
    assert [np.array_equal(logits(session, t), r) for t, r in zip((PROMPTS[0], [11]), reference, strict=False)] == [True] * 2
