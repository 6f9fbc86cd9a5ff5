"""Activation addition: the difference of two prompts at the first positions, however the tokens arrive."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import actgraph as ag
from actgraph.errors import InputError, PassError
from actgraph.graph import Graph
from actgraph.graph.hooks import run_with_hooks
from actgraph.passes.steer.actadd import PromptDifference, prompt_difference
from tests import zoo

SITE = "blocks.2.resid_post"


@pytest.fixture(scope="module")
def stories() -> Graph:
    return zoo.captured("stories260k")


@pytest.fixture(scope="module")
def pair(stories: Graph) -> PromptDifference:
    return prompt_difference(stories, "Love and joy", "Hate", site=SITE)


def test_the_difference_by_position(stories: Graph, pair: PromptDifference) -> None:
    rows = pair.rows[SITE]
    tokenizer = stories.companions.tokenizer
    assert tokenizer is not None and len(rows) == len(tokenizer.encode("Love and joy").ids)
    assert not rows[0].any() and rows[1].any(), "both begin with the same token"
    with pytest.raises(InputError, match="same activations"):
        prompt_difference(stories, "Love", "Love", site=SITE)


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize("start", [0, 2])
def test_added_at_the_first_positions(stories: Graph, pair: PromptDifference, dialect: str, start: int, tmp_path: Path) -> None:
    path = pair.save(tmp_path / "pair.safetensors")
    made = ag.run(stories, f"actadd{{prompts={path} scale=2.0 start={start}}}").graph
    made = made if dialect == "fx" else ag.load(made.save(tmp_path / "made.onnx"))
    rows, inputs = pair.rows[SITE], ag.sample_inputs(stories, batch=2, seq=12, padding="left")
    positions, real = inputs["position_ids"], inputs["attention_mask"] == 1

    def add(h: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        place = positions - start
        inside = (place >= 0) & (place < len(rows))
        return h + 2 * np.where(inside[..., None], rows[np.clip(place, 0, len(rows) - 1)], 0)

    wanted = run_with_hooks(stories, inputs, {SITE: add})["logits"]
    np.testing.assert_allclose(made.run(inputs)["logits"][real], wanted[real], atol=1e-4)
    assert np.abs(wanted - stories.run(inputs)["logits"])[real].max() > 0.1


def test_behind_a_cache(stories: Graph, pair: PromptDifference, tmp_path: Path) -> None:
    path = pair.save(tmp_path / "pair.safetensors")
    made = ag.run(stories, f"actadd{{prompts={path} scale=4.0}}").graph
    cached = ag.run(made, "kv_cache").program
    assert ag.generate(made, "One", max_new_tokens=12).tokens == ag.generate(cached, "One", max_new_tokens=12).tokens
    assert ag.generate(made, "One", max_new_tokens=12).tokens != ag.generate(stories, "One", max_new_tokens=12).tokens


def test_bad_input(stories: Graph, pair: PromptDifference, tmp_path: Path) -> None:
    path = pair.save(tmp_path / "pair.safetensors")
    with pytest.raises(PassError, match="64 channels"):
        ag.run(stories, f"actadd{{prompts={path} site=blocks.0.mlp.hidden}}")
    off = ag.run(stories, f"actadd{{prompts={path} scale=0}}").graph
    inputs = ag.sample_inputs(stories)
    assert np.array_equal(off.run(inputs)["logits"], stories.run(inputs)["logits"])
