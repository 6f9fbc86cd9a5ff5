"""Steering: against forward hooks, folded against unfolded, merged, at scale 0, and what is declined."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.errors import PassError, SiteError
from actgraph.formats.vectors import SteeringVector
from actgraph.graph import Graph
from actgraph.passes.steer.steer import Steer
from actgraph.pipeline.base import PassContext
from tests import zoo
from tests.passes.conftest import apply, hooked_logits, relative, run, token_inputs

RNG = np.random.default_rng(11)
VECTOR = RNG.normal(0, 0.4, 64).astype(np.float32)
TEXT = "[" + ", ".join(repr(float(v)) for v in VECTOR) + "]"
TINY = "[1.0, -1.0, 0.5, 0.0, 0.0, 2.0, 0.0, -0.5]"


def test_equals_a_forward_hook(stories: Graph) -> None:
    steered = apply(stories, f"steer{{vector={TEXT} site=blocks.2.resid_post scale=1.5 fold=false}}")
    reference = hooked_logits("model.layers.2", lambda h: h + 1.5 * torch.from_numpy(VECTOR))
    assert relative(reference, run(steered)) < 1e-5
    elsewhere = hooked_logits("model.layers.1", lambda h: h + 1.5 * torch.from_numpy(VECTOR))
    assert relative(elsewhere, run(steered)) > 1e-2, "steering the wrong layer must be noticed"
    assert relative(hooked_logits("model.layers.2", lambda h: h - 1.5 * torch.from_numpy(VECTOR)), run(steered)) > 1e-2


def test_folded_equals_unfolded_and_costs_no_node(stories: Graph) -> None:
    unfolded = apply(stories, f"steer{{vector={TEXT} site=blocks.2.resid_post fold=false}}")
    folded = apply(stories, f"steer{{vector={TEXT} site=blocks.2.resid_post}}")
    assert relative(run(unfolded), run(folded)) < 1e-5
    assert not any(node.op == "actgraph.shift" for node in folded.nodes())
    with pytest.raises(SiteError, match="steer"):
        folded.site("blocks.2.mlp.out")  # it now contains the shift


def test_does_not_fold_past_a_reader(stories: Graph) -> None:
    tapped = apply(stories, f"tap{{site=blocks.2.mlp.out}}, steer{{vector={TEXT} site=blocks.2.resid_post}}")
    assert any(node.op == "actgraph.shift" for node in tapped.nodes())
    plain = apply(stories, "tap{site=blocks.2.mlp.out}")
    before = plain.run(token_inputs())["blocks.2.mlp.out"]
    assert np.array_equal(before, tapped.run(token_inputs())["blocks.2.mlp.out"])


def test_vectors_at_one_site_merge(stories: Graph) -> None:
    step = f"steer{{vector={TEXT} site=blocks.3.resid_mid fold=false scale=%s}}"
    twice = apply(stories, f"{step % 1.0}, {step % -0.25}")
    assert sum(node.op == "actgraph.shift" for node in twice.nodes()) == 1
    assert relative(run(apply(stories, step % 0.75)), run(twice)) < 1e-6


def test_scale_zero_is_bit_exact(stories: Graph) -> None:
    for fold in ("true", "false"):
        same = apply(stories, f"steer{{vector={TEXT} site=blocks.2.resid_post scale=0 fold={fold}}}")
        assert np.array_equal(run(stories), run(same))


def test_one_edge_only(stories: Graph) -> None:
    """An edge site shifts q's copy of the norm's output and neither k's nor v's."""
    edge = apply(stories, f"steer{{vector={TEXT} site='model.layers.1.self_attn.q_proj:in'}}")
    value = apply(stories, f"steer{{vector={TEXT} site=blocks.1.attn.norm fold=false}}")
    assert relative(run(stories), run(edge)) > 1e-3
    assert relative(run(value), run(edge)) > 1e-3


def test_order_is_the_order_of_effect(stories: Graph) -> None:
    """A tap after the shift sees it, a tap before does not."""
    step = f"steer{{vector={TEXT} site=blocks.2.resid_post fold=false}}"
    after = apply(stories, f"{step}, tap{{site=blocks.2.resid_post}}").run(token_inputs())["blocks.2.resid_post"]
    before = apply(stories, f"tap{{site=blocks.2.resid_post}}, {step}").run(token_inputs())["blocks.2.resid_post"]
    # A tap is a reader too: an edit made after it moves every reader of the site, outputs included.
    plain = apply(stories, "tap{site=blocks.2.resid_post}").run(token_inputs())["blocks.2.resid_post"]
    assert np.allclose(after - plain, VECTOR, atol=1e-5)
    assert np.allclose(before - plain, VECTOR, atol=1e-5)


def test_wrong_width_is_one_clear_line(stories: Graph) -> None:
    with pytest.raises(PassError, match=r"3 numbers but blocks\.2\.resid_post is f32\[batch, seq, 64\]"):
        apply(stories, "steer{vector=[1.0, 2.0, 3.0] site=blocks.2.resid_post}")


def test_no_site_is_one_clear_line(stories: Graph) -> None:
    with pytest.raises(SiteError, match="nearest"):
        apply(stories, f"steer{{vector={TEXT} site=blocks.2.resid_pots}}")


@pytest.mark.parametrize("fold", ["true", "false"])
def test_golden(tiny: Graph, dialect: str, fold: str, golden) -> None:  # type: ignore[no-untyped-def]
    steered = apply(tiny, f"steer{{vector={TINY} site=blocks.0.resid_post scale=2 fold={fold}}}")
    golden(f"passes/steer_fold_{fold}.{dialect}", steered.text())
    other = apply(tiny, f"steer{{vector={TINY} site=blocks.0.resid_post scale=2 fold={'false' if fold == 'true' else 'true'}}}")
    assert relative(run(other), run(steered)) < 1e-6
    assert relative(run(tiny), run(steered)) > 1e-2


def test_dialects_agree(both_stories: dict[str, Graph]) -> None:
    step = f"steer{{vector={TEXT} site=blocks.2.resid_post fold=false}}"
    fx, onnx = (run(apply(graph, step)) for graph in both_stories.values())
    assert relative(fx, onnx) < 1e-5


def test_vectors_at_one_edge_merge(stories: Graph) -> None:
    step = f"steer{{vector={TEXT} site='model.layers.1.self_attn.q_proj:in' scale=%s}}"
    twice = apply(stories, f"{step % 1.0}, {step % -0.25}")
    assert sum(node.op == "actgraph.shift" for node in twice.nodes()) == 1
    assert relative(run(apply(stories, step % 0.75)), run(twice)) < 1e-6
    assert relative(run(apply(stories, step % 1.0)), run(twice)) > 1e-4


def test_an_edge_does_not_merge_into_a_shift_with_other_readers(stories: Graph) -> None:
    """The shift at the norm is q's, k's and v's: what q alone gets is a shift of its own."""
    norm = f"steer{{vector={TEXT} site=blocks.1.attn.norm fold=false}}"
    edge = f"steer{{vector={TEXT} site='model.layers.1.self_attn.%s_proj:in' scale=%s}}"
    both = apply(stories, f"{norm}, {edge % ('q', 2)}")
    assert sum(node.op == "actgraph.shift" for node in both.nodes()) == 2
    apart = apply(stories, ", ".join(edge % (name, scale) for name, scale in (("q", 3), ("k", 1), ("v", 1))))
    assert relative(run(apart), run(both)) < 1e-5


def test_a_failure_leaves_the_sites_as_they_were(stories: Graph) -> None:
    """Folding at the first site drops sites; the second one is refused, so that nothing must have happened."""
    step = Steer(site=("blocks.0.resid_post", "logits"), vector=tuple(map(float, VECTOR)))
    before = stories.content_hash(), [repr(site) for site in stories.sites()]
    with pytest.raises(PassError, match="logits"):
        step.run(stories, PassContext(text=str(step), name="steer"))
    assert (stories.content_hash(), [repr(site) for site in stories.sites()]) == before
    assert stories.site("blocks.0.mlp.out").type.shape == ("batch", "seq", 64)


def test_other_tokens_and_scales_than_a_vector_is_meant_for(tmp_path: Path) -> None:
    """Its clause and its factor are suggestions: the pass says where it does something else."""
    graph = zoo.captured("stories260k")
    vector = SteeringVector({"blocks.2.resid_post": np.ones(64, np.float32)}, where="generated", recommended_scale=0.5)
    path = vector.save(tmp_path / "meant.safetensors")
    said = ag.run(graph, f"steer{{vector={path} scale=2.0}}").report[0].messages
    assert any("is meant for where=generated, and acts at where=all" in message for message in said)
    assert any("was found to work with scale=0.5, and has 2" in message for message in said)
    said = ag.run(graph, f"steer{{vector={path} scale=0.5 where=generated}}").report[0].messages
    assert not any("meant for" in message or "found to work" in message for message in said)
