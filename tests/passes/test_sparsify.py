"""Activation sparsity: thresholds at the wanted quantile, the masked dense reference, identity at 0, edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.errors import OptionError, PassError
from actgraph.graph import Graph
from tests import zoo
from tests.passes.conftest import apply, corpus_batches, hf_stories, relative, run, token_inputs


def test_threshold_zero_is_the_identity(stories: Graph) -> None:
    for method in ("teal", "cats"):
        assert np.array_equal(run(stories), run(apply(stories, f"sparsify{{method={method} threshold=0}}")))


def test_teal_gates_every_projection_with_its_own_edge(stories: Graph) -> None:
    gated = apply(stories, "sparsify{method=teal threshold=0.05}")
    gates = [node for node in gated.nodes() if node.op == "actgraph.gate"]
    assert len(gates) == 5 * 7, "q, k, v, o, gate, up and down of five blocks, and not the head"


def test_teal_equals_masked_inputs_in_torch(stories: Graph) -> None:
    """Direct reference: a forward pre-hook that masks the input of each linear of the blocks."""
    threshold = 0.1
    model = hf_stories()
    handles = [
        module.register_forward_pre_hook(lambda _, args: (torch.where(args[0].abs() <= threshold, 0.0, args[0]),))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers" in name
    ]
    try:
        with torch.no_grad():
            inputs = {k: torch.from_numpy(v) for k, v in token_inputs().items()}
            reference = model(**inputs, use_cache=False).logits.numpy()
    finally:
        for handle in handles:
            handle.remove()
    assert relative(reference, run(apply(stories, f"sparsify{{method=teal threshold={threshold}}}"))) < 1e-5
    assert relative(run(stories), reference) > 1e-2


@pytest.mark.parametrize("method", ["teal", "cats"])
def test_measured_sparsity_is_the_wanted_one(stories: Graph, method: str) -> None:
    """On the calibration text itself the share of zeros at a gated site is the wanted one within half a point."""
    place = f"blocks.2.mlp.{'hidden' if method == 'teal' else 'act'}"
    gated = apply(stories, f"sparsify{{method={method} sparsity=0.5 site={place}}}, tap{{site={place}}}")
    zeros = total = 0
    for batch in corpus_batches(gated):
        out = gated.run(batch)
        valid = batch["attention_mask"].astype(bool)
        for name, value in out.items():
            if name.startswith("blocks."):
                zeros += int((value[valid] == 0).sum())
                total += value[valid].size
    assert abs(zeros / total - 0.5) < 0.005


def test_error_grows_with_sparsity(stories: Graph) -> None:
    errors = [relative(run(stories), run(apply(stories, f"sparsify{{sparsity={s}}}"))) for s in (0.1, 0.3, 0.5, 0.7)]
    assert errors == sorted(errors) and errors[0] > 0


def test_selector_chooses_edges(stories: Graph) -> None:
    one = apply(stories, "sparsify{threshold=0.1 site='model.layers.1.self_attn.q_proj:in'}")
    assert sum(node.op == "actgraph.gate" for node in one.nodes()) == 1
    both = apply(stories, "sparsify{threshold=0.1 site=blocks.1.mlp.norm}")
    assert sum(node.op == "actgraph.gate" for node in both.nodes()) == 2, "gate's and up's copies"
    rest = apply(stories, "sparsify{threshold=0.1 ignore='blocks.*.mlp.*'}")
    assert sum(node.op == "actgraph.gate" for node in rest.nodes()) == 5 * 4


def test_options_are_checked(stories: Graph) -> None:
    with pytest.raises(OptionError, match="either sparsity or threshold"):
        apply(stories, "sparsify{method=teal}")
    with pytest.raises((OptionError, PassError)):
        apply(stories, "sparsify{sparsity=1.5}")


def test_cats_needs_a_gated_feed_forward() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)).eval()
    graph = ag.trace(model, (torch.randn(2, 4),), dynamic={"input": ("batch", None)})
    with pytest.raises(PassError, match="no gated feed-forward"):
        apply(graph, "sparsify{method=cats threshold=0.1}")


@pytest.mark.parametrize("name", ["mixtral", "mixtral_batched"])
def test_experts_are_declined_by_name(name: str) -> None:
    """Inputs of experts stay dense, and the report says so, unless they were left out on purpose."""
    graph = zoo.captured(name)
    stacks = sorted(p.name for p in graph.parameters() if p.type.rank == 3)
    row = ag.run(graph, "sparsify{threshold=0.1}", parity="none", reproducer=False).report[0]
    assert sorted(d.reason.split()[0] for d in row.declined) == stacks and len(stacks) == 4
    assert row.counts["gates"] == 8, "q, k, v and o of both blocks"
    row = ag.run(graph, "sparsify{threshold=0.1 ignore='blocks.*.moe.*'}", parity="none", reproducer=False).report[0]
    assert sorted(d.reason.split()[0] for d in row.declined) == [s for s in stacks if s.endswith("gate_up_proj")]


@pytest.mark.parametrize("method", ["teal", "cats"])
def test_golden(tiny: Graph, dialect: str, method: str, golden) -> None:  # type: ignore[no-untyped-def]
    gated = apply(tiny, f"sparsify{{method={method} threshold=0.25}}")
    golden(f"passes/sparsify_{method}.{dialect}", gated.text())
    assert relative(run(tiny), run(gated)) > 1e-3
