"""Generated from the registry: every op, sample and dtype through every engine.

reference = registered torch op (contiguous and strided) = eager form = every kernel
          = ONNX reference evaluator = onnxruntime with the function kept = onnxruntime with the body inlined,
and the op's own ``infer`` = torch's fake tensors = ONNX shape inference of the body.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel
from torch._subclasses.fake_tensor import FakeTensorMode

from actgraph.errors import UnsupportedError
from actgraph.ops import DType, all_ops
from actgraph.ops.body import MAX_OPSET
from actgraph.ops.registry import OpDef, kernels
from actgraph.ops.torch_library import operand_types, torch_op
from tests.conformance.harness import (
    Case,
    assert_conforms,
    build,
    carrier,
    from_torch,
    run_evaluator,
    run_onnxruntime,
    run_torch,
    to_torch,
    types_of,
)

OPSETS = (13, 17, 18, 21, 23)

#: What the CPU provider of onnxruntime has no kernel for, by op and type of the first operand. Listed, so that nothing is
#: skipped silently: a case that fails for this reason and is not here fails, and so does an entry that runs.
NOT_IN_ONNXRUNTIME: set[tuple[str, DType]] = set()


def sample_dtypes(op: OpDef, index: int) -> list[DType]:
    sample = op.samples[index]
    kinds = sample.dtypes or tuple(op.inputs[0].dtypes)
    return sorted(kinds, key=list(DType).index)


CASES = [Case(op, i, dtype) for op in all_ops() for i in range(len(op.samples)) for dtype in sample_dtypes(op, i)]
BY_SAMPLE = [Case(op, i, sample_dtypes(op, i)[0]) for op in all_ops() for i in range(len(op.samples))]
TYPED = [c for c in CASES if c.dtype in (DType.F32, DType.BF16) or c.dtype.is_integer]


def expected(case: Case) -> list[np.ndarray]:
    return run_torch(case.op.reference, case, case.operands())


def opset_of(case: Case) -> int:
    """The opset of the numeric comparisons: the evaluator knows QuantizeLinear from 19 on."""
    return max(21, case.op.min_opset)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch(case: Case) -> None:
    """The registered op, on contiguous and strided operands, the eager form and every torch kernel give the reference."""
    operands, want = case.operands(), expected(case)
    registered = torch_op(case.op.name)
    assert_conforms(case, run_torch(registered, case, operands), want, "registered op")
    assert_conforms(case, run_torch(registered, case, operands, strided=True), want, "strided operands")
    assert_conforms(case, run_torch(case.op.reference, case, operands, strided=True), want, "strided reference")
    for kernel in kernels(case.op.name, engine="torch", device="cpu"):
        if kernel.claims(types_of(operands), case.attributes):
            assert_conforms(case, run_torch(kernel.implementation, case, operands), want, f"kernel {kernel.name}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_evaluator(case: Case) -> None:
    """ONNX's own evaluator runs the function body to the same numbers."""
    operands = case.operands()
    model = build(case.op, case.attributes, types_of(operands), opset_of(case))
    assert_conforms(case, run_evaluator(model, operands), expected(case), "reference evaluator")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_onnxruntime(case: Case) -> None:
    """onnxruntime gives the same numbers with the function kept, and with the body inlined at the lowest opset too."""
    operands = case.operands()
    types = types_of(operands)
    want = expected(case)
    forms = {
        "function kept": build(case.op, case.attributes, types, opset_of(case)),
        "body inlined": build(case.op, case.attributes, types, opset_of(case), inlined=True),
        "body inlined at the lowest opset": build(case.op, case.attributes, types, lowest(case), inlined=True),
    }
    listed = (case.op.name, case.dtype) in NOT_IN_ONNXRUNTIME
    for who, model in forms.items():
        try:
            actual = run_onnxruntime(model, operands)
        except NoKernel as error:
            assert listed, f"{who}: {error}"
            assert case.dtype in (DType.F16, DType.BF16)
            continue
        assert not listed, f"{case.op.name} of {case.dtype} runs: take it off the list"
        assert_conforms(case, actual, want, who)


def lowest(case: Case) -> int:
    """The lowest opset at which the case has a body."""
    kinds = [t.dtype for t in [*types_of(case.operands()), *case.op.infer(types_of(case.operands()), case.attributes)] if t]
    return next(o for o in OPSETS if has_body(case, o) and not (o < 21 and {DType.I4, DType.U4} & set(kinds)))


def has_body(case: Case, opset: int) -> bool:
    try:
        build(case.op, case.attributes, types_of(case.operands()), opset)
    except UnsupportedError:
        return False
    return True


@pytest.mark.parametrize("case", BY_SAMPLE, ids=str)
def test_bodies_are_valid(case: Case) -> None:
    """At every opset the body passes the full checker; its opset is refused where the op says so and only there."""
    types = types_of(case.operands())
    valid = 0
    for opset in OPSETS:
        if not has_body(case, opset):
            assert opset < 21, f"opset {opset} should have a body"
            continue
        valid += 1
        for inlined in (False, True):
            model = build(case.op, case.attributes, types, opset, inlined=inlined, shaped=True)
            onnx.checker.check_model(model, full_check=True)
    assert valid and MAX_OPSET in OPSETS


@pytest.mark.parametrize("case", TYPED, ids=str)
def test_infer(case: Case) -> None:
    """``infer``, torch's fake tensors, the real result and ONNX shape inference agree."""
    operands = case.operands()
    types = types_of(operands)
    inferred = case.op.infer(types, case.attributes)
    with FakeTensorMode() as mode:
        fakes = [None if a is None else mode.from_tensor(to_torch(a)) for a in operands]
        fake = torch_op(case.op.name)(*fakes, **case.attributes)
    assert operand_types(fake if isinstance(fake, tuple) else [fake]) == inferred
    for result, kind in zip(expected(case), inferred, strict=True):
        assert result.shape == kind.shape and DType.of(result.dtype) == carrier(kind.dtype)
    for inlined in (False, True):
        model = build(case.op, case.attributes, types, opset_of(case), inlined=inlined, shaped=True, declared=False)
        del model.graph.value_info[:]
        for output in model.graph.output:
            output.ClearField("type")
        found = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
        for output, kind in zip(found.graph.output, inferred, strict=True):
            assert output.type.tensor_type.elem_type == kind.dtype.onnx
            dims = output.type.tensor_type.shape.dim
            assert len(dims) == len(kind.shape), f"rank {len(dims)}, expected {kind}"
            for dim, size in zip(dims, kind.shape, strict=True):
                assert not dim.HasField("dim_value") or dim.dim_value == size


DIFFERENTIABLE = [
    c
    for c in CASES
    if c.dtype is DType.F64
    and c.op.differentiable
    and c.op.surrogate is None
    and all(0 < a.size <= 130 and np.isfinite(a).all() for a in c.operands() if a is not None)
    and np.any(c.operands()[0])  # norms of zero vectors have a kink, which finite differences see
]


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_gradients(case: Case) -> None:
    """Autograd of the registered op agrees with finite differences, for every float operand that the op trains through."""
    tensors = [to_torch(a) for a in case.operands()]
    chosen = [i for i, t in enumerate(tensors) if t is not None and t.is_floating_point() and i not in frozen(case)]
    op = torch_op(case.op.name)

    def run(*values: torch.Tensor) -> torch.Tensor:
        full = list(tensors)
        for index, value in zip(chosen, values, strict=True):
            full[index] = value
        return op(*full, **case.attributes)

    assert torch.autograd.gradcheck(run, [tensors[i].clone().requires_grad_() for i in chosen], eps=1e-6, atol=1e-6)


def frozen(case: Case) -> set[int]:
    """Operands without a gradient by definition: thresholds of gates; masks, whose 0 and other values are switches."""
    return {i for i, o in enumerate(case.op.inputs) if o.name in ("thresholds", "mask", "strength", "kept")}


@pytest.mark.parametrize("op", all_ops(), ids=lambda op: op.name)
def test_a_wrong_body_fails(op: OpDef) -> None:
    """The comparison has power: a body that is off by a little is caught, in every op and for most of its samples."""

    def off(b, operands, attributes):  # type: ignore[no-untyped-def]
        results = op.body(b, operands, attributes)
        if results[0].dtype.is_float:
            factor = 2.0 if results[0].dtype in (DType.F8E4M3, DType.F8E5M2) else 1.02
            return [b.cast(b.up(r) * factor + 1e-3, r.dtype) for r in results]
        return [b.cast(b.cast(r, DType.I32) + 1, r.dtype) for r in results]

    wrong = dataclasses.replace(op, body=off)
    caught = 0
    for index in range(len(op.samples)):
        case = Case(op, index, sample_dtypes(op, index)[0])
        operands = case.operands()
        want = run_torch(op.reference, case, operands)
        if not want[0].size:
            caught += 1
            continue
        model = build(wrong, case.attributes, types_of(operands), opset_of(case))
        with pytest.raises(AssertionError):
            assert_conforms(case, run_evaluator(model, operands), want, "wrong body")
        caught += 1
    assert caught == len(op.samples)


@pytest.mark.parametrize("op", all_ops(), ids=lambda op: op.name)
def test_registered_well(op: OpDef) -> None:
    """The registration of every op in torch: schema, no aliasing, fake kernel, autograd, tracing."""
    case = Case(op, 0, DType.F32 if DType.F32 in sample_dtypes(op, 0) else sample_dtypes(op, 0)[0])
    tensors = [to_torch(a) for a in case.operands()]
    if op.differentiable:
        tensors = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors]
    torch.library.opcheck(torch_op(op.name), tuple(tensors), case.attributes)


def test_fresh_results() -> None:
    """No op returns its operand or a view of it."""
    for case in BY_SAMPLE:
        tensors = [to_torch(a) for a in case.operands()]
        result = torch_op(case.op.name)(*tensors, **case.attributes)
        for tensor in tensors:
            if tensor is not None and tensor.numel():
                assert result.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr(), str(case)
                assert np.array_equal(from_torch(tensor), from_torch(tensor), equal_nan=True)


def test_every_op_is_sampled() -> None:
    """Each op has samples, one of them empty, and at least one per structural choice of its string attributes."""
    for op in all_ops():
        assert len(op.samples) >= 4, op.name
        assert any(0 in shape for s in op.samples for shape in s.shapes if shape), f"{op.name} has no empty sample"
        for attribute in op.attributes:
            if attribute.choices and attribute.name != "dtype":
                seen = {op.complete(s.attributes)[attribute.name] for s in op.samples}
                assert seen == set(attribute.choices), f"{op.name}.{attribute.name}: {set(attribute.choices) - seen} unsampled"
