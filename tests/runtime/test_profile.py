"""Profiles: every node has a row, the rows are the wall time, sites are those of the model, and nothing changes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actgraph as ag
from actgraph.errors import InputError
from actgraph.graph.graph import Array
from actgraph.runtime.native.library import available
from actgraph.runtime.profiling import profile as profiles
from actgraph.runtime.profiling.bench import CALLS, bench
from actgraph.runtime.profiling.ort_nodes import Naming, _by_run, _Run, _take
from actgraph.runtime.profiling.places import OTHER, SiteNames, Wiring, from_neighbours, place
from actgraph.runtime.profiling.profile import Profile
from actgraph.runtime.profiling.record import Recorder, Step
from actgraph.runtime.threads import threads, using_threads
from tests import zoo

kernels = pytest.mark.skipif(not available(), reason="the kernels' library was not built: there is no C compiler")
engines = pytest.mark.parametrize("engine", ["torch", "onnxruntime"])

GATED = "sparsify{threshold=0.05}, quantize{weights=int8}, kv_cache{last_logits=true}"
STATIC = "kv_cache{graphs=combined form=static max_length=40}"
COUNTS = (5, 1, 1, 3, 1)
STREAM = 20e9


@functools.cache
def program(passes: str = GATED, model: str = "stories260k") -> ag.Program:
    return ag.run(zoo.captured(model), passes, parity="none", reproducer=False).program


@functools.cache
def compiled(engine: str, passes: str = GATED, model: str = "stories260k", **options: Any) -> ag.Compiled:
    return ag.compile(program(passes, model), engine, **options)


def converse(session: ag.Session, seed: int = 3, counts: tuple[int, ...] = COUNTS) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [session.feed(rng.integers(3, 90, (session.batch, count)))["logits"] for count in counts]


@functools.cache
def profiled(engine: str) -> Profile:
    session = compiled(engine).session()
    with session.profile(stream=STREAM) as profile:
        converse(session)
    return profile


def same(found: list[Array], expected: list[Array]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@kernels
@engines
def test_every_claimed_kernel_has_a_row(engine: str) -> None:
    profile, claims = profiled(engine), compiled(engine).claims
    assert claims is not None
    for stage in ("prefill", "decode"):
        rows = {row.node: row for row in profile.rows if row.stage == stage}
        claimed = claims[stage].claimed
        assert claimed and {name: rows[name].kernel for name in claimed} == claimed
        assert all(rows[name].op.startswith("actgraph.") for name in claimed)
    if engine == "torch":  # what has none says why
        reasons = {row.op: row.why for row in profile.rows if row.why}
        assert "product of matrices" in reasons["actgraph.attention"]


@engines
def test_rows_are_the_wall_time(engine: str) -> None:
    profile = profiled(engine)
    assert [(step.stage, step.tokens) for step in profile.steps] == [
        ("prefill", 5), ("decode", 1), ("decode", 1), ("prefill", 3), ("decode", 1)
    ]  # fmt: skip
    assert sum(row.total for row in profile.rows) == pytest.approx(profile.total, rel=1e-9)
    assert all(row.total >= 0 and row.median >= 0 for row in profile.rows if row.op)
    for stage, count in (("prefill", 2), ("decode", 3)):
        rows = {row.node: row for row in profile.rows if row.stage == stage}
        assert rows["(outside nodes)"].total > 0
        assert {row.steps for row in rows.values() if row.op.startswith("actgraph.rms")} <= {count, count - 1}
        spent = sum(step.time for step in profile.steps if step.stage == stage) * 1e-9
        assert sum(row.total for row in rows.values()) == pytest.approx(spent)


@engines
def test_sites_are_those_of_the_model(engine: str) -> None:
    profile = profiled(engine)
    apart = ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.gate", "mlp.up")
    together = ("attn.k+q+v", "attn.out", "mlp.gate+up")  # gated linears of the same x, for single tokens
    for stage, parts in (("prefill", apart), ("decode", together if available() else apart)):
        linears = [f"blocks.{i}.{part}" for i in range(5) for part in parts]
        found = {row.site: row for row in profile.rows if row.stage == stage}
        assert {*linears, "logits", "embed", "final_norm", "blocks.0.attn.norm", "blocks.4.mlp.act"} <= set(found)
        graph = compiled(engine).program.graphs[stage]
        known = {site.name for site in graph.sites()} | {name.rpartition(".")[0] for name in SiteNames.of(graph).roles}
        assert {site.split("+")[0] for site in found if not site.startswith("(")} <= known | {OTHER}
        gate = found["blocks.3.mlp.gate+up" if parts is together else "blocks.3.mlp.gate"]
        assert "linear" in gate.op or "MatMul" in gate.op
    turned = {row.site for row in profile.rows if "otary" in row.op}
    assert turned == {f"blocks.{i}.attn" for i in range(5)}, "what has no site stands in the layer that it works for"


@engines
def test_profiling_changes_nothing(engine: str) -> None:
    """Equal results in the profile and behind it, with buffers that grow, several rows, padding and a reset."""
    made = compiled(engine)
    for batch in (1, 2):
        plain, watched = made.session(batch), made.session(batch)
        assert same(converse(watched, 1), converse(plain, 1))
        with watched.profile(stream=False) as profile:
            assert same(converse(watched, 2), converse(plain, 2))
        assert "feed" not in vars(watched) and len(profile.steps) == len(COUNTS) and profile.stream is None
        assert same(converse(watched, 3), converse(plain, 3))
        for session in (plain, watched):
            session.reset()
        assert same(converse(watched, 4), converse(plain, 4))
    plain, watched = made.session(2), made.session(2)
    tokens, valid = np.random.default_rng(0).integers(3, 90, (2, 6)), np.array([[0, 0, 1, 1, 1, 1], [1] * 6])
    with watched.profile(stream=False):  # onnxruntime goes on with other graphs
        assert same([watched.feed(tokens, valid)["logits"]], [plain.feed(tokens, valid)["logits"]])
        assert same(converse(watched, 2), converse(plain, 2))
    assert same(converse(watched, 3), converse(plain, 3))


@engines
@pytest.mark.parametrize("form", ["explicit", "static"])
def test_other_ways_of_keeping_slots(engine: str, form: str) -> None:
    made = compiled(engine, STATIC, "llama", lowering="explicit" if form == "explicit" else "held")
    plain, watched = made.session(), made.session()
    converse(plain, 1), converse(watched, 1)
    with watched.profile(stream=False) as profile:
        assert same(converse(watched, 2), converse(plain, 2))
    assert same(converse(watched, 3), converse(plain, 3))
    assert {step.stage for step in profile.steps} == {"prefill", "decode"}
    assert {"blocks.1.mlp.up", "blocks.0.attn.q", "logits"} <= {row.site for row in profile.rows}
    assert sum(row.total for row in profile.rows) == pytest.approx(profile.total)
    if form == "explicit" and engine == "torch":
        assert any("held slots" in row.why for row in profile.rows if row.op.startswith("actgraph."))


@kernels
@engines
def test_bytes_are_those_that_must_be_read(engine: str) -> None:
    profile = profiled(engine)
    rows = {row.site: row for row in profile.rows if row.stage == "decode" and row.op}
    head = rows["logits"]  # of every token, by a dense kernel: int8 codes and a scale for each output
    assert head.weights == head.steps * (512 * 64 + 512 * 4) and not head.at_most
    assert head.activations == head.steps * 64 * 4
    gate = rows["blocks.0.mlp.gate+up"]
    whole = 2 * (64 * 172 + 172 * 4)
    if engine == "onnxruntime":
        assert gate.at_most and gate.weights == gate.steps * whole
    else:  # the rows of inputs that are kept
        assert not gate.at_most and 0 < gate.weights < gate.steps * whole
        assert (gate.weights - gate.steps * 2 * 172 * 4) % (2 * 172) == 0
    assert rows["embed"].weights == rows["embed"].steps * 64 * 4, "one row of the table"
    attention = next(row for row in profile.rows if row.stage == "decode" and "ttention" in row.op)
    held = (6, 7, 11)[-attention.steps :]  # the first step of torch may be one that is recorded
    assert attention.caches == 2 * 4 * 8 * 4 * sum(held) and len(held) >= 2
    assert attention.bandwidth == pytest.approx(attention.bytes / attention.steps / attention.median)
    assert profile.bytes == sum(call.bytes.all for step in profile.steps for call in step.calls)


@pytest.mark.parametrize(
    ("model", "passes", "size", "op"),
    [("llama", STATIC, 32 * 48 * 4, "MatMul"), ("stories260k", GATED, 64 * 172 + 172 * 4, "MatMulNBits")],
)
def test_bytes_of_weights_that_onnxruntime_has_packed(model: str, passes: str, size: int, op: str) -> None:
    """Its events do not count them. (It has more scales than the file, one for each block of 32.)"""
    session = compiled("onnxruntime", passes, model, kernels=False).session()
    with session.profile(stream=False) as profile:
        converse(session)
    rows = {row.site: row for row in profile.rows if row.stage == "decode" and row.weights}
    for site in ("blocks.0.mlp.gate", "blocks.1.mlp.up"):
        assert rows[site].op == op and size <= rows[site].weights / rows[site].steps < 1.1 * size


@engines
def test_the_trace_is_valid(engine: str, tmp_path: Path) -> None:
    """The Trace Event Format: complete events within their step, metadata, microseconds."""
    profile = profiled(engine)
    assert profile.save_chrome_trace(tmp_path / "trace.json") == tmp_path / "trace.json"
    trace = json.loads((tmp_path / "trace.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    events = trace["traceEvents"]
    assert {event["ph"] for event in events} == {"X", "M"}
    for event in events:
        assert isinstance(event["name"], str) and isinstance(event["pid"], int) and isinstance(event["tid"], int)
    named = {(event["name"], event["tid"]): event["args"]["name"] for event in events if event["ph"] == "M"}
    assert named["thread_name", 1] == "steps" and named["thread_name", 2] == "nodes"
    complete = [event for event in events if event["ph"] == "X"]
    assert all(event["ts"] >= 0 and event["dur"] >= 0 for event in complete)
    steps = [event for event in complete if event["tid"] == 1]
    assert [step["name"] for step in steps] == [step.stage for step in profile.steps]
    assert sum(step["dur"] for step in steps) == pytest.approx(profile.total * 1e6)
    nodes = [event for event in complete if event["tid"] == 2]
    assert len(nodes) == sum(row.calls for row in profile.rows if row.op)
    for node in nodes:
        step = steps[node["args"]["step"]]
        assert step["ts"] <= node["ts"] + 1 and node["ts"] + node["dur"] <= step["ts"] + step["dur"] + 1
        assert {"site", "op", "kernel", "bytes"} <= set(node["args"])
    with pytest.raises(InputError, match="create the directory"):
        profile.save_chrome_trace(tmp_path / "missing" / "trace.json")


def test_tables_and_json() -> None:
    profile = profiled("onnxruntime")
    for by in profiles.BY:
        table = profile.table(by)
        assert table.headers[:2] == ("stage", by) and {row[0] for row in table.rows} == {"prefill", "decode"}
        assert all(len(row) == len(table.headers) for row in table.rows)
        assert len(str(table).splitlines()) == len(table.rows) + 1 and table._repr_html_().count("<tr>") == len(table.rows) + 1
        groups = [row[1] for row in table.rows if row[0] == "decode"]
        assert len(set(groups)) == len(groups) and groups[-1] == "all"
    roles = {row[1]: row for row in profile.table("role", stage="decode").rows}
    assert roles["blocks.*.mlp.gate+up"][2] == "15" and "blocks.*.attn" in roles
    assert "blocks.0.mlp.gate+up" not in roles
    short = profile.table("site", stage="decode", top=4).rows
    assert len(short) == 6 and short[4][1].endswith("more)") and short[5][1] == "all"
    from rich.console import Console

    console = Console(width=300)
    with console.capture() as shown:
        console.print(profile.table("op"))
    assert "GB/s" in shown.get() and "actgraph.linear" in shown.get()
    with pytest.raises(InputError, match="no table by 'size'"):
        profile.table("size")
    data = json.loads(json.dumps(profile.to_json()))
    assert data["stream"] == STREAM and len(data["rows"]) == len(profile.rows) and data["total"] == profile.total
    assert data["rows"][0].keys() >= {"node", "op", "site", "stage", "kernel", "calls", "total", "median", "bytes", "bandwidth"}
    assert "onnxruntime" in repr(profile) and "blocks.0.mlp.gate+up" in str(profile)


@engines
def test_what_fails_leaves_a_session_as_it_was(engine: str) -> None:
    made = compiled(engine)
    plain, watched = made.session(), made.session()
    with pytest.raises(ZeroDivisionError), watched.profile() as profile:
        with pytest.raises(InputError, match="not finished"):
            profile.rows  # noqa: B018
        with pytest.raises(InputError, match="profiled already"), watched.profile():
            pass
        converse(watched, 1)
        raise ZeroDivisionError
    with pytest.raises(InputError, match="not finished"):
        profile.table()
    converse(plain, 1)
    assert "feed" not in vars(watched) and same(converse(watched, 2), converse(plain, 2))
    with watched.profile(stream=False) as profile:  # a call that is refused is not recorded
        with pytest.raises(InputError, match="no token"):
            watched.feed(np.array([[100000]]))
        assert same(converse(watched, 3), converse(plain, 3))
    assert len(profile.steps) == len(COUNTS)


def test_a_graph_that_torch_has_compiled_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # what it generates does not matter here
    made = ag.compile(program(), "torch.compile")
    session = made.session()
    with session.profile(stream=False) as profile:
        converse(session)
    rows = {row.node: row for row in profile.rows if row.stage == "decode" and row.op}
    (row,) = rows.values()
    assert row.kernel == "torch.compile" and "cannot be told apart" in row.why and row.calls == 3
    assert row.weights > 0 and row.caches > 0
    assert len([row for row in profile.rows if row.stage == "prefill" and row.op]) > 10, "prompts are not compiled"


@engines
def test_generate_and_calls_of_a_model(engine: str) -> None:
    made = compiled(engine)
    expected = ag.generate(made, [1, 2, 3], 4, stop_at_end=False)
    with made.profile(stream=False) as profile:
        assert ag.generate(made, [1, 2, 3], 4, stop_at_end=False) == expected
        with pytest.raises(InputError, match="profiled already"), made.profile():
            pass
    assert [step.stage for step in profile.steps] == ["prefill", "decode", "decode", "decode"]
    bert = ag.compile(zoo.captured("bert"), engine)
    inputs = zoo.inputs("bert")
    plain = bert(inputs)
    with bert.profile(stream=False) as profile:
        found = bert(inputs)
    assert found.keys() == plain.keys() and all(np.array_equal(found[name], plain[name]) for name in plain)
    assert [(step.stage, step.tokens) for step in profile.steps] == [("forward", 8)]
    sites = {row.site for row in profile.rows}
    assert {"blocks.0.attn.q", "blocks.1.mlp.out"} <= sites
    assert len(profile.steps) == 1 and bert(inputs).keys() == plain.keys() and len(profile.steps) == 1


def test_the_stream_figure_is_measured_or_a_note_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from actgraph.runtime.kernels.numba import stream

    asked: list[int] = []
    monkeypatch.setattr(stream, "read_bandwidth", lambda count: asked.append(count) or 7e9)
    session = compiled("onnxruntime").session()
    with using_threads(3), session.profile() as profile:
        converse(session)
    assert profile.stream == 7e9 and asked == [3] and "of stream" in str(profile)

    def refuse(count: int) -> float:
        raise MemoryError("no room")

    monkeypatch.setattr(stream, "read_bandwidth", refuse)
    with session.profile() as profile:
        converse(session)
    assert profile.stream is None and profile.notes == ("the stream figure was not measured: no room",)


@kernels
def test_the_read_loop() -> None:
    from actgraph.runtime.kernels.numba.stream import Stream

    assert 1e8 < Stream(1, 1 << 24).measure() < 1e13


def test_threads() -> None:
    import torch

    before = torch.get_num_threads(), threads()
    with using_threads(3):
        assert (torch.get_num_threads(), threads()) == (3, 3)
        graph = zoo.exported("mlp")
        from actgraph.runtime.ort_engine import OrtRunner

        assert OrtRunner(graph).session.get_session_options().intra_op_num_threads == 3
    assert (torch.get_num_threads(), threads()) == before
    with pytest.raises(InputError, match="threads are -1"), using_threads(-1):
        pass


def test_places() -> None:
    """A step of a norm is the norm's; what works for one layer stands in it; what works for several is other."""
    roles = {"n": "blocks.0.attn.norm", "q": "blocks.0.attn.q", "o": "blocks.0.attn.out", "u": "blocks.1.mlp.up"}
    sites = SiteNames({**roles, "a": "attention.0"}, frozenset(roles.values()))
    nodes = [
        Wiring("mask", ("m",), (), ""),
        Wiring("square", ("s",), ("x",), "l.norm"),
        Wiring("scale", ("n",), ("s",), "l.norm"),
        Wiring("q", ("q",), ("n",), "l.attn.q"),
        Wiring("turn", ("t",), ("q", "m"), "l.attn"),
        Wiring("attention", ("a",), ("t",), "l.attn"),
        Wiring("flat", ("f",), ("a",), "l.attn"),
        Wiring("out", ("o",), ("f",), "l.attn.o"),
        Wiring("up", ("u",), ("o", "m"), "l.up"),
        Wiring("last", ("z",), ("u",), ""),
    ]
    assert place(nodes, sites) == {
        "mask": OTHER, "square": "blocks.0.attn.norm", "scale": "blocks.0.attn.norm", "q": "blocks.0.attn.q",
        "turn": "blocks.0.attn", "attention": "attention.0", "flat": "blocks.0.attn", "out": "blocks.0.attn.out",
        "up": "blocks.1.mlp.up", "last": OTHER,
    }  # fmt: skip
    known = [None, "blocks.0.attn.q", None, "blocks.0.attn.out", None, "blocks.1.mlp.up"]
    assert from_neighbours(known) == [
        OTHER, "blocks.0.attn.q", "blocks.0.attn", "blocks.0.attn.out", OTHER, "blocks.1.mlp.up",
    ]  # fmt: skip


def _event(name: str, ts: int, dur: int, op: str = "Mul") -> dict[str, Any]:
    about = {"op_name": op, "parameter_size": "0", "activation_size": "8", "output_size": "8", "input_type_shape": []}
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "args": about}


def test_events_of_onnxruntime() -> None:
    """Nodes inside a branch are the branch's; of runs that left no events a note tells."""
    run = {"cat": "Session", "name": "model_run", "ts": 0, "dur": 40, "args": {}}
    events = [_event("a", 1, 5), _event("inner", 12, 3), _event("if", 10, 8, "If"), _event("b", 20, 1), run]
    ((whole, nodes),) = _by_run(events)
    assert whole is run and [node["name"] for node in nodes] == ["a_kernel_time", "if_kernel_time", "b_kernel_time"]
    naming = Naming.__new__(Naming)
    naming.stage, naming.nodes, naming.sites, naming._made, naming.claims = "decode", {}, {}, {}, ag.runtime.claims.Claims()
    recorder, steps = Recorder(), [Step("decode", 1, 0, 60_000) for _ in range(2)]
    _take(events, [_Run(step, 0, 50_000, 3, True) for step in steps], naming, recorder)
    assert [(call.begin, call.time) for call in steps[0].calls] == [(11_000, 5000), (20_000, 8000), (30_000, 1000)]
    assert steps[0].rest == {"(between nodes)": 26_000} and steps[0].outside == 20_000 and not steps[1].calls
    assert len(recorder.notes) == 1 and "1 of 2 runs" in recorder.notes[0]


@engines
def test_bench(engine: str) -> None:
    done: list[tuple[int, int]] = []
    made = compiled(engine)
    found = bench(
        made, prompt_tokens=6, tokens=4, rounds=2, stream=STREAM, profile=True, progress=lambda *at: done.append(at)
    )  # fmt: skip
    prefill, decode = found.stages
    assert (prefill.name, prefill.tokens, prefill.calls) == ("prefill", 6, 2)
    assert (decode.name, decode.tokens, decode.calls) == ("decode", 1, 6)
    assert prefill.rate > 0 and decode.seconds > 0 and found.first_token == prefill.seconds
    assert decode.bytes > 64 * 512 and decode.limit == STREAM / decode.bytes
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert found.profile is not None and [step.tokens for step in found.profile.steps] == [6, 1, 1, 1]
    assert json.loads(json.dumps(found.to_json()))["stages"]["decode"]["calls"] == 6
    static = compiled(engine, GATED.replace("last_logits=true", "last_logits=true form=static"))
    fixed = bench(static, prompt_tokens=6, tokens=4, rounds=1, stream=STREAM)
    assert fixed.stages[1].bytes == pytest.approx(decode.bytes, rel=1e-3), "of a buffer for 512 tokens what is written counts"
    with pytest.raises(InputError, match="do not fit the context of 512"):
        bench(made, prompt_tokens=500, tokens=20, stream=False)
    with pytest.raises(InputError, match="rounds is 0"):
        bench(made, rounds=0, stream=False)
    other = bench(ag.compile(zoo.captured("mlp"), engine), rounds=2, stream=STREAM, profile=True)
    (forward,) = other.stages
    assert (forward.name, forward.tokens, forward.calls, other.first_token) == ("forward", 0, 2, None)
    assert forward.bytes > 0 and other.profile is not None
    read = sum(row.weights for row in other.profile.rows) / CALLS
    assert 0.9 * forward.bytes < read <= forward.bytes  # of a product with a bias onnxruntime says the larger of the two
