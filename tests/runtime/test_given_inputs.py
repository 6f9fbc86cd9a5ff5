"""Inputs that hosts give beside tokens: in sessions, calls, generation and adapters, in every engine alike."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

import actgraph as ag
from actgraph.errors import InputError
from actgraph.formats.onnx_export import to_onnx
from actgraph.graph import Graph
from actgraph.graph.graph import Array
from tests import zoo

TOKENS = np.random.default_rng(3).integers(3, zoo.VOCAB, (3, 12))
VECTOR = [round(float(v), 3) for v in np.random.default_rng(4).normal(0, 0.5, zoo.WIDTH)]
SITE = "site=[blocks.0.resid_post, blocks.1.resid_post] fold=false"
ENGINES = [("torch", "held"), ("torch", "explicit"), ("onnxruntime", "held"), ("onnxruntime", "explicit")]
SLOW = pytest.param("torch.compile", "held", marks=pytest.mark.slow)


@functools.cache
def steered(kind: str = f"vector={VECTOR} scale=input") -> ag.Program:
    return ag.run(zoo.captured("llama"), f"steer{{{SITE} {kind}}}, kv_cache", parity="none").program


@functools.cache
def compiled(engine: str, lowering: str = "held", kind: str = f"vector={VECTOR} scale=input") -> ag.Compiled:
    return ag.compile(steered(kind), engine, lowering=lowering)


@functools.cache
def constant(scale: float) -> Array:
    """What three rows give at one constant strength: ``[batch, steps, vocabulary]``."""
    program = ag.run(zoo.captured("llama"), f"steer{{{SITE} vector={VECTOR} scale={scale}}}, kv_cache", parity="none").program
    return converse(ag.compile(program, lowering="explicit", kernels=False).session(3))


def converse(session: ag.Session, start: int = 0, prompt: int = 6) -> Array:
    tokens = TOKENS[: session.batch]
    found = [session.feed(tokens[:, :prompt])["logits"][:, -1]] if not start else []
    found += [session.feed(tokens[:, at : at + 1])["logits"][:, -1] for at in range(start or prompt, tokens.shape[1])]
    return np.stack(found, 1)


def close(left: Array, right: Array) -> None:
    np.testing.assert_allclose(left, right, rtol=0, atol=2e-5 * float(np.abs(right).max()))


@pytest.mark.parametrize(("engine", "lowering"), [*ENGINES, SLOW])
def test_strength_of_sessions(engine: str, lowering: str) -> None:
    """None is the plain model; one for all rows, and one for each; changed and taken back on the way."""
    made = compiled(engine, lowering)
    off = converse(made.session(3))
    close(off, constant(0.0))
    all_rows, each = (made.session(3, inputs={"steer.scale": scale}) for scale in (0.8, [0.8, 0.0, -2.0]))
    one, rows = converse(all_rows), converse(each)
    close(one, constant(0.8))
    close(rows[2], constant(-2.0)[2])
    assert np.array_equal(rows[1], off[1]) and np.array_equal(rows[0], one[0])
    assert np.abs(one - off).max() > 0.05 * np.abs(off).max()
    changed, twin = made.session(3), made.session(3, inputs={"steer.scale": np.zeros(1, np.float32)})
    for scale in (0.0, 0.8, None, [0.8, 0.0, -2.0]):
        at, other = changed.length, twin.length
        for session in (changed, twin):
            if scale is None:
                del session.inputs["steer.scale"]
            else:
                session.inputs["steer.scale"] = scale
        piece = TOKENS[:, at : at + 1] if at else TOKENS[:, :6]
        found, again = (session.feed(piece)["logits"] for session in (changed, twin))
        assert at == other and np.array_equal(found, again)
    reference = ag.compile(steered(), lowering="explicit", kernels=False).session(3)
    reference.feed(TOKENS[:, :6])
    for at, scale in ((6, 0.8), (7, 0.0), (8, [0.8, 0.0, -2.0])):
        reference.inputs["steer.scale"] = scale
        wanted = reference.feed(TOKENS[:, at : at + 1])["logits"]
    close(found, wanted)


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_sessions_do_not_disturb_each_other(engine: str) -> None:
    """Side by side, and one after the other, which takes over the recorded steps."""
    made = compiled(engine)
    alone = {scale: converse(made.session(2, inputs={"steer.scale": scale})) for scale in (0.0, 0.8, -1.0)}
    sessions = {scale: made.session(2, inputs={"steer.scale": scale}) for scale in alone}
    found = {scale: [session.feed(TOKENS[:2, :6])["logits"][:, -1]] for scale, session in sessions.items()}
    for at in range(6, TOKENS.shape[1]):
        for scale, session in sessions.items():
            found[scale].append(session.feed(TOKENS[:2, at : at + 1])["logits"][:, -1])
    for scale, steps in found.items():
        assert np.array_equal(np.stack(steps, 1), alone[scale])
    del sessions, session
    assert np.array_equal(converse(made.session(2)), alone[0.0])


@pytest.mark.parametrize("kind", ["vector=input", f"vector={VECTOR} scale=input", "vector=input scale=input norm=restore"])
def test_recorded_steps_run_from_c(kind: str) -> None:
    made = compiled("torch", "held", kind)
    if not made.kernels:
        pytest.skip("the kernels' library was not built")
    rng = np.random.default_rng(0)
    values = {n: rng.normal(0, 0.3, np.shape(v)).astype(np.float32) for n, v in made.session(2).inputs.items()}
    session = made.session(2, inputs=values)
    found = converse(session)
    ((_, recording),) = session._state._recordings.values()  # type: ignore[attr-defined]
    assert recording._python == [None]
    close(found, converse(ag.compile(steered(kind), kernels=False, lowering="explicit").session(2, inputs=values)))


def test_a_vector_as_wide_as_the_session_is_long() -> None:
    """Its last axis is no axis of tokens."""
    made, prompt = compiled("torch", "held", "vector=input"), np.tile(TOKENS, (1, 6))[:1, : zoo.WIDTH - 1]
    values = dict.fromkeys(made.givable.inputs, np.asarray(VECTOR, np.float32))
    both = [c.session(inputs=values) for c in (made, ag.compile(steered("vector=input"), lowering="explicit", kernels=False))]
    for session in both:
        session.feed(prompt)
    for at in range(4):
        left, right = (session.feed(TOKENS[:1, at : at + 1])["logits"] for session in both)
        close(left, right)


def test_what_is_given_is_checked_at_once() -> None:
    made = compiled("torch")
    bad = {
        "steer.scal": (1, r"llama has no input 'steer.scal' .*did you mean steer.scale\?"),
        "input_ids": (1, "fill in 'input_ids' of llama themselves"),
        "steer.scale": ([1, 2], r"'steer.scale' of llama has shape \[2\], the graph takes f32\[batch\] \(give \[1 or 3\]\)"),
    }
    for name, (value, why) in bad.items():
        with pytest.raises(InputError, match=why):
            made.session(3, inputs={name: value})
    session = made.session(3)
    for value, why in (
        (np.ones(3), r"float64, the graph takes f32\[batch\] \(convert it\)"), ("strong", "given 'strong'"),
        ([[1.0], [2.0], [3.0]], r"shape \[3, 1\]"), ([[1], [2, 3]], "rows differ in length"), (True, "given True"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=why):
            session.inputs["steer.scale"] = value
    with pytest.raises(InputError, match=r"steer\.scal'"):
        session.inputs.update({"steer.scale": 1, "steer.scal": 1})  # all or none
    assert not session.inputs["steer.scale"].any()
    session.inputs.update({"steer.scale": [1, 2, 3]})
    assert session.inputs["steer.scale"].tolist() == [1, 2, 3] and list(session.inputs) == ["steer.scale"]
    assert "[1.0, 2.0, 3.0]" in repr(session.inputs)
    with pytest.raises(ValueError, match="read-only"):
        session.inputs["steer.scale"][0] = 5
    session.reset()
    assert session.inputs["steer.scale"].any()
    session.inputs.clear()
    assert not session.inputs["steer.scale"].any()
    with pytest.raises(KeyError):
        session.inputs["steer.scal"]
    with pytest.raises(KeyError):
        del session.inputs["steer.scal"]


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_picks_are_within_the_table(dialect: str, tmp_path: Path) -> None:
    names = [
        str(ag.SteeringVector({"": np.asarray(VECTOR) * f}).save(tmp_path / f"{i}.safetensors")) for i, f in enumerate((1, 2))
    ]
    graph = ag.run(zoo.captured("llama"), f"steer{{{SITE} vector=[{', '.join(names)}] pick=row}}", parity="none").graph
    made = ag.compile(graph if dialect == "fx" else to_onnx(graph))  # type: ignore[arg-type]
    session = made.session(3, inputs={"steer.index": [0, 2, 1]})
    for bad in (3, -1, [0, 0, 7]):
        with pytest.raises(InputError, match=r"'steer\.index' of llama is (3|-1|7) .it may be 0 to 2"):
            session.inputs["steer.index"] = bad
    with pytest.raises(InputError, match=r"given 1\.5"):
        session.inputs["steer.index"] = 1.5
    found = session.feed(TOKENS)["logits"][:, -1]
    for row in range(3):
        alone = made.session(inputs={"steer.index": [0, 2, 1][row]})
        close(alone.feed(TOKENS[row : row + 1])["logits"][:, -1], found[row : row + 1])


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_generation(engine: str) -> None:
    """One prompt, several with a strength each, a stream; texts steered together are those steered alone."""
    made, prompts = compiled(engine), [[5, 6, 7], [9, 8], [11, 3, 4, 5]]
    alone = [ag.generate(made, p, 8, inputs={"steer.scale": s}).tokens for p, s in zip(prompts, (0, 3, -3), strict=True)]
    assert [g.tokens for g in ag.generate(made, prompts, 8, inputs={"steer.scale": [0, 3, -3]})] == alone
    assert ag.generate(made, prompts[0], 8).tokens == alone[0]
    assert ag.generate(made, prompts[1], 8).tokens != alone[1]
    assert tuple(step.token for step in ag.stream(made, prompts[1], 8, inputs={"steer.scale": 3})) == alone[1]
    for run in (ag.generate, ag.stream):
        with pytest.raises(InputError, match=r"did you mean steer\.scale"):
            run(made, prompts[0], 2, inputs={"steer_scale": 3})  # type: ignore[operator]


def test_generation_row_by_row() -> None:
    """A model without a mask runs its prompts one by one, each with its own strength."""
    graph = ag.trace(NoMask(), (), {"input_ids": np_ids()}, dynamic={"input_ids": ("batch", "seq")}, name="rows")
    made = ag.compile(
        ag.run(graph, f"steer{{site=%{embedding(graph)} vector={[9.0, 0, 0, 0]} scale=input}}", parity="none").graph
    )
    alone = [ag.generate(made, p, 3, inputs={"steer.scale": s}).tokens for p, s in (([1, 2], 0), ([3], 5))]
    assert [g.tokens for g in ag.generate(made, [[1, 2], [3]], 3, inputs={"steer.scale": [0, 5]})] == alone
    with pytest.raises(InputError, match=r"shape \[3\]"):
        ag.generate(made, [[1, 2], [3]], 3, inputs={"steer.scale": [0, 5, 1]})


def np_ids() -> object:
    import torch

    return torch.ones((2, 3), dtype=torch.int64)


def embedding(graph: Graph) -> str:
    return next(n.outputs[0].name for n in graph.nodes() if n.prim is not None and n.prim.op == "gather")


def NoMask() -> object:
    import torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.head = torch.nn.Embedding(16, 4), torch.nn.Linear(4, 16)

        def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.head(self.table(input_ids).cumsum(1))}

    return Model().eval()


def test_prefixes_of_another_strength_are_others() -> None:
    cache = ag.PrefixCache(block=2)
    made, plain = ag.compile(steered(), prefixes=cache), ag.compile(steered())
    prompt = TOKENS[0, :9].tolist()
    wanted = {scale: ag.generate(plain, prompt, 6, inputs={"steer.scale": scale}).tokens for scale in (0.0, 4.0)}
    for hits, scale in ((0, 0.0), (0, 4.0), (4, 4.0), (8, 0.0)):
        assert ag.generate(made, prompt, 6, inputs={"steer.scale": scale}).tokens == wanted[scale]
        assert cache.statistics.hits == hits
    assert ag.generate(made, prompt, 6).tokens == wanted[0.0] and cache.statistics.hits == 12  # the default is a strength, too
    assert wanted[0.0] != wanted[4.0]


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_calls(engine: str) -> None:
    graph = ag.run(zoo.captured("llama"), f"steer{{{SITE} vector={VECTOR} scale=input}}", parity="none").graph
    given = zoo.inputs("llama", batch=3, length=6)
    made = ag.compile(graph, engine)
    one, each = (made({**given, "steer.scale": np.asarray(s, np.float32)})["logits"] for s in ([0.8], [0.8, 0.8, 0.8]))
    close(one, each)
    assert np.abs(one - made(given)["logits"]).max() > 0.01
    assert (
        np.array_equal(made(given)["logits"], ag.compile(zoo.captured("llama"), engine)(given)["logits"]) or engine != "torch"
    )


# --- adapters ----------------------------------------------------------------------------------------------------------------


def test_adapters_in_stock_onnxruntime(tmp_path: Path) -> None:
    """One session, and adapters that change what each call is: kept functions and inlined."""
    import onnxruntime as ort

    graph = ag.run(zoo.captured("llama"), f"steer{{{SITE} vector={VECTOR} scale=input}}, steer{{{SITE} vector=input}}").graph
    given = zoo.inputs("llama", batch=3, length=6)
    names = [f"steer.vector.blocks.{n}.resid_post" for n in (0, 1)]
    sets: list[dict[str, object]] = [
        {"steer.scale": 0.8},
        {"steer.scale": [0.8, 0, -1], names[1]: np.asarray([VECTOR], np.float32)},
    ]
    for inline in ("none", "all"):
        path = graph.save(tmp_path / f"{inline}.onnx", inline=inline)
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        plain = session.run(["logits"], given)[0]
        close(plain, zoo.captured("llama").run(given)["logits"])
        for number, values in enumerate(sets):
            file = ag.save_adapter(tmp_path / f"{number}.onnx_adapter", values, ag.load(path))
            adapter, options = ort.LoraAdapter(), ort.RunOptions()
            adapter.Load(str(file))
            options.add_active_adapter(adapter)
            found = session.run(["logits"], given, options)[0]
            loaded = ag.load_adapter(file)
            assert list(loaded) == sorted(values)
            close(found, graph.run({**given, **loaded})["logits"])
            assert np.abs(found - plain).max() > 0.01
            assert np.array_equal(session.run(["logits"], given)[0], plain)


@pytest.mark.parametrize(("engine", "lowering"), ENGINES)
def test_sessions_feed_what_adapters_hold(engine: str, lowering: str, tmp_path: Path) -> None:
    made = compiled(engine, lowering)
    file = ag.save_adapter(tmp_path / "a.onnx_adapter", {"steer.scale": [0.8, 0.0, -2.0]}, steered())
    assert np.array_equal(
        converse(made.session(3, adapter=file)), converse(made.session(3, inputs={"steer.scale": [0.8, 0.0, -2.0]}))
    )
    for call in (
        lambda: made.session(3, inputs={"steer.scale": 1}, adapter=file),
        lambda: ag.generate(made, [[1], [2], [3]], 2, inputs={"steer.scale": 1}, adapter=file),
        lambda: ag.stream(made, [1], 2, inputs={"steer.scale": 1}, adapter=file),
    ):
        with pytest.raises(InputError, match=r"'steer\.scale' is given and in the adapter .*leave it out of one"):
            call()
    with pytest.raises(InputError, match=r"shape \[3\]"):
        made.session(2, adapter=file)


def test_adapters_are_checked_and_the_same_bytes(tmp_path: Path) -> None:
    program = steered("vector=input scale=input")
    names = ["steer.vector.blocks.0.resid_post", "steer.vector.blocks.1.resid_post"]
    values = {"steer.scale": 2, names[0]: VECTOR, names[1]: np.zeros((1, zoo.WIDTH), np.float32)}
    one = ag.save_adapter(tmp_path / "a.onnx_adapter", values, program)
    two = ag.save_adapter(tmp_path / "b.onnx_adapter", dict(reversed(values.items())), next(iter(program)))
    assert one.read_bytes() == two.read_bytes()
    loaded = ag.load_adapter(one)
    assert {n: (a.dtype, a.shape) for n, a in loaded.items()} == {
        "steer.scale": (np.float32, (1,)), **dict.fromkeys(names, (np.float32, (1, zoo.WIDTH)))
    }  # fmt: skip
    np.testing.assert_array_equal(loaded[names[0]][0], np.asarray(VECTOR, np.float32))
    bad = [
        ({"steer.scal": 1}, r"did you mean steer\.scale"), ({}, "without values"), ({"input_ids": 1}, "has no default"),
        ({"steer.scale": np.ones(1)}, "float64"), ({"steer.scale": [[1.0]]}, r"shape \[1, 1\]"),
        ({names[0]: [1.0]}, r"shape \[1\]"),
    ]  # fmt: skip
    for given, why in bad:
        with pytest.raises(InputError, match=why):
            ag.save_adapter(tmp_path / "c.onnx_adapter", given, program)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"its name ends in \.onnx_adapter"):
        ag.save_adapter(tmp_path / "c.onnx", values, program)
    assert not (tmp_path / "c.onnx_adapter").exists()
    (tmp_path / "c.onnx_adapter").write_bytes(b"no adapter")
    with pytest.raises(InputError, match="is no adapter"):
        ag.load_adapter(tmp_path / "c.onnx_adapter")
    with pytest.raises(InputError, match="there is no adapter"):
        ag.load_adapter(tmp_path / "d.onnx_adapter")
