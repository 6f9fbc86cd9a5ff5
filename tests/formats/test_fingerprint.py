"""The fingerprint of a model: one for both dialects, and kept by passes that do not touch the embeddings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import actgraph as ag
from actgraph.errors import PassError
from actgraph.formats.onnx_export import to_onnx
from actgraph.formats.vectors import is_of_another_model, model_fingerprint
from actgraph.graph import Graph
from tests import zoo

ONES = "[" + ", ".join(["1.0"] * zoo.WIDTH) + "]"


def passed(graph: Graph, pipeline: str) -> Graph:
    return ag.run(graph, pipeline, parity="none", reproducer=False).graph


@pytest.mark.parametrize("name", ["gpt2", "bert", "mlp"])
def test_one_for_every_capture(name: str) -> None:
    """Our capture, our export and the file of stock torch.onnx.export; gpt2 and bert have more tables than one."""
    graph = zoo.captured(name)
    known = model_fingerprint(graph)
    assert known and model_fingerprint(to_onnx(graph)) == known
    assert model_fingerprint(ag.load(zoo.stock_onnx(name))) == known


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_edits_of_activations_keep_it(dialect: str) -> None:
    graph: Graph = zoo.captured("llama")
    graph = to_onnx(graph) if dialect == "onnx" else graph  # type: ignore[arg-type]
    known = model_fingerprint(graph)
    assert known.startswith(f"f32[{zoo.VOCAB},{zoo.WIDTH}]:")
    text = f"steer{{vector={ONES} site=blocks.0.resid_post}}, steer{{vector={ONES} site=embed fold=false}}, quantize"
    assert model_fingerprint(passed(graph, text)) == known


def test_what_can_be_told_apart() -> None:
    graph = zoo.captured("llama")
    known = model_fingerprint(graph)
    assert not is_of_another_model(known, graph)
    for unknown in ("", "model", "116b84d59ccdfc6a"):
        assert not is_of_another_model(unknown, graph)
    for text in ("quantize{embeddings=true}", "cast{dtype=bf16}"):
        changed = passed(graph, text)
        assert model_fingerprint(changed) != known and not is_of_another_model(known, changed), "stored otherwise: no claim"
    other = zoo.captured("llama")
    table = max((p for p in other.parameters() if p.shape == (zoo.VOCAB, zoo.WIDTH)), key=lambda p: "embed" in p.name)
    with other.edit() as editor:
        editor.set_parameter(table, np.roll(other.read(table), 1))
    assert is_of_another_model(known, other), "other weights"
    assert is_of_another_model(known.replace(f"{zoo.WIDTH}]", f"{2 * zoo.WIDTH}]"), graph), "another width"


def test_the_vector_of_another_model_is_refused(tmp_path: Path) -> None:
    graph = zoo.captured("llama")
    direction = {"blocks.0.resid_post": np.ones(zoo.WIDTH, np.float32)}
    for model, refused in ((zoo.captured("qwen3"), True), (graph, False), (to_onnx(graph), False), (None, False)):
        fingerprint = model_fingerprint(model) if model is not None else ""
        path = ag.SteeringVector(direction, fingerprint).save(tmp_path / "v.safetensors")
        for subject in (graph, to_onnx(graph)):
            if refused:
                with pytest.raises(PassError, match=rf"{path} was extracted from another model than {graph.name}.*other_model"):
                    ag.run(subject, f"steer{{vector={path}}}", parity="none", reproducer=False)
            allowed = "other_model=allow" if refused else ""
            report = ag.run(subject, f"steer{{vector={path} {allowed}}}", parity="none", reproducer=False).report
            assert report[0].counts
