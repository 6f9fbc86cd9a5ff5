"""What stock onnxruntime cannot run, as far as the file itself tells."""

from __future__ import annotations

from actgraph.graph.onnx import OnnxGraph
from actgraph.ops.dtypes import DType

#: Ops that onnxruntime's CPU engine has no bfloat16 kernel of, and that hardly a model does without.
_NO_BFLOAT16 = frozenset({
    "Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "MatMul", "Gemm", "Conv", "Softmax", "Erf", "Gelu", "Tanh", "Sigmoid", "Relu",
    "ReduceMean", "LayerNormalization",
})  # fmt: skip


def engine_note(graph: OnnxGraph) -> str:
    """One sentence if the nodes compute in a type that onnxruntime's CPU engine has no kernels for, else empty."""
    found = sorted(
        {
            node.op.removeprefix("onnx.")
            for node in graph.nodes()
            if node.op.removeprefix("onnx.") in _NO_BFLOAT16 and any(value.dtype is DType.BF16 for value in node.outputs)
        }
    )
    if not found:
        return ""
    shown = ", ".join(found[:3]) + (" ..." if len(found) > 3 else "")
    return (
        f"{graph.name} computes in bfloat16 ({shown}), for which onnxruntime's CPU engine has no kernels: "
        "run the file on an engine that has them, or cast to f16"
    )
