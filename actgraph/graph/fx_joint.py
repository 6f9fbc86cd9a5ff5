"""The signature of AOTAutograd's joint graphs: which lifted input is a parameter, which output a gradient, and their names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from actgraph.graph.graph import Role


@dataclass
class JointSignature:
    """Roles by public name, names of the outputs that are not ``None``, and public names of inputs by native name."""

    input_roles: dict[str, Role] = field(default_factory=dict)
    output_roles: dict[str, Role] = field(default_factory=dict)
    output_names: list[str] = field(default_factory=list)
    public: dict[str, str] = field(default_factory=dict)


def read_signature(gm: fx.GraphModule, signature: Any, forward_outputs: int) -> JointSignature:
    """See ``FxGraph.from_joint``."""
    inputs = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    outputs = pytree.tree_leaves(gm.graph.output_node().args[0], is_leaf=lambda item: isinstance(item, fx.Node) or item is None)
    found = JointSignature()
    if signature is None:
        primals = [name for name in inputs if not name.startswith("tangents")]
        found.input_roles = {name: Role.TANGENT for name in inputs if name.startswith("tangents")}
        gradients: list[str | None] = [*[None] * forward_outputs, *(f"grad.{name}" for name in primals)]
        loss = ""
    else:
        lifted = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        found.public = {native: name for native, name in lifted.items() if native != name}
        found.input_roles = dict.fromkeys(signature.inputs_to_parameters.values(), Role.PARAMETER)
        found.input_roles.update(dict.fromkeys(signature.inputs_to_buffers.values(), Role.BUFFER))
        backward = signature.backward_signature
        by_output = {**backward.gradients_to_parameters, **backward.gradients_to_user_inputs} if backward is not None else {}
        loss = backward.loss_output if backward is not None else ""
        gradients = [None] * len(outputs)
        for index, node in enumerate(outputs):
            if isinstance(node, fx.Node) and index >= len(signature.user_outputs) and node.name in by_output:
                gradients[index] = f"grad.{by_output[node.name]}"
    forward = 0
    for node, gradient in zip(outputs, gradients, strict=False):
        if not isinstance(node, fx.Node):
            continue
        if gradient is not None:
            found.output_names.append(gradient)
            found.output_roles[gradient] = Role.GRADIENT
            continue
        plain = f"output_{forward}" if forward else "output"
        found.output_names.append("loss" if node.name == loss and "loss" not in found.output_names else plain)
        forward += 1
    return found
