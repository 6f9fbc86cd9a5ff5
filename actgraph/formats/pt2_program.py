"""An ``FxGraph`` as a ``torch.export.ExportedProgram`` that stock torch loads: tensors lifted to inputs, our ops decomposed."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymIntArgument,
    TensorArgument,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from actgraph.errors import UnsupportedError
from actgraph.graph import fx_build
from actgraph.graph.fx import FxGraph
from actgraph.graph.fx_module import output_structure
from actgraph.graph.fx_types import find_fake_mode
from actgraph.ops.registry import DOMAIN

_META = ("val", "nn_module_stack", "stack_trace", "torch_fn", "custom")


def program_of(graph: FxGraph, *, keep_ops: bool = False) -> ExportedProgram:
    """The program. Optional inputs are required in it, since torch.export knows no defaults.

    keep_ops: leave actgraph's ops as they are (loading then needs ``import actgraph``).
    """
    native = fx_build.copy_graph(graph.graph)
    for node in native.nodes:
        node.meta = {key: node.meta[key] for key in _META if key in node.meta}
    if not keep_ops:
        decompose(native)
    inputs, state, constants = _lift(graph, native)
    arguments = [node for node in native.nodes if node.op == "placeholder"][len(inputs) :]
    inputs += [InputSpec(InputKind.USER_INPUT, _argument(node), None) for node in arguments]
    output = native.output_node()
    results: tuple[fx.Node, ...] = output.args[0]  # type: ignore[assignment]
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, _argument(node), None) for node in results]
    names = [node.name for node in arguments]
    in_spec = pytree.tree_flatten(((), dict.fromkeys(names, 0)))[1]
    out_spec = pytree.tree_flatten(output_structure(graph.output_names, [0] * len(results)))[1]
    entry = ModuleCallEntry("", ModuleCallSignature([], [], in_spec, out_spec, names))
    return ExportedProgram(
        root=_branches(graph),
        graph=native,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict=state,
        range_constraints=_ranges(graph, arguments),
        module_call_graph=[entry],
        constants=constants,
    )


def decompose(native: fx.Graph) -> None:
    """Replace every actgraph op by what its torch reference does."""
    for node in list(native.nodes):
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target.namespace == DOMAIN:
            _inline(native, node)


def _inline(native: fx.Graph, node: fx.Node) -> None:
    """The reference of one call, traced on fake tensors, in place of the call."""
    from actgraph.ops.torch_library import op_of

    op = op_of(node.target)
    assert op is not None
    tensors: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), tensors.append)
    tensors = list(dict.fromkeys(tensors))

    def run(*values: Any) -> Any:
        known = dict(zip(tensors, values, strict=True))
        args = fx.node.map_arg(node.args, known.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, known.__getitem__)
        return op.reference(*args, **_plain(kwargs))

    fakes = [item.meta["val"] for item in tensors]
    with find_fake_mode(fakes), torch.no_grad():
        traced = make_fx(run, decomposition_table={}, pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)
    inputs = iter(tensors)
    mapping: dict[fx.Node, Any] = {}
    carried = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace", "custom") if key in node.meta}
    with native.inserting_before(node):
        for item in traced.graph.nodes:
            if item.op == "placeholder":
                mapping[item] = next(inputs)
            elif item.op == "call_function":
                mapping[item] = native.node_copy(item, mapping.__getitem__)
                mapping[item].meta = {"val": item.meta["val"], **carried}
            elif item.op == "output":
                _replace(native, node, fx.node.map_arg(item.args[0], mapping.__getitem__))
            else:
                raise UnsupportedError(f"the reference of actgraph.{op.name} holds tensors of its own", "save as .onnx")


def _plain(kwargs: Any) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, (list, tuple)) else value for key, value in dict(kwargs).items()}


def _replace(native: fx.Graph, node: fx.Node, result: Any) -> None:
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result, propagate_meta=False)
    else:
        for item in list(node.users):
            item.replace_all_uses_with(result[item.args[1]], propagate_meta=False)
            native.erase_node(item)
    native.erase_node(node)


def _lift(graph: FxGraph, native: fx.Graph) -> tuple[list[InputSpec], dict[str, Any], dict[str, Any]]:
    """Parameter accesses become the first inputs; returns their specs, the state and the constants."""
    specs: list[InputSpec] = []
    state: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    accesses = {str(node.target): node for node in native.nodes if node.op == "get_attr"}
    first = next(iter(native.nodes))
    for path in graph._parameters:
        node = accesses[path]
        *parents, leaf = path.split(".")
        holder = fx_build.lookup(graph.root, ".".join(parents)) if parents else graph.root
        tensor = getattr(holder, leaf)
        buffer = leaf in holder._buffers
        kind = "b" if buffer else "p"
        with native.inserting_before(first):
            lifted = native.placeholder(f"{kind}_{node.name}")
        lifted.target = lifted.name
        lifted.meta = dict(node.meta)
        node.replace_all_uses_with(lifted, propagate_meta=False)
        if node is first:
            first = first.next
        native.erase_node(node)
        persistent = leaf not in holder._non_persistent_buffers_set
        argument = TensorArgument(lifted.name)
        if buffer:
            specs.append(InputSpec(InputKind.BUFFER, argument, path, persistent))
        else:
            specs.append(InputSpec(InputKind.PARAMETER, argument, path))
        (state if persistent else constants)[path] = tensor
    return specs, state, constants


def _branches(graph: FxGraph) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr" and str(node.target) not in graph._parameters:
            found[str(node.target)] = fx_build.lookup(graph.root, str(node.target))
    return found


def _argument(node: fx.Node) -> TensorArgument | SymIntArgument:
    if isinstance(node.meta.get("val"), torch.Tensor):
        return TensorArgument(node.name)
    return SymIntArgument(node.name)


def _ranges(graph: FxGraph, arguments: list[fx.Node]) -> dict[sympy.Symbol, ValueRanges[sympy.Expr]]:
    """The allowed sizes of every symbol in the inputs, data-dependent ones too."""
    env = graph.fake_mode.shape_env
    assert env is not None
    ranges: dict[sympy.Symbol, Any] = {}
    free: set[sympy.Symbol] = set()
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        for item in value if isinstance(value, (list, tuple)) else (value,):
            for size in item.shape if isinstance(item, torch.Tensor) else (item,):
                if isinstance(size, torch.SymInt):
                    free |= size.node.expr.free_symbols
    for symbol in sorted(free, key=str):
        name = graph.dims.names.get(symbol)
        low, high = graph.dim_ranges.get(name, (None, None)) if name else (None, None)
        ranges[symbol] = ValueRanges(low or 0, int_oo if high is None else high)
    return ranges
