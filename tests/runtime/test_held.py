"""Slots that are written in place give what slots that go in and come out give, in every form, and nothing else is written."""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import actgraph as ag
from actgraph import formats
from actgraph.errors import InputError
from actgraph.formats.onnx_export import to_onnx
from actgraph.graph.graph import Array
from actgraph.graph.slots import slots_of
from tests import zoo

#: Gemma 3 has windows of 4 in its first layers, and its last sees all.
WINDOW = 4
pytestmark = pytest.mark.usefixtures("without_kernels")

GROWING, STATIC, RING = (f"form={form} graphs=combined" for form in ("growing", "static", "ring"))
COMBINED = (GROWING, STATIC, RING)
STORED = (
    "form=growing storage=int8 graphs=combined",
    "form=static storage=int8 graphs=combined",
    "form=ring storage=float16 graphs=combined",
)
PROGRAMS = ("form=growing", "form=static", "form=ring", "form=ring storage=int8")
every_dialect = pytest.mark.parametrize("dialect", ["fx", "onnx"])
#: Tokens of each call: a prompt, single tokens, another turn, single tokens, and a turn that goes around a ring twice.
TURNS = (11, 1, 1, 1, 6, 1, 1, 9, 1)
TOKENS = np.random.default_rng(5).integers(3, zoo.VOCAB, (2, 64))

Results = list[dict[str, Array]]


@functools.cache
def model(dialect: str, options: str, name: str = "gemma3") -> ag.Graph | ag.Program:
    result = ag.run(
        zoo.captured(name) if dialect == "fx" else zoo.exported(name), f"kv_cache{{{options}}}", parity="none", reproducer=False
    )
    return result.graph if "combined" in options else result.program


@functools.cache
def compiled(dialect: str, options: str, lowering: str = "held", chunk: int = 512, name: str = "gemma3") -> ag.Compiled:
    return ag.compile(model(dialect, options, name), lowering=lowering, chunk=chunk)


def converse(session: ag.Session, turns: Sequence[int] = TURNS, padding: int = 0) -> Results:
    """The results of feeding these numbers of tokens. padding: of them that stand on the left of the second row's prompt."""
    found, at = [], session.length
    for count in turns:
        valid = np.ones((session.batch, count), np.int64)
        if not at and padding:
            valid[1, :padding] = 0
        found.append(session.feed(TOKENS[: session.batch, at : at + count], valid if padding else None))
        at += count
    return found


def same(left: Results, right: Results, tolerance: float) -> bool:
    """Whether results have the same names and shapes, and differ by at most ``tolerance`` of the largest number."""
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(a[n].shape == b[n].shape and close(a[n], b[n], tolerance) for n in a)
        for a, b in zip(left, right, strict=True)
    )


def close(a: Array, b: Array, tolerance: float) -> bool:
    if not tolerance or not b.size:
        return np.array_equal(a, b)
    return bool(np.abs(a.astype(np.float64) - b).max() <= tolerance * np.abs(b).max())


def tolerance_of(dialect: str, options: str) -> float:
    """0 where held does the same sums in the same order; not so fused attentions, and those over the front of a buffer."""
    if "int8" in options or "float16" in options:
        return 0.0
    return 1e-5 if ("growing" in options) == (dialect == "onnx") else 0.0


# --- held is explicit -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dialect", "options"),
    [
        *((dialect, options) for dialect in ("fx", "onnx") for options in (GROWING, RING, PROGRAMS[0], PROGRAMS[2])),
        ("fx", STATIC), ("onnx", PROGRAMS[1]), ("onnx", STORED[0]), ("fx", STORED[1]), ("onnx", STORED[2]), ("fx", PROGRAMS[3]),
    ],
)  # fmt: skip
def test_held_is_explicit(dialect: str, options: str) -> None:
    """One row and two with padding; pieces of a prompt that are shorter and longer than the ring; turns after turns."""
    short, long = WINDOW - 1, WINDOW + 3
    for batch, padding, chunk in ((1, 0, long), (2, 0, short), (2, WINDOW + 1, short)):
        made, plain = (compiled(dialect, options, lowering, chunk) for lowering in ("held", "explicit"))
        held, explicit = made.session(batch), plain.session(batch)
        tolerance = 0.0 if padding and dialect == "onnx" else tolerance_of(dialect, options)
        assert same(converse(held, padding=padding), converse(explicit, padding=padding), tolerance), (batch, padding, chunk)
        assert held.bytes == explicit.bytes and held.length == sum(TURNS)
        assert (made.lowering, made.why_explicit) == ("held", "")
        assert (plain.lowering, plain.why_explicit) == ("explicit", "asked for")


@pytest.mark.parametrize("options", [*COMBINED, PROGRAMS[0]])
@every_dialect
def test_reset_is_a_new_session(dialect: str, options: str) -> None:
    made = compiled(dialect, options)
    fresh = converse(made.session(2))
    session = made.session(2)
    for turns, padding in (((7, 1, 3), 2), ((2, 1), 0)):  # with padding, fused attentions are left; without they come back
        converse(session, turns, padding)
        session.reset()
        assert session.length == 0
        assert same(converse(session), fresh, 0.0)
        session.reset()


@pytest.mark.parametrize("options", [*COMBINED, PROGRAMS[0]])
@every_dialect
def test_results_belong_to_the_caller(dialect: str, options: str) -> None:
    """No later call changes them, and writing into them changes no later call."""
    made = compiled(dialect, options)
    session, other = made.session(), made.session()
    kept, copies, at = [], [], 0
    for count in TURNS:
        results = session.feed(TOKENS[:1, at : at + count])
        kept.append(results)
        copies.append({name: array.copy() for name, array in results.items()})
        spoiled = other.feed(TOKENS[:1, at : at + count])
        assert same([spoiled], [results], 0.0)
        for array in spoiled.values():
            array[...] = 7
        at += count
    session.reset()
    del session
    gc.collect()
    made.session().feed(TOKENS[:1, ::-1])
    assert same(kept, copies, 0.0)


# --- entries --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dialect", "options"),
    [("fx", GROWING), ("onnx", GROWING), ("fx", STATIC), ("onnx", STATIC), ("fx", STORED[0]), ("onnx", STORED[1])],
)
def test_a_loaded_session_goes_on_as_the_original(dialect: str, options: str) -> None:
    made, plain = compiled(dialect, options), compiled(dialect, options, "explicit")
    source = made.session()
    converse(source, (9, 1))
    contents = source.read(0, source.length)
    assert all(array.shape[2] == 10 for array in contents.values()) and contents.keys() == {s.name for s in made.slots}
    reference = plain.session()
    converse(reference, (9, 1))
    tolerance = tolerance_of(dialect, options)
    assert same([contents], [reference.read(0, 10)], tolerance)
    copies = {name: array.copy() for name, array in contents.items()}
    for count in (10, 6):  # all, and a part of it
        part = {name: array[:, :, :count] for name, array in contents.items()}
        continued, twin = made.session(), plain.session()
        for session in (continued, twin):
            session.load(part, TOKENS[:1, :count])
        assert same([continued.read(2, count)], [twin.read(2, count)], 0.0)
        assert continued.bytes == twin.bytes
        turns = (5, 1, 1, 8, 1)
        assert same(converse(continued, turns), converse(twin, turns), tolerance)
        if count == 10:
            again = converse(source, turns)
            continued.reset()
            continued.load(part, TOKENS[:1, :count])
            assert same(converse(continued, turns), again, tolerance)
    assert same([contents], [copies], 0.0), "what was read or loaded is the caller's"


@every_dialect
def test_what_cannot_be_read_or_loaded(dialect: str) -> None:
    made = compiled(dialect, GROWING)
    session = made.session()
    converse(session, (5,))
    contents = session.read(0, 5)
    for start, stop in ((-1, 3), (3, 2), (0, 6)):
        with pytest.raises(InputError, match="holds 5 tokens"):
            session.read(start, stop)
    with pytest.raises(InputError, match="empty session"):
        session.load(contents, TOKENS[:1, :5])
    with pytest.raises(InputError, match="empty session of one row"):
        made.session(2).load(contents, TOKENS[:, :5])
    with pytest.raises(InputError, match="would have 5 tokens, not 4"):
        made.session().load(contents, TOKENS[:1, :4])
    with pytest.raises(InputError, match="do not fit the slots"):
        made.session().load({name: contents[name] for name in list(contents)[1:]}, TOKENS[:1, :5])
    for change in (
        lambda array: array[:, :1], lambda array: array.astype(np.float64), lambda array: np.concatenate([array, array]),
        lambda array: array[0, 0],
    ):  # fmt: skip  # one head would be repeated for all, and numbers converted
        with pytest.raises(InputError, match=r"takes f32\[1, \d, 5, \d+\], not"):
            made.session().load({name: change(array) for name, array in contents.items()}, TOKENS[:1, :5])
    with pytest.raises(InputError, match="the context holds 64 tokens, and 70 are to be loaded"):
        longer = {name: np.repeat(array[:, :, :1], 70, axis=2) for name, array in contents.items()}
        compiled(dialect, STATIC).session().load(longer, np.repeat(TOKENS[:1, :1], 70, axis=1))
    ring = compiled(dialect, RING)
    with pytest.raises(InputError, match="do not fit the slots"):  # what left the window is gone
        ring.session().load(contents, TOKENS[:1, :5])


@every_dialect
def test_bytes(dialect: str) -> None:
    """Entries of three layers, keys and values of two heads of eight float32, without the room kept for more."""
    entry = 3 * 2 * 2 * 8 * 4
    session = compiled(dialect, GROWING).session(2)
    assert session.bytes == 0
    for count, total in ((5, 5), (1, 6), (58, 64)):
        session.feed(TOKENS[:, :count])
        assert session.bytes == 2 * total * entry
    padded = compiled(dialect, GROWING).session(2)
    converse(padded, (7, 1), padding=3)
    assert padded.bytes == 2 * 8 * entry
    assert compiled(dialect, STATIC).session(2).bytes == 2 * 64 * entry


@functools.cache
def _roomy() -> ag.Graph:
    """A Llama of one layer for 512 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**zoo._LLAMA, "num_hidden_layers": 1, "max_position_embeddings": 512})
    return formats.load(zoo._random(LlamaForCausalLM(config), "llama"), name="roomy", length=8)


@pytest.mark.parametrize(
    ("dialect", "form"), [("fx", "growing"), ("onnx", "growing"), ("onnx", "growing storage=int8"), ("fx", "static")]
)
def test_growth(dialect: str, form: str) -> None:
    """Over the end of the first buffer and the next ones, by one token and by many, and from what was loaded."""
    tokens = np.random.default_rng(1).integers(3, zoo.VOCAB, (1, 400))
    graph = _roomy() if dialect == "fx" else to_onnx(_roomy())
    cached = ag.run(graph.clone(), f"kv_cache{{graphs=combined form={form}}}", parity="none", reproducer=False).graph
    made, plain = ag.compile(cached), ag.compile(cached, lowering="explicit")
    assert made.capacity == 512
    held, explicit, at = made.session(), plain.session(), 0
    tolerance = tolerance_of(dialect, form)
    for count in (62, 1, 1, 1, 60, 5, 1, 130, 1):
        new = tokens[:, at : at + count]
        assert same([held.feed(new)], [explicit.feed(new)], tolerance), (at, count)
        assert held.bytes == explicit.bytes
        at += count
    loaded, again = made.session(), plain.session()
    for session in (loaded, again):
        session.load(explicit.read(0, 64), tokens[:, :64])
    assert same([loaded.feed(tokens[:, 64:65])], [again.feed(tokens[:, 64:65])], tolerance)


# --- errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [GROWING, STATIC, RING, PROGRAMS[0]])
@every_dialect
def test_a_full_context(dialect: str, options: str) -> None:
    """Nothing is computed, and what still fits goes on."""
    session, other = (compiled(dialect, options).session() for _ in range(2))
    assert session.compiled.capacity == 64
    for each in (session, other):
        each.feed(TOKENS[:1, :60])
    with pytest.raises(InputError, match=r"context is full: 60 of 64 tokens are used, and 5 are to come"):
        session.feed(TOKENS[:1, :5])
    assert session.length == 60
    assert same([session.feed(TOKENS[:1, 60:])], [other.feed(TOKENS[:1, 60:])], 0.0)
    with pytest.raises(InputError, match="context is full"):
        session.feed(TOKENS[:1, :1])


def fail(session: ag.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of one token whose engine fails when it has written its slots."""
    state, run = session._state, session._state.run

    def failing(*args: object) -> dict[str, Array]:
        run(*args)  # type: ignore[arg-type]
        raise IndexError("in the engine")

    with monkeypatch.context() as patch:
        patch.setattr(state, "run", failing)
        with pytest.raises(IndexError, match="in the engine"):
            session.feed(TOKENS[:1, :1])


@pytest.mark.parametrize("lowering", ["held", "explicit"])
@pytest.mark.parametrize("options", [GROWING, PROGRAMS[2]])
@every_dialect
def test_a_call_that_fails(dialect: str, options: str, lowering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it wrote is not known: the session says so until it is reset, and others do not notice."""
    made = compiled(dialect, options, lowering)
    fresh, session, other = converse(made.session()), made.session(), made.session()
    converse(session, (5,)), converse(other, (11,))
    fail(session, monkeypatch)
    for count in (1, 3):
        with pytest.raises(InputError, match="an earlier call of the session failed") as caught:
            session.feed(TOKENS[:1, :count])
        assert "reset the session" in str(caught.value)
    assert session.length == 5
    assert same(converse(other, TURNS[1:]), fresh[1:], 0.0)
    session.reset()
    assert same(converse(session), fresh, 0.0)


@every_dialect
def test_tokens_that_do_not_fit_are_refused_and_change_nothing(dialect: str) -> None:
    session = compiled(dialect, GROWING).session(2)
    for tokens, valid in (
        (TOKENS[:1, :4], None), (TOKENS[:, :0], None), (TOKENS[0, :4], None), (TOKENS[:, :4], np.ones((2, 3))),
    ):  # fmt: skip
        with pytest.raises(InputError, match=r"both are \[2, n\], n > 0"):
            session.feed(tokens, valid)
    assert session.length == 0
    assert same(converse(session), converse(compiled(dialect, GROWING).session(2)), 0.0)
    with pytest.raises(InputError, match="batch is 0"):
        compiled(dialect, GROWING).session(0)


def test_a_failed_prompt_is_no_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without slots a session goes on after a failed call; the prompt is then the one that was computed."""
    from actgraph.graph.context import graph_context

    graph = zoo.captured("llama")
    with graph.edit("test") as editor:
        editor.add_output(graph_context(graph, editor, "prompt_lengths"), "told")
    session = ag.compile(graph).session()
    fail(session, monkeypatch)
    assert session.length == 0
    assert session.feed(TOKENS[:1, :4])["told"].tolist() == [4]
    assert session.feed(TOKENS[:1, 4:5])["told"].tolist() == [4]


# --- slots that somebody else reads ---------------------------------------------------------------------------------------


def _new(graph: ag.Graph, editor: ag.graph.Editor) -> None:
    editor.add_output(dict(graph.outputs())["present.0.key"], "seen")


def _old(graph: ag.Graph, editor: ag.graph.Editor) -> None:
    editor.add_output(graph.value("past_key_values.0.key"), "seen")


def _both(graph: ag.Graph, editor: ag.graph.Editor) -> None:
    editor.add_output(graph.value("past_key_values.1.value"), "seen")
    editor.add_output(dict(graph.outputs())["present.1.value"], "written")


def _view_of_old(graph: ag.Graph, editor: ag.graph.Editor) -> None:
    old = graph.value("past_key_values.0.key")
    editor.add_output(editor.insert("reshape", [old], {"shape": (-1, 8)}).output, "seen")


def _sum_of_old(graph: ag.Graph, editor: ag.graph.Editor) -> None:
    editor.add_output(editor.insert("add", [graph.value("past_key_values.0.key"), 1.0]).output, "seen")


def _sum_of_new(graph: ag.Graph, editor: ag.graph.Editor) -> None:
    editor.add_output(editor.insert("add", [dict(graph.outputs())["present.0.key"], 1.0]).output, "seen")


READERS = (_new, _old, _both, _view_of_old, _sum_of_old, _sum_of_new)
#: Every reader in both dialects, over the forms in turn.
READ = [(dialect, forms[(n + n // 2) % 2], reader) for n, reader in enumerate(READERS)
        for dialect, forms in (("fx", (GROWING, RING)), ("onnx", (STATIC, GROWING)))]  # fmt: skip


@pytest.mark.parametrize(("dialect", "options", "reader"), READ)
def test_a_slot_that_is_read(dialect: str, options: str, reader: Callable[[ag.Graph, ag.graph.Editor], None]) -> None:
    """Outputs are the old and the new content as the graph says, whole, and stay so."""
    graph = model(dialect, options)
    assert isinstance(graph, ag.Graph)
    graph = graph.clone()
    with graph.edit("test") as editor:
        reader(graph, editor)
    made = ag.compile(graph)
    held, explicit = made.session(2), ag.compile(graph, lowering="explicit").session(2)
    found = converse(held)
    assert same(found, converse(explicit), tolerance_of(dialect, options))
    assert "seen" in found[0] and made.lowering == "held"
    assert any(array.any() for array in found[-1].values())


@pytest.mark.parametrize(("dialect", "options"), [("fx", GROWING), ("onnx", RING), ("fx", PROGRAMS[0]), ("onnx", PROGRAMS[0])])
def test_cleaned_graphs(dialect: str, options: str) -> None:
    """What is computed twice is computed once: masks, positions, lengths."""
    source = model(dialect, options)
    text = "fold, cse, dce"
    cleaned = ag.run(source.clone(), text, parity="none", reproducer=False)
    made = ag.compile(cleaned.graph if isinstance(source, ag.Graph) else cleaned.program)
    for padding in (0, 3):
        found = converse(made.session(2), padding=padding)
        assert same(found, converse(compiled(dialect, options, "explicit").session(2), padding=padding), 1e-5)
    assert made.lowering == "held"


def _halved(dialect: str) -> ag.Graph:
    """A cache that forgets: what is kept is half of what is attended to."""
    graph = model(dialect, GROWING)
    assert isinstance(graph, ag.Graph)
    graph = graph.clone()
    with graph.edit("test") as editor:
        slot = slots_of(graph)["past_key_values.0.key"]
        kept = editor.insert("mul", [dict(graph.outputs())[slot.output], 0.5]).output
        editor.remove_output(slot.output)
        editor.write_slot(slot, kept)
    return graph


@every_dialect
def test_what_cannot_be_held_is_explicit_and_says_so(dialect: str) -> None:
    graph = _halved(dialect)
    made = ag.compile(graph)
    assert same(converse(made.session()), converse(ag.compile(graph, lowering="explicit").session()), 0.0)
    if dialect == "fx":
        assert made.lowering == "explicit" and "which is not cache_append" in made.why_explicit
        assert "slots explicit" in repr(made)
    else:  # onnxruntime holds any slot as a value of its own
        assert made.lowering == "held"
    plain = ag.compile(zoo.captured("gemma3") if dialect == "fx" else zoo.exported("gemma3"))
    plain.session()
    assert plain.why_explicit == "no slots" and "slots" not in repr(plain)


# --- threads --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dialect", "options"), [("fx", GROWING), ("fx", PROGRAMS[2]), ("onnx", PROGRAMS[2])])
def test_sessions_in_threads(dialect: str, options: str) -> None:
    """Several at once on a Compiled that nobody has opened, each with its own tokens and turns: as alone."""
    source = model(dialect, options)
    workers = 4

    def run(made: ag.Compiled, row: int, wait: Callable[[], object] = lambda: None) -> Results:
        tokens = np.random.default_rng(row).integers(3, zoo.VOCAB, (1 + row % 2, 64))
        wait()
        session, found, at = made.session(len(tokens)), [], 0
        for count in (3 + 5 * row, 1, 1, 4, 1, 1, 2 + row, 1):
            found.append(session.feed(tokens[:, at : at + count]))
            at += count
        return found

    single = ag.compile(source)
    alone = [run(single, row) for row in range(workers)]
    for _ in range(2):
        shared, barrier = ag.compile(source), threading.Barrier(workers)
        with ThreadPoolExecutor(workers) as pool:
            together = list(pool.map(lambda row: run(shared, row, barrier.wait), range(workers)))  # noqa: B023
        assert all(same(a, b, 0.0) for a, b in zip(together, alone, strict=True))
