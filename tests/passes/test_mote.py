"""MoTE: every edit against a router by hand, tokens outside of a clause, what is folded, refused and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actgraph as ag
from actgraph.errors import OptionError, PassError
from actgraph.graph import Graph
from actgraph.graph.executor import executor_for
from actgraph.graph.graph import Array, parameter_bytes
from actgraph.graph.slots import slots_of
from tests.passes.conftest import relative
from tests.passes.moe import BLOCK, Convention, Route, by_hand, choose, in_dialect, inputs, routed

E = 3  # the expert that is edited
NAMES = ("mixtral_batched", "deepseek")
REAL = inputs()["attention_mask"].astype(bool)
BEHIND = inputs()["position_ids"] >= 3  # what where=3: names


def mote(graph: Graph, options: str) -> Graph:
    return apply(graph, f"mote{{{options}}}")


def apply(graph: Graph, pipeline: str) -> Graph:
    result = run(graph, pipeline).graph
    result.verify()
    return result


def run(graph: Graph, pipeline: str) -> ag.RunResult:
    """Without the comparison of outputs that every run makes: these tests compare more."""
    return ag.run(graph, pipeline, parity="none", reproducer=False)


def plain(c: Convention, logits: Array) -> tuple[Array, Array]:
    return choose(c, logits)


def after(c: Convention, logits: Array, part: float = 1.0) -> tuple[Array, Array]:
    """The weight of the expert goes to the others that were chosen, and nobody enters."""
    experts, weights = choose(c, logits)
    left = np.where(experts == E, weights * (1 - part), weights)
    return experts, left * weights.sum() / left.sum()


def before(c: Convention, logits: Array) -> tuple[Array, Array]:
    return choose(c, logits, gone=[E])


def forced(c: Convention, logits: Array, weight: float | None = None) -> tuple[Array, Array]:
    experts, weights = choose(c, logits, forced=[E])
    changed = np.where(experts == E, weights if weight is None else weight, weights)
    return experts, changed if weight is None else changed * weights.sum() / changed.sum()


def biased(c: Convention, logits: Array) -> tuple[Array, Array]:
    return choose(c, logits + 1.5 * (np.arange(len(logits)) == E))


def selected(c: Convention, logits: Array) -> tuple[Array, Array]:
    return choose(c, logits, added=0.3 * (np.arange(len(logits)) == E))


EDITS: dict[str, Route] = {
    f"experts=1:{E}": after,
    f"experts=1:{E} amount=0.5": lambda c, x: after(c, x, 0.5),
    f"experts=1:{E} policy=before_topk": before,
    f"experts=1:{E} mode=force": forced,
    f"experts=1:{E} mode=force weight=0.25": lambda c, x: forced(c, x, 0.25),
    f"experts=1:{E} mode=bias amount=1.5": biased,
    f"experts=1:{E} mode=bias amount=0.3 on=selection": selected,
}


#: Every edit in both dialects and both styles: one style in each dialect, in turn.
PAIRS = [(name, ("fx", "onnx")[(n + other) % 2], options) for n, options in enumerate(EDITS)
         for other, name in enumerate(NAMES)]  # fmt: skip


@pytest.mark.parametrize(("name", "dialect", "options"), PAIRS)
def test_equals_a_router_by_hand(name: str, dialect: str, options: str) -> None:
    graph = in_dialect(name, dialect)
    reference = by_hand(name, EDITS[options])
    assert relative(reference[REAL], routed(mote(graph, options))[2][REAL]) < 1e-5
    assert relative(reference[REAL], by_hand(name, plain)[REAL]) > 1e-3, "the model must notice"
    if "force" not in options:
        other = routed(mote(graph, options.replace(f"1:{E}", "1:0")))[2]
        assert relative(reference[REAL], other[REAL]) > 1e-3, "another expert would be noticed"
    if "policy" in options or "mode" in options:
        assert relative(reference[REAL], routed(mote(graph, f"{options} fold=false"))[2][REAL]) < 1e-5


@pytest.mark.parametrize("name", ["olmoe", pytest.param("deepseek_v2", marks=pytest.mark.slow)])
def test_routers_that_do_not_normalise(name: str) -> None:
    """Each expert keeps the weight of its own score: without one, the total changes and the others' weights do not."""
    for number, (options, route) in enumerate(EDITS.items()):
        graph = in_dialect(name, "onnx" if number % 2 and name == "olmoe" else "fx")
        reference = by_hand(name, route)
        made = run(graph, f"mote{{{options}}}")
        assert relative(reference[REAL], routed(made.graph)[2][REAL]) < 1e-5, options
        said = "does not normalise" in " ".join(made.report[0].messages)
        assert said == (options.endswith(("before_topk", "mode=force")))
    assert relative(reference[REAL], by_hand(name, plain)[REAL]) > 1e-3


@pytest.mark.parametrize(("name", "dialect", "options"), [(n, d, o) for n, d, o in PAIRS if "0.5" not in o])
def test_tokens_outside_of_a_clause_are_routed_bit_for_bit(name: str, dialect: str, options: str) -> None:
    graph = in_dialect(name, dialect)
    experts, weights, logits = routed(graph)
    edited = mote(graph, f"{options} where=3:")
    now = routed(edited)
    outside = ~BEHIND.reshape(-1)
    assert np.array_equal(experts[outside], now[0][outside]) and np.array_equal(weights[outside], now[1][outside])
    assert np.array_equal(logits[~BEHIND & REAL], now[2][~BEHIND & REAL]), "nor does anything else of theirs change"
    reference = by_hand(name, EDITS[options], BEHIND)
    assert relative(reference[REAL], now[2][REAL]) < 1e-5 and relative(reference[REAL], logits[REAL]) > 1e-3


def test_forced_and_suppressed_experts(dialect: str) -> None:
    for name in NAMES:
        graph = in_dialect(name, dialect)
        experts, weights, _ = routed(graph)
        assert 0.1 < (experts == E).any(1).mean() < 0.9, "some tokens use the expert, others do not"
        for sets in (experts, now := routed(mote(graph, f"experts=1:{E} mode=force"))[0]):
            assert all(len(set(row)) == experts.shape[1] for row in sets.tolist())
        assert (now == E).any(1).all(), "in the set of every token"
        had = (experts == E).any(1)
        same = routed(mote(graph, f"experts=1:{E} mode=force fold=false"))
        order = np.argsort(experts[had]), np.argsort(same[0][had])
        assert np.array_equal(np.sort(experts[had]), np.sort(same[0][had]))
        by_expert = [np.take_along_axis(w[had], o, 1) for w, o in zip((weights, same[1]), order, strict=True)]
        assert np.allclose(*by_expert, rtol=1e-6), "whoever had it keeps the weights"
        gone = routed(mote(graph, f"experts=1:{E} policy=before_topk"))
        assert not (gone[0] == E).any()
        np.testing.assert_allclose(gone[1].sum(1), weights.sum(1), rtol=1e-6)
        muted = routed(mote(graph, f"experts=1:{E}"))
        assert np.array_equal(muted[0], experts) and not muted[1][experts == E].any()
        np.testing.assert_allclose(muted[1].sum(1), weights.sum(1), rtol=1e-6)
        assert np.array_equal(muted[1][~had], weights[~had]), "bit for bit where the expert was not chosen"


@pytest.mark.parametrize("name", NAMES)
def test_off_is_bit_exact(name: str, dialect: str) -> None:
    graph = in_dialect(name, dialect)
    base = routed(graph)
    for options in (f"experts=1:{E}", f"experts=1:{E} mode=force", f"experts=1:{E} mode=bias"):
        off = mote(graph, f"{options} amount=0")
        assert off.text(provenance=False) == graph.text(provenance=False)
    steps = ("mode=bias amount=input", "mode=bias amount=input on=selection", "mode=bias amount=input where=3:")
    for options in steps:  # the input's default is zeros: the nodes are there, and change nothing
        edited = mote(graph, options)
        assert all(np.array_equal(a, b) for a, b in zip(base, routed(edited), strict=True)), options


def test_biases_at_run_time(dialect: str) -> None:
    """The input is [blocks with experts, experts]; a file runs without it."""
    for name in NAMES:
        graph = in_dialect(name, dialect)
        for on in ("logits", "selection"):
            edited = mote(graph, f"mode=bias amount=input on={on}")
            kind = edited.input("mote.expert_bias").type.shape
            assert kind == ((2, 4) if name.startswith("mixtral") else (1, 12))
            bias = np.zeros(kind, np.float32)
            bias[-1, E] = 0.4
            constant = mote(graph, f"experts=1:{E} mode=bias amount=0.4 on={on} fold=false")
            given = routed(edited, {**inputs(), "mote.expert_bias": bias})
            assert all(np.array_equal(a, b) for a, b in zip(routed(constant), given, strict=True))
    with pytest.raises(PassError, match=r"mote\.expert_bias already"):
        mote(edited, "mode=bias amount=input")


def test_biases_of_sessions_and_adapters(tmp_path: Path) -> None:
    """A session takes them for all its calls, and an adapter file holds them."""
    graph = in_dialect("mixtral", "fx")
    path = mote(graph, "mode=bias amount=input").save(tmp_path / "model.onnx")
    ids = inputs()["input_ids"][:1]
    bias = np.zeros((2, 4), np.float32)
    bias[:, E] = 0.4
    adapter = ag.save_adapter(tmp_path / "bias.onnx_adapter", {"mote.expert_bias": bias}, ag.load(path))
    constant = mote(graph, f"experts=[0:{E},1:{E}] mode=bias amount=0.4 fold=false").save(tmp_path / "constant.onnx")
    wanted, plain = (ag.compile(ag.load(file)).session(1).feed(ids)["logits"] for file in (constant, path))
    session = ag.compile(ag.load(path)).session(1)
    assert list(session.inputs) == ["mote.expert_bias"]
    session.inputs["mote.expert_bias"] = bias
    loaded = ag.compile(ag.load(path)).session(1, adapter=adapter)
    for made in (session, loaded):
        np.testing.assert_allclose(made.feed(ids)["logits"], wanted, atol=1e-5)
    assert np.abs(np.asarray(wanted) - plain).max() > 1e-2


def test_what_folds_adds_no_node(dialect: str) -> None:
    deepseek, mixtral = in_dialect("deepseek", dialect), in_dialect("mixtral_batched", dialect)
    for options in (f"experts=1:{E} policy=before_topk", f"experts=1:{E} mode=force", f"experts=1:{E} mode=bias on=selection"):
        result = run(deepseek, f"mote{{{options}}}")
        assert result.report[0].counts == {"folded": 1}, "the choice, into the stored bias of the choice"
        assert len(result.graph.nodes()) == len(deepseek.nodes())
        assert run(mixtral, f"mote{{{options}}}").report[0].counts == {"selection": 1}, "which Mixtral has not"
    biased = run(mixtral, f"mote{{experts=*:{E} mode=bias}}")
    assert biased.report[0].counts == {"folded": 2} and not any(n.op.startswith("actgraph.") for n in biased.graph.nodes()
                                                                if n.op != "actgraph.grouped_linear")  # fmt: skip


def test_the_last_word_counts(dialect: str) -> None:
    """Pipeline order is the order of effect, folded or not."""
    for name in NAMES:
        graph = in_dialect(name, dialect)
        out, into = f"mote{{experts=1:{E} policy=before_topk fold=%s}}", f"mote{{experts=1:{E} mode=force fold=%s}}"
        for fold in ("true", "false"):
            assert (routed(apply(graph, f"{out % 'true'}, {into % fold}"))[0] == E).any(1).all()
            assert not (routed(apply(graph, f"{into % 'true'}, {out % fold}"))[0] == E).any()


@pytest.mark.parametrize("fold", ["true", "false"])
def test_former_edits_count(fold: str, dialect: str) -> None:
    """What is asked for in two steps is possible or not as in one."""
    for name, enough in (("mixtral_batched", 4), ("deepseek", 4)):
        graph = in_dialect(name, dialect)
        two = mote(graph, f"experts=[1:0, 1:1] mode=force fold={fold}")
        with pytest.raises(PassError, match=f"{enough} experts cannot be among the"):
            mote(two, f"experts=[1:2, 1:3] mode=force fold={fold}")
        assert not (routed(mote(two, f"experts=1:1 policy=before_topk fold={fold}"))[0] == 1).any()
    few = mote(in_dialect("mixtral_batched", dialect), f"experts=[1:0, 1:1] policy=before_topk fold={fold}")
    with pytest.raises(PassError, match="1 of 4 experts are left"):
        mote(few, f"experts=1:2 policy=before_topk fold={fold}")
    assert set(routed(mote(few, f"experts=1:0 mode=force fold={fold}"))[0].reshape(-1).tolist()) == {0, 2, 3}


def test_all_suppressed_leaves_the_shared_path(dialect: str) -> None:
    """DeepSeek: what remains is the shared expert; Mixtral: nothing is added to the stream."""
    for name, count in (("mixtral_batched", 4), ("deepseek", 12)):
        everyone = "[" + ", ".join(f"1:{e}" for e in range(count)) + "]"
        graph = in_dialect(name, dialect)
        muted = mote(graph, f"experts={everyone}")
        assert not routed(muted)[1].any()
        result = muted.run(inputs())["logits"]
        assert np.isfinite(result[REAL]).all() and relative(graph.run(inputs())["logits"], result) > 1e-2


@pytest.mark.parametrize(
    ("options", "error", "why"),
    [
        ("", OptionError, "say which experts"),
        ("experts=1:2 profile=x.json", OptionError, "say which experts, once"),
        ("experts=1", OptionError, "experts"),
        ("experts=[1:2, one:3]", OptionError, "'one:3' is no expert"),
        ("experts=1:2 amount=input", OptionError, "amount=input needs mode=bias"),
        ("experts=1:2 mode=force amount=0.5", OptionError, "chosen or not"),
        ("experts=1:2 amount=2", OptionError, "no share"),
        ("experts=1:2 weight=0.5", OptionError, "weight is for mode=force"),
        ("experts=1:2 where=5:5", OptionError, "no token"),
        ("experts=1:2 mode=stimulate", OptionError, "mode"),
        ("experts=7:2", PassError, r"blocks\.7 is no mixture of experts"),
        ("experts=1:4", PassError, r"blocks\.1 has no expert 4"),
        ("experts=[1:0, 1:1, 1:2] mode=force", PassError, "3 experts cannot be among the 2"),
        ("experts=[1:0, 1:1, 1:2] policy=before_topk", PassError, "1 of 4 experts are left, and each token gets 2"),
    ],
)
def test_bad_input_is_one_clear_line(options: str, error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        mote(in_dialect("mixtral_batched", "fx"), options)


def test_groups_limit_what_can_be_asked(dialect: str) -> None:
    graph = in_dialect("deepseek", dialect)  # 3 groups of 4, of which a token chooses 2
    with pytest.raises(PassError, match="3 groups, and each token chooses 2"):
        mote(graph, "experts=[1:0, 1:4, 1:8] mode=force")
    mostly = [*range(3), *range(4, 7)]
    with pytest.raises(PassError, match="1 groups have 2 experts left"):
        mote(graph, f"experts=[{', '.join(f'1:{e}' for e in mostly)}] policy=before_topk")
    two = mote(graph, "experts=[1:4, 1:8] mode=force")
    assert all({4, 8} <= set(row) for row in routed(two)[0].tolist())
    one_left = run(graph, "mote{experts=[1:4, 1:5, 1:6] policy=before_topk}")
    assert "too few experts are left in group 1" in " ".join(one_left.report[0].messages)
    assert not set(routed(one_left.graph)[0].reshape(-1).tolist()) & {4, 5, 6, 7}


def test_a_model_without_experts(tiny: Graph) -> None:
    with pytest.raises(PassError, match="no mixture of experts"):
        mote(tiny, "experts=1:2")


COMPOSED: dict[str, Any] = {
    "steer": "steer{vector=%s site=blocks.0.resid_post fold=false}",
    "quantize": "quantize{weights=int8}",
}


@pytest.mark.parametrize("other", COMPOSED)
def test_composes(other: str, dialect: str) -> None:
    """Before and behind another pass; each does what it does alone."""
    vector = "[" + ", ".join(repr(float(v)) for v in np.random.default_rng(0).normal(0, 0.4, 32).round(3)) + "]"
    step = COMPOSED[other] % vector if "%s" in COMPOSED[other] else COMPOSED[other]
    for name in NAMES:
        graph = in_dialect(name, dialect)
        alone = routed(apply(graph, step))
        for edit in (
            f"mote{{experts=1:{E} policy=before_topk}}",
            f"mote{{experts=1:{E} mode=force}}",
            f"mote{{experts=1:{E}}}",
        ):
            a, b = routed(apply(graph, f"{edit}, {step}")), routed(apply(graph, f"{step}, {edit}"))
            assert np.array_equal(a[0], b[0]) and relative(a[2], b[2]) < 1e-4
            assert relative(alone[2][REAL], b[2][REAL]) > 1e-3
            if "policy" in edit:
                assert not (b[0] == E).any()


@pytest.mark.parametrize("name", ["mixtral", *NAMES])
def test_dropped_experts_leave_the_outputs_unchanged(name: str, dialect: str) -> None:
    """Weights go, grouped or gathered; the router keeps its rows, so what is chosen and how it weighs stays."""
    graph = in_dialect(name, dialect)
    kept = mote(graph, f"experts=1:{E} policy=before_topk")
    result = run(graph, f"mote{{experts=1:{E} policy=before_topk drop=true}}")
    result.graph.verify()
    assert all(np.array_equal(a, b) for a, b in zip(routed(kept), routed(result.graph), strict=True))
    count = kept.views.moe()[-1].experts
    assert result.graph.views.moe()[-1].experts == count - 1 and result.report[0].counts["dropped"] == 1
    sizes = [sum(parameter_bytes(p) for p in g.parameters()) for g in (kept, result.graph)]
    stacks = [p for p in kept.parameters() if p.shape is not None and len(p.shape) == 3 and ".1.mlp.experts." in p.name]
    assert len(stacks) == 2 and sizes[0] - sizes[1] > 0.9 * sum(map(parameter_bytes, stacks)) / count
    for late in (f"experts=1:{E} mode=force", "experts=1:0 policy=before_topk"):
        with pytest.raises(PassError, match="1 of its experts were dropped"):
            mote(result.graph, late)
    assert routed(mote(result.graph, "experts=1:0"))[0].shape == routed(kept)[0].shape
    with pytest.raises(OptionError, match="only experts that no token gets"):
        mote(graph, f"experts=1:{E} policy=before_topk where=3: drop=true")


@pytest.mark.parametrize("order", ["mote, kv_cache", "kv_cache, mote"])
def test_with_a_cache_in_chunks_and_whole(order: str, dialect: str) -> None:
    """A clause means the same for a whole text, in chunks behind a cache, and for a row that is padded on the left."""
    graph = in_dialect("mixtral_batched", dialect)
    step = f"mote{{experts=1:{E} policy=before_topk where='2:6 & generated'}}"
    whole = apply(graph, step)
    cached = apply(graph, order.replace("mote", step).replace("kv_cache", "kv_cache{graphs=combined}"))
    given, lengths = inputs(), {"prompt_lengths": np.array([3, 2])}
    expected = whole.run({**given, **lengths})["logits"]
    assert relative(expected[REAL], whole.run(given)["logits"][REAL]) > 1e-3, "without lengths nothing is generated"
    runner, slots = executor_for(cached).open(cached), slots_of(cached).values()
    sizes = [[2 if axis == 0 else size if isinstance(size, int) else 0 for axis, size in enumerate(s.shape)] for s in slots]
    state = {s.input: np.zeros(size, np.float32) for s, size in zip(slots, sizes, strict=True)}
    parts = []
    for start, stop in ((0, 5), (5, 6), (6, 8)):
        feed = {name: given[name][:, start:stop] for name in ("input_ids", "position_ids")}
        out = runner({**feed, "attention_mask": given["attention_mask"][:, :stop], **lengths, **state})
        state = {s.input: out[s.output] for s in slots}
        parts.append(out["logits"])
    assert relative(expected[REAL], np.concatenate(parts, 1)[REAL]) < 1e-5


def test_details_name_the_block(dialect: str) -> None:
    report = run(in_dialect("mixtral_batched", dialect), f"mote{{experts=[*:{E}, 0:1]}}").report[0]
    assert report.details[0]["site"] == "blocks.0" and report.details[0]["experts"] == f"1 {E}"
    assert report.details[1]["site"] == BLOCK and report.details[1]["experts"] == str(E)
