"""Orthogonalisation: equal to ablation wherever the stream is written, untied embeddings, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.errors import InputError, PassError
from actgraph.formats.vectors import SteeringVector, model_fingerprint
from actgraph.graph import Graph
from actgraph.graph.graph import Array
from tests import zoo
from tests.passes.conftest import apply, hf_stories, in_dialect, relative, run, token_inputs

STREAM = "[blocks.0.resid_pre, 'blocks.*.attn.out', 'blocks.*.mlp.out']"


def direction(width: int, seed: int = 5) -> tuple[Array, str]:
    """A unit direction, and a longer one as pipeline text."""
    v = np.random.default_rng(seed).normal(0, 1, width)
    return v / np.linalg.norm(v), "[" + ", ".join(repr(float(x)) for x in np.float32(v * 3)) + "]"


@pytest.mark.parametrize(
    ("name", "dialect"),
    [
        ("stories260k", "fx"),
        ("stories260k", "onnx"),
        ("gpt2", "fx"),
        ("gpt2", "onnx"),
        ("opt", "fx"),
        ("gpt_neox", "onnx"),
        ("mixtral", "fx"),
        ("mixtral", "onnx"),
    ],
)
def test_equals_ablation_of_all_that_is_written(name: str, dialect: str) -> None:
    """Tied and untied embeddings, learned positions, biases, Conv1D layouts, parallel blocks, experts."""
    graph = in_dialect(name, dialect)
    unit, text = direction(64 if name == "stories260k" else 32)
    inputs = token_inputs() if name == "stories260k" else zoo.inputs(name)
    edited = apply(graph, f"orthogonalize{{direction={text}}}")
    reference = apply(graph, f"ablate{{direction={text} site={STREAM} fold=false}}")
    assert relative(run(reference, inputs), run(edited, inputs)) < 1e-5
    assert relative(run(graph, inputs), run(edited, inputs)) > 1e-2
    other = apply(graph, f"ablate{{direction={direction(len(unit), 6)[1]} site={STREAM} fold=false}}")
    assert relative(run(other, inputs), run(edited, inputs)) > 1e-2, "another direction must be noticed"
    assert [node.op for node in edited.nodes()] == [node.op for node in graph.nodes()]
    taps = "tap{site='blocks.*.resid_post'}"
    streams, before = apply(edited, taps).run(inputs), apply(graph, taps).run(inputs)
    for site in (key for key in streams if key.endswith("resid_post")):
        assert np.abs(streams[site] @ unit).max() < 1e-4 < np.abs(before[site] @ unit).max()


def test_equals_edited_weights_of_the_model(stories: Graph) -> None:
    """Direct reference: the matrices of the transformers model replaced by (I - v v^T) W."""
    unit, text = direction(64)
    v = torch.from_numpy(unit)
    model = hf_stories()
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        with torch.no_grad():
            rows = model.model.embed_tokens.weight.double()
            embedding = (rows - torch.outer(rows @ v, v)).float()
            for layer in model.model.layers:
                for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                    wide = linear.weight.double()
                    linear.weight.copy_((wide - torch.outer(v, v @ wide)).float())
            hook = model.model.embed_tokens.register_forward_hook(lambda _, args, __: embedding[args[0]])  # the head stays
            inputs = {key: torch.from_numpy(value) for key, value in token_inputs().items()}
            reference = model(**inputs, use_cache=False).logits.numpy()
            hook.remove()
    finally:
        model.load_state_dict(saved)
    assert relative(reference, run(apply(stories, f"orthogonalize{{direction={text}}}"))) < 1e-5


def test_a_tied_embedding_is_untied(stories: Graph) -> None:
    out = ag.run(stories, f"orthogonalize{{direction={direction(64)[1]}}}")
    row = out.report["orthogonalize"]
    assert any("untied model.embed_tokens.weight" in message for message in row.messages)
    assert row.counts == {"embedding": 1, "linear": 10}
    unit, _ = direction(64)
    table = out.graph.value("model.embed_tokens.weight")
    kept = out.graph.read(table)
    assert np.array_equal(kept, stories.read(stories.value("model.embed_tokens.weight"))), "the head reads it as it was"
    assert np.abs(kept @ unit).max() > 1e-2


def test_amounts(stories: Graph) -> None:
    _, text = direction(64)
    step = f"orthogonalize{{direction={text} amount=%s}}"
    assert np.array_equal(run(stories), run(apply(stories, step % 0)))
    twice = apply(stories, f"{step % 2}, {step % 2}")
    assert relative(run(stories), run(twice)) < 1e-5, "a reflection is its own inverse"
    assert relative(run(stories), run(apply(stories, step % 2))) > 1e-2
    again = apply(stories, f"{step % 1}, {step % 1}")
    assert relative(run(apply(stories, step % 1)), run(again)) < 1e-6, "a projection is idempotent"


def test_a_vector_of_another_model_is_refused(stories: Graph, tmp_path: Path) -> None:
    vector = {"blocks.1.resid_post": np.float32(direction(64)[0])}
    for model in (model_fingerprint(stories), "f32[512,64]:0123456789abcdef"):
        path = SteeringVector(vector, model).save(tmp_path / "vector.safetensors")
        if "0123" in model:
            with pytest.raises(PassError, match="made from another model"):
                ag.run(stories, f"orthogonalize{{direction={path}}}")
        assert ag.run(stories, f"orthogonalize{{direction={path} other_model=allow}}").report[0].counts


def test_a_file_with_several_directions(stories: Graph, tmp_path: Path) -> None:
    unit, text = direction(64)
    two = {"blocks.1.resid_post": np.float32(unit), "blocks.2.resid_post": np.float32(direction(64, 9)[0])}
    path = SteeringVector(two).save(tmp_path / "two.safetensors")
    with pytest.raises(PassError, match=r"2 directions.*of=blocks\.1\.resid_post"):
        apply(stories, f"orthogonalize{{direction={path}}}")
    chosen = apply(stories, f"orthogonalize{{direction={path} of=blocks.1.resid_post}}")
    assert relative(run(apply(stories, f"orthogonalize{{direction={text}}}")), run(chosen)) < 1e-6
    with pytest.raises(InputError, match=r"no direction for blocks\.3\.resid_post"):
        apply(stories, f"orthogonalize{{direction={path} of=blocks.3.resid_post}}")
    one = SteeringVector({"blocks.1.resid_post": np.float32(unit)}).save(tmp_path / "one.safetensors")
    with pytest.raises(InputError, match=r"no direction for blocks\.2\.resid_post"):
        apply(stories, f"orthogonalize{{direction={one} of=blocks.2.resid_post}}")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma3", "a norm sits between what is written and the residual add"),
        ("bert", "norm"),
        ("resnet", "norm"),
    ],
)
def test_refused(name: str, reason: str) -> None:
    graph = zoo.captured(name)
    before = graph.content_hash()
    with pytest.raises(PassError, match=reason):
        apply(graph, f"orthogonalize{{direction={direction(32)[1]}}}")
    assert graph.content_hash() == before


def test_refused_behind_other_edits(stories: Graph) -> None:
    _, text = direction(64)
    step = f"orthogonalize{{direction={text}}}"
    for site in ("blocks.1.attn.out", "blocks.2.resid_post", "embed"):
        with pytest.raises(PassError, match="steer changes it: put this pass first"):
            apply(stories, f"steer{{vector={text} site={site} fold=false}}, {step}")
    with pytest.raises(PassError, match="stored as codes"):
        apply(stories, f"quantize{{weights=int8}}, {step}")
    folded = apply(stories, f"steer{{vector={text} site=blocks.1.mlp.out}}, {step}")
    assert relative(run(apply(stories, step)), run(folded)) < 1e-5, "a vector folded into a bias is removed, being written"
    after = apply(stories, f"{step}, steer{{vector={text} site=blocks.1.mlp.out}}")
    assert relative(run(folded), run(after)) > 1e-2


def test_bad_input(stories: Graph) -> None:
    with pytest.raises(PassError, match=r"the direction has 3 numbers but model\.embed_tokens\.weight writes 64"):
        apply(stories, "orthogonalize{direction=[1.0, 2.0, 3.0]}")
    with pytest.raises(PassError, match="zero"):
        apply(stories, f"orthogonalize{{direction={[0.0] * 64}}}")
    with pytest.raises(InputError, match="there is no steering vector"):
        apply(stories, "orthogonalize{direction=missing.safetensors}")
    with pytest.raises(PassError, match="no residual stream"):
        linear = ag.trace(torch.nn.Linear(4, 4).eval(), (torch.zeros(1, 4),), dynamic={"input": ("batch", None)})
        apply(linear, "orthogonalize{direction=[1.0, 0.0, 0.0, 0.0]}")
