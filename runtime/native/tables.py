"""What the C library must know of an op: a plain description, and the same as the structure that C reads."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

from actgraph.errors import UnsupportedError
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import REQUIRED, OpDef
from actgraph.ops.shapes import TensorType
from actgraph.runtime.kernels.numba.kernel import NumbaKernel, OpKernels
from actgraph.runtime.native.library import CHOICES, KEY, MOST_TENSORS, Attribute, Op

_KINDS = {"int": 0, "bool": 0, "float": 1, "str": 2, "ints": 3}
#: In place of an input's element type: see ``OpKernels.as_they_are``.
AS_IT_IS = -1


@dataclass(frozen=True)
class AttributeTable:
    """``ag_attribute``: kind 0 is an integer, 1 a float, 2 a string, 3 a set of axes, 4 in no frame. fallback: its word in
    frames of nodes that lack it.
    """

    name: str
    kind: int
    fallback: int
    choices: str
    required: bool


@dataclass(frozen=True)
class OpTable:
    """``ag_op``: see native/kernel.h."""

    name: str
    input_types: tuple[int, ...]
    accepts: tuple[int, ...]
    input_names: str
    optional: tuple[int, ...]
    output_types: tuple[int, ...]
    follows: bool
    result_attribute: int
    result_types: tuple[int, ...]
    written_types: tuple[int, ...]
    key_inputs: tuple[int, ...]
    key_attributes: tuple[int, ...]
    attributes: tuple[AttributeTable, ...]
    errors: tuple[str, ...]


def table_of(kernels: OpKernels) -> OpTable:
    """What C must know of an op with kernels. Raises UnsupportedError for an op with more operands than frames hold."""
    definition = kernels.definition
    names = [attribute.name for attribute in definition.attributes]
    if len(definition.inputs) + len(definition.outputs) > MOST_TENSORS or len(names) > MOST_TENSORS:
        raise UnsupportedError(f"{definition.qualified_name} has more operands or attributes than a kernel can have")
    if len(kernels.key_operands) + len(kernels.key_attributes) > KEY:
        raise UnsupportedError(f"the kernels of {definition.qualified_name} are told apart by too many things")
    if len(kernels.written) > CHOICES:
        raise UnsupportedError(f"{definition.qualified_name} has results of more types than a kernel can have")
    return OpTable(
        name=definition.onnx_name,
        input_types=tuple(
            AS_IT_IS if place in kernels.as_they_are else 0 if kind is None else kind.onnx
            for place, kind in enumerate(kernels.operands)
        ),
        accepts=tuple(sum(1 << kind.onnx for kind in kernels.accepted(place)) for place in range(len(definition.inputs))),
        input_names="|".join(operand.name for operand in definition.inputs),
        optional=tuple(int(operand.optional) for operand in definition.inputs),
        output_types=(kernels.result.onnx,) * len(definition.outputs),
        follows=kernels.operands[0] is DType.F32 and _result(definition, DType.F16) is DType.F16,
        result_attribute=names.index(kernels.result_attribute) if kernels.result_attribute else -1,
        result_types=tuple(DType(choice).onnx for choice in kernels.written),
        written_types=tuple(kind.onnx for kind in kernels.written.values()),
        key_inputs=kernels.key_operands,
        key_attributes=tuple(names.index(name) for name in kernels.key_attributes),
        attributes=tuple(_attribute(kernels, attribute) for attribute in definition.attributes),
        errors=kernels.errors,
    )


def _result(definition: OpDef, kind: DType) -> DType | None:
    """The element type of the first output of a call whose operands are ``kind`` where they can be."""
    types = [
        None if operand.optional else TensorType(kind if kind in operand.dtypes else min(operand.dtypes), None)
        for operand in definition.inputs
    ]
    attributes = {a.name: a.choices[0] if a.choices else 1 for a in definition.attributes if a.default is REQUIRED}
    return definition.infer(types, definition.complete(attributes))[0].dtype


def _attribute(kernels: OpKernels, attribute: Any) -> AttributeTable:
    required, word = attribute.default is REQUIRED, 0
    if attribute.kind not in _KINDS:  # a list of floats stands in no frame: see OpKernels.word
        return AttributeTable(attribute.name, 4, 0, "", False)
    if not required:
        value = attribute.default
        word = int(np.float64(value).view(np.int64)) if attribute.kind == "float" else kernels.word(attribute.name, value)
    return AttributeTable(attribute.name, _KINDS[attribute.kind], word, "|".join(attribute.choices), required)


def as_structure(table: OpTable) -> tuple[Op, list[Any]]:
    """The structure, and what must live as long as it does."""
    op = Op()
    op.name = table.name.encode()
    op.inputs, op.outputs, op.attributes = len(table.input_types), len(table.output_types), len(table.attributes)
    op.input_type[: op.inputs], op.optional[: op.inputs] = table.input_types, table.optional
    op.accepts[: op.inputs], op.input_names = table.accepts, table.input_names.encode()
    op.output_type[: op.outputs] = table.output_types
    op.follows = int(table.follows)
    op.result_attribute, choices = table.result_attribute, len(table.result_types)
    op.result_type[:choices], op.written_type[:choices] = table.result_types, table.written_types
    op.key_inputs, op.key_attributes = len(table.key_inputs), len(table.key_attributes)
    op.key_input[: op.key_inputs], op.key_attribute[: op.key_attributes] = table.key_inputs, table.key_attributes
    attributes = (Attribute * max(op.attributes, 1))()
    for place, attribute in enumerate(table.attributes):
        attributes[place].name, attributes[place].kind = attribute.name.encode(), attribute.kind
        attributes[place].fallback, attributes[place].choices = attribute.fallback, attribute.choices.encode()
        attributes[place].required = int(attribute.required)
    errors = (ctypes.c_char_p * max(len(table.errors), 1))(*(text.encode() for text in table.errors))
    op.attribute, op.error, op.errors = attributes, errors, len(table.errors)
    return op, [attributes, errors]


def key_of(kernels: OpKernels, kernel: NumbaKernel) -> list[int]:
    """``ag_variant.key``: the element types and the attribute values that a kernel is for."""
    keys = [0 if kind is None else kind.onnx for kind in kernel.types]
    return keys + [kernels.word(name, value) for name, value in zip(kernels.key_attributes, kernel.attributes, strict=True)]
