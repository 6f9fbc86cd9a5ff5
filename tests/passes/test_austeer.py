"""AUSteer: votes, ranks and ties by hand, exactly k channels, against forward hooks and edited weights, run-time scales."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

import actgraph as ag
from actgraph.errors import InputError, OptionError, PassError, SiteError
from actgraph.formats.artifacts import Artifact
from actgraph.graph import Graph
from actgraph.graph.graph import Array
from actgraph.passes.steer.austeer import UnitMomentum, activation_momentum, extract_momentum, pair_texts, ranked_units
from tests import zoo
from tests.passes.conftest import apply, hf_stories, relative, run, token_inputs
from tests.passes.planes import last_tokens, seen

FAMILIES = {"attn.head_out": "self_attn.o_proj", "mlp.out": "mlp", "resid_post": ""}


def momentum_file(path: Path, family: str, seed: int = 0, pairs: int = 6) -> tuple[str, dict[str, Array]]:
    """Momentum from random pairs, so that there are many ties; saved in another order than that of the blocks."""
    rng = np.random.default_rng(seed)
    names = [f"blocks.{i}.{family}" for i in range(5)]
    above, below = ({name: rng.normal(size=(pairs, 64)).astype(np.float32) for name in names} for _ in range(2))
    momentum = activation_momentum(above, below)
    shuffled = {name: momentum[name] for name in reversed(names)}
    return str(UnitMomentum(shuffled, pairs).save(path / f"{family}.safetensors")), momentum


def factors(momentum: dict[str, Array], k: int, scale: float) -> dict[str, Array]:
    """``1 + gamma`` of each site, ranked by sorting tuples."""
    everything = [
        (-abs(float(m)), block, channel, name, float(m))
        for block, (name, values) in enumerate(momentum.items())
        for channel, m in enumerate(values)
    ]
    result = {name: np.ones(len(values), np.float32) for name, values in momentum.items()}
    for _, _, channel, name, m in sorted(everything)[:k]:
        result[name][channel] += np.float32(scale * m)
    return result


def hooked(family: str, gains: dict[str, Array]) -> Array:
    """Logits of the transformers model with the activations scaled by hooks."""
    model, handles = hf_stories(), []
    for name, gain in gains.items():
        block = model.model.layers[int(name.split(".")[1])]
        factor = torch.from_numpy(gain)
        module = block.get_submodule(FAMILIES[family]) if FAMILIES[family] else block
        if family == "attn.head_out":
            handles.append(module.register_forward_pre_hook(lambda _, args, factor=factor: (args[0] * factor, *args[1:])))
        else:
            handles.append(module.register_forward_hook(lambda _, __, out, factor=factor: _times(out, factor)))
    try:
        with torch.no_grad():
            tensors = {k: torch.from_numpy(v) for k, v in token_inputs().items()}
            return model(**tensors, use_cache=False).logits.numpy()  # type: ignore[no-any-return]
    finally:
        for handle in handles:
            handle.remove()


def _times(output: object, factor: torch.Tensor) -> object:
    return (output[0] * factor, *output[1:]) if isinstance(output, tuple) else output * factor  # type: ignore[operator]


def test_votes_and_ranks_by_hand() -> None:
    """(b) of the card: an integer difference, zeros and ties in it, and the order of equal ones: block, then channel."""
    first = np.array([[1, -1, 0, 2, -3], [1, -2, 0, -2, 3], [1, -1, 5, 2, 0], [-1, -1, 0, -2, 0]])
    second = np.array([[-1, 0, 1, 0, 1], [-1, 0, 1, 0, 1], [-1, 0, 1, 0, -1], [-1, 0, 1, -9, 1]])
    zero = np.zeros_like(first)
    momentum = activation_momentum({"b": first, "a": second}, {"b": zero, "a": zero})
    assert momentum["b"].tolist() == [0.75, -1.0, 0.25, 0.5, 0.25] and momentum["a"].tolist() == [-1.0, 0.0, 1.0, -0.25, 0.75]
    ranked = [(unit.site, unit.channel, unit.momentum) for unit in ranked_units(momentum, 9)]
    assert ranked == [
        ("b", 1, -1.0), ("a", 0, -1.0), ("a", 2, 1.0), ("b", 0, 0.75), ("a", 4, 0.75), ("b", 3, 0.5), ("b", 2, 0.25),
        ("b", 4, 0.25), ("a", 3, -0.25),
    ]  # fmt: skip
    assert [u.site for u in ranked_units({"a": momentum["a"], "b": momentum["b"]}, 3)] == ["a", "a", "b"]


def test_a_planted_channel_comes_first() -> None:
    """(a): a channel that is larger by a constant in all positives; smaller, with the other sign."""
    rng = np.random.default_rng(0)
    for sign in (1.0, -1.0):
        above = {f"blocks.{i}.mlp.out": rng.normal(size=(30, 40)).astype(np.float32) for i in range(4)}
        below = {name: rows + 0.5 * rng.normal(size=rows.shape).astype(np.float32) for name, rows in above.items()}
        above["blocks.2.mlp.out"][:, 17] = below["blocks.2.mlp.out"][:, 17] + np.float32(0.3 * sign)
        (unit,) = ranked_units(activation_momentum(above, below), 1)
        assert (unit.site, unit.channel, unit.momentum) == ("blocks.2.mlp.out", 17, sign)


@settings(max_examples=40, deadline=None)
@given(nps.arrays(np.int8, (5, 6), elements=st.integers(-2, 2)), st.integers(1, 12))
def test_exactly_k_units(delta: Array, k: int) -> None:
    """(c), and the order against a sort of tuples."""
    momentum = activation_momentum({"x": delta[:, :4], "y": delta[:, 4:]}, {"x": 0 * delta[:, :4], "y": 0 * delta[:, 4:]})
    moving = sum(int(np.count_nonzero(values)) for values in momentum.values())
    if k > moving:
        with pytest.raises(InputError, match=f"{moving} of 6 have a momentum"):
            ranked_units(momentum, k)
        return
    gains = {name: np.zeros(len(values)) for name, values in momentum.items()}
    for unit in ranked_units(momentum, k):
        gains[unit.site][unit.channel] = unit.momentum
    assert sum(int(np.count_nonzero(gain)) for gain in gains.values()) == k
    for name, factor in factors(momentum, k, 1.0).items():
        np.testing.assert_allclose(factor, 1 + gains[name], rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_forward_hooks(stories: Graph, tmp_path: Path, family: str) -> None:
    """(d), in files as well; a site without a chosen channel gets no node."""
    file, momentum = momentum_file(tmp_path, family)
    result = ag.run(stories, f"austeer{{units={file!r} k=7 scale=12 fold=false}}")
    gains = factors(momentum, 7, 12)
    touched = [name for name, gain in gains.items() if (gain != 1).any()]
    assert result.report[0].counts == {"inserted": len(touched)} and len(result.report[0].details) == 7
    scales = [node for node in result.graph.nodes() if node.op == "actgraph.channel_scale"]
    assert sum(np.count_nonzero(result.graph.read(node.operands[1]) != 1) for node in scales) == 7  # type: ignore[arg-type]
    steered = run(result.graph)
    assert relative(hooked(family, gains), steered) < 1e-5
    for wrong in (factors(momentum, 7, -12), factors(momentum, 6, 12), factors(dict(reversed(momentum.items())), 7, 12)):
        assert relative(hooked(family, wrong), steered) > 1e-3
    result.graph.save(tmp_path / "inlined.onnx", inline="all")
    assert relative(steered, run(ag.load(tmp_path / "inlined.onnx"))) < 1e-5


@pytest.mark.parametrize("family", ["attn.head_out", "mlp.out"])
def test_equals_the_weight_edit(stories: Graph, tmp_path: Path, family: str) -> None:
    """Columns of the output projection, rows of the down projection, by hand."""
    file, momentum = momentum_file(tmp_path, family)
    edited = stories.clone()
    with edited.edit("by hand") as editor:
        for name, gain in factors(momentum, 20, 3).items():
            site = edited.site(name)
            for linear in edited.views.linears():
                if family == "mlp.out" and linear.output == site.value:
                    linear.write_weight(editor, linear.read_weight() * gain[:, None])
                elif family != "mlp.out" and linear.input in site.uses(edited):
                    linear.write_weight(editor, linear.read_weight() * gain[None, :])
    steered = run(apply(stories, f"austeer{{units={file!r} k=20 scale=3 fold=false}}"))
    assert relative(run(edited), steered) < 1e-5 < 1e-2 < relative(run(stories), steered)
    folded = ag.run(stories, f"austeer{{units={file!r} k=20 scale=3}}")
    assert set(folded.report[0].counts) == {"folded"} and relative(run(edited), run(folded.graph)) < 1e-5
    assert not any(node.op == "actgraph.channel_scale" for node in folded.graph.nodes())
    assert np.array_equal(run(apply(folded.graph, "unfold")), steered), "weights are as they were, and the node is back"


def test_scales_of_rows_at_run_time(stories: Graph, tmp_path: Path) -> None:
    file, _ = momentum_file(tmp_path, "mlp.out")
    made = apply(stories, f"austeer{{units={file!r} k=30 scale=input where=2:}}")
    assert np.array_equal(run(made), run(stories))
    rows = made.run({**token_inputs(), "austeer.scale": np.array([0.0, 8.0], np.float32)})["logits"]
    fixed = run(apply(stories, f"austeer{{units={file!r} k=30 scale=8 where=2:}}"))
    assert np.array_equal(rows[0], run(stories)[0]) and relative(fixed[1], rows[1]) < 1e-5
    assert relative(run(stories)[1], rows[1]) > 1e-2
    assert np.array_equal(fixed[:, :2], run(stories)[:, :2]), "the first two positions are not in the clause"


def test_scale_zero_and_narrowed_sites(stories: Graph, tmp_path: Path) -> None:
    file, momentum = momentum_file(tmp_path, "resid_post")
    off = ag.run(stories, f"austeer{{units={file!r} scale=0}}")
    assert set(off.report[0].counts) == {"identity"} and np.array_equal(run(off.graph), run(stories))
    sites = "blocks.{1..3}.resid_post"
    some = {name: momentum[name] for name in list(momentum)[1:4]}
    narrowed = apply(stories, f"austeer{{units={file!r} k=9 scale=4 site={sites!r} ignore=blocks.2.resid_post}}")
    del some["blocks.2.resid_post"]
    assert relative(hooked("resid_post", factors(some, 9, 4)), run(narrowed)) < 1e-5


def test_one_node_merges_nothing_and_survives_quantization(stories: Graph, tmp_path: Path) -> None:
    file, _ = momentum_file(tmp_path, "attn.head_out")
    step = f"austeer{{units={file!r} k=12 scale=10}}"
    both = apply(stories, f"{step}, quantize{{weights=int8}}")
    assert relative(run(apply(stories, step)), run(both)) < 0.05
    site = "blocks.0.attn.head_out"
    step = step.replace("scale=10", "scale=10 fold=false")
    before, after = seen(stories, [site])[site], seen(apply(stories, step), [site])[site]
    changed = (before != after).any((0, 1))
    assert 0 < changed.sum() <= 12


def test_pairs() -> None:
    pairs = [("Q: one ", "yes", "no"), ("Q: two ", "I'm sorry, but I can't assist with that", "sure")]
    assert pair_texts(pairs) == (["Q: one yes", "Q: two " + pairs[1][1]], ["Q: one no", "Q: two sure"])
    assert pair_texts(pairs, refusal="I'm sorry, but I can't assist")[0] == ["Q: one yes", pairs[1][1]]


def test_from_a_model_to_a_steered_one(stories: Graph, tmp_path: Path) -> None:
    pairs = [(f"{name} saw the", " dark forest", " big city") for name in ("Tom", "Lily", "The cat", "A man", "She")]
    positive, negative = pair_texts(pairs)
    found = extract_momentum(stories, positive, negative, site="blocks.*.mlp.out", progress=False)
    names = [f"blocks.{i}.mlp.out" for i in range(5)]
    assert found.pairs == 5 and list(found.momentum) == names
    want = activation_momentum(*(last_tokens(stories, names, texts) for texts in (positive, negative)))
    assert all(np.array_equal(found.momentum[name], want[name]) for name in names)
    assert [abs(row["momentum"]) for row in found.table(3)] == [1.0] * 3
    file = str(found.save(tmp_path / "units.safetensors"))
    steered = apply(stories, f"austeer{{units={file!r} k=40 scale=6}}")
    assert relative(run(stories), run(steered)) > 1e-2


def test_refusals(tmp_path: Path) -> None:
    graph = zoo.captured("stories260k")
    file, momentum = momentum_file(tmp_path, "mlp.out")

    def saved(name: str, directions: dict[str, Array], model: str = "") -> str:
        return str(UnitMomentum(directions, model=model).save(tmp_path / f"{name}.safetensors"))

    one = momentum["blocks.0.mlp.out"]
    foreign = saved("foreign", momentum, model="f32[512,64]:0123456789abcdef")
    other = str(Artifact("kif_signature", momentum).save(tmp_path / "other.safetensors"))
    cases: list[tuple[str, type[Exception], str]] = [
        (f"units={file!r} k=0", OptionError, "k"), (f"units={file!r} scale=nan", OptionError, "finite"),
        (f"units={file!r} k=1000", InputError, "have a momentum"), ("units=none.safetensors", InputError, "there is no file"),
        (f"units={other!r}", InputError, "no activation_momentum file but kif_signature"),
        (f"units={file!r} site=blocks.0.resid_post", PassError, "no momentum for"),
        (f"units={saved('short', {'blocks.0.mlp.out': one[:9]})!r} k=2", PassError, "9 channels for blocks.0.mlp.out"),
        (f"units={saved('nan', {'blocks.0.mlp.out': one * np.nan})!r} k=2", InputError, "NaN"),
        (f"units={file!r} site=blocks.8.mlp.out", SiteError, "nearest"), (f"units={foreign!r}", PassError, "another model"),
    ]  # fmt: skip
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            apply(graph, f"austeer{{{options}}}")
    assert apply(graph, f"austeer{{units={foreign!r} other_model=allow}}")
    rows = {"x": np.ones((3, 4), np.float32)}
    for above, below, what in (
        (rows, {"y": rows["x"]}, "same sites"), ({}, {}, "same sites"), (rows, {"x": rows["x"][:2]}, "pair n"),
        ({"x": rows["x"] * np.nan}, rows, "NaN"), ({"x": rows["x"][:0]}, {"x": rows["x"][:0]}, "pair n"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=what):
            activation_momentum(above, below)
