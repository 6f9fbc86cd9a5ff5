"""An FX graph as an ``nn.Module`` that people use: named inputs, optional ones filled in, named outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from actgraph.graph import fx_build
from actgraph.graph.fx_types import tensor_of

if TYPE_CHECKING:
    from actgraph.graph.fx import FxGraph


class SignatureCodeGen(fx.graph.CodeGen):
    """Generates ``forward(self, input_ids, ..., row_index=None)`` and the structure of the result."""

    def __init__(self, defaults: dict[str, str], names: list[str]) -> None:
        super().__init__()
        self.defaults = defaults  # input -> buffer with its default
        self.names = names

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, *, expanded_def: bool = False) -> str:
        plain = []
        for variable in free_vars:
            name = variable.split(":")[0].split("=")[0].strip()
            plain.append(f"{name}=None" if name in self.defaults else variable)
        text: str = super().gen_fn_def(plain, "", expanded_def=expanded_def)
        for name, buffer in self.defaults.items():
            text += f"\n    if {name} is None:\n        {name} = self.{buffer}"
        return text

    def generate_output(self, output_args: Any, **options: Any) -> str:
        return f"return {output_structure(self.names, list(output_args))!r}"


def output_structure(names: Sequence[str], values: Sequence[Any]) -> Any:
    """``values`` as a forward returns them: one unnamed bare, several unnamed as a tuple, else a dict by name."""
    if list(names) == ["output"]:
        return values[0]
    if all(name == "output" or name.startswith("output_") for name in names):
        return tuple(values)
    return dict(zip(names, values, strict=True))


def as_module(graph: FxGraph) -> nn.Module:
    """See ``FxGraph.to_torch``. Shares the tensors; later edits of the graph do not change the module."""
    native = fx_build.copy_graph(graph.graph)
    root = fx_build.share_module(graph.root)
    defaults: dict[str, str] = {}
    for name, array in graph.defaults.items():
        node = graph._inputs[name]
        defaults[node.name] = f"default_{node.name}"
        root.register_buffer(defaults[node.name], tensor_of(array), persistent=False)
    native.set_codegen(SignatureCodeGen(defaults, list(graph.output_names)))
    module = fx.GraphModule(root, native, class_name="ActivationModule")
    for path, tensor in fx_build.named_tensors(root):
        _attach(module, path, tensor, root)
    return module


def _attach(module: nn.Module, path: str, tensor: torch.Tensor, root: nn.Module) -> None:
    """Give ``module`` the tensor under ``path``, of the same sort (parameter, buffer, unsaved buffer) as in ``root``."""
    *parents, leaf = path.split(".")
    holder = root
    for part in parents:
        holder = getattr(holder, part)
    persistent = leaf not in holder._non_persistent_buffers_set
    fx_build.store(module, path, tensor, buffer=leaf in holder._buffers, persistent=persistent)
