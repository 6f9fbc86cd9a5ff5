"""FX graphs that were not captured by us: joint graphs of AOTAutograd, with and without a signature."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch._functorch.aot_autograd import aot_export_joint_simple, aot_export_module

from actgraph.graph.fx import FxGraph
from actgraph.graph.graph import Role
from tests.graph.fx_models import node

F32 = np.float32


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("mask", torch.tensor([1.0, 0.5, 2.0]))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.b(torch.relu(self.a(x))) * self.mask
        return ((out - y) ** 2).mean(), out.detach()


def test_a_joint_graph_is_read_printed_verified_and_edited() -> None:
    torch.manual_seed(0)
    module, x, y = Loss(), torch.randn(5, 4), torch.randn(5, 3)
    gm, signature = aot_export_module(module, (x, y), trace_joint=True, output_loss_index=0)
    graph = FxGraph.from_joint(gm, signature)
    roles = {value.name: graph.role(value.name) for value in graph.inputs()}
    assert [roles[name] for name in ("a.weight", "a.bias", "b.weight", "b.bias")] == [Role.PARAMETER] * 4
    assert roles["mask"] is Role.BUFFER and list(roles.values())[-2:] == [Role.USER, Role.USER]
    names = [name for name, _ in graph.outputs()]
    assert names == ["loss", "output_1", "grad.a.weight", "grad.a.bias", "grad.b.weight", "grad.b.bias"]
    assert all(graph.role(name) is Role.GRADIENT for name in names[2:])
    assert not graph.parameters()
    text = graph.text()
    assert "a.weight: f32[8, 4] <parameter>" in text and "grad.b.bias: f32[3] <gradient>" in text and "aten.addmm" in text
    graph.verify()

    inputs = {**{k: v.detach().numpy() for k, v in module.state_dict().items()}}
    users = [value.name for value in graph.inputs() if graph.role(value.name) is Role.USER]
    inputs |= dict(zip(users, (x.numpy(), y.numpy()), strict=True))
    found = graph.run(inputs)
    loss, _ = module(x, y)
    loss.backward()
    np.testing.assert_allclose(found["loss"], loss.detach().numpy(), rtol=1e-6)
    np.testing.assert_allclose(found["grad.a.weight"], module.a.weight.grad.numpy(), rtol=1e-5, atol=1e-7)

    with graph.edit("test") as editor:  # double what the loss sees of the hidden layer, in forward only
        relu = node(graph, "aten.relu").output
        forward = [use for use in relu.uses if use.node is not None and use.node.op == "aten.addmm"]
        shift = editor.insert("actgraph.shift", [relu, np.full(8, 0.25, F32)])
        editor.redirect(relu, shift.output, forward)
    graph.verify()
    assert "by test" in graph.text()
    with torch.no_grad():
        moved = module.b(torch.relu(module.a(x)) + 0.25) * module.mask
    np.testing.assert_allclose(graph.run(inputs)["loss"], ((moved - y) ** 2).mean().numpy(), rtol=1e-5)


def test_a_joint_graph_without_a_signature() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        return [torch.tanh(x @ w)]

    gm = aot_export_joint_simple(function, (torch.randn(5, 4), torch.randn(4, 3, requires_grad=True)), trace_joint=True)
    graph = FxGraph.from_joint(gm)
    assert [graph.role(value.name) for value in graph.inputs()] == [Role.USER, Role.USER, Role.TANGENT]
    assert [name for name, _ in graph.outputs()] == ["output", "grad.primals_2"]
    graph.verify()
    x, w, t = (np.random.default_rng(i).standard_normal(s).astype(F32) for i, s in enumerate([(5, 4), (4, 3), (5, 3)]))
    out = graph.run({"primals_1": x, "primals_2": w, "tangents_1": t})
    np.testing.assert_allclose(out["grad.primals_2"], x.T @ (t * (1 - np.tanh(x @ w) ** 2)), rtol=1e-4, atol=1e-5)


def test_saved_activations_have_a_role() -> None:
    from torch._functorch.partitioners import default_partition

    def function(x: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        return [torch.tanh(x @ w)]

    joint = aot_export_joint_simple(function, (torch.randn(5, 4), torch.randn(4, 3, requires_grad=True)), trace_joint=True)
    forward, _ = default_partition(joint, (), num_fwd_outputs=1)
    saved = len(forward.graph.output_node().args[0]) - 1
    names = ["output", *(f"saved_{i}" for i in range(saved))]
    graph = FxGraph.from_graph_module(forward, output_names=names, output_roles=dict.fromkeys(names[1:], Role.SAVED))
    assert saved and graph.role("saved_0") is Role.SAVED and "<saved>" in graph.text()
    graph.verify()
