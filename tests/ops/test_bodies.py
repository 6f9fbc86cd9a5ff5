"""ONNX bodies as functions: overloads, attribute references, inlining by stock tools, refusals."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import inliner
from onnx_ir.passes.common import InlinePass

from actgraph.errors import UnsupportedError
from actgraph.ops import DType, TensorType, all_ops, get_op
from actgraph.ops.body import BodyBuilder, body_function, expand
from tests.conformance.harness import Case, build, run_evaluator, run_onnxruntime, same_bits, types_of

X = TensorType(DType.F32, ("batch", "seq", 8))
V = TensorType(DType.F32, (8,))


def test_one_function_serves_all_thresholds() -> None:
    """Thresholds and scales are attribute references; strings, ranks, dtypes and absent operands make overloads."""
    op = get_op("gate")
    functions = [body_function(op, {"threshold": t}, [X], 18) for t in (0.1, 0.2)]
    assert functions[0].identifier() == functions[1].identifier()
    texts = [ir.to_proto(f).node for f in functions]
    assert [n.SerializeToString() for n in texts[0]] == [n.SerializeToString() for n in texts[1]]
    others = [
        body_function(op, {"keep": "x>="}, [X], 18),
        body_function(op, {}, [X, V], 18),
        body_function(op, {}, [TensorType(DType.F16, X.shape)], 18),
        body_function(op, {"axis": 1}, [X], 18),
    ]
    assert len({f.identifier() for f in [functions[0], *others]}) == 5
    again = body_function(op, {"keep": "x>="}, [X], 18)
    assert again.identifier() == others[0].identifier(), "overloads are the same on every run"


def test_overloads_of_the_whole_grid_are_unambiguous() -> None:
    """Two specialisations with the same overload have the same nodes: no body can shadow another in one file."""
    seen: dict[tuple[str, str, str], list[bytes]] = {}
    for op in all_ops():
        for index, sample in enumerate(op.samples):
            for dtype in sample.dtypes or op.inputs[0].dtypes:
                case = Case(op, index, dtype)
                function = body_function(op, case.attributes, types_of(case.operands()), 21)
                nodes = [n.SerializeToString() for n in ir.to_proto(function).node]
                assert seen.setdefault(function.identifier(), nodes) == nodes, function.identifier()


@pytest.mark.parametrize("op", all_ops(), ids=lambda op: op.name)
def test_stock_inliners_give_the_same_numbers(op) -> None:  # type: ignore[no-untyped-def]
    """onnx_ir's and onnx's inliners and ``expand`` all reduce a call to standard ops that compute the same."""
    case = Case(op, 0, DType.F32 if not op.samples[0].dtypes else op.samples[0].dtypes[0])
    operands = case.operands()
    kept = build(op, case.attributes, types_of(operands), 21)
    by_ir = ir.to_proto(InlinePass()(ir.from_proto(kept)).model)
    by_onnx = inliner.inline_local_functions(kept)
    expanded = build(op, case.attributes, types_of(operands), 21, inlined=True)
    want = run_onnxruntime(kept, operands)
    for model in (by_ir, by_onnx, expanded):
        assert {n.domain for n in model.graph.node} == {""} and not model.functions
        for a, b in zip(run_onnxruntime(model, operands), want, strict=True):
            assert same_bits(a, b)


def test_calls_may_leave_out_or_leave_empty_what_is_absent() -> None:
    """Every operand is an input of the function: a call passes "" for absent ones, or stops early (onnxruntime)."""
    op = get_op("clip")
    function = body_function(op, {"max": 1.0}, [X, None, TensorType(DType.F32, ())], 18)
    assert [v.name for v in function.inputs] == ["x", "lo", "hi"]
    operands = [np.ones((1, 2, 8), np.float32) * 3, None, np.full((), 2, np.float32)]
    model = build(op, op.complete({}), types_of(operands), 18)
    assert model.graph.node[0].input[:] == ["in_0", "", "in_2"]
    for run in (run_onnxruntime, run_evaluator):
        assert (run(model, operands)[0] == 2).all()


def test_values_are_typed_and_names_are_stable() -> None:
    function = body_function(get_op("shift"), {"norm": "restore"}, [X, V], 18)
    for node in function:
        for value in node.outputs:
            assert value.name and value.dtype is not None
    names = [v.name for n in function for v in n.outputs]
    assert len(set(names)) == len(names) and function.outputs[0].name == "y"


def test_expand_reads_the_given_values_and_prefixes_names() -> None:
    x = ir.Value(name="hidden", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["b", "s", 8]))
    nodes, outputs = expand(get_op("gate"), {"threshold": 0.25}, [x], [X], 18, prefix="blocks.0/gate/")
    assert all(n.name.startswith("blocks.0/gate/") for n in nodes)
    assert any(x in n.inputs for n in nodes) and outputs[0].producer() is nodes[-1]
    constants = [n.attributes["value"].as_tensor().numpy() for n in nodes if n.op_type == "Constant"]
    assert any(c == np.float32(0.25) for c in constants)
    assert not any(a.is_ref() for n in nodes for a in n.attributes.values())


def test_refusals() -> None:
    """Too old an opset, an unknown element type, an unknown rank or expert count: one line each, never a wrong body."""
    with pytest.raises(UnsupportedError, match="no body at opset 12"):
        body_function(get_op("gate"), {}, [X], 12)
    with pytest.raises(UnsupportedError, match="no known element type"):
        body_function(get_op("gate"), {}, [TensorType(None, X.shape)], 18)
    with pytest.raises(UnsupportedError, match="needs the rank"):
        body_function(get_op("gate"), {"axis": 1}, [TensorType(DType.F32, None), V], 18)
    with pytest.raises(UnsupportedError, match="number of experts"):
        types = [TensorType(DType.F32, ("rows", 8)), TensorType(DType.F32, ("e", 4, 8)), TensorType(DType.I32, ("e",))]
        body_function(get_op("grouped_linear"), {}, types, 18)
    with pytest.raises(UnsupportedError, match="opset 18 has no f8e4m3"):
        body_function(get_op("quantize"), {"dtype": "f8e4m3"}, [X, TensorType(DType.F32, ())], 18)


def test_a_negative_axis_needs_no_rank() -> None:
    body_function(get_op("gate"), {}, [TensorType(DType.F32, None)], 18)
    body_function(get_op("shift"), {}, [TensorType(DType.F32, None), V], 18)


def test_structural_attributes_cannot_be_references() -> None:
    with pytest.raises(ValueError, match="structural"):
        BodyBuilder(get_op("gate"), 18).attribute("keep", DType.F32)
