"""The op ``linear``: an input gate, a stored weight, the product and an output mask in one, as kernels claim it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from actgraph.errors import VerifyError
from actgraph.ops import layout as lay
from actgraph.ops.body import compute_dtype
from actgraph.ops.drawing import Rule, boolean, draws, fraction, integers, normal, positive, scales, special
from actgraph.ops.dtypes import COMPUTE_FLOATS, DType
from actgraph.ops.registry import Attribute, Attributes, OpDef, Operand, Sample, Trait, register
from actgraph.ops.scales import ZERO_POINTS
from actgraph.ops.shapes import TensorType
from actgraph.ops.sparsity import GATE, INDEX_GATE, TOPK_GATE
from actgraph.ops.weights import BLOCK_SIZE, LAYOUTS, PACKED, WEIGHTS, body_weight, check_weight, torch_weight

if TYPE_CHECKING:
    import torch

    from actgraph.ops.body import BodyBuilder, BodyValue

_LINEAR_DOC = """
A linear layer that need not read all of its weight: ``y = where(kept != 0, gate(x) W + bias, 0)``.

``x`` [.., K]; ``y`` [.., N] of the type of ``x``. ``W`` [K, N] is ``weight`` in its ``layout`` ("out_in": stored as [N, K],
"in_out": stored as [K, N]), dequantized where it has a ``scale``: ``(weight - zero_point) * scale``. ``scale`` is [], [1],
[N], or with ``block_size`` g one per group along K: [N, ceil(K/g)] for "out_in", [ceil(K/g), N] for "in_out"; ``zero_point``
(absent: 0) lies as ``scale``. ``packed``: two 4-bit codes a byte along the last axis of the stored weight, the first in the
low half ("out_in" with "u4", groups and zero point 8 is the form of MatMulNBits).

``keep`` is the gate of the input: "none"; "abs>" and "x>=" as ``gate`` (with ``thresholds`` [] or [K], or the attribute
``threshold``); "top_k" as ``topk_gate`` (the ``k`` largest magnitudes of each token); "listed" as ``index_gate`` (channels
in ``indices`` [.., n]). Dropped inputs are +0.0; NaN is kept by the thresholds. A kernel does not read the weights of
dropped inputs, so weights must be finite: an infinity or NaN times a dropped input is unspecified. ``kept`` [.., N] (shape
of ``y``) gates the output: where it is 0 (or false), ``y`` is +0.0, without bias, and need not be computed; NaN counts as
not 0.

float16 and bfloat16 are computed in float32 (the dequantized weight, too) and rounded once. The gradient flows to ``x``,
float weights, ``scale`` and ``bias``.

Sources: *Deja Vu*, 2023 and *CATS*, 2024 (rows of the weight skipped); *TEAL*, 2024 (thresholds on the inputs of linears);
*CoreInfer*, 2024 (a listed set); ONNX MatMulNBits (groups of 4-bit codes).
"""

_GATES = {"abs>": GATE, "x>=": GATE, "top_k": TOPK_GATE, "listed": INDEX_GATE}


def _linear_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    x, weight, scale, zero, bias, thresholds, indices, kept = types
    assert x is not None and weight is not None
    form = {"layout": attributes["layout"], "block": attributes["block_size"], "packed": attributes["packed"]}
    outputs, inputs = check_weight("linear", "weight", weight, scale, zero, **form)
    if x.shape is not None and not x.shape:
        raise VerifyError("actgraph.linear: x needs a channel axis")
    if x.shape is not None:
        lay.check_into("linear", "the input axis of weight", (inputs,), (x.shape[-1],))
        lay.check_into("linear", "the channel axis of x", (x.shape[-1],), (inputs,))
    if bias is not None and bias.shape is not None and (len(bias.shape) != 1 or not _same(bias.shape[0], outputs)):
        raise VerifyError(f"actgraph.linear: bias {bias} must be [{outputs}]")
    _check_gate(x, thresholds, indices, attributes)
    shape = None if x.shape is None else (*x.shape[:-1], outputs)
    if kept is not None and kept.shape is not None and shape is not None:
        fits = len(kept.shape) == len(shape) and all(map(_same, kept.shape, shape))
        if not fits:
            raise VerifyError(f"actgraph.linear: kept {kept} must have the shape of the result {TensorType(x.dtype, shape)}")
    return [TensorType(x.dtype, shape)]


def _same(a: Any, b: Any) -> bool:
    return a == b or not (isinstance(a, int) and isinstance(b, int))


def _check_gate(x: TensorType, thresholds: TensorType | None, indices: TensorType | None, attributes: Attributes) -> None:
    keep, k = attributes["keep"], attributes["k"]
    if thresholds is not None:
        if keep not in ("abs>", "x>="):
            raise VerifyError(f"actgraph.linear: keep = {keep!r} takes no thresholds")
        if thresholds.shape is not None and len(thresholds.shape) > 1:
            raise VerifyError(f"actgraph.linear: thresholds {thresholds} must be [] or one per channel of x")
        GATE.infer([x, thresholds], {"axis": -1})
    if (keep == "listed") != (indices is not None):
        raise VerifyError("actgraph.linear: indices go with keep = 'listed', and only with it")
    if indices is not None:
        INDEX_GATE.infer([x, indices], {"axis": -1})
    if (k > 0) != (keep == "top_k") or k < 0:
        raise VerifyError(f"actgraph.linear: k = {k} with keep = {keep!r}", "k is positive for 'top_k' and 0 otherwise")


def torch_gate(
    h: torch.Tensor, thresholds: torch.Tensor | None, indices: torch.Tensor | None, *, keep: str, threshold: float, k: int
) -> torch.Tensor:
    """``h`` [.., K] with its dropped channels at +0.0."""
    if keep == "none":
        return h
    if keep == "top_k":
        result = TOPK_GATE.reference(h, k=k)
    elif keep == "listed":
        result = INDEX_GATE.reference(h, indices)
    else:
        result = GATE.reference(h, thresholds, threshold=threshold, keep=keep)
    assert not isinstance(result, tuple)
    return result


def body_gate(
    b: BodyBuilder, h: BodyValue, thresholds: BodyValue | None, indices: BodyValue | None, *, keep: str, k: int
) -> BodyValue:
    """As ``torch_gate``; the threshold is the op's attribute ``threshold``."""
    if keep == "none":
        return h
    gate = _GATES[keep]
    operands: list[BodyValue | None] = [h] if keep == "top_k" else [h, indices if keep == "listed" else thresholds]
    (y,) = gate.body(b, operands, {"keep": keep, "k": k, "group_size": 0, "axis": -1})
    return y


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    thresholds: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
    *,
    layout: str = "out_in",
    block_size: int = 0,
    packed: str = "",
    keep: str = "none",
    threshold: float = 0.0,
    k: int = 0,
) -> torch.Tensor:
    h = torch_gate(lay.torch_compute(x), thresholds, indices, keep=keep, threshold=threshold, k=k)
    y = h @ torch_weight(weight, scale, zero_point, h.dtype, layout=layout, block=block_size, packed=packed)
    if bias is not None:
        y = y + bias.to(h.dtype)
    if kept is not None:
        y = y.masked_fill(kept == 0, 0.0)
    return y.to(x.dtype)


def _linear_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    x, weight, scale, zero, bias, thresholds, indices, kept = operands
    assert x is not None and weight is not None
    compute = compute_dtype(x.dtype)
    h = body_gate(b, b.up(x), thresholds, indices, keep=attributes["keep"], k=attributes["k"])
    form = {"layout": attributes["layout"], "block": attributes["block_size"], "packed": attributes["packed"]}
    y = b.op("MatMul", h, body_weight(b, weight, scale, zero, compute, **form), rank=x.rank)
    if bias is not None:
        y = y + b.cast(bias, compute)
    if kept is not None:
        off = b.op("Not", kept) if kept.dtype is DType.BOOL else b.up(kept).equal(0)
        y = b.where(off, 0.0, y)
    return [b.cast(y, x.dtype)]


# --- samples ----------------------------------------------------------------------------------------------------------------


def _codes(kind: DType) -> Rule:
    """Codes over the whole range of ``kind``."""

    def rule(rng: Any, shape: tuple[int, ...], dtype: DType) -> Any:
        if kind.is_float:
            return rng.standard_normal(shape).astype(kind.numpy)
        low, high = (0, 256) if kind is DType.U8 else (-128, 128)
        return rng.integers(low, high, shape).astype(kind.numpy)

    return rule


def _scales(rng: Any, shape: tuple[int, ...], dtype: DType) -> Any:
    return scales(rng, shape, dtype).astype(DType.F64.numpy if dtype is DType.F64 else DType.F32.numpy)


def _strewn(rng: Any, shape: tuple[int, ...], dtype: DType) -> Any:
    """Special values in every other token: a NaN reaches every output of its token."""
    values = normal(rng, shape, dtype)
    values[::2] = special(rng, values[::2].shape, dtype)
    return values


_F32 = (DType.F32,)
_SOME = (DType.F32, DType.BF16)
_ALL = (DType.F64, DType.F32, DType.F16, DType.BF16)


def _sample(
    x: tuple[int, ...],
    weight: tuple[int, ...],
    *,
    scale: tuple[int, ...] | None = None,
    zero: tuple[int, ...] | None = None,
    bias: bool = False,
    thresholds: tuple[int, ...] | None = None,
    indices: tuple[int, ...] | None = None,
    kept: tuple[int, ...] | None = None,
    kind: DType | None = None,
    x_rule: Rule = normal,
    kept_rule: Rule = fraction,
    dtypes: tuple[DType, ...] = _F32,
    note: str = "",
    **attributes: Any,
) -> Sample:
    channels = weight[0] if attributes.get("layout", "out_in") == "out_in" else weight[1] * (2 if "packed" in attributes else 1)
    shapes = (x, weight, scale, zero, (channels,) if bias else None, thresholds, indices, kept)
    points = integers(0, 16 if "packed" in attributes else 9, DType.I32)
    listed = integers(-1, x[-1], DType.I64)
    weights = normal if kind is None else _codes(kind)
    rules = draws(x_rule, weights, _scales, points, normal, positive, listed, kept_rule)
    return Sample(shapes, attributes, dtypes=dtypes, draw=rules, note=note)


_SAMPLES = (
    _sample((2, 3, 8), (5, 8), bias=True, dtypes=_ALL),
    _sample((2, 3, 8), (8, 5), layout="in_out", keep="abs>", threshold=0.5, dtypes=_ALL),
    _sample((2, 3, 8), (8, 5), bias=True, thresholds=(8,), layout="in_out", keep="x>=", dtypes=_ALL),
    _sample((3, 8), (8, 5), thresholds=(), layout="in_out", keep="abs>", x_rule=_strewn, note="NaN and infinity"),
    _sample((2, 3, 8), (8, 5), layout="in_out", keep="top_k", k=3, dtypes=_ALL),
    _sample((2, 3, 8), (5, 8), indices=(2, 1, 4), keep="listed", dtypes=_ALL),
    _sample((2, 3, 8), (5, 8), bias=True, kept=(2, 3, 5), dtypes=_ALL, note="output gating"),
    _sample((2, 3, 8), (5, 8), kept=(2, 3, 5), kept_rule=boolean, x_rule=_strewn, note="a boolean mask, NaN and infinity"),
    _sample((2, 3, 8), (5, 8), scale=(5,), kind=DType.I8, bias=True, dtypes=_ALL),
    _sample(
        (2, 8), (8, 5), scale=(5,), zero=(5,), kind=DType.U8, layout="in_out", keep="abs>", threshold=0.5, dtypes=_SOME
    ),
    _sample((2, 8), (5, 8), scale=(), zero=(), kind=DType.I8, note="one scale"),
    _sample((2, 8), (8, 5), scale=(1,), kind=DType.I8, layout="in_out", note="one scale"),
    _sample((2, 10), (4, 10), scale=(4, 3), zero=(4, 3), kind=DType.I8, block_size=4, note="the last group is short"),
    _sample((2, 10), (10, 4), scale=(3, 4), kind=DType.I8, block_size=4, layout="in_out", keep="abs>", threshold=0.5),
    _sample((2, 64), (6, 32), scale=(6, 2), zero=(6, 2), kind=DType.U8, packed="u4", block_size=32, dtypes=_SOME),
    _sample(
        (2, 64), (64, 3), scale=(2, 6), zero=(2, 6), kind=DType.U8, packed="u4", block_size=32, layout="in_out",
        keep="abs>", threshold=0.5, bias=True, dtypes=_SOME,
    ),
    _sample((2, 8), (5, 4), scale=(5,), kind=DType.U8, packed="i4"),
    _sample((2, 8), (8, 3), scale=(6,), kind=DType.U8, packed="i4", layout="in_out", keep="top_k", k=3),
    _sample((2, 3, 8), (5, 8), scale=(5,), kind=DType.F8E4M3, bias=True, dtypes=_SOME, note="float8"),
    _sample((2, 3, 8), (8, 5), kind=DType.F8E5M2, layout="in_out", keep="x>=", threshold=0.25, note="float8, no scale"),
    _sample((2, 8), (5, 8), kind=DType.BF16, bias=True, note="a bfloat16 weight"),
    _sample((0, 3, 8), (5, 8), scale=(5,), kind=DType.I8, kept=(0, 3, 5), keep="abs>", threshold=0.5, note="no tokens"),
    _sample((8,), (5, 8), bias=True, note="one token without axes"),
    _sample((1, 1), (1, 1), bias=True, keep="top_k", k=3, note="k beyond the size"),
    _sample((3, 257), (131, 257), scale=(131, 9), kind=DType.I8, block_size=32, kept=(3, 131), note="large"),
)  # fmt: skip

LINEAR = register(
    OpDef(
        name="linear",
        doc=_LINEAR_DOC,
        inputs=(
            Operand("x", "[.., K]"),
            Operand("weight", "[N, K] or [K, N], see layout; numbers or codes", dtypes=WEIGHTS),
            Operand("scale", "of codes: [], [1], [N] or one per group along K", optional=True),
            Operand("zero_point", "of codes, as scale; absent: 0", dtypes=ZERO_POINTS, optional=True),
            Operand("bias", "[N]", optional=True),
            Operand("thresholds", "of the gate in place of the attribute: [] or [K]", optional=True),
            Operand("indices", "input channels that stay, [.., n]", dtypes=frozenset({DType.I64, DType.I32}), optional=True),
            Operand("kept", "[.., N]: outputs where it is 0 are +0.0", dtypes=COMPUTE_FLOATS | {DType.BOOL}, optional=True),
        ),
        outputs=("y",),
        infer=_linear_infer,
        reference=_linear,
        body=_linear_body,
        attributes=(
            Attribute("layout", "str", "[N, K] or [K, N]", default="out_in", choices=LAYOUTS),
            BLOCK_SIZE,
            PACKED,
            Attribute("keep", "str", "which inputs stay", default="none", choices=("none", "abs>", "x>=", "top_k", "listed")),
            Attribute("threshold", "float", "of the gate, for the whole tensor", default=0.0, structural=False),
            Attribute("k", "int", "inputs that stay under top_k, per token", default=0),
        ),
        traits=frozenset({Trait.PER_TOKEN}),
        min_opset=13,
        samples=_SAMPLES,
    )
)
