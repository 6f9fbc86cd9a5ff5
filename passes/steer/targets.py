"""Weights that can carry an edit: linears, convolutions, norms and tables of embeddings, and how each is rewritten.

Everything here is planned before anything is changed: a ``Write`` holds the new data, and making it gives what has to be
recorded to undo it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from actgraph.graph import Editor, Node, Use, Value
from actgraph.graph.evaluate import evaluate
from actgraph.graph.folds import WeightChange, add_lowrank
from actgraph.graph.graph import Array
from actgraph.graph.text import array_hash, data_hash
from actgraph.graph.views import Convolution, Linear, Norm
from actgraph.ops.dtypes import DType
from actgraph.passes.steer.edits import Edit

HALF = (DType.F16, DType.BF16)
_INTEGERS = "its integers cannot carry the edit: fold before quantizing"


class Illegal(Exception):
    """Why an edit cannot go where it was tried."""


@dataclass
class Write:
    """New ``data`` for what ``uses`` read of ``stored``; ``linear``: written through that view (a bias, a shared matrix).

    kind, axis, arrays: see ``WeightChange``.
    """

    data: Array
    kind: str = "values"
    stored: Value | None = None
    uses: Sequence[Use] = ()
    linear: Linear | None = None
    creates_at: Use | None = None
    axis: int = -1
    arrays: dict[str, Array] = field(default_factory=dict)

    def make(self, editor: Editor) -> WeightChange:
        """Change the graph, and say how to undo it."""
        if self.creates_at is not None or (self.linear is not None and self.linear.bias is None and self.kind == "created"):
            return self._create(editor)
        if self.linear is not None and self.kind == "untied":
            matrix, stored = self.linear.matrix, self.stored
            assert matrix is not None and matrix.node is not None and stored is not None
            before = matrix.node.operands[matrix.index]
            assert before is not None
            self.linear.write_weight(editor, self.data)
            now = matrix.node.operands[matrix.index]
            assert now is not None
            digest = array_hash(evaluate(before.graph, before))
            return WeightChange(now.name, "untied", data_hash(now), before.name, digest)
        stored = self.stored
        assert stored is not None and self.uses and self.uses[0].node is not None
        before_data = evaluate(stored.graph, stored).copy()
        name, (reader, index) = stored.name, self.uses[0]
        if stored.is_parameter:
            now = editor.set_parameter(stored, self.data, uses=self.uses)
        else:
            now = editor.add_parameter(f"{name}_folded", self.data)
            for use in self.uses:
                assert use.node is not None
                editor.set_operand(use.node, use.index, now)
        assert reader is not None and reader.operands[index] == now
        if now != stored:
            return WeightChange(now.name, "untied", data_hash(now), name, array_hash(before_data))
        if self.kind == "values":
            return WeightChange(name, "values", data_hash(now), arrays={"values": before_data})
        change = WeightChange(name, self.kind, data_hash(now), axis=self.axis, arrays=self.arrays)
        return change.repaired(before_data, self.data)

    def _create(self, editor: Editor) -> WeightChange:
        if self.creates_at is not None:
            node, index = self.creates_at
            assert node is not None
            stored = editor.add_parameter(f"{_stem(node, self.stored)}bias", self.data)
            editor.set_operand(node, index, stored)
            return WeightChange(stored.name, "created", data_hash(stored))
        assert self.linear is not None
        output = self.linear.output
        before = set(output.uses)
        self.linear.write_bias(editor, self.data)
        product = self.linear.matrix_node
        prim = product.prim if product is not None else None
        if product is not None and prim is not None and prim.op == "linear":
            made = product.operands[2]
        else:
            added = next(use.node for use in output.uses if use not in before and use.node is not None)
            made = next(o for o in added.operands if o is not None and o != output)
        assert made is not None
        return WeightChange(made.name, "created", data_hash(made))


def _stem(node: Node, weight: Value | None) -> str:
    name = weight.name if weight is not None else node.name
    return name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"


def own_uses(stored: Value, nodes: Sequence[Node]) -> list[Use]:
    """The uses of a stored value through which nobody but ``nodes`` reads it; empty when others share the way."""
    mine = set(nodes)
    found = []
    for use in stored.uses:
        ends, outside = _ends(stored, use, mine)
        if ends and outside:
            return []
        if ends:
            found.append(use)
    return found


def _ends(value: Value, use: Use, mine: set[Node]) -> tuple[bool, bool]:
    """Whether some, and whether others, of the ways from a use lead into ``mine`` or elsewhere.

    A way is what prepares the stored value (a cast, a transpose, ``1 + weight``); where it meets data, somebody reads it.
    """
    node = use.node
    if node is None or node in mine:
        return node is not None, node is None
    if any(o is not None and o != value and not o.is_parameter for o in node.operands):
        return False, True
    results = [_ends(output, further, mine) for output in node.outputs for further in output.uses]
    return any(inside for inside, _ in results), any(outside for _, outside in results) or not results


# --- checks -----------------------------------------------------------------------------------------------------------------


def rounding(value: Value) -> str:
    """What a half-precision weight does to the exactness."""
    if value.dtype not in HALF:
        return ""
    digits = 11 if value.dtype is DType.F16 else 8
    dtype = value.dtype.value if value.dtype is not None else ""
    return f"; {value.name} is {dtype}: each number is rounded once more, to 2^-{digits} of itself"


def check_finite(data: Array, before: Array | None, what: str) -> None:
    """Raise Illegal where a finite number became infinite."""
    wide = data.astype(np.float32) if data.dtype.itemsize < 4 else data
    old = True if before is None else np.isfinite(before.astype(np.float32) if before.dtype.itemsize < 4 else before)
    if np.any(~np.isfinite(wide) & old):
        raise Illegal(f"{what} would overflow its type {data.dtype.name}")


def check_stored(linear: Linear) -> None:
    """Raise Illegal unless the weight is stored in floating point."""
    dtype = linear.weight.dtype
    if linear.matrix is None or not linear.weight.is_parameter or dtype is None or dtype.is_integer:
        raise Illegal(f"the weight {linear.weight.name} is quantized, and {_INTEGERS}")


# --- linears ----------------------------------------------------------------------------------------------------------------


def linear_bias(linear: Linear, added: Array, *, create: bool = True) -> Write:
    """``added`` (``[out_features]``, float64) in the bias of a linear."""
    dtype = linear.output.dtype
    assert dtype is not None
    if linear.bias is None:
        if not create:
            raise Illegal(f"{linear.weight.name} has no bias, and one of its own would cost what the edit costs")
        data = added.astype(dtype.numpy)
        check_finite(data, None, "a bias")
        return Write(data, "created", linear=linear)
    old = linear.bias
    known = linear.read_bias()
    assert known is not None
    data = (known.astype(np.float64) + added).astype(dtype.numpy)
    check_finite(data, known, old.name)
    shape = (1,) * (len(old.shape or (0,)) - 1) + (-1,)
    uses = [use for use in old.uses if use.node in linear.nodes and use != linear.matrix]
    return Write(data.reshape(shape), stored=old, uses=uses)


def linear_map(edit: Edit, linear: Linear, *, reader: bool) -> list[Write]:
    """The map in the weight (and, of the linear that writes the activation, the bias)."""
    check_stored(linear)
    stored = linear.weight
    axis = 1 if reader else 0
    uses = own_uses(stored, [linear.matrix_node] if linear.matrix_node is not None else [])
    if uses:  # where others read it, too, these uses get a copy
        place = linear.out_axis if not reader else 1 - linear.out_axis
        writes = [_mapped(edit, stored, uses, place, reader=reader)]
    else:  # others share the way to it (a transpose): the product gets a matrix of its own
        data = edit.on_rows(linear.read_weight(), axis, reader=reader)
        check_finite(data, None, stored.name)
        writes = [Write(data, "untied", stored=stored, linear=linear)]
    bias = linear.read_bias() if not reader else None
    if bias is not None:
        writes.append(linear_bias(linear, edit.on_rows(bias.astype(np.float64), 0) - bias.astype(np.float64)))
    return writes


def _mapped(edit: Edit, stored: Value, uses: Sequence[Use], axis: int, *, reader: bool = False) -> Write:
    before = stored.graph.read(stored)
    data = edit.on_rows(before, axis, reader=reader)
    check_finite(data, before, stored.name)
    if edit.factor is not None:
        return Write(data, "scale", stored=stored, uses=uses, axis=axis, arrays={"factor": edit.factor})
    coordinates, directions = edit.lowrank_on(before, axis, reader=reader)
    return Write(
        data, "lowrank", stored=stored, uses=uses, axis=axis, arrays={"coordinates": coordinates, "directions": directions}
    )


# --- norms ------------------------------------------------------------------------------------------------------------------


def _vector(norm: Norm, value: Value | None, what: str, width: int) -> tuple[Array, Sequence[Use]]:
    if value is None:
        raise Illegal(f"the norm that writes it has no {what}")
    if not value.is_parameter or value.dtype is None or value.dtype.is_integer:
        raise Illegal(f"the {what} {value.name} of its norm is computed")
    data = value.graph.read(value)
    uses = own_uses(value, norm.nodes)
    if data.size != width or not uses:
        raise Illegal(f"the {what} {value.name} of its norm is not one number per channel of its own")
    return data, uses


def channels_last(norm: Norm) -> bool:
    """Whether the channels of a norm are its last axis (of batch and group norms they are the second)."""
    return norm.kind in ("layer_norm", "rms_norm") and norm.over_last_axis


def norm_bias(norm: Norm, edit: Edit) -> Write:
    """The shift in the norm's bias."""
    data, uses = _vector(norm, norm.bias, "bias", edit.width)
    assert edit.shift is not None
    total = (data.astype(np.float64) + edit.shift.reshape(data.shape)).astype(data.dtype)
    check_finite(total, data, "its bias")
    return Write(total, stored=norm.bias, uses=uses)


def norm_scale(norm: Norm, edit: Edit) -> list[Write]:
    """The factors in the norm's weight and bias; of ``1 + weight`` in the sum."""
    assert edit.factor is not None
    data, uses = _vector(norm, norm.weight, "weight", edit.width)
    factor = edit.factor.reshape(data.shape)
    wide = data.astype(np.float64)
    total = ((wide + norm.weight_offset) * factor - norm.weight_offset).astype(data.dtype)
    check_finite(total, data, "its weight")
    writes = [Write(total, stored=norm.weight, uses=uses)]
    if norm.bias is not None:
        old, bias_uses = _vector(norm, norm.bias, "bias", edit.width)
        scaled = (old.astype(np.float64) * edit.factor.reshape(old.shape)).astype(old.dtype)
        writes.append(Write(scaled, stored=norm.bias, uses=bias_uses))
    return writes


# --- convolutions and tables --------------------------------------------------------------------------------------------------


def conv_bias(conv: Convolution, added: Array) -> Write:
    """``added`` (``[out_channels]``, float64) in the bias of a convolution."""
    dtype = conv.output.dtype
    assert dtype is not None
    if conv.bias is None:
        data = added.astype(dtype.numpy)
        check_finite(data, None, "a bias")
        return Write(data, "created", stored=conv.weight, creates_at=Use(conv.nodes[0], 2))
    if not conv.bias.is_parameter:
        raise Illegal(f"the bias {conv.bias.name} is computed")
    old = conv.bias.graph.read(conv.bias)
    total = (old.astype(np.float64) + added.reshape(old.shape)).astype(old.dtype)
    check_finite(total, old, conv.bias.name)
    return Write(total, stored=conv.bias, uses=own_uses(conv.bias, conv.nodes))


def conv_map(edit: Edit, conv: Convolution) -> list[Write]:
    """The map in the weight and bias of the convolution that writes the activation."""
    if conv.groups > 1 and (edit.factor is None or conv.transposed):
        raise Illegal(f"the convolution has {conv.groups} groups, and the map mixes channels of several")
    stored = conv.weight
    if not stored.is_parameter or stored.dtype is None or stored.dtype.is_integer:
        raise Illegal(f"the weight {stored.name} is quantized, and {_INTEGERS}")
    writes = [_mapped(edit, stored, own_uses(stored, conv.nodes), 1 if conv.transposed else 0)]
    if conv.bias is not None:
        if not conv.bias.is_parameter:
            raise Illegal(f"the bias {conv.bias.name} is computed")
        old = conv.bias.graph.read(conv.bias).reshape(-1).astype(np.float64)
        writes.append(conv_bias(conv, edit.on_rows(old, 0) - old))
    return writes


def table_edit(edit: Edit, table: Value, use: Use) -> list[Write]:
    """The edit in every row of a table of embeddings."""
    if table.dtype is None or table.dtype.is_integer:
        raise Illegal(f"the table {table.name} is quantized, and {_INTEGERS}")
    if len(table.uses) > 1:
        raise Illegal(f"the table {table.name} is read by others, too, and a copy of it would cost more than the edit")
    if edit.shift is None:
        return [_mapped(edit, table, [use], 1)]
    data = table.graph.read(table)
    ones = {"coordinates": np.ones((data.shape[0], 1)), "directions": edit.shift[None]}
    total = add_lowrank(data, 1, ones["coordinates"], ones["directions"])
    check_finite(total, data, table.name)
    return [Write(total, "lowrank", stored=table, uses=[use], axis=1, arrays=ones)]
