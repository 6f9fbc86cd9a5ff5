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
        ("threshold_gate", [X, (7,), X, (8,), None], r"threshold_gate: tau \(one value per channel\)"),
        ("threshold_gate", [X, (8,), ("batch", 1, 8), None, None], r"threshold_gate: z .* another shape"),
        ("lowrank_map", [X, (7, 2), (2, 2), None], r"lowrank_map: basis .* 8 channels"),
        ("lowrank_map", [X, (8, 2), (2, 2), (2, 3, 8)], r"lowrank_map: mask"),
        ("target_angle", [X, (7, 2), (), None], r"target_angle: basis .* 8 channels"),
        ("target_angle", [X, (8, 2), (2, 3, 8), None], r"target_angle: angle"),
        ("target_angle", [X, (8, 2), (), (2, 3, 8)], r"target_angle: mask"),
        ("latent_edit", [X, (2, 7), (2, 7)], r"latent_edit: decoder .* 8 channels"),
        ("latent_edit", [X, (2, 8), (3, 8)], r"latent_edit: encoder .* must be \[r, channels\]"),
        ("latent_edit", [X, (2, 8), (2, 8), (3,)], r"latent_edit: bias .* one number for each of the 2 latents"),
        ("latent_edit", [X, (2, 8), (2, 8), None, (2, 1)], r"latent_edit: thresholds .* one number for each"),
        ("latent_edit", [X, (2, 8), (2, 8), None, None, (3,)], r"latent_edit: values"),
        ("latent_edit", [X, (2, 8), (2, 8), None, None, None, (2, 3, 8)], r"latent_edit: mask"),
    ],
)
def test_refused(op: str, shapes: list[Shape | None], message: str) -> None:
    definition = get_op(f"actgraph.{op}")
    types = [None if shape is None else TensorType(DType.F32, shape) for shape in shapes]
    types += [None] * (len(definition.inputs) - len(types))
    with pytest.raises(VerifyError, match=message):
        definition.infer(types, definition.complete({}))


K: Shape = ("batch", 2, "keys", 8)
ROWS: Shape = ("batch", 2, "keys", 1)


@pytest.mark.parametrize(
    ("key", "scale", "message"),
    [
        ((DType.F64, K), None, r"key f64\[.*\] is neither f32 as query nor f16, bf16 or i8"),
        ((DType.I8, K), None, r"key i8\[.*\] needs a scale"),
        ((DType.F16, K), ROWS, r"key f16\[.*\] takes no scale"),
        ((DType.F32, K), ROWS, r"key f32\[.*\] takes no scale"),
        ((DType.I8, K), ("batch", 2, "keys"), r"key_scale f32\[.*\] must be f32\[batch, 2, keys, 1\]"),
        ((DType.I8, K), ("batch", 2, "keys", 8), r"key_scale of shape"),
        ((DType.I8, K), ("batch", 1, "keys", 1), r"the rows of key"),
    ],
)
def test_stored_keys_are_refused(key: tuple[DType, Shape], scale: Shape | None, message: str) -> None:
    query = TensorType(DType.F32, ("batch", 4, 1, 8))
    value = TensorType(DType.F32, K)
    scales = None if scale is None else TensorType(DType.F32, scale)
    with pytest.raises(VerifyError, match=f"attention: {message}"):
        get_op("attention").infer([query, TensorType(*key), value, None, scales, None], {"scale": 1.0, "softcap": 0.0})


def test_latents_that_are_set_need_an_encoder() -> None:
    definition = get_op("latent_edit")
    types = [TensorType(DType.F32, X), TensorType(DType.F32, (2, 8)), *[None] * 5]
    assert definition.infer(types, definition.complete({"mode": "add"})) == types[:1]
    with pytest.raises(VerifyError, match="mode set needs the encoder"):
        definition.infer(types, definition.complete({"mode": "set"}))
