"""Directional ablation: the projection, its folds, and the equivalence with editing every writer of the stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.errors import SiteError
from actgraph.graph import Graph
from tests.passes.conftest import apply, as_dialect, hooked_logits, relative, run, token_inputs

DIRECTION = np.random.default_rng(5).normal(0, 1, 64).astype(np.float32)
UNIT = (DIRECTION / np.linalg.norm(DIRECTION)).astype(np.float32)
TEXT = "[" + ", ".join(repr(float(v)) for v in DIRECTION) + "]"
TINY = "[1.0, -1.0, 0.5, 0.0, 0.0, 2.0, 0.0, -0.5]"


def project_out(h: torch.Tensor) -> torch.Tensor:
    v = torch.from_numpy(UNIT)
    return h - (h @ v)[..., None] * v


def test_equals_a_forward_hook(stories: Graph) -> None:
    ablated = apply(stories, f"ablate{{direction={TEXT} site=blocks.1.resid_post}}")
    assert relative(hooked_logits("model.layers.1", project_out), run(ablated)) < 1e-5
    assert relative(run(stories), run(ablated)) > 1e-2
    assert any(node.op == "actgraph.lowrank_map" for node in ablated.nodes()), "a residual stream has other readers: no fold"


def test_the_component_is_gone_and_the_rest_is_kept(stories: Graph) -> None:
    out = apply(stories, f"ablate{{direction={TEXT} site=blocks.1.resid_post}}, tap{{site=blocks.1.resid_post}}").run(
        token_inputs()
    )
    before = apply(stories, "tap{site=blocks.1.resid_post}").run(token_inputs())["blocks.1.resid_post"]
    after = out["blocks.1.resid_post"]
    assert np.abs(after @ UNIT).max() < 1e-5
    assert np.abs(before @ UNIT).max() > 1e-1
    orthogonal = before - (before @ UNIT)[..., None] * UNIT
    assert relative(orthogonal, after) < 1e-5


@pytest.mark.parametrize("site", ["blocks.2.mlp.out", "blocks.2.attn.out", "blocks.2.mlp.norm", "blocks.3.attn.norm"])
def test_folded_equals_unfolded(stories: Graph, site: str) -> None:
    unfolded = apply(stories, f"ablate{{direction={TEXT} site={site} fold=false}}")
    folded = apply(stories, f"ablate{{direction={TEXT} site={site}}}")
    assert not any(node.op == "actgraph.lowrank_map" for node in folded.nodes())
    assert relative(run(unfolded), run(folded)) < 1e-5
    assert relative(run(stories), run(folded)) > 1e-3


def test_at_every_writer_equals_ablation_of_the_stream(stories: Graph) -> None:
    """The paper's weight edit (every writer of the stream) removes the direction from every stream value."""
    sites = "[embed, 'blocks.*.attn.out', 'blocks.*.mlp.out']"
    edited = apply(stories, f"ablate{{direction={TEXT} site={sites}}}, tap{{site='blocks.*.resid_post'}}").run(token_inputs())
    plain = apply(stories, "tap{site='blocks.*.resid_post'}").run(token_inputs())
    for name, value in edited.items():
        if name != "logits":
            assert np.abs(value @ UNIT).max() < 1e-4 < np.abs(plain[name] @ UNIT).max()


@pytest.mark.parametrize("site", ["blocks.2.mlp.norm", "model.layers.2.mlp.gate_proj:in"])
def test_edges_behind_a_fold_are_gone(stories: Graph, site: str) -> None:
    """Folded into its readers, the projection is not in what they read: their edges would show the wrong tensor."""
    folded = apply(stories, f"ablate{{direction={TEXT} site={site!r}}}")
    for name in ("model.layers.2.mlp.gate_proj:in", "model.layers.2.mlp:in"):
        with pytest.raises(SiteError, match=f"{name} was removed by ablate"):
            folded.site(name)
    up = "model.layers.2.mlp.up_proj:in"
    if site.endswith(":in"):
        assert folded.site(up).value == folded.site("blocks.2.mlp.norm").value, "the edges beside it are as they were"
    else:
        with pytest.raises(SiteError, match="ablate"):
            folded.site(up)


@pytest.mark.parametrize("site", ["blocks.0.mlp.out", "blocks.0.resid_post"])
def test_golden(tiny: Graph, dialect: str, site: str, golden) -> None:  # type: ignore[no-untyped-def]
    ablated = apply(tiny, f"ablate{{direction={TINY} site={site}}}")
    golden(f"passes/ablate_{site.rsplit('.', 1)[-1]}.{dialect}", ablated.text())
    unfolded = apply(tiny, f"ablate{{direction={TINY} site={site} fold=false}}")
    assert relative(run(unfolded), run(ablated)) < 1e-6
    assert relative(run(tiny), run(ablated)) > 1e-3


class Mixed(torch.nn.Module):
    """Its input is read by a linear and by a product."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * x


class Around(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(8, 8)
        self.inner = Mixed()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.first(x))
        return self.inner(h) + h


def test_an_edge_folds_only_where_all_its_readers_are_linears(dialect: str) -> None:
    graph = as_dialect(ag.trace(Around().eval(), (torch.randn(2, 8),), dynamic={"x": ("batch", None)}), dialect)
    x = {"x": np.random.default_rng(1).normal(0, 1, (3, 8)).astype(np.float32)}
    folding = apply(graph, f"ablate{{direction={TINY} site='inner:in'}}")
    inserting = apply(graph, f"ablate{{direction={TINY} site='inner:in' fold=false}}")
    assert relative(run(graph, x), run(inserting, x)) > 1e-2
    assert relative(run(inserting, x), run(folding, x)) < 1e-6
    assert any(node.op == "actgraph.lowrank_map" for node in folding.nodes()), "the product has no weights to fold into"
    alone = apply(graph, f"ablate{{direction={TINY} site='inner.linear:in'}}")
    assert not any(node.op == "actgraph.lowrank_map" for node in alone.nodes())
