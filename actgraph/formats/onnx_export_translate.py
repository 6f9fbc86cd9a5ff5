"""An FX graph, node by node, as ONNX nodes.

The graph is translated as it is: it is not traced again, so every value keeps its name, every node its provenance, and
every size the user's name for it. Each call goes to the first of these that takes it: an op of the registry (one node of
domain ``actgraph``), a rule of ``onnx_export_rules``, torch's own translation, or torch's decomposition of the op into
others. Implicit type promotion of torch becomes explicit casts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import fx

from actgraph.errors import UnsupportedError
from actgraph.formats.compat import torch_facade
from actgraph.formats.onnx_export_emit import Emitter
from actgraph.formats.onnx_export_rules import COMPLEX_RULES, RULES
from actgraph.formats.onnx_export_types import dims_of, set_type
from actgraph.graph.fx_args import bind
from actgraph.graph.fx_build import is_item, is_multiple
from actgraph.graph.fx_ops import op_name
from actgraph.graph.fx_types import DimNames
from actgraph.graph.onnx_native import registry_attributes
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import DOMAIN, get_op
from actgraph.ops.shapes import Dim, Shape, TensorType

if TYPE_CHECKING:
    from actgraph.formats.onnx_export_sites import Carrier

Size = int | ir.Value
_REAL = {DType.C64: DType.F32, DType.C128: DType.F64}


class Translator:
    """Translates the nodes of one FX graph in order.

    values: what each FX node is in ONNX. made: the ONNX nodes written for each FX node.
    inner: values inside the translation of a node that virtual sites denote, by ``(node, recipe)``.
    sites: which nodes must stay separate (``None``: no site denotes anything here).
    """

    def __init__(
        self, emit: Emitter, dims: DimNames, sites: Carrier | None, describe: Callable[[fx.Node, ir.Node], None]
    ) -> None:
        self.emit = emit
        self.dims = dims
        self.facade = torch_facade()
        self.values: dict[fx.Node, Any] = {}
        self.made: dict[fx.Node, list[ir.Node]] = {}
        self.inner: dict[tuple[fx.Node, str], ir.Value] = {}
        self.functions: dict[ir.OperatorIdentifier, ir.Function] = {}
        self.branches: dict[str, ir.Function] = {}
        self.size_sources: dict[Dim, tuple[ir.Value, int]] = {}
        self._sites = sites
        self._describe = describe

    # --- what rules use ---------------------------------------------------------------------------------------------------

    def type_of(self, node: fx.Node) -> TensorType:
        """The type of a node's value. Complex numbers are pairs of real ones along a last axis, as torch exports them."""
        kind = self.dims.type_of(node.meta.get("val"))
        if kind.dtype in _REAL and kind.shape is not None:
            return TensorType(_REAL[kind.dtype], (*kind.shape, 2))
        return kind

    def size_of(self, example: torch.Tensor, axis: int) -> Dim:
        """One size of an example value, as an int or by name."""
        return self.dims.dim(example.shape[axis])

    def size(self, value: ir.Value, axis: int) -> Size:
        """One size of ``value``: a number where it is static, else an i64 vector of one element."""
        dims = dims_of(value)
        if dims is not None:
            dim, axis = dims[axis], axis % len(dims)
            if isinstance(dim, int):
                return dim
            if dim in self.size_sources:
                value, axis = self.size_sources[dim]
        return self.emit.op("Shape", value, start=axis, end=axis + 1 if axis != -1 else None)

    def size_vector(self, node: fx.Node, axis: int) -> Size:
        return self.size(self.values[node], axis)

    def scalar(self, size: Size) -> ir.Value:
        """A size as an i64 scalar."""
        if isinstance(size, int):
            return self.emit.constant(size, DType.I64)
        return self.emit.op("Squeeze", size, self.emit.ints([0]))

    def number(self, value: Any) -> ir.Value:
        """A Python number as an i64 or f32 scalar; a value as it is."""
        if isinstance(value, ir.Value):
            return value
        return self.emit.constant(value, DType.F32 if isinstance(value, float) else DType.I64)

    def vector(self, parts: Sequence[Any]) -> ir.Value:
        """An i64 vector of sizes, each a number, a scalar or a vector of one element."""
        if all(isinstance(part, int) for part in parts):
            return self.emit.ints(parts)
        pieces = []
        for part in parts:
            if isinstance(part, int):
                pieces.append(self.emit.ints([part]))
            elif dims_of(part) == [1]:
                pieces.append(part)
            else:
                pieces.append(self._vector_of(part))
        return pieces[0] if len(pieces) == 1 else self.emit.op("Concat", *pieces, axis=0)

    def _vector_of(self, scalar: ir.Value) -> ir.Value:
        maker = scalar.producer()
        if maker is not None and maker.op_type == "Squeeze" and maker.inputs[0] is not None and dims_of(maker.inputs[0]) == [1]:
            return maker.inputs[0]
        return self.emit.op("Reshape", scalar, self.emit.ints([1]))

    def reshape_target(self, source: Sequence[Dim], target: Shape) -> list[int] | None:
        """A constant target for ``Reshape``: 0 copies the size at the same place, -1 is the one size that is left over."""
        result: list[int] = []
        for index, dim in enumerate(target):
            if isinstance(dim, int):
                if dim == 0:
                    return None
                result.append(dim)
            elif index < len(source) and dim is not None and source[index] == dim:
                result.append(0)
            else:
                result.append(-1)
        return result if result.count(-1) <= 1 else None

    # --- the walk -----------------------------------------------------------------------------------------------------------

    def run(self, nodes: Iterable[fx.Node]) -> None:
        """Translate every call among ``nodes``; inputs and parameters must be in ``values``."""
        with self.facade.quiet("onnx_ir"):  # it warns of empty lists of integers
            for node in nodes:
                if node.op == "call_function":
                    self._call(node)
                elif node.op in ("call_module", "call_method"):
                    reason = f"cannot export {node.op} {node.target} to ONNX"
                    raise UnsupportedError(reason, "capture the model with torch.export")

    def _call(self, node: fx.Node) -> None:
        if is_item(node) and node in self.values:
            return
        before = len(self.emit.nodes)
        if self._sites is not None:
            self.emit.protected = {self.values[operand] for operand in self._sites.edge_operands(node)}
        result = self._translate(node)
        multiple = is_multiple(node)
        values = list(result) if multiple else [result]
        names = [user.name for user in _items(node)] if multiple else [node.name]
        kinds = [self.type_of(user) for user in _items(node)] if multiple else [self.type_of(node)]
        owned = [self._own(node, value) for value in values]
        fresh = [(name, v, kind) for name, v, kind in zip(names, owned, kinds, strict=False) if self.emit.is_pending(v)]
        self.emit.finish(node.name, fresh, lambda made: self._describe(node, made))
        self.made[node] = self.emit.nodes[before:]
        self.values[node] = owned if multiple else owned[0]
        if multiple:
            self.values.update(zip(_items(node), owned, strict=False))

    def _own(self, node: fx.Node, value: Any) -> Any:
        """``value``, or a copy of it where the FX node must stay a value of its own."""
        if self._sites is None or not isinstance(value, ir.Value) or self.emit.is_pending(value):
            return value
        if self._sites.must_stay(node, self.emit.is_constant(value)):
            self.emit.protected.add(value)
            return self.emit.op("Identity", value)
        return value

    def _translate(self, node: fx.Node) -> Any:
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target.namespace == DOMAIN:
            return self._registry_op(node)
        qualified = str(target._schema.name) if isinstance(target, torch._ops.OpOverload) else None
        rules = COMPLEX_RULES if _is_complex(node) else RULES
        rule = rules.get(target) or rules.get(qualified)
        if rule is not None:
            result = rule(self, node, {key: self._resolve(value) for key, value in bind(node).items()})
            if result is not None:
                return result
        args, kwargs = self._promoted(node)
        if isinstance(target, torch._ops.OpOverload) and target.namespace == "onnx":
            return self._onnx_op(node, args, kwargs)
        translation = self.facade.translation(node, self.emit.opset)
        if translation is not None:
            return self._torch_translation(node, translation, args, kwargs)
        return self._decomposed(node)

    def _resolve(self, argument: Any) -> Any:
        """An FX argument with nodes replaced by ONNX values."""
        if isinstance(argument, fx.Node):
            if argument in self.values:
                return self.values[argument]
            return self.branches[str(argument.target)]
        if isinstance(argument, (list, tuple)):
            return [self._resolve(item) for item in argument]
        return argument

    def _torch_translation(
        self, node: fx.Node, translation: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        convert = self._convert
        try:
            with self.facade.recording(self.emit.opset, self.emit.recorder_constants) as recording:
                result = translation(*map(convert, args), **{key: self._keyword(key, value) for key, value in kwargs.items()})
        except Exception as error:
            reason = f"cannot export {op_name(node.target)} ({node.name}) to ONNX: {_first_line(error)}"
            raise UnsupportedError(reason) from error
        functions = recording.functions
        many = isinstance(result, (list, tuple))
        values = self.emit.record(recording.nodes, list(result) if many else [result], functions)
        called = {made.op_identifier() for made in self.emit.pending}  # those that could not be taken apart
        self.functions.update((key, function) for key, function in functions.items() if key in called)
        return values if many else values[0]

    def _keyword(self, key: str, value: Any) -> Any:
        return -1 if key == "dtype" and value is None else self._convert(value)

    def _convert(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._convert(item) for item in value]
        if isinstance(value, torch.dtype):
            return ir.DataType(DType.of(value).onnx)
        if isinstance(value, (torch.device, torch.memory_format, torch.layout)):
            return str(value)
        return value

    def _decomposed(self, node: fx.Node) -> Any:
        example = _examples(node.args), _examples(node.kwargs)
        inner = self.facade.decompose(node, *example, self.emit.opset)
        if inner is None:
            raise UnsupportedError(
                f"{op_name(node.target)} ({node.name}) has no translation to ONNX", "replace it, or register an op with a body"
            )
        leaves, _ = torch.utils._pytree.tree_flatten((list(node.args), dict(node.kwargs)))
        operands = iter([leaf for leaf in leaves if isinstance(leaf, fx.Node)])
        for part in inner.graph.nodes:
            if part.op == "placeholder":
                self.values[part] = self.values[next(operands)]
            elif part.op == "get_attr":
                tensor = getattr(inner, str(part.target))
                self.values[part] = self.emit.constant(tensor.detach().cpu().numpy())
            elif part.op == "call_function" and not (is_item(part) and part in self.values):
                result = self._translate(part)
                self.values[part] = result
                if is_multiple(part):
                    self.values.update((user, result[int(str(user.args[1]))]) for user in _items(part))
                elif self.emit.is_pending(result):
                    set_type(result, self.type_of(part))
        return self._resolve(inner.graph.output_node().args[0])

    def _registry_op(self, node: fx.Node) -> Any:
        definition = get_op(node.target._schema.name.partition("::")[2])  # type: ignore[union-attr]
        bound = bind(node)
        operands: list[ir.Value | None] = []
        for operand in definition.inputs:
            given = self._resolve(bound.get(operand.name))
            operands += given if operand.variadic else [given]
        given = {a.name: bound[a.name] for a in definition.attributes if a.name in bound}
        native = registry_attributes(definition, given)
        values = self.emit.add(
            ir.Node(DOMAIN, definition.onnx_name, _trimmed(operands), native, num_outputs=len(definition.outputs))
        )
        return list(values) if is_multiple(node) else values[0]

    def _onnx_op(self, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """One of ``torch.onnx.ops``: an ONNX op called from torch code."""
        name, opset = onnx_op(node.target)
        if opset > self.emit.opset:
            raise UnsupportedError(f"{node.name} is an op of opset {opset}", f"export to opset {opset}")
        attributes = ir.convenience.convert_attributes({key: value for key, value in kwargs.items() if value is not None})
        count = len(node.meta["val"]) if is_multiple(node) else 1
        values = self.emit.add(ir.Node("", name, _trimmed(list(args)), attributes, num_outputs=count))
        return list(values) if is_multiple(node) else values[0]

    # --- type promotion ---------------------------------------------------------------------------------------------------

    def _promoted(self, node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
        """The arguments as ONNX values, cast where torch would convert them implicitly."""
        args, kwargs = [self._resolve(a) for a in node.args], {k: self._resolve(v) for k, v in node.kwargs.items()}
        if not isinstance(node.target, torch._ops.OpOverload):
            return args, kwargs
        by_position, by_name = self.facade.promotions(node, _examples(node.args), _examples(node.kwargs))
        for index, dtype in by_position.items():
            if index < len(args):
                args[index] = self._promote(args[index], dtype)
        for key, dtype in by_name.items():
            if key in kwargs:
                kwargs[key] = self._promote(kwargs[key], dtype)
        return args, kwargs

    def _promote(self, argument: Any, dtype: torch.dtype) -> Any:
        if dtype.is_complex:
            return argument
        kind = DType.of(dtype)
        if isinstance(argument, ir.Value):
            return self.emit.cast(argument, kind)
        if isinstance(argument, list):
            return [self._promote(item, dtype) for item in argument]
        if kind.is_float and isinstance(argument, int):
            return float(argument)
        return argument


def _items(node: fx.Node) -> list[fx.Node]:
    """The accesses to the results of a call with several, in order."""
    return sorted(filter(is_item, node.users), key=lambda user: int(str(user.args[1])))


def _is_complex(node: fx.Node) -> bool:
    """Whether the node reads or makes complex numbers, which most of our rules do not know."""
    values = [part.meta.get("val") for part in (node, *node.all_input_nodes)]
    return any(isinstance(value, torch.Tensor) and value.is_complex() for value in values)


def onnx_op(target: Any) -> tuple[str, int]:
    """Name and opset of an overload of ``torch.onnx.ops``: ``onnx::RotaryEmbedding.opset23``."""
    name, _, opset = target.name().removeprefix("onnx::").partition(".opset")
    return name, int(opset)


def _trimmed(operands: list[ir.Value | None]) -> list[ir.Value | None]:
    """Without the absent operands at the end."""
    while operands and operands[-1] is None:
        operands.pop()
    return operands


def _examples(argument: Any) -> Any:
    return fx.node.map_arg(argument, lambda node: node.meta["val"])


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return next(iter(str(cause).splitlines()), type(cause).__name__)
