"""Writing ONNX nodes: constants, types, folding and sharing of the helper nodes that a translation needs.

An ATen op often becomes several ONNX nodes. The last one stands for the op and keeps its name; the others are *helpers*
(shape arithmetic, masks, casts). Helpers with constant operands are computed here, equal helpers are made once, and no
node that stands for an op of the source graph is ever folded or merged: sites denote those.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx.reference.ops import load_op

from actgraph.formats.onnx_export_fit import in_float32
from actgraph.formats.onnx_export_types import FOLD_LIMIT, has_graph, infer_types, set_type
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import TensorType

Array = np.ndarray[Any, Any]

_RANDOM = frozenset({"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"})
_NOT_FOLDED = _RANDOM | {"DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear", "Constant", "Dropout"}


class Emitter:
    """Collects the nodes of one ONNX graph (or of one function body, when ``constants_as_nodes``).

    protected: values that the op under translation must read itself, because an edge site denotes that operand: what reads
    them is neither shared with other ops nor computed here.
    """

    def __init__(self, opset: int, *, constants_as_nodes: bool = False, prefix: str = "") -> None:
        self.opset = opset
        self.prefix = prefix  # of every name made here
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.constants: dict[Any, ir.Value] = {}
        self.recorder_constants: dict[Any, ir.Value] = {}
        self.protected: set[ir.Value] = set()
        self._constants_as_nodes = constants_as_nodes
        self._pending: list[ir.Node] = []
        self._shared: dict[Any, tuple[ir.Value, ...]] = {}
        self._names: set[str] = set()
        self._source_values: set[int] = set()

    # --- values and nodes -----------------------------------------------------------------------------------------------

    def op(self, op_type: str, *inputs: ir.Value | None, outputs: int = 1, domain: str = "", **attributes: Any) -> ir.Value:
        """One node with one output (the first of ``outputs``; ``ops`` gives all)."""
        return self.ops(op_type, *inputs, outputs=outputs, domain=domain, **attributes)[0]

    def ops(
        self, op_type: str, *inputs: ir.Value | None, outputs: int = 1, domain: str = "", **attributes: Any
    ) -> tuple[ir.Value, ...]:
        """One node with ``outputs`` outputs. Attributes are plain Python values; ``None`` leaves one out."""
        operands = list(inputs)
        while operands and operands[-1] is None:
            operands.pop()
        given = {key: value for key, value in attributes.items() if value is not None}
        return self.add(ir.Node(domain, op_type, operands, ir.convenience.convert_attributes(given), num_outputs=outputs))

    def add(self, node: ir.Node) -> tuple[ir.Value, ...]:
        """Take over one node; returns what its outputs are (a constant, or those of an equal helper)."""
        return self._record(node)

    def record(
        self,
        nodes: Sequence[ir.Node],
        results: Sequence[ir.Value],
        functions: Mapping[ir.OperatorIdentifier, ir.Function] | None = None,
    ) -> list[ir.Value]:
        """Take over nodes that torch's translations wrote; returns what ``results`` are now (folded or shared ones change).

        Calls of ``functions`` are replaced by the nodes of their bodies.
        """
        moved: dict[ir.Value, ir.Value] = {}
        self._take(nodes, moved, functions or {})
        if moved:
            for key, value in self.recorder_constants.items():
                self.recorder_constants[key] = moved.get(value, value)
        return [moved.get(value, value) for value in results]

    def _take(
        self,
        nodes: Iterable[ir.Node],
        moved: dict[ir.Value, ir.Value],
        functions: Mapping[ir.OperatorIdentifier, ir.Function],
    ) -> None:
        for node in nodes:
            for index, value in enumerate(node.inputs):
                if value in moved:
                    node.replace_input_with(index, moved[value])
            before = tuple(node.outputs)
            function = functions.get(node.op_identifier())
            if function is not None and not any(map(has_graph, function)):
                after = self._body(node, function, functions)
            else:
                after = list(self._record(node))
            moved.update((old, new) for old, new in zip(before, after, strict=True) if new is not old)

    def _body(
        self, call: ir.Node, function: ir.Function, functions: Mapping[ir.OperatorIdentifier, ir.Function]
    ) -> list[ir.Value]:
        """The body of ``function`` in place of ``call``; returns what the outputs of the call are now."""
        operands = [*call.inputs, *[None] * (len(function.inputs) - len(call.inputs))]
        given = dict(zip(function.inputs, operands, strict=True))
        moved = {old: new for old, new in given.items() if new is not None}
        for node in function:
            attributes = []
            for attribute in node.attributes.values():
                if not attribute.is_ref():
                    attributes.append(attribute)
                    continue
                source = call.attributes.get(str(attribute.ref_attr_name)) or function.attributes[str(attribute.ref_attr_name)]
                if source.value is not None:
                    attributes.append(ir.Attr(attribute.name, source.type, source.value))
            inputs = [None if value is None else moved.get(value, given.get(value, value)) for value in node.inputs]
            copy = ir.Node(node.domain, node.op_type, inputs, attributes, num_outputs=len(node.outputs), overload=node.overload)
            made = dict(zip(copy.outputs, node.outputs, strict=True))
            self._take([copy], moved, functions)
            moved.update((old, moved.get(new, new)) for new, old in made.items())
        self._replace(call, ())
        return [moved[value] for value in function.outputs]

    def constant(self, data: Any, dtype: DType | np.dtype[Any] | None = None) -> ir.Value:
        """A constant, stored once per content. Python numbers need ``dtype``."""
        kind = dtype.numpy if isinstance(dtype, DType) else dtype
        array = np.asarray(data, dtype=kind)
        key = (array.dtype.name, array.shape, array.tobytes())
        if key in self.constants:
            return self.constants[key]
        name = self.unique(_constant_name(array))
        tensor = ir.tensor(array, name=name)
        if self._constants_as_nodes:
            node = ir.Node("", "Constant", [], ir.convenience.convert_attributes({"value": tensor}), num_outputs=1)
            value = node.outputs[0]
            value.name = name
            self.nodes.append(node)
        else:
            value = ir.Value(name=name)
            self.initializers[name] = value
        value.const_value = tensor
        value.type = ir.TensorType(tensor.dtype)
        value.shape = ir.Shape(array.shape)
        self.constants[key] = value
        return value

    def ints(self, values: Iterable[int]) -> ir.Value:
        """A constant i64 vector."""
        return self.constant(np.asarray(list(values), dtype=np.int64))

    def cast(self, value: ir.Value, dtype: DType) -> ir.Value:
        """``value`` as ``dtype``; ``value`` itself where it is already."""
        if value.dtype is not None and int(value.dtype) == dtype.onnx:
            return value
        return self.op("Cast", value, to=dtype.onnx)

    def unique(self, stem: str) -> str:
        """A value name that is not taken yet."""
        stem = f"{self.prefix}{stem}"
        name, number = stem, 0
        while name in self._names:
            number += 1
            name = f"{stem}_{number}"
        self._names.add(name)
        return name

    @property
    def pending(self) -> Sequence[ir.Node]:
        """The nodes written since the last ``finish``."""
        return self._pending

    def is_pending(self, value: Any) -> bool:
        """Whether a node of the translation under way made ``value``."""
        maker = value.producer() if isinstance(value, ir.Value) else None
        return maker is not None and any(node is maker for node in self._pending)

    def is_constant(self, value: ir.Value) -> bool:
        """Whether ``value`` is a constant that was made here (and not a parameter)."""
        return value.const_value is not None and id(value) not in self._source_values

    def add_source(self, value: ir.Value) -> None:
        """Tell of an input or parameter of the source graph; its name is taken from now on."""
        self._names.add(value.name or "")
        self._source_values.add(id(value))

    def live_nodes(self, outputs: Sequence[ir.Value]) -> list[ir.Node]:
        """The nodes that ``outputs`` depend on, in order; the others stop reading their operands."""
        needed = set(outputs)
        kept = []
        for node in reversed(self.nodes):
            if needed.isdisjoint(node.outputs):
                self._replace(node, ())
                continue
            kept.append(node)
            needed.update(value for value in node.inputs if value is not None)
            for attribute in node.attributes.values():
                if attribute.type is ir.AttributeType.GRAPH:
                    inner = ir.traversal.RecursiveGraphIterator(attribute.as_graph())
                    needed.update(value for part in inner for value in part.inputs if value is not None)
        return kept[::-1]

    def finish(
        self, source: str, results: Sequence[tuple[str, ir.Value, TensorType]], describe: Callable[[ir.Node], None]
    ) -> None:
        """Close the translation of one source node: name everything and put its nodes into the graph.

        source: name of the source node. results: its values as ``(name, value, type)``; each must be made by a pending node.
        describe: called on every new node to attach metadata.
        """
        final = {value for _, value, _ in results}
        makers = {value.producer() for value in final}
        for name, value, kind in results:
            value.name = self.unique(name)
            set_type(value, kind)
            self._source_values.add(id(value))
        for node in self._pending:
            for value in node.outputs:
                if value not in final:
                    value.name = self.unique(f"{source}.{node.op_type.lower()}")
            if not any(value in final for value in node.outputs):
                node.name = node.outputs[0].name
                self._share(node)
            else:  # several makers of one result each: only a single one can have the name of the source
                node.name = f"{self.prefix}{source}" if len(makers) == 1 else node.outputs[0].name
            describe(node)
        self.nodes.extend(self._pending)
        self._pending = []

    # --- folding, sharing, types ----------------------------------------------------------------------------------------

    def _record(self, node: ir.Node) -> tuple[ir.Value, ...]:
        if node.op_type == "Constant" and node.domain == "":
            array = _constant_array(node)
            if array is not None:
                return (self.constant(array),)
        if node.op_type == "CastLike" and node.domain == "":
            like = node.inputs[1]
            if like is not None and like.dtype is not None:
                return self._replace(node, self.ops("Cast", node.inputs[0], to=int(like.dtype)))
        if node.op_type == "Cast" and node.domain == "":
            value = node.inputs[0]
            if value is not None and value.dtype is not None and int(value.dtype) == node.attributes["to"].as_int():
                return self._replace(node, [value])
        if _passes_through(node):
            return self._replace(node, [value for value in node.inputs[:1] if value is not None])
        folded = self._fold(node)
        if folded is not None:
            return self._replace(node, folded)
        fitted = in_float32(self, node)
        if fitted is not None:
            return self._replace(node, fitted)
        known = self._shared.get(_key(node)) if _key(node) is not None else None
        if known is not None and self._sharable(node):
            return self._replace(node, known)
        infer_types(node, self.opset)
        self._pending.append(node)
        return tuple(node.outputs)

    def _replace(self, node: ir.Node, values: Sequence[ir.Value]) -> tuple[ir.Value, ...]:
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)  # a node that is not used must not count as a reader
        return tuple(values)

    def _sharable(self, node: ir.Node) -> bool:
        if node.op_type in ("Shape", "Size"):
            return True
        return self.protected.isdisjoint(node.inputs)

    def _share(self, node: ir.Node) -> None:
        key = _key(node)
        if key is not None and self._sharable(node):
            self._shared.setdefault(key, tuple(node.outputs))

    def _fold(self, node: ir.Node) -> list[ir.Value] | None:
        """The results of a helper on constants, or of ``Shape`` on a static shape; ``None`` where it must run."""
        if node.domain != "" or node.op_type in _NOT_FOLDED or has_graph(node) or not self.protected.isdisjoint(node.inputs):
            return None
        if node.op_type == "Shape":
            return self._fold_shape(node)
        arrays: list[Array | None] = []
        for value in node.inputs:
            if value is None:
                arrays.append(None)
                continue
            if value.const_value is None or value.const_value.size > FOLD_LIMIT or id(value) in self._source_values:
                return None
            arrays.append(value.const_value.numpy())
        if not arrays:
            return None
        attributes = {key: _plain(attribute) for key, attribute in node.attributes.items()}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results = load_op("", node.op_type, self.opset).eval(*arrays, n_outputs=len(node.outputs), **attributes)
        except Exception:  # the reference evaluator lacks the op or the type: the node runs as it is
            return None
        listed = list(results) if isinstance(results, (tuple, list)) else [results]
        if len(listed) != len(node.outputs) or any(np.asarray(r).size > FOLD_LIMIT for r in listed):
            return None
        return [self.constant(np.asarray(result)) for result in listed]

    def _fold_shape(self, node: ir.Node) -> list[ir.Value] | None:
        value = node.inputs[0]
        if value is None or value.shape is None:
            return None
        start = node.attributes.get_int("start", 0) or 0
        end = node.attributes.get_int("end", None)
        dims = list(value.shape)[start:end]
        known = [dim for dim in dims if isinstance(dim, int)]
        return [self.ints(known)] if len(known) == len(dims) else None


def _key(node: ir.Node) -> Any:
    """Equal keys mean equal results; ``None`` for nodes that must not be merged."""
    if node.op_type in _RANDOM or has_graph(node):
        return None
    attributes = tuple(sorted((key, repr(_plain(attribute))) for key, attribute in node.attributes.items()))
    return (node.domain, node.op_type, node.overload, len(node.outputs), tuple(map(id, node.inputs)), attributes)


def _passes_through(node: ir.Node) -> bool:
    """Whether the result is the operand: an extremum or concatenation of one tensor, a transposition that keeps the order."""
    if node.domain != "":
        return False
    if node.op_type in ("Max", "Min", "Sum", "Mean", "Concat"):
        return len(node.inputs) == 1
    if node.op_type == "Transpose" and "perm" in node.attributes:
        perm = list(node.attributes["perm"].as_ints())
        return perm == list(range(len(perm)))
    return False


def _plain(attribute: ir.Attr) -> Any:
    value = attribute.value
    if attribute.type is ir.AttributeType.TENSOR:
        return value.numpy()
    return list(value) if isinstance(value, tuple) else value


def _constant_array(node: ir.Node) -> Array | None:
    (attribute,) = node.attributes.values()
    if attribute.type is ir.AttributeType.TENSOR:
        return np.asarray(attribute.value.numpy())
    kinds: Mapping[str, Any] = {
        "value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32,
    }  # fmt: skip
    return np.asarray(attribute.value, dtype=kinds[attribute.name]) if attribute.name in kinds else None


def _constant_name(array: Array) -> str:
    """A name by content, so that edits elsewhere never rename it: ``const_i64_1_0_64``, ``const_f32_1e-05``."""
    dtype = DType.of(array.dtype).value
    if array.size == 0:
        return f"const_{dtype}_empty"
    if array.size <= 6 and array.ndim <= 1:
        text = "_".join(str(item).replace("-", "neg_", 1) if item < 0 else str(item) for item in array.reshape(-1))
        return f"const_{dtype}{'s' if array.ndim else ''}_{text}"
    shape = "x".join(map(str, array.shape))
    return f"const_{dtype}_{shape}_{hashlib.sha256(array.tobytes()).hexdigest()[:8]}"
