"""From any ATen GraphModule to the form that ``FxGraph`` keeps.

The form: parameter accesses first, one per storage; then the inputs; then functional calls in topological order, each
call with several results followed by one ``getitem`` per result; one flat output tuple; every node with ``meta["val"]``
and an origin. Guards and assertions about metadata are gone (``FxGraph`` checks its inputs by their declared types).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from actgraph.graph.fx_args import signature
from actgraph.graph.fx_types import find_fake_mode, refake
from actgraph.graph.graph import Companions
from actgraph.graph.provenance import KEY, Origin

_ASSERTIONS = (
    "_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size",
    "_functional_assert_async", "_functional_assert_scalar", "_functional_sym_constrain_range", "_check_runtime",
)  # fmt: skip
#: Calls whose result is their first operand, once the graph is functional and runs without autograd.
_PASS_THROUGH = ("lift_fresh_copy", "lift_fresh", "lift", "detach", "detach_", "alias")

#: A view is legal for some strides only, and an edit upstream (or another attention kernel) changes strides.
_FREE_OF_STRIDES: dict[Any, Any] = {
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default: torch.ops.aten.reshape.default,
}


def share_module(module: nn.Module) -> nn.Module:
    """A copy of the module tree as plain containers that share all tensors (branches of control flow stay whole)."""
    if isinstance(module, fx.GraphModule):
        return module
    twin = nn.Module()
    twin._parameters = dict(module._parameters)
    twin._buffers = dict(module._buffers)
    twin._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    twin._modules = {name: share_module(child) if child is not None else None for name, child in module._modules.items()}
    twin.training = False
    return twin


def lookup(module: nn.Module, path: str) -> Any:
    """The attribute at a dotted path. Raises AttributeError."""
    for part in path.split("."):
        module = getattr(module, part)
    return module


def store(module: nn.Module, path: str, tensor: torch.Tensor, *, buffer: bool, persistent: bool = True) -> None:
    """Set the tensor at a dotted path, making the containers on the way; a parameter unless ``buffer``."""
    *parents, leaf = path.split(".")
    for part in parents:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    module._parameters.pop(leaf, None)
    module._buffers.pop(leaf, None)
    if buffer:
        module.register_buffer(leaf, tensor.detach(), persistent=persistent)
    else:
        data = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        module.register_parameter(leaf, data)


def discard(module: nn.Module, path: str) -> None:
    """Forget the tensor at a dotted path."""
    *parents, leaf = path.split(".")
    for part in parents:
        child = module._modules.get(part)
        if child is None:
            return
        module = child
    module._parameters.pop(leaf, None)
    module._buffers.pop(leaf, None)


def storage_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are one and the same data, read in the same way."""
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return (id(tensor),)
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))


def named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer under every one of its names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def import_tensors(gm: fx.GraphModule) -> nn.Module:
    """A plain module tree with the tensors of ``gm`` (also those that it holds as bare attributes) and its branches."""
    root = nn.Module()
    persistent = set(gm.state_dict(keep_vars=True))
    for name, parameter in gm.named_parameters(remove_duplicate=False):
        store(root, name, parameter, buffer=False)
    for name, tensor in gm.named_buffers(remove_duplicate=False):
        store(root, name, tensor, buffer=True, persistent=name in persistent)
    known = {name for name, _ in named_tensors(root)}
    for node in gm.graph.nodes:
        if node.op != "get_attr" or node.target in known:
            continue
        known.add(node.target)
        found = lookup(gm, node.target)
        if isinstance(found, torch.Tensor):
            store(root, node.target, found, buffer=True, persistent=False)
        else:
            attach(root, node.target, found)
    return root


def normalise(graph: fx.Graph, root: nn.Module) -> FakeTensorMode:
    """Bring ``graph`` (over the tensors of ``root``) into the form of the module docstring. Linear in nodes."""
    fake_mode = find_fake_mode(node.meta.get("val") for node in graph.nodes)
    graph.set_codegen(fx.graph.CodeGen())
    _flatten_output(graph)
    _drop_assertions(graph)
    _complete_tuples(graph, fake_mode)
    _hoist_parameters(graph, root, fake_mode)
    for node in graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = refake(node.meta["val"], fake_mode)
        if node.op == "call_function":
            node.target = _FREE_OF_STRIDES.get(node.target, node.target)
            _tidy_keywords(node)
            if "custom" not in node.meta or KEY not in node.meta["custom"]:
                set_origin(node, Origin(sources=(node.name,), scope=module_scope(node)))
    return fake_mode


def module_scope(node: fx.Node) -> str:
    """The module path that computed the node, ``""`` for the root, with ``@k`` after a module called for the k-th time again.

    A shared layer's second call is ``encoder.layer@1``, and the linear in it ``encoder.layer@1.linear@1``.
    """
    scope, before = "", ""
    for key, entry in (node.meta.get("nn_module_stack") or {}).items():
        path = str(entry[0])
        if path.startswith("_empty_nn_module_stack"):
            return ""
        path = path.removeprefix("L['self'].").removeprefix("L['self']")
        if not path:
            continue
        again = re.search(r"@\d+$", str(key))
        nested = path.startswith(f"{before}.") if before else False
        scope = (scope + path[len(before) :] if nested else path) + (again.group() if again is not None else "")
        before = path
    return scope


def set_origin(node: fx.Node, origin: Origin) -> None:
    """Record the origin under our key of ``meta["custom"]``, which torch carries along."""
    node.meta["custom"] = {**(node.meta.get("custom") or {}), KEY: origin.to_dict()}


def _flatten_output(graph: fx.Graph) -> None:
    output = graph.output_node()
    flat: list[Any] = []
    fx.node.map_arg(output.args[0], flat.append)
    output.args = (tuple(flat),)


def _drop_assertions(graph: fx.Graph) -> None:
    """Remove assertions and pass-through calls, then what only they read."""
    for node in reversed(graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            graph.erase_node(node)
        elif node.op == "call_function":
            name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
            if name in _ASSERTIONS and not node.users:
                graph.erase_node(node)
            elif name in _PASS_THROUGH and isinstance(node.args[0], fx.Node):
                node.replace_all_uses_with(node.args[0], propagate_meta=False)
                graph.erase_node(node)
            elif not node.users and isinstance(node.meta.get("val"), (torch.SymInt, torch.SymBool, torch.SymFloat, bool)):
                graph.erase_node(node)


def _complete_tuples(graph: fx.Graph, fake_mode: FakeTensorMode) -> None:
    """Exactly one ``getitem`` per result right after each call with several results, in order."""
    for node in list(graph.nodes):
        if node.op == "call_function" and is_multiple(node):
            complete_tuple(graph, node)


def is_multiple(node: fx.Node) -> bool:
    """Whether a call returns a tuple or list (of which only the items are values)."""
    return node.target is not operator.getitem and isinstance(node.meta.get("val"), (tuple, list))


def is_item(node: fx.Node) -> bool:
    """Whether a node is bookkeeping: access to one result of a call with several."""
    return node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[0], fx.Node)


def complete_tuple(graph: fx.Graph, node: fx.Node) -> None:
    """See ``_complete_tuples``, for one call."""
    items: dict[int, fx.Node] = {}
    for user in list(node.users):
        if not is_item(user):
            continue
        index = user.args[1]
        assert isinstance(index, int)
        if index in items:
            user.replace_all_uses_with(items[index], propagate_meta=False)
            graph.erase_node(user)
        else:
            items[index] = user
    place = node
    for index, value in enumerate(node.meta["val"]):
        item = items.get(index)
        if item is None:
            with graph.inserting_after(place):
                item = graph.call_function(operator.getitem, (node, index))
            item.meta["val"] = value
            if "nn_module_stack" in node.meta:
                item.meta["nn_module_stack"] = node.meta["nn_module_stack"]
        elif place.next is not item:
            place.append(item)
        place = item


def _hoist_parameters(graph: fx.Graph, root: nn.Module, fake_mode: FakeTensorMode) -> None:
    """One access per storage, all at the top, dead ones dropped."""
    first: dict[tuple[Any, ...], fx.Node] = {}
    accesses: list[fx.Node] = []
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        found = lookup(root, str(node.target))
        if not isinstance(found, torch.Tensor):
            if not node.users:
                graph.erase_node(node)
            continue
        kept = first.setdefault(storage_key(found), node)
        if kept is node:
            accesses.append(node)
            continue
        node.replace_all_uses_with(kept, propagate_meta=False)
        graph.erase_node(node)
    top = next(iter(graph.nodes))
    for node in accesses:
        if not node.users:
            graph.erase_node(node)
            top = next(iter(graph.nodes)) if top is node else top
            continue
        fake_parameter(node, lookup(root, str(node.target)), fake_mode)
        if node is not top:
            top.prepend(node)
        else:
            top = top.next


def fake_parameter(node: fx.Node, tensor: torch.Tensor, fake_mode: FakeTensorMode) -> None:
    """Give a parameter access its ``meta["val"]``."""
    if tensor.layout is torch.strided:  # as ``from_tensor`` makes it, without its bookkeeping
        with fake_mode:
            node.meta["val"] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    else:
        node.meta["val"] = fake_mode.from_tensor(tensor.detach(), static_shapes=True)


def _tidy_keywords(node: fx.Node) -> None:
    """Drop keywords that say what would happen anyway."""
    if signature(node.target) is None:
        return
    kwargs = dict(node.kwargs)
    if not kwargs.get("pin_memory", True):
        del kwargs["pin_memory"]
    if kwargs.get("layout") is torch.strided:
        del kwargs["layout"]
    value, source = node.meta.get("val"), node.args[0] if node.args else None
    if "_to_copy" in str(node.target) and isinstance(source, fx.Node) and isinstance(value, torch.Tensor):
        known = source.meta.get("val")
        if isinstance(known, torch.Tensor) and known.device == value.device:
            kwargs.pop("device", None)
    if len(kwargs) != len(node.kwargs):
        node.kwargs = kwargs


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with equal node names and order; ``meta`` is copied one level deep."""
    twin = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        made = twin.create_node(node.op, node.target, name=node.name, type_expr=node.type)
        # Set afterwards: ``create_node`` would search each argument for symbolic sizes, which this graph has as nodes.
        made.args = fx.node.map_arg(node.args, mapping.__getitem__)
        made.kwargs = fx.node.map_arg(node.kwargs, mapping.__getitem__)
        rename(twin, made, node.name)
        made.meta = dict(node.meta)
        mapping[node] = made
    return twin


def rename(graph: fx.Graph, node: fx.Node, name: str) -> None:
    """Give a new node exactly this name, where torch has made up another."""
    if node.name != name:
        used = graph._graph_namespace._used_names
        used.discard(node.name)
        node.name = name
        used.add(name)


def attach(root: nn.Module, path: str, child: Any) -> None:
    """Set what is no tensor (a branch of control flow) at a dotted path, making the containers on the way."""
    *parents, leaf = path.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    setattr(root, leaf, child)


def copy_companions(companions: Companions) -> Companions:
    """An independent record of the same (immutable) contents."""
    return replace(
        companions,
        tokenizer_files=dict(companions.tokenizer_files),
        config=dict(companions.config),
        generation_config=dict(companions.generation_config),
        sample_inputs=dict(companions.sample_inputs),
    )
