"""Module sites: what modules take in and give out, checked against forward hooks on the eager modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from actgraph.formats.trace import trace
from actgraph.graph.fx import FxGraph
from tests import zoo
from tests.graph.reference_sites import Hooks
from tests.graph.test_architectures import TOLERANCE, mismatch, read_sites

#: Modules that compute something of their own, whatever library they come from; all of them must have an output site.
_LEAVES = (
    "Linear",
    "Conv1D",
    "Conv2d",
    "Conv1d",
    "LayerNorm",
    "RMSNorm",
    "BatchNorm2d",
    "Embedding",
    "Activation",
    "ReLU",
    "GELU",
)


@pytest.mark.parametrize("name", zoo.TINY)
def test_module_sites_hold_what_the_modules_compute(name: str) -> None:
    graph = zoo.captured(name)
    inputs = zoo.inputs(name)
    model = zoo.model(name)
    hooks = Hooks(model, inputs, zoo._NO_CACHE.get(name, {}))
    known = set(graph.site_table.all_names())
    wanted: dict[str, list[np.ndarray]] = {}  # what the module was given or returned: the site is one of these
    missing = []
    for path, calls in hooks.calls.items():
        for call, (given, returned) in enumerate(calls):
            site = f"{path}@{call}" if call else path
            if site in known and path:
                wanted[site] = [tensor.numpy() for tensor in tree_leaves(returned) if isinstance(tensor, torch.Tensor)]
            elif type(model.get_submodule(path)).__name__.endswith(_LEAVES) and f"{site}:out[0]" not in known:
                missing.append(site)
            if f"{site}:in" in known:
                wanted[f"{site}:in"] = [tensor.numpy() for tensor in given]
    have = read_sites(graph, list(wanted), inputs)
    wrong = {site: m for site, some in wanted.items() if (m := min(mismatch(have[site], each) for each in some)) > TOLERANCE}
    assert not wrong
    assert not missing
    assert len(wanted) > 10


class Shared(nn.Module):
    """One layer called three times, a list of modules, a module with two inputs and two results."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(6, 3) for _ in range(2))
        self.pair = Pair()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for _ in range(3):
            x = self.layer(x)
        low, high = self.pair(x, y)
        return self.heads[0](low), self.heads[1](high)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 6))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scaled = y * self.weight
        return torch.minimum(x, scaled), torch.maximum(x, scaled)


@pytest.fixture(scope="module")
def shared() -> FxGraph:
    torch.manual_seed(0)
    return trace(Shared().eval(), (torch.randn(2, 6), torch.randn(2, 6)), dynamic={"x": ("batch", None), "y": ("batch", None)})


def test_repeated_calls_are_numbered(shared: FxGraph) -> None:
    names = set(shared.site_table.all_names())
    for call in ("", "@1", "@2"):
        assert {f"layer{call}", f"layer{call}:in", f"layer.0{call}", f"layer.1{call}"} <= names
    assert "layer@3" not in names
    assert shared.site("layer").value == shared.site("layer.1").value == shared.site("layer@1:in").value
    assert shared.site("layer@2").value == shared.site("layer.1@2").value


def test_several_inputs_and_results_are_numbered(shared: FxGraph) -> None:
    graph = shared.clone()
    names = set(graph.site_table.all_names())
    assert {"pair:in", "pair:in[0]", "pair:in[1]", "pair:out[0]", "pair:out[1]"} <= names and "pair" not in names
    # In the order of first use, which need not be that of the arguments: y is scaled before x is read.
    assert graph.site("pair:in[0]").value == graph.input("y")
    assert graph.site("pair:in").anchor == graph.site("pair:in[0]").anchor
    assert graph.site("pair:in[1]").value == graph.site("layer@2").value
    assert len(graph.site("pair:in[1]").uses(graph)) == 2
    assert "heads" not in names and "heads:in" not in names  # a list of modules computes nothing as a whole
    # An edit at an input of a module reaches every reader inside it, and none outside.
    x = {"x": np.ones((1, 6), np.float32), "y": np.zeros((1, 6), np.float32)}
    with graph.edit("shift") as editor:
        editor.insert_at(graph.site("pair:in[1]"), "add", [np.float32(10)])
    graph.verify()
    low, high = graph.run(x).values()
    values = shared.clone()
    head = [values.value(f"heads.{i}.{part}") for i in range(2) for part in ("weight", "bias")]
    weight, bias = values.read(head[2]), values.read(head[3])
    inner = Hooks(_eager(), x, {}).out("layer", 2) + 10
    assert np.allclose(high, inner @ weight.T + bias, atol=1e-4)
    assert np.allclose(low, values.read(head[1])[None], atol=1e-5)


def _eager() -> nn.Module:
    torch.manual_seed(0)
    return Shared().eval()


def test_a_graph_without_scopes_has_no_module_sites() -> None:
    from actgraph import formats

    graph = formats.load(str(zoo.stock_onnx("mlp")))
    assert not [site for site in graph.sites() if site.role == "module"]
    assert not [name for name in graph.site_table.all_names() if name.startswith(("hidden", "head", "norm:"))]
