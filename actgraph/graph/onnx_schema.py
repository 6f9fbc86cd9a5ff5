"""Which element types the operators of ONNX take, by their schemas.

An operator of one opset may refuse a type that its neighbours take: ``Cos`` has no bfloat16 before opset 22. Such a node
computes in float32 between casts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import onnx

from actgraph.ops.dtypes import DType

Refused = tuple[tuple[int, ...], tuple[int, ...]]
NOTHING: Refused = ((), ())


@functools.lru_cache(maxsize=4096)
def refused(op_type: str, domain: str, opset: int, dtypes: tuple[DType | None, ...], outputs: int) -> Refused:
    """The operands of a node whose float types its schema excludes, and the outputs that are of the same type then.

    dtypes: of the operands, ``None`` for absent or unknown ones. outputs: how many the node has.
    Empty where the schema takes the types, does not take float32 instead either, or is not known (other domains).
    """
    try:
        schema = onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return NOTHING
    found, parameters = [], set()
    for index, dtype in enumerate(dtypes):
        formal = _formal(schema.inputs, index)
        if formal is None or not takes_float_instead(dtype, formal.types):
            continue
        found.append(index)
        parameters.add(formal.type_str)
    if not found:
        return NOTHING
    same = [
        index
        for index, dtype in enumerate(dtypes)
        if dtype is not None and dtype.is_float and _named(schema, index, parameters)
    ]
    results = [i for i in range(outputs) if (f := _formal(schema.outputs, i)) is not None and f.type_str in parameters]
    return tuple(same), tuple(results)


def refuses_result(op_type: str, domain: str, opset: int, dtype: DType | None) -> bool:
    """Whether the first output of an operator cannot be ``dtype`` but can be float32 (``ConstantOfShape`` of bfloat16)."""
    try:
        schema = onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return False
    return bool(schema.outputs) and takes_float_instead(dtype, schema.outputs[0].types)


def takes_float_instead(dtype: DType | None, allowed: Sequence[str] | set[str]) -> bool:
    """Whether a float type is not among ``allowed``, and float32 is."""
    return dtype is not None and dtype in _NAMES and _NAMES[dtype] not in allowed and _NAMES[DType.F32] in allowed


def _named(schema: onnx.defs.OpSchema, index: int, parameters: set[str]) -> bool:
    formal = _formal(schema.inputs, index)
    return formal is not None and formal.type_str in parameters


def _formal(formals: Sequence[onnx.defs.OpSchema.FormalParameter], index: int) -> onnx.defs.OpSchema.FormalParameter | None:
    """The declaration of operand ``index``: the last one repeats where it is variadic."""
    if index < len(formals):
        return formals[index]
    variadic = onnx.defs.OpSchema.FormalParameterOption.Variadic
    return formals[-1] if formals and formals[-1].option == variadic else None


_NAMES: Mapping[DType, str] = {
    DType.F16: "tensor(float16)", DType.BF16: "tensor(bfloat16)", DType.F32: "tensor(float)", DType.F64: "tensor(double)",
}  # fmt: skip
