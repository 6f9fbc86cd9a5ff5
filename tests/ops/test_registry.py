"""Definitions: attributes are checked and canonical, names are found in every spelling, kernels are looked up."""

from __future__ import annotations

import dataclasses
import math

import pytest

from actgraph.errors import OptionError, VerifyError
from actgraph.ops import DType, TensorType, all_ops, get_op, registry
from actgraph.ops.reference_docs import ops_markdown
from actgraph.ops.registry import Attribute, Kernel, Operand, kernels, register, register_kernel


def test_names() -> None:
    assert get_op("fake_quant") is get_op("actgraph.fake_quant") is get_op("FakeQuant")
    with pytest.raises(OptionError, match=r"no op 'frobnicate'.*shift"):
        get_op("frobnicate")
    assert [op.name for op in all_ops()] == sorted(op.name for op in all_ops())


def test_attributes_are_checked() -> None:
    gate = get_op("gate")
    assert gate.complete({}) == {"threshold": 0.0, "keep": "abs>", "axis": -1}
    with pytest.raises(OptionError, match="no attribute 'treshold'"):
        gate.complete({"treshold": 1})
    with pytest.raises(OptionError, match=r"must be one of abs>, x>="):
        gate.complete({"keep": ">"})
    with pytest.raises(OptionError, match="must be float"):
        gate.complete({"threshold": "much"})
    with pytest.raises(OptionError, match=r"'k' of actgraph\.topk_gate is missing"):
        get_op("topk_gate").complete({})


def test_floats_are_what_onnx_can_store() -> None:
    """Both dialects hold the same number: through ONNX's float32 and back nothing changes."""
    import numpy as np

    for value in (0.1, 0.031, 1e-30, 3.0, 1 / 3, math.inf, -math.inf):
        once = registry.shortest(value)
        assert registry.shortest(float(np.float32(once))) == once
        assert registry.single(once) == float(np.float32(value))
    assert get_op("gate").complete({"threshold": float(np.float32(0.031))})["threshold"] == 0.031


def test_definitions_that_cannot_work_are_refused() -> None:
    gate = get_op("gate")
    assert register(gate) is gate, "registering the same definition again is harmless"
    with pytest.raises(ValueError, match="registered already"):
        register(dataclasses.replace(gate, doc="another"))
    clash = dataclasses.replace(
        gate, name="clash", inputs=(Operand("x", ""), Operand("t", "")), attributes=(Attribute("t", "int", "", 0),)
    )
    with pytest.raises(ValueError, match="one name for two"):
        register(clash)


def test_calls_are_checked() -> None:
    """Operand count, presence and element types are checked before ``infer`` sees them."""
    x, flag = TensorType(DType.F32, (2, 8)), TensorType(DType.BOOL, (2, 8))
    shift, gate = get_op("shift"), get_op("gate")
    assert shift.result_types([x, TensorType(DType.F32, (8,))], shift.complete({})) == [x]
    with pytest.raises(VerifyError, match="needs its operand 'vector'"):
        shift.result_types([x], shift.complete({}))
    with pytest.raises(VerifyError, match=r"operand 'x' of actgraph.gate cannot be bool.*bf16, f16, f32, f64"):
        gate.result_types([flag], gate.complete({}))
    with pytest.raises(VerifyError, match="takes 2 operands, not 3"):
        gate.result_types([x, x, x], gate.complete({}))
    assert gate.result_types([TensorType(None, None)], gate.complete({})) == [TensorType(None, None)]


def test_kernels_are_asked_last_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_KERNELS", [])
    made = [register_kernel(Kernel("gate", name, "torch", "cpu", lambda types, attributes: True, print)) for name in "ab"]
    register_kernel(Kernel("gate", "c", "onnxruntime", "cpu", lambda types, attributes: True, print))
    assert kernels("gate", engine="torch", device="cpu") == made[::-1]
    assert kernels("shift") == [] and len(kernels()) == 3


def test_every_op_is_documented() -> None:
    """Formula, source and every operand and attribute are there, and the page shows them all."""
    page = ops_markdown()
    for op in all_ops():
        assert f"## `{op.qualified_name}`" in page
        assert "``" in op.doc and ("Source" in op.doc or op.name == "grouped_linear"), op.name
        for item in (*op.inputs, *op.attributes):
            assert item.doc and f"| `{item.name}` |" in page
        assert DType.F32 in op.inputs[0].dtypes or op.name in ("dequantize", "position_mask")
    assert "NaN" in page and page.endswith("\n")
