"""Changes to an FX graph, called by ``FxGraph`` on behalf of the editor."""

from __future__ import annotations

import heapq
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from actgraph.errors import InputError
from actgraph.graph import fx_build, fx_ops
from actgraph.graph.fx_args import bind, operand_paths, rebuild, replace_at
from actgraph.graph.fx_types import new_symbol, same_type, size_expression, tensor_of
from actgraph.graph.graph import Array, Node, Role, Use, Value
from actgraph.graph.provenance import Origin
from actgraph.ops.shapes import TensorType

if TYPE_CHECKING:
    from actgraph.graph.fx import FxGraph


def insert(
    graph: FxGraph,
    op: str,
    operands: Sequence[Value | None],
    attributes: Mapping[str, Any],
    *,
    after: Node | None,
    before: Node | None,
    name: str,
    origin: Origin,
) -> Node:
    """See ``Graph._insert``."""
    keys = [value.key if value is not None else None for value in operands]
    reader = before.key if before is not None else _place(graph, keys, after.key if after is not None else None).next
    neighbour = reader.prev
    try:
        with graph.graph.inserting_before(reader):
            target, args, kwargs = fx_ops.call(op, keys, attributes, lambda size: _size(graph, size))
            node = graph.graph.create_node("call_function", target, args, kwargs, name=_identifier(name))
        _finish(graph, node, origin)
    except BaseException:
        for item in _between(neighbour, reader)[::-1]:
            graph.graph.erase_node(item)
        raise
    for item in _between(neighbour, node):  # what computes the sizes
        fx_build.set_origin(item, origin)
    return Node(graph, node)


def _between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    node = first.next
    while node is not last:
        found.append(node)
        node = node.next
    return found


def copy_node(graph: FxGraph, node: Node, operands: Sequence[Value | None], *, origin: Origin) -> Node:
    """See ``Graph._copy_node``."""
    keys = [value.key if value is not None else None for value in operands]
    source: fx.Node = node.key
    with graph.graph.inserting_after(_place(graph, keys, source)):
        copy = graph.graph.create_node(source.op, source.target, source.args, source.kwargs, name=source.name)
    copy.meta = {key: value for key, value in source.meta.items() if key in ("nn_module_stack", "stack_trace", "custom", "val")}
    set_operands(graph, copy, dict(enumerate(keys)))
    _finish(graph, copy, origin)
    return Node(graph, copy)


def _finish(graph: FxGraph, node: fx.Node, origin: Origin) -> None:
    """Types, result items and provenance of a new node."""
    node.meta["val"] = fx_ops.evaluate(node, graph.fake_mode)
    fx_build.set_origin(node, origin)
    if fx_build.is_multiple(node):
        fx_build.complete_tuple(graph.graph, node)
    graph._changed(node, order=True)


def _place(graph: FxGraph, operands: Sequence[fx.Node | None], after: fx.Node | None) -> fx.Node:
    """The node after which something that reads ``operands`` can stand, no earlier than ``after``."""
    candidates = [n for n in operands if n is not None and n.op not in ("placeholder", "get_attr")]
    if after is not None:
        candidates.append(after)
    if not candidates:
        return last_of_header(graph)
    place = candidates[0]
    for candidate in candidates[1:]:
        if place < candidate:
            place = candidate
    while fx_build.is_item(place.next) and place.next.args[0] in (place, place.args[0] if place.args else None):
        place = place.next  # never between a call and its results
    return place


def last_of_header(graph: FxGraph) -> fx.Node:
    """The last input or parameter access: computations start after it."""
    if graph._inputs:
        return next(reversed(graph._inputs.values()))
    place = graph.graph._root
    while place.next.op in ("get_attr", "placeholder"):
        place = place.next
    return place


def _identifier(name: str) -> str:
    return name.replace(".", "_")


def _size(graph: FxGraph, expression: str) -> fx.Node | int:
    """The node that computes a size given as text, read off the graph's inputs."""

    def symbol_node(symbol: str) -> fx.Node:
        for value in graph.inputs():
            for axis, size in enumerate(value.shape or ()):
                if size == symbol:
                    node = graph.graph.call_function(torch.ops.aten.sym_size.int, (value.key, axis))
                    node.meta["val"] = value.key.meta["val"].shape[axis]
                    return node
        raise InputError(f"no input of {graph.name} has the dimension {symbol!r}", "use a size the inputs have")

    return fx_ops.build_size(expression, symbol_node, graph.graph)


def set_operands(graph: FxGraph, node: fx.Node, changes: Mapping[int, fx.Node | None]) -> None:
    """Replace operands by index (``None`` empties an optional one)."""
    paths = operand_paths(node)
    bound = bind(node)
    for index, value in changes.items():
        if not 0 <= index < len(paths):
            raise InputError(f"{node.name} has {len(paths)} operands, there is no operand {index}")
        path, old = paths[index]
        if old is value:
            continue
        head, rest = path[0], path[1:]
        bound[head] = replace_at(bound.get(head), rest, value)
    rebuild(node, bound)
    graph._changed(node)


def redirect(graph: FxGraph, new: Value, uses: Iterable[Use]) -> None:
    """See ``Graph._redirect``."""
    by_node: dict[fx.Node, dict[int, fx.Node | None]] = {}
    outputs = list(graph._output_nodes())
    for use in uses:
        if use.node is None:
            outputs[use.index] = new.key
        else:
            by_node.setdefault(use.node.key, {})[use.index] = new.key
    for node, changes in by_node.items():
        set_operands(graph, node, changes)
    graph.graph.output_node().args = (tuple(outputs),)
    graph._changed()


# --- parameters, inputs -----------------------------------------------------------------------------------------------


def add_parameter(graph: FxGraph, name: str, data: Array, *, buffer: bool) -> Value:
    """See ``Graph._add_parameter``."""
    path = _free_path(graph, name)
    tensor = tensor_of(data)
    fx_build.store(graph.root, path, tensor, buffer=buffer or not tensor.is_floating_point())
    first = next(iter(graph.graph.nodes))
    with graph.graph.inserting_before(first):
        node = graph.graph.create_node("get_attr", path, name=path.replace(".", "_"))
    fx_build.fake_parameter(node, fx_build.lookup(graph.root, path), graph.fake_mode)
    graph._parameters[path] = node
    graph._aliases[path] = (path,)
    graph._changed(node)
    return Value(graph, node)


def _free_path(graph: FxGraph, name: str) -> str:
    """A dotted path derived from ``name`` that nothing has and that leads through no tensor."""
    parts = [part or "_" for part in name.split(".")]
    path = ".".join(parts)
    if any(isinstance(_found(graph.root, ".".join(parts[:depth])), torch.Tensor) for depth in range(1, len(parts))):
        path = "_".join(parts)
    number, result = 0, path
    while _found(graph.root, result) is not None:
        number += 1
        result = f"{path}_{number}"
    return result


def _found(root: torch.nn.Module, path: str) -> Any:
    """What stands at a dotted path, ``None`` for nothing. As long as the path, however many tensors there are."""
    try:
        return fx_build.lookup(root, path)
    except AttributeError:
        return None


def set_parameter(graph: FxGraph, parameter: Value, data: Array) -> None:
    """See ``Graph._set_parameter``."""
    node: fx.Node = parameter.key
    old = graph.tensor(parameter)
    tensor = tensor_of(data)
    is_buffer = not isinstance(old, torch.nn.Parameter) or not tensor.is_floating_point()
    stored: torch.Tensor = tensor if is_buffer else torch.nn.Parameter(tensor, requires_grad=old.requires_grad)
    for path in graph.aliases(parameter):
        fx_build.store(graph.root, path, stored, buffer=is_buffer)
    fx_build.fake_parameter(node, stored, graph.fake_mode)
    graph._changed(node)


def add_input(graph: FxGraph, name: str, type: TensorType, role: Role, default: Array | None) -> Value:
    """See ``Graph._add_input``. A default makes the input optional for ``run``, sessions and ``to_torch``."""
    if name in graph._inputs:
        raise InputError(f"an input named {name!r} exists already", "choose another name")
    if type.dtype is None or type.shape is None or None in type.shape:
        raise InputError(f"the type of input {name!r} must be known, not {type}")
    value = _fake_input(graph, type)
    with graph.graph.inserting_after(last_of_header(graph)):
        node = graph.graph.create_node("placeholder", _identifier(name), name=_identifier(name))
    node.target = node.name
    node.meta["val"] = value
    if node.name != name:
        graph.public[node.name] = name
    graph._inputs[name] = node
    if role is not Role.USER:
        graph.input_roles[name] = role
    if default is not None:
        graph.defaults[name] = default
    graph._changed(node)
    return Value(graph, node)


def set_input_type(graph: FxGraph, value: Value, type: TensorType) -> None:
    """See ``Graph._set_input_type``."""
    node: fx.Node = value.key
    node.meta["val"] = _fake_input(graph, type)
    graph._changed(node)


def _fake_input(graph: FxGraph, type: TensorType) -> torch.Tensor:
    if type.dtype is None or type.shape is None:
        raise InputError(f"the type of an input must be known, not {type}")
    sizes = [_symbolic_size(graph, size) if isinstance(size, str) else size for size in type.shape]
    with graph.fake_mode:
        return torch.empty(sizes, dtype=type.dtype.torch)  # type: ignore[arg-type]


def _symbolic_size(graph: FxGraph, name: str) -> Any:
    """torch's size for a dimension name of the inputs (or an expression of them); a new symbol for a new name."""
    for value in graph.inputs():
        for axis, size in enumerate(value.shape or ()):
            if size == name:
                return value.key.meta["val"].shape[axis]
    env = graph.fake_mode.shape_env
    assert env is not None
    if not name.isidentifier():
        expression = size_expression(name)
        known = {symbol: _symbolic_size(graph, symbol.name).node.expr for symbol in expression.free_symbols}
        return env.create_symintnode(expression.xreplace(known), hint=None)
    hint = 19 + 2 * len(graph.dims.names)
    symbol = new_symbol(env, name, hint, 2)
    graph.dims.set(symbol, name)
    return env.create_symintnode(symbol, hint=hint)


# --- dead code, types -----------------------------------------------------------------------------------------------------


def erase_dead(graph: FxGraph, only: Collection[str] | None = None) -> list[str]:
    """See ``Graph._erase_dead``: one sweep from the end."""
    removed: list[str] = []
    for node in reversed(graph.graph.nodes):
        if only is not None and graph._native_name(node) not in only:
            continue
        if node.op in ("placeholder", "output") or fx_build.is_item(node) or not is_pure(node):
            continue
        if fx_build.is_multiple(node):
            items = list(node.users)
            if any(item.users for item in items):
                continue
            for item in items:
                removed.append(item.name)
                _forget(graph, item)
        elif node.users:
            continue
        removed.append(graph._native_name(node))
        if only is not None:
            graph.graph._graph_namespace._used_names.discard(node.name)  # who puts the node back finds its name free
        if node.op == "get_attr":
            path = str(node.target)
            for alias in graph._aliases.pop(path, (path,)):
                fx_build.discard(graph.root, alias)
                graph._canonical.pop(alias, None)
            graph._parameters.pop(path, None)
        _forget(graph, node)
    if removed:
        graph._changed(order=True)
    return removed


def _forget(graph: FxGraph, node: fx.Node) -> None:
    graph._changed(node)
    graph.graph.erase_node(node)


def is_pure(node: fx.Node) -> bool:
    """Whether a node may go when nothing reads it."""
    if node.op == "get_attr":
        return True
    if node.op != "call_function":
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return not schema.is_mutable
    return not isinstance(node.target, torch._ops.HigherOrderOperator)


def retype(graph: FxGraph, nodes: Iterable[fx.Node], *, propagate: bool) -> None:
    """See ``Graph._retype``: each node is evaluated at most once, in topological order."""
    waiting: list[tuple[Any, int, fx.Node]] = []
    seen: set[fx.Node] = set()

    def push(node: fx.Node) -> None:
        if node not in seen and node.op == "call_function":
            seen.add(node)
            heapq.heappush(waiting, (node._sort_key, len(seen), node))

    for node in nodes:
        push(node)
    while waiting:
        _, _, node = heapq.heappop(waiting)
        if node.target is operator.getitem and fx_build.is_item(node):
            value = node.args[0].meta["val"][node.args[1]]  # type: ignore[union-attr]
        else:
            value = fx_ops.evaluate(node, graph.fake_mode)
        if same_type(node.meta.get("val"), value):
            continue
        node.meta["val"] = value
        graph._changed(node)
        for user in node.users:
            if propagate or fx_build.is_item(user):
                push(user)
