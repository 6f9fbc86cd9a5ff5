"""Steer2Edit: calibration against transformers, scores against loops, the card's properties, and what is declined."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.calibrate.corpora import Corpus
from actgraph.calibrate.document_rows import collect_rows
from actgraph.errors import InputError, OptionError, PassError, SiteError
from actgraph.graph import Graph
from actgraph.graph.graph import Array
from actgraph.passes.linears import input_value
from actgraph.passes.steer.steer2edit import (
    Measured,
    Steer2EditDirections,
    compact,
    components,
    compute_edits,
    edit_heads,
    edit_neurons,
    load_directions,
    steer2edit_directions,
    strengths,
)  # fmt: skip
from actgraph.passes.steer.weight_edits import load_edits
from tests import zoo
from tests.passes.conftest import apply, hf_stories, in_dialect, relative, run, token_inputs

RNG = np.random.default_rng(17)
#: A setting that edits some components of stories260k and not all.
SETTING = {"rho_att": 0.3, "rho_mlp": 0.5, "a": 0.4}
TEXT = " ".join(f"{key}={value}" for key, value in SETTING.items())


@functools.cache
def pairs(who: str) -> list[tuple[str, str]]:
    """Openings of the sample's stories with what follows: stories of a ``girl``, or of anybody ``else``."""
    texts = [str(text)[:120] for text in Corpus.of() if ("girl" in str(text)) == (who == "girl")]
    found = [(text[:25], text[25:]) for text in dict.fromkeys(texts)][:5]
    assert len(found) == 5
    return found


@functools.cache
def measured() -> Steer2EditDirections:
    return steer2edit_directions(zoo.captured("stories260k"), pairs("girl"), pairs("else"), batch_size=4)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return measured().save(tmp_path / "directions.safetensors")


def directions_for(name: str, seed: int = 0) -> Steer2EditDirections:
    """Random directions and mean inputs for a tiny model."""
    rng = np.random.default_rng(seed)
    found, _ = components(zoo.captured(name))
    return Steer2EditDirections({
        c.place.name: Measured(
            rng.normal(0, 1, c.place.linear.out_features).astype(np.float32),
            rng.normal(0, 1, c.place.linear.in_features).astype(np.float32),
        )
        for c in found
    })  # fmt: skip


# --- calibration ------------------------------------------------------------------------------------------------------


def reference_means(documents: list[tuple[str, str]], module: str) -> tuple[Array, Array]:
    """Mean input and output of a module over responses, document by document, by a hook on the transformers model."""
    model, tokenizer = hf_stories(), zoo.captured("stories260k").companions.tokenizer
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = model.get_submodule(module).register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    means = []
    try:
        for prompt, response in documents:
            ids = tokenizer.encode(prompt + response).ids
            size = len(tokenizer.encode(prompt).ids)
            with torch.no_grad():
                model(torch.tensor([ids]), use_cache=False)
            span = slice(size - 1, len(ids) - 1)
            means.append([part[0, span].double().numpy().mean(0) for part in seen[-1]])
    finally:
        handle.remove()
    return np.mean([m[0] for m in means], 0), np.mean([m[1] for m in means], 0)


def whole_words(documents: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The documents split where the first response token begins, so that the prompt reads alike alone."""
    return [(text[:place], text[place:]) for a, b in documents for text in [a + b] for place in [text.index(" ", 18)]]


@pytest.mark.parametrize(("site", "module"), [("attn.head_out", "self_attn.o_proj"), ("mlp.hidden", "mlp.down_proj")])
def test_calibration_against_transformers(stories: Graph, site: str, module: str) -> None:
    sets = [whole_words(pairs(who)) for who in ("girl", "else")]
    found = steer2edit_directions(stories, *sets, batch_size=3).matrices[f"blocks.2.{site}"]
    (x_pos, y_pos), (x_neg, y_neg) = (reference_means(documents, f"model.layers.2.{module}") for documents in sets)
    assert np.abs(found.direction - (y_pos - y_neg)).max() < 1e-5 < np.abs(y_pos - y_neg).max()
    assert np.abs(found.mean_input - (x_pos + x_neg) / 2).max() < 1e-5
    elsewhere = (
        reference_means(sets[0], f"model.layers.1.{module}")[1] - reference_means(sets[1], f"model.layers.1.{module}")[1]
    )
    assert np.abs(found.direction - elsewhere).max() > 1e-2, "another layer must be noticed"


def test_any_batch_size_gives_the_same_directions(stories: Graph) -> None:
    one, many = (steer2edit_directions(stories, pairs("girl"), pairs("else"), batch_size=n).matrices for n in (1, 5))
    for name, found in one.items():
        assert np.abs(found.direction - many[name].direction).max() < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_calibration_of_other_architectures(name: str) -> None:
    """Conv1D weights, rows of tokens: alike in both dialects and for any batch."""
    rng = np.random.default_rng(3)
    sets = [[(rng.integers(3, 96, 3), rng.integers(3, 96, n)) for n in (2, 5, 4)] for _ in range(2)]
    fx, onnx = (steer2edit_directions(in_dialect(name, d), *sets, batch_size=2).matrices for d in ("fx", "onnx"))
    assert set(fx) == set(onnx) == {c.place.name for c in components(zoo.captured(name))[0]}
    for site, found in fx.items():
        assert relative(found.direction, onnx[site].direction) < 1e-4
    alone = steer2edit_directions(zoo.captured(name), *sets, batch_size=1).matrices
    assert all(relative(alone[site].direction, found.direction) < 1e-4 for site, found in fx.items())


# --- scores and strengths ---------------------------------------------------------------------------------------------


def test_vectorised_neurons_equal_the_loop() -> None:
    weight, found = RNG.normal(0, 1, (16, 40)), Measured(RNG.normal(0, 1, 16), RNG.normal(0, 1, 40))
    weight[:, 3], found.mean_input[5] = 0.0, 0.0
    v = found.direction / np.linalg.norm(found.direction)
    edits = edit_neurons(weight, found, 0.5, 0.6)
    for i in range(40):
        mean = weight[:, i] * found.mean_input[i]
        g = float(v @ mean / np.linalg.norm(mean)) if mean.any() else 0.0
        strength = np.sign(g) * max(abs(g) - 0.5 * 0.6, 0) / (0.5 * (1 - 0.6))
        assert edits.scores[i] == pytest.approx(g, abs=1e-12)
        expected = strength * np.sign(weight[:, i] @ v) * v
        assert np.allclose(edits.update.update()[:, i], expected, atol=1e-12)
    assert 0 < edits.edited < 38


def test_heads_equal_the_loop() -> None:
    weight, found = RNG.normal(0, 1, (16, 24)), Measured(RNG.normal(0, 1, 16), RNG.normal(0, 1, 24))
    found.mean_input[8:12] = 0.0  # a head that writes nothing on average
    v = found.direction / np.linalg.norm(found.direction)
    edits = edit_heads(weight, found, 6, 0.3, 0.2)
    for j in range(6):
        part, x = weight[:, 4 * j : 4 * j + 4], found.mean_input[4 * j : 4 * j + 4]
        mean = part @ x
        g = float(v @ mean / np.linalg.norm(mean)) if mean.any() else 0.0
        strength = np.sign(g) * max(abs(g) - 0.06, 0) / (0.3 * 0.8)
        k = part.T @ v / np.linalg.norm(part.T @ v)
        assert np.allclose(edits.update.update()[:, 4 * j : 4 * j + 4], strength * np.outer(v, k), atol=1e-12)
    assert edits.strengths[2] == 0 < edits.edited


def test_the_update_has_rank_one() -> None:
    for edit in compute_edits(zoo.captured("stories260k"), measured(), **SETTING).values():
        if edit.edited > 1:
            values = np.linalg.svd(edit.update.update(), compute_uv=False)
            assert values[1] < 1e-6 * values[0]


@pytest.mark.parametrize("name", ["stories260k", "gpt2"])
def test_every_edit_pushes_the_mean_output_along_the_direction(name: str) -> None:
    directions = measured() if name == "stories260k" else directions_for(name)
    checked = 0
    for site, edit in compute_edits(zoo.captured(name), directions, rho_att=0.3, rho_mlp=0.3, a=0.2).items():
        found = directions.matrices[site]
        v = found.direction.astype(np.float64) / np.linalg.norm(found.direction.astype(np.float64))
        width = len(found.mean_input) // len(edit.scores)
        pushed = (edit.update.read * found.mean_input).reshape(-1, width).sum(1) * (v @ edit.update.write)
        assert (pushed[edit.strengths != 0] > 0).all() and not pushed[edit.strengths == 0].any()
        checked += edit.edited
    assert checked > 10


def test_the_first_block_moves_by_what_the_edit_says(stories: Graph, tmp_path: Path) -> None:
    """Measured again after the edit: the first attention's mean output moves along v by s . x, and nothing before it moves."""
    name = "blocks.0.attn.head_out"
    edit = compute_edits(stories, measured(), rho_att=0.2, rho_mlp=0, a=0.1)[name]
    path = measured().save(tmp_path / "directions.safetensors")
    edited = apply(stories, f"steer2edit{{directions={path} rho_att=0.2 rho_mlp=0 a=0.1 site={name}}}")
    means = []
    for graph in (stories, edited):
        linear = components(graph)[0][0].place.linear
        values = [f"%{value.name}" for value in (input_value(linear), linear.output)]
        found = collect_rows(graph, values, pairs("girl"), position="response")
        means.append([found[value].astype(np.float64).mean(0) for value in values])
    (x, y), (x_after, y_after) = means
    assert np.array_equal(x, x_after) and edit.edited
    assert np.abs(y_after - y - (edit.update.read @ x) * edit.update.write).max() < 1e-6 < np.abs(y_after - y).max() / 100


def test_strengths_maximise_the_objective() -> None:
    scores, rho, a = np.array([0.9, -0.5, 0.1, -0.02]), 0.4, 0.3
    grid = np.linspace(-4, 4, 16001)
    for g, found in zip(scores, strengths(scores, rho, a), strict=True):
        objective = grid * g - rho * (a * np.abs(grid) + (1 - a) / 2 * grid**2)
        assert found == pytest.approx(grid[objective.argmax()], abs=1e-3)


def test_sparsity_is_monotone_and_ends() -> None:
    graph = zoo.captured("stories260k")
    counts = []
    for product in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 0.999, 1.0, 1.5):
        a = 0.5
        found = compute_edits(graph, measured(), rho_att=max(product / a, 1e-3), rho_mlp=max(product / a, 1e-3), a=a)
        counts.append(sum(edit.edited for edit in found.values()))
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[3] > 0
    assert counts[-2:] == [0, 0]


def test_a_family_can_be_left_alone() -> None:
    found = compute_edits(zoo.captured("stories260k"), measured(), rho_att=0.0, rho_mlp=0.5, a=0.2)
    assert not any(edit.edited for site, edit in found.items() if "attn" in site)
    assert any(edit.edited for site, edit in found.items() if "mlp" in site)
    with pytest.raises(OptionError, match="below 1"):
        strengths(np.ones(2), 0.5, 1.0)


# --- the pass ---------------------------------------------------------------------------------------------------------


def hooked(edits: dict[str, Array]) -> Array:
    """Logits of the transformers model with ``delta x`` added to the outputs of its modules."""
    model = hf_stories()
    handles = []

    def hook(delta: torch.Tensor):  # type: ignore[no-untyped-def]
        return lambda _, args, out: out + args[0] @ delta.T

    for site, delta in edits.items():
        _, layer, kind, _ = site.split(".")
        module = f"model.layers.{layer}.{'self_attn.o_proj' if kind == 'attn' else 'mlp.down_proj'}"
        handles.append(model.get_submodule(module).register_forward_hook(hook(torch.from_numpy(delta.astype(np.float32)))))
    try:
        with torch.no_grad():
            return model(**{k: torch.from_numpy(v) for k, v in token_inputs().items()}, use_cache=False).logits.numpy()
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("mode", ["merge", "side_branch"])
def test_equals_a_forward_hook(stories: Graph, file: Path, mode: str) -> None:
    found = compute_edits(stories, measured(), **SETTING)
    reference = hooked({site: edit.update.update() for site, edit in found.items() if edit.edited})
    edited = apply(stories, f"steer2edit{{directions={file} {TEXT} mode={mode}}}")
    assert relative(reference, run(edited)) < 1e-5
    assert relative(run(stories), reference) > 1e-2
    swapped = hooked({site: -edit.update.update() for site, edit in found.items() if edit.edited})
    assert relative(swapped, run(edited)) > 1e-2, "the wrong sign must be noticed"


def test_merging_keeps_the_topology_and_a_branch_is_two_nodes(stories: Graph, file: Path) -> None:
    merged = apply(stories, f"steer2edit{{directions={file} {TEXT}}}")
    assert [node.op for node in merged.nodes()] == [node.op for node in stories.nodes()]
    beside = ag.run(stories, f"steer2edit{{directions={file} {TEXT} mode=side_branch}}")
    row = beside.report["steer2edit"]
    assert len(beside.graph.nodes()) == len(stories.nodes()) + 2 * row.counts["branches"]
    assert row.counts["heads edited"] > 0 < row.counts["neurons edited"]
    assert {"site", "weight", "mode", "update", "of weight", "edited", "of", "largest lambda"} <= set(row.details[0])


@pytest.mark.parametrize(
    ("name", "dialect"), [("gpt2", "fx"), ("gpt2", "onnx"), ("opt", "fx"), ("gemma3", "fx"), ("mixtral", "fx")]
)
def test_merged_equals_the_branch_elsewhere(name: str, dialect: str, tmp_path: Path) -> None:
    graph = in_dialect(name, dialect)
    path = directions_for(name).save(tmp_path / "directions.safetensors")
    step = f"steer2edit{{directions={path} rho_att=0.4 rho_mlp=0.4 a=0.3 scale=0.5"
    merged, beside = (ag.run(graph, f"{step} mode={mode}}}") for mode in ("merge", "side_branch"))
    inputs = zoo.inputs(name)
    assert relative(run(merged.graph, inputs), run(beside.graph, inputs)) < 1e-5
    assert relative(run(graph, inputs), run(merged.graph, inputs)) > 1e-2
    declined = [d for d in merged.report["steer2edit"].declined if "experts" in d.reason]
    assert len(declined) == (len(graph.views.blocks()) if name == "mixtral" else 0)


def test_off_is_bit_exact(stories: Graph, file: Path) -> None:
    for mode in ("merge", "side_branch"):
        off = apply(stories, f"steer2edit{{directions={file} {TEXT} mode={mode} scale=0}}")
        assert np.array_equal(run(stories), run(off))
        assert len(off.nodes()) == len(stories.nodes())


def test_a_branch_follows_a_run_time_input(stories: Graph, file: Path) -> None:
    step = f"steer2edit{{directions={file} {TEXT} mode=side_branch"
    toggled, constant = apply(stories, f"{step} scale=input}}"), apply(stories, f"{step} scale=0.5}}")
    assert np.array_equal(run(stories), run(toggled)), "off where nobody gives it"
    inputs = token_inputs()
    half = run(toggled, {**inputs, "steer2edit.scale": np.full(2, 0.5, np.float32)})
    assert relative(run(constant), half) < 1e-5
    rows = run(toggled, {**inputs, "steer2edit.scale": np.array([0.0, 0.5], np.float32)})
    assert np.array_equal(rows[0], run(stories)[0]) and relative(half[1], rows[1]) < 1e-6
    assert relative(run(stories)[1], rows[1]) > 1e-3


def test_a_branch_at_some_tokens(stories: Graph, file: Path) -> None:
    step = f"steer2edit{{directions={file} {TEXT} mode=side_branch where='5:'}}"
    edited = run(apply(stories, step))
    before = run(stories)
    assert np.array_equal(edited[:, :5], before[:, :5])
    assert relative(before[:, 5:], edited[:, 5:]) > 1e-3


def test_a_branch_survives_quantization(stories: Graph, file: Path) -> None:
    """Quantized, then edited: the codes stay, merging is declined, and the edit does what it does to the float weights."""
    quantized = apply(stories, "quantize{weights=int8}")
    with pytest.raises(PassError, match="mode=side_branch"):
        apply(quantized, f"steer2edit{{directions={file} {TEXT}}}")
    edited = apply(quantized, f"steer2edit{{directions={file} {TEXT} mode=side_branch}}")
    found = compute_edits(quantized, measured(), **SETTING)
    assert any(edit.edited for edit in found.values())
    codes = [
        (p.name, quantized.read(p).tobytes()) for p in quantized.parameters() if p.dtype is not None and not p.dtype.is_float
    ]
    after = {p.name: edited.read(p).tobytes() for p in edited.parameters()}
    assert codes and all(after[name] == data for name, data in codes)
    assert relative(run(quantized), run(edited)) > 1e-2
    other = apply(stories, f"steer2edit{{directions={file} {TEXT} mode=side_branch}}, quantize{{weights=int8}}")
    assert relative(run(other), run(edited)) < 0.05


def test_only_some_projections(stories: Graph, file: Path) -> None:
    out = ag.run(stories, f"steer2edit{{directions={file} {TEXT} site='blocks.{{1..2}}.mlp.hidden'}}")
    assert [row["site"] for row in out.report["steer2edit"].details] == ["blocks.1.mlp.hidden", "blocks.2.mlp.hidden"]
    same = apply(stories, f"steer2edit{{directions={file} {TEXT} site=[linear.13,'blocks.2.mlp.out']}}")
    assert relative(run(same), run(out.graph)) < 1e-6
    rest = ag.run(stories, f"steer2edit{{directions={file} {TEXT} ignore='blocks.*.mlp.hidden'}}")
    assert all("attn" in row["site"] for row in rest.report["steer2edit"].details)


def test_compact_edits_are_the_pass(stories: Graph, file: Path, tmp_path: Path) -> None:
    found = compact(measured(), compute_edits(stories, measured(), **SETTING))
    path = found.save(tmp_path / "edits.safetensors")
    loaded = load_edits(path)
    assert set(loaded.edits) == set(found.edits) and loaded.method == "steer2edit"
    assert (
        relative(
            run(apply(stories, f"steer2edit{{directions={file} {TEXT}}}")), run(apply(stories, f"rank_one{{edits={path}}}"))
        )
        < 1e-6
    )


def test_composition_through_onnx(stories: Graph, file: Path, tmp_path: Path) -> None:
    vector = "[" + ", ".join(repr(round(float(v), 4)) for v in RNG.normal(0, 0.3, 64)) + "]"
    pipeline = (
        f"steer{{vector={vector} site=blocks.1.attn.out fold=false}}, steer2edit{{directions={file} {TEXT} mode=side_branch}}, "
        f"steer2edit{{directions={file} {TEXT} scale=-0.5}}, kv_cache{{graphs=combined}}"
    )
    plain = apply(stories, pipeline.removesuffix(", kv_cache{graphs=combined}"))
    if stories.dialect == "fx":
        for inline in ("none", "all"):
            path = plain.save(tmp_path / f"{inline}.onnx", **({"inline": "all"} if inline == "all" else {}))
            assert relative(run(plain), run(ag.load(path))) < 1e-5
    else:
        cached = ag.run(stories, pipeline).graph
        text, plain_text = (
            ag.generate(cached, "Once upon", max_new_tokens=12),
            ag.generate(plain, "Once upon", max_new_tokens=12),
        )
        assert text == plain_text


def test_blocks_are_still_read_behind_a_branch(dialect: str, tmp_path: Path) -> None:
    """A later pass finds the feed-forwards and attentions of GPT-2, whose activation is what the branch reads as well."""
    graph = in_dialect("gpt2", dialect)
    path = directions_for("gpt2").save(tmp_path / "directions.safetensors")
    edited = apply(graph, f"steer2edit{{directions={path} rho_att=0.4 rho_mlp=0.4 a=0.3 mode=side_branch}}")
    assert len(edited.views.feed_forwards()) == len(graph.views.feed_forwards())
    assert len(edited.views.attentions()) == len(graph.views.attentions())
    assert [input_value(f.down).name for f in edited.views.feed_forwards()] == [
        input_value(f.down).name for f in graph.views.feed_forwards()
    ]


def test_bad_input(stories: Graph, file: Path, tmp_path: Path) -> None:
    step = f"steer2edit{{directions={file} {TEXT}%s}}"
    with pytest.raises(PassError, match=r"no component's score exceeds rho \* a \(the largest is 0\.\d+\)"):
        apply(stories, f"steer2edit{{directions={file} rho_att=2 rho_mlp=2 a=0.5}}")
    with pytest.raises(OptionError, match="merged weights act on every token"):
        apply(stories, step % " where=prompt")
    with pytest.raises(OptionError, match="merged weights act on every token"):
        apply(stories, step % " scale=input")
    with pytest.raises(PassError, match="names no output projection"):
        apply(stories, step % " site=blocks.1.attn.q")
    with pytest.raises(SiteError, match="nearest"):
        apply(stories, step % " site=blocks.1.mlp.hiden")
    with pytest.raises(PassError, match="made from another model than llama"):
        apply(zoo.captured("llama"), step % "")
    with pytest.raises(PassError, match=r"blocks\.0\.attn\.head_out was measured as \[64, 64\], and its weight is \[32, 32\]"):
        apply(zoo.captured("llama"), step % " other_model=allow")
    with pytest.raises(PassError, match="it has neither attention nor feed-forward"):
        apply(zoo.captured("resnet"), step % " other_model=allow")
    with pytest.raises(InputError, match="no token of a response"):
        steer2edit_directions(stories, [("Once upon a time", "")], pairs("else"))
    with pytest.raises(InputError, match="a prompt and a response"):
        steer2edit_directions(stories, ["Once upon a time"], pairs("else"))
    with pytest.raises(InputError, match="empty"):
        steer2edit_directions(stories, [], pairs("else"))
    with pytest.raises(InputError, match="documents are cut to 3"):
        steer2edit_directions(stories, pairs("girl"), pairs("else"), max_length=3)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="not a safetensors file"):
        load_directions(tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match="there is no file"):
        load_directions(tmp_path / "missing.safetensors")
    with pytest.raises(InputError, match="holds no directions of steer2edit"):
        load_directions(compact(measured(), compute_edits(stories, measured(), **SETTING)).save(tmp_path / "edits.safetensors"))
    with pytest.raises(InputError, match="holds no rank-1 edits"):
        load_edits(file)


def test_equal_sets_have_nothing_to_edit(stories: Graph, tmp_path: Path) -> None:
    same = steer2edit_directions(stories, pairs("else"), pairs("else")).save(tmp_path / "same.safetensors")
    with pytest.raises(PassError, match="have the same mean there"):
        apply(stories, f"steer2edit{{directions={same} {TEXT}}}")


def test_files_round_trip(file: Path, tmp_path: Path) -> None:
    again = load_directions(file)
    assert again.save(tmp_path / "again.safetensors").read_bytes() == file.read_bytes()
    assert again.notes == {"positive": "5", "negative": "5"} and again.model.startswith("f32[512,64]:")
