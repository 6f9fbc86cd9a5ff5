"""Inserting calls into an FX graph: registry ops, the shared vocabulary, and fake execution for their types."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from actgraph.errors import InputError, UnsupportedError
from actgraph.graph.fx_args import signature
from actgraph.graph.fx_types import size_expression
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import DOMAIN
from actgraph.ops.torch_library import result_fakes

aten = torch.ops.aten
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]  # target, args, kwargs
Operands = Sequence[fx.Node | None]
#: How sizes given as text (``"batch*seq"``) become nodes: supplied by the graph, which knows where sizes can be read.
SizeOf = Callable[[str], "fx.Node | int"]


def call(op: str, operands: Operands, attributes: Mapping[str, Any], size_of: SizeOf) -> Call:
    """The target, args and kwargs that spell ``op`` in ATen.

    op: ``actgraph.<name>`` for a registry op, or a name of the vocabulary that may be inserted.
    Raises UnsupportedError for other names.
    """
    if op.startswith(f"{DOMAIN}."):
        return _registry_call(op, operands, attributes)
    if op in _SIMPLE:
        return _SIMPLE[op], tuple(operands), dict(attributes)
    if op == "cast":
        return aten._to_copy.default, (operands[0],), {"dtype": DType.of(attributes["to"]).torch}
    if op == "clip":
        return aten.clamp.Tensor, tuple(operands), {}
    if op == "sum":
        return aten.sum.dim_IntList, (operands[0], list(attributes["axes"]), bool(attributes.get("keepdims", True))), {}
    if op == "gather":
        if attributes.get("axis", 0) != 0:
            raise UnsupportedError("only rows of a table are looked up", "transpose the table")
        return aten.embedding.default, (operands[0], operands[1]), {}
    if op == "transpose":
        return aten.permute.default, (operands[0], list(attributes["perm"])), {}
    if op == "reshape":
        sizes = [size_of(size) if isinstance(size, str) else size for size in attributes["shape"]]
        return aten.reshape.default, (operands[0], sizes), {}
    if op == "concat":
        return aten.cat.default, (list(operands), int(attributes["axis"])), {}
    if op == "slice":
        start, end = attributes.get("start", 0), attributes.get("end", _END)
        return aten.slice.Tensor, (operands[0], attributes["axis"], start, end, attributes.get("step", 1)), {}
    raise UnsupportedError(f"op {op!r} cannot be inserted into an FX graph", "use a registry op or a starred vocabulary name")


_END = 2**63 - 1  # how a slice says "to the end"
_SIMPLE: dict[str, Any] = {
    "identity": aten.clone.default,
    "add": aten.add.Tensor,
    "sub": aten.sub.Tensor,
    "mul": aten.mul.Tensor,
    "div": aten.div.Tensor,
    "where": aten.where.self,
    "matmul": aten.matmul.default,
    "cos": aten.cos.default,
    "sin": aten.sin.default,
    "relu": aten.relu.default,
    "sigmoid": aten.sigmoid.default,
}


def _registry_call(op: str, operands: Operands, attributes: Mapping[str, Any]) -> Call:
    from actgraph.ops.registry import get_op
    from actgraph.ops.torch_library import torch_op

    definition = get_op(op)
    target = torch_op(definition.name)
    values: dict[str, Any] = dict(definition.complete(attributes))
    rest = list(operands)
    for operand in definition.inputs:
        values[operand.name] = rest if operand.variadic else (rest.pop(0) if rest else None)
        if operand.variadic:
            rest = []
    args, kwargs = [], {}
    for argument in signature(target) or ():
        value = values.pop(argument.name, argument.default)
        if isinstance(value, tuple):
            value = list(value)
        if argument.keyword_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    if values or rest:
        raise InputError(f"{op} does not take {', '.join(values) or 'so many operands'}", "see the op's documentation")
    return target, tuple(args), kwargs


def op_name(target: Any) -> str:
    """``aten.linear``, ``aten.add.Scalar`` (the overload shown unless default or Tensor), ``actgraph.shift``, ``sym.mul``."""
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        overload = target._overloadname
        return f"{namespace}.{name}" if overload in ("default", "Tensor") else f"{namespace}.{name}.{overload}"
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order.{target.__name__}"
    if isinstance(target, str):
        return f"module.{target}"
    name = getattr(target, "__name__", str(target))
    module = getattr(target, "__module__", "")
    return f"sym.{name.removeprefix('sym_')}" if module in ("_operator", "operator", "math", "torch") else f"{module}.{name}"


def evaluate(node: fx.Node, fake_mode: FakeTensorMode) -> Any:
    """What ``node`` computes, as fake values, from the fake values of its arguments.

    Raises InputError when the op refuses its operands or would force a symbolic size to a constant.
    """

    def value_of(argument: fx.Node) -> Any:
        if "val" not in argument.meta:
            raise UnsupportedError(f"the type of {argument.name} is unknown", "the op at hand needs it")
        return argument.meta["val"]

    args = fx.node.map_arg(node.args, value_of)
    kwargs = fx.node.map_arg(node.kwargs, value_of)
    env = fake_mode.shape_env
    target: Any = node.target
    try:
        with _no_new_guards(env, op_name(target)), fake_mode, torch.no_grad():
            result = _quick(target, args, kwargs)
            if result is None:
                result = target(*args, **kwargs)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        reason = str(error).strip().splitlines()
        said = reason[0] if reason else type(error).__name__
        raise InputError(f"{op_name(target)} cannot take these operands: {said}") from error
    return result


def _quick(target: Any, args: Any, kwargs: Any) -> Any:
    """The result of a call from its rules alone; ``None`` where they do not tell and the op itself has to be asked.

    ``aten.linear`` is among them because torch computes its sizes through several reshapes of symbolic sizes.
    """
    if isinstance(target, torch._ops.OpOverload) and target.namespace == DOMAIN:
        return result_fakes(target, args, kwargs)
    if target is aten.linear.default and args[0].dim() > 1 and args[0].dtype == args[1].dtype:
        x, weight = args[:2]
        width, features = x.shape[-1], weight.shape[1]
        return x.new_empty((*x.shape[:-1], weight.shape[0])) if isinstance(width, int) and width == features else None
    return None


@contextlib.contextmanager
def _no_new_guards(env: ShapeEnv | None, op: str) -> Iterator[None]:
    """Refuse what would make two sizes equal, or a symbolic size a constant. Raises InputError and forgets the equation."""
    if env is None:
        yield
        return
    before, ranges, guards, frozen = dict(env.replacements), dict(env.var_to_range), len(env.guards), env.frozen
    env.frozen = False  # a frozen environment would believe the example sizes
    try:
        yield
    finally:
        env.frozen = frozen
        forced = {symbol: value for symbol, value in env.replacements.items() if before.get(symbol) != value}
        new = [symbol for symbol in forced if symbol not in before]
        if new:
            for symbol in new:
                del env.replacements[symbol]
            env.replacements.update(before)
            env.var_to_range.update(ranges)
            env._replacements_version_counter += 1  # sizes cache what they were replaced by
            env._update_version_counter()
        del env.guards[guards:]
    if new:
        facts = ", ".join(f"{symbol} = {forced[symbol]}" for symbol in new)
        raise InputError(f"{op} would only work for {facts}", "use operands whose sizes agree for every input")


def build_size(expression: str, symbol_node: Callable[[str], fx.Node], graph: fx.Graph) -> fx.Node | int:
    """Nodes that compute a size expression such as ``"2*seq + 1"`` from the sizes of inputs."""
    size: fx.Node | int = _emit(size_expression(expression), symbol_node, graph)
    return size


def _emit(value: sympy.Expr, symbol_node: Callable[[str], fx.Node], graph: fx.Graph) -> Any:
    if value.is_Integer:
        return int(value)
    if value.is_Symbol:
        return symbol_node(str(value))
    fraction = sympy.fraction(sympy.together(value.args[0] if isinstance(value, sympy.floor) else value))
    if fraction[1] != 1:
        numerator, denominator = fraction
        return _binary(operator.floordiv, _emit(numerator, symbol_node, graph), _emit(denominator, symbol_node, graph), graph)
    if isinstance(value, (sympy.Add, sympy.Mul)):
        function = operator.add if isinstance(value, sympy.Add) else operator.mul
        parts = [_emit(part, symbol_node, graph) for part in value.args]
        result = parts[0]
        for part in parts[1:]:
            result = _binary(function, result, part, graph)
        return result
    raise UnsupportedError(f"the size {value} cannot be computed in the graph", "reshape with one size of -1 instead")


def _binary(function: Callable[[Any, Any], Any], left: Any, right: Any, graph: fx.Graph) -> Any:
    node = graph.call_function(function, (left, right))
    values = [item.meta["val"] if isinstance(item, fx.Node) else item for item in (left, right)]
    node.meta["val"] = function(*values)
    return node
