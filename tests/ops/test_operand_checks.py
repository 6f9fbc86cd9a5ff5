"""Channel, token and basis operands that do not fit are refused with the operand's name, by every op that takes them."""

from __future__ import annotations

import pytest

from actgraph.errors import VerifyError
from actgraph.ops import get_op
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import Shape, TensorType

X: Shape = ("batch", "seq", 8)


@pytest.mark.parametrize(
    ("op", "shapes", "message"),
    [
        ("shift", [X, (7,), None, None], r"shift: vector \(one value per channel\)"),
        ("shift", [X, (8,), (2, 3, 8), None], r"shift: strength \(one value per token\)"),
        ("shift", [X, (8,), None, (2, 3, 8)], r"shift: mask \(one value per token\)"),
        ("channel_scale", [X, (7,), None], r"channel_scale: gamma \(one value per channel\)"),
        ("channel_scale", [X, (8,), (2, 3, 8)], r"channel_scale: mask"),
        ("lowrank_map", [X, (7, 2), (2, 2), None], r"lowrank_map: basis .* 8 channels"),
        ("lowrank_map", [X, (8, 2), (2, 2), (2, 3, 8)], r"lowrank_map: mask"),
        ("target_angle", [X, (7, 2), (), None], r"target_angle: basis .* 8 channels"),
        ("target_angle", [X, (8, 2), (2, 3, 8), None], r"target_angle: angle"),
        ("target_angle", [X, (8, 2), (), (2, 3, 8)], r"target_angle: mask"),
    ],
)
def test_refused(op: str, shapes: list[Shape | None], message: str) -> None:
    definition = get_op(f"actgraph.{op}")
    types = [None if shape is None else TensorType(DType.F32, shape) for shape in shapes]
    with pytest.raises(VerifyError, match=message):
        definition.infer(types, definition.complete({}))
