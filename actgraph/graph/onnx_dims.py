"""What int tensors that describe shapes hold, symbolically.

An ONNX graph computes shapes with ordinary nodes (``Shape -> Gather -> Concat -> Reshape``). ``ShapeValues`` reads such
chains backwards from where they are needed: the value of a small int tensor as a tuple of sizes, each an int, a symbolic
size or ``None``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from actgraph.graph.onnx_native import array_of
from actgraph.ops.shapes import Dim, Shape, TensorType, canonical_dim, dim_add, dim_mul

Sizes = tuple[Dim, ...]

_LARGEST = 64  # elements; longer int tensors are data, not shapes
_DEEPEST = 200
_FAR = 1 << 31  # slices use "a very large number" for "to the end"


class ShapeValues:
    """Symbolic contents of int tensors.

    type_of: the type of a value as known so far. bindings: for a function body, its inputs -> the caller's values.
    """

    def __init__(
        self,
        type_of: Callable[[ir.Value], TensorType],
        bindings: Mapping[ir.Value, Sizes | None] | None = None,
        attributes: Callable[[ir.Node, str], ir.Attr | None] | None = None,
    ) -> None:
        self._type_of = type_of
        self._known: dict[ir.Value, Sizes | None] = dict(bindings or {})
        self._attribute = attributes or (lambda node, name: node.attributes.get(name))
        self._depth = 0

    def forget(self) -> None:
        """Drop what was computed, after types or constants changed."""
        self._known.clear()

    def of(self, value: ir.Value | None) -> Sizes | None:
        """The elements of ``value`` in order (a scalar has one), or ``None`` when it is not a shape computation."""
        if value is None:
            return None
        if value in self._known:
            return self._known[value]
        if self._depth >= _DEEPEST:
            return None
        self._depth += 1
        try:
            result = self._compute(value)
        finally:
            self._depth -= 1
        self._known[value] = result
        return result

    def ints(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """``of`` where every element is a known int."""
        sizes = self.of(value)
        if sizes is None or not all(isinstance(size, int) for size in sizes):
            return None
        return tuple(size for size in sizes if isinstance(size, int))

    def _compute(self, value: ir.Value) -> Sizes | None:
        tensor = value.const_value
        if tensor is not None and (value.is_initializer() or value.producer() is None):
            return _constant(tensor) if not value.is_graph_input() or value.is_initializer() else None
        node = value.producer()
        if node is None or node.domain != "":
            return None
        if node.op_type == "Constant":
            attribute = self._attribute(node, "value")
            return _constant(attribute.as_tensor()) if attribute is not None else None
        rule = _RULES.get(node.op_type)
        return rule(self, node) if rule is not None else None

    # --- rules ----------------------------------------------------------------------------------------------------

    def _axis_ints(self, node: ir.Node, name: str, index: int) -> tuple[int, ...] | None:
        attribute = self._attribute(node, name)
        if attribute is not None:
            return tuple(attribute.as_ints())
        return self.ints(node.inputs[index]) if index < len(node.inputs) else None

    def _shape(self, node: ir.Node) -> Sizes | None:
        source = node.inputs[0]
        shape = self._type_of(source).shape if source is not None else None
        if shape is None:
            return None
        start, end = self._attribute(node, "start"), self._attribute(node, "end")
        return shape[start.as_int() if start else 0 : end.as_int() if end else len(shape)]

    def _size(self, node: ir.Node) -> Sizes | None:
        source = node.inputs[0]
        shape = self._type_of(source).shape if source is not None else None
        return (product(shape),) if shape is not None else None

    def _same(self, node: ir.Node) -> Sizes | None:
        return self.of(node.inputs[0])

    def _concat(self, node: ir.Node) -> Sizes | None:
        result: Sizes = ()
        for operand in node.inputs:
            part = self.of(operand)
            if part is None:
                kind = self._type_of(operand).shape if operand is not None else None
                if kind is None or len(kind) != 1 or not isinstance(kind[0], int):
                    return None
                part = (None,) * kind[0]
            result += part
        return result if len(result) <= _LARGEST else None

    def _gather(self, node: ir.Node) -> Sizes | None:
        data, indices = self.of(node.inputs[0]), self.ints(node.inputs[1])
        if data is None or indices is None or any(not -len(data) <= i < len(data) for i in indices):
            return None
        return tuple(data[i] for i in indices)

    def _slice(self, node: ir.Node) -> Sizes | None:
        data = self.of(node.inputs[0])
        starts, ends = self._axis_ints(node, "starts", 1), self._axis_ints(node, "ends", 2)
        steps = self.ints(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else (1,)
        if data is None or starts is None or ends is None or steps is None or len(starts) != 1:
            return None
        end: int | None = ends[0]
        if steps[0] < 0 and ends[0] < -len(data):
            end = None
        return data[starts[0] : end : steps[0]]

    def _arithmetic(self, node: ir.Node) -> Sizes | None:
        left, right = self.of(node.inputs[0]), self.of(node.inputs[1])
        if left is None or right is None:
            return None
        if len(left) != len(right):
            if 1 not in (len(left), len(right)):
                return None
            left, right = (left * len(right), right) if len(left) == 1 else (left, right * len(left))
        combine = _ARITHMETIC[node.op_type]
        return tuple(combine(a, b) for a, b in zip(left, right, strict=True))

    def _negate(self, node: ir.Node) -> Sizes | None:
        data = self.of(node.inputs[0])
        return tuple(dim_mul(size, -1) for size in data) if data is not None else None

    def _reduce_product(self, node: ir.Node) -> Sizes | None:
        data = self.of(node.inputs[0])
        return (product(data),) if data is not None else None

    def _where(self, node: ir.Node) -> Sizes | None:
        condition, yes, no = (self.of(operand) for operand in node.inputs)
        if condition is None or yes is None or no is None:
            return None
        length = max(len(condition), len(yes), len(no))
        columns = [part * length if len(part) == 1 else part for part in (condition, yes, no)]
        if any(len(part) != length for part in columns):
            return None
        return tuple(y if c == 1 else n if c == 0 else (y if y == n else None) for c, y, n in zip(*columns, strict=True))

    def _constant_of_shape(self, node: ir.Node) -> Sizes | None:
        counts, attribute = self.ints(node.inputs[0]), self._attribute(node, "value")
        count = 1
        for size in counts or ():
            count *= size
        if counts is None or count > _LARGEST:
            return None
        fill = _constant(attribute.as_tensor()) if attribute is not None else None
        return fill * count if fill is not None else None


def _constant(tensor: ir.TensorProtocol) -> Sizes | None:
    if tensor.dtype not in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL) or tensor.size > _LARGEST:
        return None
    return tuple(int(item) for item in array_of(tensor).ravel())


def product(sizes: Sequence[Dim]) -> Dim:
    """The product of sizes; ``None`` when one is unknown."""
    result: Dim = 1
    for size in sizes:
        result = dim_mul(result, size)
    return result


def dim_sub(left: Dim, right: Dim) -> Dim:
    """The difference of two sizes."""
    if left is None or right is None:
        return None
    if isinstance(left, int) and isinstance(right, int):
        return left - right
    return canonical_dim(f"({left})-({right})")


def dim_div(left: Dim, right: Dim) -> Dim:
    """The quotient of two sizes where it is a plain expression; ``None`` where it would need rounding."""
    if left is None or right is None or right == 0:
        return None
    if isinstance(left, int) and isinstance(right, int):
        return int(left / right)
    quotient = canonical_dim(f"({left})/({right})")
    return None if isinstance(quotient, str) and "/" in quotient else quotient


def _equal(left: Dim, right: Dim) -> Dim:
    if left is None or right is None:
        return None
    if left == right:
        return 1
    # a symbolic size is positive, so it differs from -1 and 0 and from nothing else that is known
    if isinstance(left, int) and isinstance(right, int):
        return 0
    number = left if isinstance(left, int) else right
    return 0 if isinstance(number, int) and number <= 0 else None


def _extreme(choose: Callable[[int, int], int]) -> Callable[[Dim, Dim], Dim]:
    def apply(left: Dim, right: Dim) -> Dim:
        if left == right:
            return left
        return choose(left, right) if isinstance(left, int) and isinstance(right, int) else None

    return apply


_ARITHMETIC: dict[str, Callable[[Dim, Dim], Dim]] = {
    "Add": dim_add, "Sub": dim_sub, "Mul": dim_mul, "Div": dim_div, "Equal": _equal,
    "Max": _extreme(max), "Min": _extreme(min),
}  # fmt: skip

_RULES: dict[str, Callable[[ShapeValues, ir.Node], Sizes | None]] = {
    "Shape": ShapeValues._shape, "Size": ShapeValues._size, "Identity": ShapeValues._same, "Cast": ShapeValues._same,
    "Squeeze": ShapeValues._same, "Unsqueeze": ShapeValues._same, "Reshape": ShapeValues._same,
    "Concat": ShapeValues._concat, "Gather": ShapeValues._gather, "Slice": ShapeValues._slice,
    "Neg": ShapeValues._negate, "ReduceProd": ShapeValues._reduce_product, "Where": ShapeValues._where,
    "ConstantOfShape": ShapeValues._constant_of_shape, **dict.fromkeys(_ARITHMETIC, ShapeValues._arithmetic),
}  # fmt: skip


def carries_sizes(node: ir.Node) -> bool:
    """Whether ``node`` may be part of a shape computation."""
    if node.domain != "" or node.op_type not in _RULES:
        return False
    output = node.outputs[0]
    holds_ints = output.dtype in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
    return holds_ints and (output.shape is None or len(output.shape) < 2)


# --- shapes from sizes ------------------------------------------------------------------------------------------------


def reshape_shape(source: Shape | None, target: Sizes, allow_zero: bool) -> Shape:
    """The result of Reshape: 0 copies a size, -1 takes what is left."""
    result: list[Dim] = []
    for axis, size in enumerate(target):
        if size == 0 and not allow_zero:
            result.append(source[axis] if source is not None and axis < len(source) else None)
        else:
            result.append(size)
    if -1 in result:
        place = result.index(-1)
        rest = result[:place] + result[place + 1 :]
        result[place] = _quotient(source, rest) if source is not None else None
    return tuple(result)


def _quotient(numerator: Sequence[Dim], denominator: Sequence[Dim]) -> Dim:
    """The product of ``numerator`` over the product of ``denominator``, common factors cancelled first."""
    if None in numerator or None in denominator:
        return None
    left, right = list(numerator), []
    for size in denominator:
        if size in left:
            left.remove(size)
        else:
            right.append(size)
    return dim_div(product(left), product(right))


def slice_size(size: Dim, start: Dim, end: Dim, step: int) -> Dim:
    """The length of ``[start:end:step]`` of an axis of ``size``; ``None`` where it depends on unknown or clamped sizes."""
    if isinstance(size, int) and isinstance(start, int) and isinstance(end, int):
        return len(range(*slice(start, None if step < 0 and end < -size else end, step).indices(size)))
    if step == -1 and start == -1 and isinstance(end, int) and end <= -_FAR:
        return size
    if step != 1 or size is None:
        return None
    first = dim_add(size, start) if isinstance(start, int) and start < 0 else start
    if isinstance(end, int):
        if 0 <= end < _FAR - 1:
            return 0 if end == 0 else None  # min(end, size) is not a plain expression
        last = dim_add(size, end) if end < 0 else size
    else:
        beyond = dim_sub(size, end)
        table = isinstance(size, int) and isinstance(end, str) and end.isidentifier()
        if not table and (not isinstance(beyond, int) or beyond < 0):
            return None  # clamped, perhaps
        last = end  # a table cut to the length of an input: beyond the table the model could not run at all
    return dim_sub(last, first)
