"""Quantizer arithmetic: the conventions settled in ``actgraph.ops.quantizer``, shared by arrays, torch and ONNX."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actgraph.errors import InputError, UnsupportedError, VerifyError
from actgraph.ops import DType, TensorType, get_op
from actgraph.ops import quantizer as qz
from actgraph.ops.torch_library import torch_op
from tests.conformance.harness import build, run_onnxruntime, types_of
from tests.ops.test_steering import everywhere, torch_call

INTEGER_TYPES = [DType.I8, DType.U8, DType.I4, DType.U4, DType.I16, DType.U16]


def test_int8_weights_use_absmax_over_127() -> None:
    weight = np.array([[-2.54, 1.0], [0.0, 0.0], [0.5, 127.0]], np.float32)
    scale, zero = qz.weight_parameters(weight)
    np.testing.assert_array_equal(scale, np.array([2.54 / 127, 1, 1], np.float32))  # an all-zero channel has scale 1
    assert zero.dtype == np.int32 and not zero.any()
    codes = qz.quantize_array(weight, scale)
    assert codes.dtype == np.int8 and codes.tolist() == [[-127, 50], [0, 0], [0, 127]]  # 0.5 rounds to even


def test_ranges_include_zero() -> None:
    scale, zero = qz.affine_parameters(2.0, 5.1, DType.U8)
    assert scale == np.float32(5.1 / 255) and zero == 0
    scale, zero = qz.affine_parameters(-3.0, -1.0, DType.I8)
    assert scale == np.float32(3 / 255) and zero == 127
    assert qz.dequantize_array(zero.astype(np.int8), scale, zero) == 0, "zero is exact"


@given(lo=st.floats(-1e6, 1e6), hi=st.floats(-1e6, 1e6), kind=st.sampled_from(INTEGER_TYPES))
@settings(max_examples=200, deadline=None)
def test_affine_parameters_cover_the_range(lo: float, hi: float, kind: DType) -> None:
    """The zero point is a code, zero is exact, and the ends of the range come back within a step and a half."""
    lo, hi = min(lo, hi), max(lo, hi)
    scale, zero = qz.affine_parameters(lo, hi, kind)
    codes = qz.code_range(kind)
    assert codes.qmin <= zero <= codes.qmax
    ends = np.array([min(lo, 0), 0, max(hi, 0)], np.float32)
    back = qz.dequantize_array(qz.quantize_array(ends, scale, zero, kind), scale, zero)
    assert back[1] == 0
    assert (np.abs(back - ends) <= 1.5 * scale + 1e-30).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_statistics_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(InputError, match="not finite"):
        qz.symmetric_parameters(bad)
    with pytest.raises(InputError, match="not finite"):
        qz.affine_parameters(-1.0, bad)
    with pytest.raises(InputError, match="not finite"):
        qz.weight_parameters(np.array([[1.0, bad]], np.float32))


def test_types_that_quantizers_do_not_make_are_refused() -> None:
    with pytest.raises(InputError, match="not a quantized type"):
        qz.code_range(DType.F32)
    with pytest.raises(InputError, match="no zero point"):
        qz.affine_parameters(-1, 1, DType.F8E4M3)


def test_blocks_follow_onnx() -> None:
    """Ten columns in blocks of four: three scales a row, the last block short."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((3, 10)).astype(np.float32)
    scale, zero = qz.weight_parameters(weight, DType.I4, axis=1, block_size=4)
    assert scale.shape == (3, 3)
    np.testing.assert_array_equal(scale[:, 2], np.abs(weight[:, 8:]).max(1) / np.float32(7))
    codes = qz.quantize_array(weight, scale, zero, DType.I4, axis=1, block_size=4)
    operands = [codes, scale]
    op = get_op("dequantize")
    attributes = op.complete({"axis": 1, "block_size": 4})
    model = build(op, attributes, [*types_of(operands), None], 21)
    want = qz.dequantize_array(codes, scale, axis=1, block_size=4)
    np.testing.assert_array_equal(run_onnxruntime(model, operands)[0], want)


@pytest.mark.parametrize("kind", [DType.I4, DType.U4])
def test_nibbles(kind: DType) -> None:
    """Packing is what ONNX stores (first code low), unpacks to itself, and ``dequantize`` reads it."""
    codes = np.arange(16, dtype=np.uint8).reshape(2, 8)
    codes = codes if kind is DType.U4 else (codes.astype(np.int8) - 8)
    packed = qz.pack_nibbles(codes.astype(kind.numpy))
    assert packed.dtype == np.uint8 and packed.shape == (2, 4)
    assert packed[0, 0] == (int(codes[0, 0]) & 15) | ((int(codes[0, 1]) & 15) << 4)
    np.testing.assert_array_equal(qz.unpack_nibbles(packed, kind), codes)
    scale = np.array([0.5, 2.0], np.float32)
    want = codes.astype(np.float32) * scale[:, None]
    for who, result in everywhere("dequantize", [packed, scale], {"packed": kind.value}).items():
        np.testing.assert_array_equal(result, want, err_msg=who)
    with pytest.raises(InputError, match="do not fill"):
        qz.pack_nibbles(codes[:, :3])


@pytest.mark.parametrize("kind", [DType.I8, DType.U8, DType.I16])
@pytest.mark.parametrize("axis", [0, 1])
def test_arrays_torch_and_onnx_give_the_same_codes(kind: DType, axis: int) -> None:
    """numpy, torch, onnxruntime and ``fake_quant`` are one quantizer."""
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((5, 7)) * 3).astype(np.float32)
    scale, zero = qz.weight_parameters(x * 0.7, kind, axis=axis, symmetric=kind is not DType.U8)
    codes = qz.quantize_array(x, scale, zero, kind, axis=axis)
    for who, result in everywhere("quantize", [x, scale, zero], {"dtype": kind.value, "axis": axis}).items():
        np.testing.assert_array_equal(result, codes, err_msg=who)
    back = qz.dequantize_array(codes, scale, zero, axis=axis)
    for who, result in everywhere("dequantize", [codes, scale, zero], {"axis": axis}).items():
        np.testing.assert_array_equal(result, back, err_msg=who)
    attributes = {"dtype": kind.value, "axis": axis, "granularity": "axis"}
    for who, result in everywhere("fake_quant", [x, scale, zero], attributes).items():
        np.testing.assert_array_equal(result, back, err_msg=who)


def test_infinities_saturate_in_the_engines() -> None:
    x = np.array([np.inf, -np.inf, 1.0], np.float32)
    operands, attributes = [x, np.full((), 0.5, np.float32)], {"dtype": "i8"}
    op = get_op("quantize")
    model = build(op, op.complete(attributes), [*types_of(operands), None], 21)
    want = np.array([127, -128, 2], np.int8)
    np.testing.assert_array_equal(run_onnxruntime(model, operands)[0], want)
    np.testing.assert_array_equal(torch_call("quantize", *map(torch.from_numpy, operands)).numpy(), want)


def test_dynamic_quantizers_equal_static_ones_on_their_range() -> None:
    x = torch.randn(4, 6)
    token = torch_call("fake_quant", x, source="dynamic", granularity="token")
    for row, result in zip(x, token, strict=True):
        scale, _ = qz.symmetric_parameters(row.abs().max().numpy())
        assert torch.equal(result, torch_call("fake_quant", row, torch.from_numpy(scale)))
    whole = torch_call("fake_quant", x, source="dynamic", dtype="u8", symmetric=False)
    scale, zero = qz.affine_parameters(x.min().numpy(), x.max().numpy(), DType.U8)
    assert torch.equal(whole, torch_call("fake_quant", x, torch.from_numpy(scale), torch.from_numpy(zero), dtype="u8"))


def test_dynamic_per_tensor_equals_dynamic_quantize_linear() -> None:
    """ONNX's own DynamicQuantizeLinear (uint8, asymmetric, range with 0) is a special case."""
    import onnx
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, None]) for n in ("x", "y")]
    model = helper.make_model(helper.make_graph(nodes, "g", value[:1], value[1:]), opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    onnx.checker.check_model(model)
    import onnxruntime as ort

    session = ort.InferenceSession(model.SerializeToString())
    for shift in (0.0, 5.0, -5.0):
        x = torch.randn(7, 9) + shift
        ours = torch_call("fake_quant", x, source="dynamic", dtype="u8", symmetric=False)
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], ours.numpy(), rtol=0, atol=1e-6)


def test_straight_through_gradients() -> None:
    """LSQ: 1 inside and 0 outside for x; round(v) - v inside, qmin - z or qmax - z outside for the scale."""
    x = torch.tensor([-100.0, -0.31, 0.26, 1.07, 100.0], dtype=torch.float64, requires_grad=True)
    s = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    z = torch.tensor(3, dtype=torch.int32)
    y = torch_call("fake_quant", x, s, z, dtype="i4")
    gx, gs = torch.autograd.grad(y, (x, s), torch.eye(5, dtype=torch.float64)[2] * 0 + 1)
    v = (x / s).detach()
    inside = (v.round() + 3 >= -8) & (v.round() + 3 <= 7)
    assert inside.tolist() == [False, True, True, False, False]
    assert torch.equal(gx, inside.double())
    want = torch.where(inside, v.round() - v, torch.where(v < 0, -8.0 - 3, 7.0 - 3))
    torch.testing.assert_close(gs, want.sum())


def test_what_cannot_be_is_refused() -> None:
    x = TensorType(DType.F32, ("batch", 10))
    op = get_op("fake_quant")
    scalar, rows = TensorType(DType.F32, ()), TensorType(DType.F32, (10,))
    bad = [
        ([x, None, None], {}, "needs a scale"),
        ([x, scalar, None], {"source": "dynamic"}, "takes no scale"),
        ([x, scalar, None], {"granularity": "token"}, "dynamic only"),
        ([x, rows, None], {}, "does not broadcast"),
        ([x, scalar, None], {"granularity": "group"}, "group_size"),
        ([x, TensorType(DType.F32, ("batch", 2)), None], {"granularity": "group", "group_size": 4}, "one value per block"),
        ([x, None, None], {"granularity": "group", "group_size": 4, "source": "dynamic"}, "do not divide"),
        ([x, scalar, None], {"dtype": "f8e4m3", "symmetric": False}, "must be symmetric"),
        ([x, TensorType(DType.F32, (9,)), None], {"granularity": "axis"}, "does not broadcast"),
    ]
    for types, attributes, message in bad:
        with pytest.raises(VerifyError, match=message):
            op.infer(types, op.complete(attributes))
    assert op.infer([x, TensorType(DType.F32, ("batch", 3)), None], op.complete({"granularity": "group", "group_size": 4})) == [
        x
    ]
    with pytest.raises(UnsupportedError, match="torch has no i4"):
        torch_op("quantize")(torch.ones(2), torch.tensor(1.0), dtype="i4")


def test_packed_shapes_over_names() -> None:
    op = get_op("dequantize")
    q, scale = TensorType(DType.U8, ("out", "half")), TensorType(DType.F32, ("out",))
    assert op.infer([q, scale, None], op.complete({"packed": "i4"})) == [TensorType(DType.F32, ("out", "2*half"))]
    with pytest.raises(VerifyError, match="packed codes are u8"):
        op.infer([TensorType(DType.I8, (2, 2)), scale, None], op.complete({"packed": "i4"}))
