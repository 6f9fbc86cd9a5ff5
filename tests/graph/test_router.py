"""Routers of many models: what experts are chosen by, what their weights are made of, and what cannot be read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import actgraph as ag
from actgraph.graph import Graph
from actgraph.graph.executor import executor_for
from actgraph.graph.recognize.router import Groups, Router, read_router
from tests.passes.moe import eager, in_dialect, inputs

#: k, experts, the module whose output has the weights and experts, weights gathered, a bias of the choice, normalised, groups.
KNOWN: dict[str, tuple[int, int, str, bool, bool, bool, Groups | None]] = {
    "mixtral": (2, 4, "mlp.gate", False, False, True, None),
    "olmoe": (2, 6, "mlp.gate", False, False, False, None),
    "gpt_oss": (2, 6, "mlp.router", False, False, True, None),
    "deepseek": (3, 12, "mlp.gate", True, True, True, Groups(3, 4, 2, 2)),
    "deepseek_v2": (3, 12, "mlp.gate", False, False, False, Groups(3, 4, 2, 1)),
}


def last_router(graph: Graph) -> Router | str:
    return read_router(graph.views.semantics, graph.views.moe()[-1])


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "deepseek_v2" else n for n in KNOWN])
def test_routers_are_read(name: str) -> None:
    """In both dialects alike; the values hold what the module of the model computes."""
    k, experts, path, gathered, bias, normalised, groups = KNOWN[name]
    found = {}
    model = eager(name)
    hook = model.model.layers[1].get_submodule(path).register_forward_hook(lambda m, a, out: found.update(out=out))  # type: ignore[union-attr, operator]
    with torch.no_grad():
        model(**{key: torch.from_numpy(value) for key, value in inputs().items()}, use_cache=False)
    hook.remove()
    logits, weights, chosen = (t.numpy() for t in found["out"])
    order = np.argsort(chosen, 1)
    for dialect in ("fx", "onnx") if name != "deepseek_v2" else ("fx",):  # its complex rotary embedding has no ONNX that runs
        graph = in_dialect(name, dialect)
        router = last_router(graph)
        assert isinstance(router, Router), router
        assert (router.k, router.experts, router.normalised, router.groups) == (k, experts, normalised, groups)
        assert (router.values is None) == gathered and (router.bias is not None) == bias
        assert len(router.choosing) == (2 if groups else 1)
        values = [router.logits, router.chosen, router.gates, router.scores, router.selection]
        out = executor_for(graph).open(graph, list(dict.fromkeys(values)), optimize=False)(inputs())
        mine = np.argsort(out[router.chosen.name], 1)
        np.testing.assert_allclose(out[router.logits.name], logits, rtol=1e-4, atol=1e-5)
        assert np.array_equal(np.sort(chosen, 1), np.sort(out[router.chosen.name], 1))
        of_expert = np.take_along_axis(out[router.gates.name], mine, 1)
        np.testing.assert_allclose(of_expert, np.take_along_axis(weights, order, 1), rtol=1e-4, atol=1e-6)
        if groups is None:
            best = np.sort(np.argsort(-out[router.selection.name], 1)[:, :k], 1)
            assert np.array_equal(best, np.sort(chosen, 1)), "chosen are the highest of what they are chosen by"


class Soft(nn.Module):
    """Experts that all serve every token: nothing is chosen."""

    def __init__(self, pick: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pick = pick
        self.router = nn.Linear(4, 3)
        self.up = nn.Parameter(torch.randn(3, 4, 6))
        self.down = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = torch.softmax(self.router(x), -1)
        index = scores.argmax(-1) if self.pick else torch.zeros_like(x[:, 0], dtype=torch.int64)
        hidden = torch.relu(torch.bmm(x[:, None], self.up[index]))
        rows = torch.bmm(hidden, self.down[index])[:, 0]
        return x + rows * scores.amax(-1, keepdim=True)


def test_a_choice_without_a_top_k_is_a_reason(tmp_path: object) -> None:
    graph = ag.trace(Soft(True).eval(), (torch.randn(5, 4),), dynamic={"x": ("rows", None)}, name="soft")
    mixtures = graph.views.moe()
    assert [read_router(graph.views.semantics, each) for each in mixtures] == ["its experts are not chosen by a top-k"]
