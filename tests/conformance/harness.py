"""One call of one op as an ONNX model, run by every engine, and the comparison that conformance means.

Types that numpy lacks (bfloat16, float8, 4-bit) enter and leave the models as float32 or int32 through Cast, which is
exact for the values that the samples hold.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from onnx.reference import ReferenceEvaluator

from actgraph.ops.body import MIN_IR_VERSION, body_function, expand, function_opsets, onnx_attributes
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import OpDef, Sample
from actgraph.ops.shapes import TensorType

Array = np.ndarray[Any, Any]
NATIVE = {DType.F64, DType.F32, DType.F16, DType.I64, DType.I32, DType.I16, DType.I8, DType.U8, DType.U16, DType.BOOL}


@dataclasses.dataclass(frozen=True)
class Case:
    """One point of the grid."""

    op: OpDef
    index: int
    dtype: DType

    @property
    def sample(self) -> Sample:
        return self.op.samples[self.index]

    @property
    def attributes(self) -> dict[str, Any]:
        return self.op.complete(self.sample.attributes)

    def __str__(self) -> str:
        note = f"-{self.sample.note}" if self.sample.note else ""
        return f"{self.op.name}-{self.index}-{self.dtype}{note}".replace(" ", "_")

    def operands(self) -> list[Array | None]:
        """The numpy operands, the same on every run."""
        rng = np.random.default_rng(zlib.crc32(f"{self.op.name}/{self.index}/{self.dtype}".encode()))
        if self.sample.draw is not None:
            drawn = self.sample.draw(rng, self.sample.shapes, self.dtype)
        else:
            drawn = tuple(None if s is None else rng.standard_normal(s).astype(self.dtype.numpy) for s in self.sample.shapes)
        return [None if a is None else np.asarray(a) for a in drawn]


def types_of(operands: Sequence[Array | None]) -> list[TensorType | None]:
    return [None if a is None else TensorType(DType.of(a.dtype), a.shape) for a in operands]


def to_torch(array: Array | None, *, strided: bool = False) -> torch.Tensor | None:
    """A torch tensor with the array's values; ``strided`` gives one that is not contiguous."""
    if array is None:
        return None
    dtype = DType.of(array.dtype)
    plain = torch.from_numpy(np.array(carried(array)))
    tensor = plain.to(dtype.torch)
    if strided and tensor.dim():
        wide = torch.empty((*tensor.shape[:-1], tensor.shape[-1] * 2), dtype=tensor.dtype)
        wide[..., ::2] = tensor
        tensor = wide[..., ::2]
    return tensor


def from_torch(tensor: torch.Tensor) -> Array:
    """The values in a type that numpy has."""
    dtype = DType.of(tensor.dtype)
    return tensor.detach().to(carrier(dtype).torch).numpy()


def carrier(dtype: DType) -> DType:
    """The type in which values of ``dtype`` enter and leave the models."""
    if dtype in NATIVE:
        return dtype
    return DType.F32 if dtype.is_float else DType.I32


def carried(array: Array) -> Array:
    return array.astype(carrier(DType.of(array.dtype)).numpy)


# --- models -----------------------------------------------------------------------------------------------------------


def build(
    op: OpDef,
    attributes: dict[str, Any],
    types: Sequence[TensorType | None],
    opset: int,
    *,
    inlined: bool = False,
    shaped: bool = False,
    declared: bool = True,
) -> onnx.ModelProto:
    """A model that calls ``op`` once.

    inlined: the body instead of a call of the function. shaped: static shapes on inputs (else ranks only). declared: the
    result's type is written down (else shape inference has to find it).
    """
    results = op.infer(types, op.complete(attributes))
    opsets = {"": opset} if inlined else function_opsets(opset)
    inputs, nodes, operands = [], [], []
    for position, kind in enumerate(types):
        if kind is None:
            operands.append(None)
            continue
        outer = _value(f"in_{position}", carrier(kind.dtype), kind.shape if shaped else [None] * kind.rank)
        inputs.append(outer)
        if carrier(kind.dtype) is not kind.dtype:
            cast = ir.Node("", "Cast", [outer], [ir.AttrInt64("to", kind.dtype.onnx)])
            cast.outputs[0].name = f"cast_{position}"
            cast.outputs[0].type = ir.TensorType(ir.DataType(kind.dtype.onnx))
            nodes.append(cast)
            outer = cast.outputs[0]
        operands.append(outer)
    functions = []
    if inlined:
        body, outputs = expand(op, attributes, operands, types, opset, prefix="body_")
        nodes.extend(body)
    else:
        function = body_function(op, attributes, types, opset)
        functions.append(function)
        node = ir.Node(
            "actgraph", op.onnx_name, operands, onnx_attributes(op, attributes), overload=function.overload,
            num_outputs=len(op.outputs),
        )  # fmt: skip
        nodes.append(node)
        outputs = list(node.outputs)
    finals = []
    for position, (value, kind) in enumerate(zip(outputs, results, strict=True)):
        value.name = value.name or f"result_{position}"
        value.type = ir.TensorType(ir.DataType(kind.dtype.onnx)) if declared or inlined else None
        if carrier(kind.dtype) is not kind.dtype and declared:
            cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", carrier(kind.dtype).onnx)])
            nodes.append(cast)
            value = cast.outputs[0]
        value.name = f"out_{position}"
        if declared:
            value.type = ir.TensorType(ir.DataType(carrier(kind.dtype).onnx))
            value.shape = ir.Shape(kind.shape if shaped else [None] * kind.rank)
        finals.append(value)
    graph = ir.Graph(inputs, finals, nodes=nodes, opset_imports=opsets, name="case")
    model = ir.Model(graph, ir_version=MIN_IR_VERSION if opset < 23 else 11, functions=functions)
    return ir.to_proto(model)


def _value(name: str, dtype: DType, shape: Sequence[int | None]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType(dtype.onnx)), shape=ir.Shape(list(shape)))


def feeds(operands: Sequence[Array | None]) -> dict[str, Array]:
    return {f"in_{i}": carried(a) for i, a in enumerate(operands) if a is not None}


# --- engines ----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _session(key: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(key, options, providers=["CPUExecutionProvider"])


def run_onnxruntime(model: onnx.ModelProto, operands: Sequence[Array | None]) -> list[Array]:
    """Run in onnxruntime; equal models (other sizes of one case) share a session."""
    return _session(model.SerializeToString()).run(None, feeds(operands))


def run_evaluator(model: onnx.ModelProto, operands: Sequence[Array | None]) -> list[Array]:
    """Run in ONNX's reference evaluator."""
    with np.errstate(all="ignore"):
        return ReferenceEvaluator(model).run(None, feeds(operands))


def run_torch(function: Any, case: Case, operands: Sequence[Array | None], *, strided: bool = False) -> list[Array]:
    """Run a torch function (reference, registered op or kernel)."""
    tensors = [to_torch(a, strided=strided) for a in operands]
    result = function(*tensors, **case.attributes)
    return [from_torch(r) for r in (result if isinstance(result, tuple) else (result,))]


# --- comparison -------------------------------------------------------------------------------------------------------


def same_bits(actual: Array, expected: Array) -> bool:
    """Equal bit for bit, any NaN being equal to any NaN."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    if actual.dtype.kind != "f":
        return bool(np.array_equal(actual, expected))
    nan = np.isnan(expected)
    bits = f"u{actual.dtype.itemsize}"
    equal = np.ascontiguousarray(actual).view(bits) == np.ascontiguousarray(expected).view(bits)
    return bool(np.array_equal(np.isnan(actual), nan) and np.all(equal | nan))


def assert_conforms(case: Case, actual: Sequence[Array], expected: Sequence[Array], who: str) -> None:
    """Compare two results of a case.

    Exact ops: the same bits or values. Others: NaN and infinities in the same places, and at most one rounding of
    the result's type plus 16 roundings of the type computed in, relative to the largest finite result (sums cancel).
    """
    assert len(actual) == len(expected)
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape and a.dtype == e.dtype, f"{who}: {a.dtype}{a.shape}, expected {e.dtype}{e.shape}"
        if case.op.exact == "bits" or e.dtype.kind != "f":
            assert same_bits(a, e), f"{who}: {_difference(a, e)}"
            continue
        if case.op.exact == "values":
            assert np.array_equal(a, e, equal_nan=True), f"{who}: {_difference(a, e)}"
            continue
        wide_a, wide_e = a.astype(np.float64), e.astype(np.float64)
        finite = np.isfinite(wide_e)
        assert np.array_equal(wide_a[~finite], wide_e[~finite], equal_nan=True), f"{who}: NaN or infinity differ"
        if not finite.any():
            continue
        result_type = case.op.infer(types_of(case.operands()), case.attributes)[index].dtype
        allowed = epsilon(result_type) * np.abs(wide_e[finite]) * (result_type in (DType.F16, DType.BF16))
        computed = epsilon(DType.F64 if result_type is DType.F64 else DType.F32)
        allowed = allowed + 16 * computed * np.abs(wide_e[finite]).max()
        gap = np.abs(wide_a[finite] - wide_e[finite])
        assert (gap <= allowed).all(), f"{who}: {_difference(a, e)}"


def epsilon(dtype: DType) -> float:
    """The gap between 1 and the next number of a float type."""
    return {DType.F64: 2.0**-52, DType.F32: 2.0**-23, DType.F16: 2.0**-10, DType.BF16: 2.0**-7}[dtype]


def _difference(a: Array, e: Array) -> str:
    with np.errstate(all="ignore"):
        gap = np.abs(a.astype(np.float64) - e.astype(np.float64))
    place = np.unravel_index(np.nanargmax(gap), gap.shape) if gap.size and not np.isnan(gap).all() else ()
    return f"largest difference {gap[place] if gap.size else 0} at {tuple(map(int, place))}: {a[place]} against {e[place]}"
