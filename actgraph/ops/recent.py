"""The new tokens' part of what covers all tokens: entries, and how many real tokens stand before each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from actgraph.errors import VerifyError
from actgraph.ops.drawing import boolean, draws, integers, normal
from actgraph.ops.dtypes import COMPUTE_FLOATS, DType
from actgraph.ops.positions import check_axis
from actgraph.ops.registry import Attribute, Attributes, OpDef, Operand, Sample, Trait, register
from actgraph.ops.shapes import TensorType

if TYPE_CHECKING:
    import torch

    from actgraph.ops.body import BodyBuilder, BodyValue

_ANY = COMPUTE_FLOATS | {DType.I64, DType.I32, DType.I8, DType.U8, DType.BOOL}

_DOC = """
The last entries of ``x`` along ``axis``, as many as ``like`` is long there: of an attention mask over past and new tokens the
part of the new ones.

``like`` gives only its size. ``x`` is at least as long.

Source: standard practice (incremental decoding).
"""


def _infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    x, like = types
    assert x is not None and like is not None
    axis = attributes["axis"]
    check_axis("recent", x, axis)
    check_axis("recent", like, axis)
    if x.shape is None:
        return [x]
    sizes = list(x.shape)
    count = like.shape[axis] if like.shape is not None else None
    whole = sizes[axis]
    if isinstance(count, int) and isinstance(whole, int) and count > whole:
        raise VerifyError(f"actgraph.recent: {x} has fewer entries in axis {axis} than {like}")
    sizes[axis] = count
    return [TensorType(x.dtype, tuple(sizes))]


def _reference(x: torch.Tensor, like: torch.Tensor, *, axis: int) -> torch.Tensor:
    import torch

    new = x.narrow(axis, x.shape[axis] - like.shape[axis], like.shape[axis])
    return new.clone(memory_format=torch.contiguous_format)


def _body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    x, like = operands
    assert x is not None and like is not None
    axis = attributes["axis"]
    whole = b.size(x, axis)
    return [b.slice(x, whole - b.size(like, axis), whole, axis)]


register(
    OpDef(
        name="recent",
        doc=_DOC,
        inputs=(
            Operand("x", "entries of all tokens, such as a mask [batch, past + tokens]", dtypes=_ANY),
            Operand("like", "any tensor: its size is used", dtypes=_ANY),
        ),
        outputs=("y",),
        infer=_infer,
        reference=_reference,
        body=_body,
        attributes=(Attribute("axis", "int", "the axis of the tokens, of both"),),
        traits=frozenset({Trait.POSITION_AWARE}),
        min_opset=13,
        exact="bits",
        differentiable=False,
        samples=(
            Sample(((2, 7), (1, 3)), {"axis": 1}, dtypes=(DType.I64,), draw=draws(integers(0, 2, DType.I64), normal)),
            Sample(((2, 3), (1, 3)), {"axis": -1}, dtypes=(DType.BOOL,), draw=draws(boolean, normal), note="all"),
            Sample(((2, 5, 4), (2, 0, 1)), {"axis": 1}, dtypes=(DType.F32,), draw=draws(normal, normal), note="none"),
            Sample(((6,), (4,)), {"axis": 0}, dtypes=(DType.F16,), draw=draws(normal, normal)),
        ),
    )
)

# --- valid_positions --------------------------------------------------------------------------------------------------------

_POSITIONS_DOC = """
Positions of the newest tokens among the real ones of their row: [batch, tokens] of int64, for a ``valid`` mask [batch, past +
tokens] that is 0 for padding. A real token has the number of real ones before it; padding on the left has 0.

``like`` gives only the number of the new tokens, along axis 1. Where nothing is padding these are ``past, past + 1 ...``.

Source: standard practice (position ids of left-padded batches).
"""


def _positions_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    valid, like = types
    assert valid is not None and like is not None
    if valid.shape is not None and len(valid.shape) != 2:
        raise VerifyError(f"actgraph.valid_positions: valid {valid} must be [batch, tokens]")
    return [TensorType(DType.I64, _infer(types, {"axis": 1})[0].shape)]


def _positions(valid: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    import torch

    counted = (valid != 0).to(torch.int64).cumsum(1) - 1
    return _reference(counted.clamp_min(0), like, axis=1)


def _positions_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    valid, like = operands
    assert valid is not None and like is not None
    real = b.cast(b.cast(valid, DType.BOOL), DType.I64)
    counted = b.op("CumSum", real, b.const(1, DType.I64)) - 1
    whole = b.size(valid, 1)
    return [b.slice(b.where(counted < 0, 0, counted), whole - b.size(like, 1), whole, 1)]


register(
    OpDef(
        name="valid_positions",
        doc=_POSITIONS_DOC,
        inputs=(
            Operand("valid", "which tokens are real, [batch, past + tokens]", dtypes=_ANY),
            Operand("like", "any tensor: its size along axis 1 is used", dtypes=_ANY),
        ),
        outputs=("positions",),
        infer=_positions_infer,
        reference=_positions,
        body=_positions_body,
        traits=frozenset({Trait.POSITION_AWARE}),
        min_opset=13,
        exact="bits",
        differentiable=False,
        samples=(
            Sample(((3, 7), (1, 7)), dtypes=(DType.I64,), draw=draws(integers(0, 2, DType.I64), normal)),
            Sample(((2, 9), (2, 1)), dtypes=(DType.BOOL,), draw=draws(boolean, normal), note="one new token"),
            Sample(((2, 5), (2, 2, 4)), dtypes=(DType.F32,), draw=draws(integers(0, 2, DType.I64), normal)),
            Sample(((1, 3), (1, 0)), dtypes=(DType.I32,), draw=draws(integers(0, 2, DType.I32), normal), note="no tokens"),
        ),
    )
)
