"""Attention as one op, and as its two halves for graphs that look inside: its pattern, and the mixing of values by it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from actgraph.errors import VerifyError
from actgraph.ops import layout
from actgraph.ops.drawing import Rule, boolean, draws, integers, normal, scales
from actgraph.ops.dtypes import COMPUTE_FLOATS, DType
from actgraph.ops.registry import Attribute, Attributes, OpDef, Operand, Sample, Trait, register, single
from actgraph.ops.shapes import Shape, TensorType

if TYPE_CHECKING:
    import torch

    from actgraph.ops.body import BodyBuilder, BodyValue

# --- attention_pattern ------------------------------------------------------------------------------------------------------

_PATTERN_DOC = """
Attention probabilities: ``softmax(scale * query key^T + mask)`` over keys, and zeros in a row that may see no key.

``query`` [batch, heads, queries, head]; ``key`` [batch, kv_heads, keys, head], where kv_heads divides heads and query head
``h`` reads key head ``h * kv_heads / heads`` (grouped-query attention). ``mask`` broadcasts to [batch, heads, queries,
keys]: boolean (true: may be seen) or numbers that are added to the scores. ``is_causal`` also hides every key after the
query's own index. The result is [batch, heads, queries, keys] in the type of ``query``. A row whose scores are all
-infinity gives zeros and not NaN, as torch's scaled_dot_product_attention does; NaN among the scores gives NaN. float16 and
bfloat16 are computed in float32 and rounded once.

Source: *Attention Is All You Need*, 2017; grouped queries: *GQA*, 2023.
"""


def _rank_four(op: str, **operands: TensorType | None) -> None:
    for name, operand in operands.items():
        if operand is not None and operand.shape is not None and len(operand.shape) != 4:
            raise VerifyError(f"actgraph.{op}: {name} {operand} must have rank 4")


def _shape_of(kind: TensorType) -> Shape:
    return kind.shape if kind.shape is not None else (None, None, None, None)


def _check_groups(op: str, heads: object, kv_heads: object) -> None:
    if isinstance(heads, int) and isinstance(kv_heads, int) and (kv_heads < 1 or heads % kv_heads):
        raise VerifyError(f"actgraph.{op}: {kv_heads} key heads do not divide {heads} query heads")


def _pattern_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    query, key, mask = types
    assert query is not None and key is not None
    _rank_four("attention_pattern", query=query, key=key)
    (batch, heads, queries, width), (_, kv_heads, keys, key_width) = _shape_of(query), _shape_of(key)
    if isinstance(width, int) and isinstance(key_width, int) and width != key_width:
        raise VerifyError(f"actgraph.attention_pattern: query {query} and key {key} differ in the last axis")
    _check_groups("attention_pattern", heads, kv_heads)
    shape = (batch, heads, queries, keys)
    if mask is not None:
        layout.check_into("attention_pattern", "mask", mask.shape, shape)
    return [TensorType(query.dtype, shape)]


def _repeated(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1) if x.shape[1] != heads else x


def _probabilities(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float, softcap: float, is_causal: bool
) -> torch.Tensor:
    """The pattern in the type that arithmetic is done in."""
    import torch

    q = layout.torch_compute(query)
    scores = (q * single(scale)) @ _repeated(key.to(q.dtype), query.shape[1]).transpose(-1, -2)
    if softcap:
        scores = torch.tanh(scores / single(softcap)) * single(softcap)
    hidden = torch.full((), -math.inf, dtype=q.dtype, device=q.device)
    if mask is not None:
        scores = torch.where(mask, scores, hidden) if mask.dtype == torch.bool else scores + mask.to(q.dtype)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = torch.where(allowed, scores, hidden)
    blind = (scores == -math.inf).all(-1, keepdim=True)
    return torch.where(blind, torch.zeros((), dtype=q.dtype, device=q.device), torch.softmax(scores, -1))


def _pattern(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None = None, *, scale: float, is_causal: bool = False
) -> torch.Tensor:
    return _probabilities(query, key, mask, scale, 0.0, is_causal).to(query.dtype)


def _pattern_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    query, key, mask = operands
    assert query is not None and key is not None
    return [b.cast(_body_probabilities(b, query, key, mask, 0.0, attributes["is_causal"]), query.dtype)]


def _body_probabilities(
    b: BodyBuilder,
    query: BodyValue,
    key: BodyValue,
    mask: BodyValue | None,
    softcap: float,
    is_causal: bool,
    key_scale: BodyValue | None = None,
) -> BodyValue:
    q = b.up(query) * b.attribute("scale", b.up(query).dtype)
    keys = _body_numbers(b, key, key_scale, q.dtype)
    scores = _grouped_product(b, q, b.transpose(keys, [0, 1, 3, 2]), query, key)
    if softcap:
        cap = b.const(single(softcap), q.dtype)
        scores = b.op("Tanh", scores / cap) * cap
    if mask is not None:
        scores = b.where(mask, scores, -math.inf) if mask.dtype is DType.BOOL else scores + b.cast(mask, q.dtype)
    if is_causal:
        square = b.fill(b.concat([b.size(query, 2), b.size(key, 2)]), 1.0, DType.F32, 2)
        allowed = b.cast(b.op("Trilu", square, attributes={"upper": 0}), DType.BOOL)
        scores = b.where(allowed, scores, -math.inf)
    seen = b.cast(b.op("Not", scores.equal(-math.inf), dtype=DType.BOOL), DType.F32)
    blind = b.reduce("ReduceMax", seen, [3]).equal(0)
    return b.where(blind, 0.0, b.op("Softmax", scores, attributes={"axis": -1}))


def _grouped_product(b: BodyBuilder, left: BodyValue, right: BodyValue, many: BodyValue, few: BodyValue) -> BodyValue:
    """``left @ right`` per head, where ``right`` has the heads of ``few`` and ``left`` those of ``many``, a multiple."""
    if _known_heads(many) is not None and _known_heads(many) == _known_heads(few):
        b.specialise("mha")
        return b.op("MatMul", left, right)
    shape = b.shape(left)
    rest = b.slice(shape, b.ints([2]), b.ints([4]), 0)
    grouped = b.reshape(left, b.concat([b.size(few, 0), b.size(few, 1), b.ints([-1]), rest]), 5)
    product = b.op("MatMul", grouped, b.unsqueeze(right, [2]))
    return b.reshape(product, b.concat([b.slice(shape, b.ints([0]), b.ints([3]), 0), b.size(right, 3)]), 4)


def _known_heads(x: BodyValue) -> int | None:
    heads = x.shape[1] if x.shape is not None else None
    return heads if isinstance(heads, int) else None


register(
    OpDef(
        name="attention_pattern",
        doc=_PATTERN_DOC,
        inputs=(
            Operand("query", "[batch, heads, queries, head]"),
            Operand("key", "[batch, kv_heads, keys, head]", same_as="query"),
            Operand("mask", "keys that may be seen, or numbers to add", dtypes=COMPUTE_FLOATS | {DType.BOOL}, optional=True),
        ),
        outputs=("pattern",),
        infer=_pattern_infer,
        reference=_pattern,
        body=_pattern_body,
        attributes=(
            Attribute("scale", "float", "what products of query and key are multiplied by", structural=False),
            Attribute("is_causal", "bool", "hide the keys after the query's own index", default=False),
        ),
        traits=frozenset({Trait.PER_SAMPLE}),
        min_opset=14,
        samples=(
            Sample(((2, 3, 5, 4), (2, 3, 5, 4), None), {"scale": 0.5}),
            Sample(((2, 4, 3, 8), (2, 2, 7, 8), None), {"scale": 0.35}, note="grouped queries"),
            Sample(((2, 3, 5, 4), (2, 3, 5, 4), (2, 1, 5, 5)), {"scale": 0.5}, draw=draws(normal, normal, boolean)),
            Sample(((2, 3, 5, 4), (2, 3, 6, 4), (5, 6)), {"scale": 0.5}, draw=draws(normal, normal, normal)),
            Sample(((1, 6, 5, 4), (1, 2, 5, 4), None), {"scale": 0.5, "is_causal": True}),
            Sample(((2, 2, 3, 4), (2, 2, 3, 4), (2, 1, 3, 3)), {"scale": 1.0, "is_causal": True},
                   draw=draws(normal, normal, lambda rng, shape, dtype: boolean(rng, shape, dtype) & (rng.random(shape) < 0.3)),
                   note="rows that may see no key"),
            Sample(((1, 1, 1, 2), (1, 1, 1, 2), None), {"scale": -2.0}),
            Sample(((2, 2, 0, 4), (2, 2, 3, 4), None), {"scale": 0.5}, note="no queries"),
            Sample(((1, 2, 3, 4), (1, 2, 3, 4), (1, 1, 1, 3)), {"scale": 0.5},
                   draw=draws(normal, normal, lambda rng, shape, dtype: boolean(rng, shape, dtype) & False), note="no key"),
        ),
    )
)  # fmt: skip


# --- attention_mix ----------------------------------------------------------------------------------------------------------

_MIX_DOC = """
Values mixed by an attention pattern: ``pattern value`` per head.

``pattern`` [batch, heads, queries, keys]; ``value`` [batch, kv_heads, keys, head], where kv_heads divides heads and head
``h`` reads value head ``h * kv_heads / heads``. The result is [batch, heads, queries, head]. float16 and bfloat16 are
computed in float32 and rounded once.

Source: *Attention Is All You Need*, 2017; grouped queries: *GQA*, 2023.
"""


def _mix_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    pattern, value = types
    assert pattern is not None and value is not None
    _rank_four("attention_mix", pattern=pattern, value=value)
    (batch, heads, queries, keys), (_, kv_heads, value_keys, width) = _shape_of(pattern), _shape_of(value)
    if isinstance(keys, int) and isinstance(value_keys, int) and keys != value_keys:
        raise VerifyError(f"actgraph.attention_mix: pattern {pattern} and value {value} differ in their keys")
    _check_groups("attention_mix", heads, kv_heads)
    return [TensorType(pattern.dtype, (batch, heads, queries, width))]


def _mix(pattern: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    mixed = layout.torch_compute(pattern) @ _repeated(layout.torch_compute(value), pattern.shape[1])
    return mixed.to(pattern.dtype)


def _mix_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    pattern, value = operands
    assert pattern is not None and value is not None
    return [b.cast(_grouped_product(b, b.up(pattern), b.up(value), pattern, value), pattern.dtype)]


register(
    OpDef(
        name="attention_mix",
        doc=_MIX_DOC,
        inputs=(
            Operand("pattern", "[batch, heads, queries, keys]"),
            Operand("value", "[batch, kv_heads, keys, head]", same_as="pattern"),
        ),
        outputs=("y",),
        infer=_mix_infer,
        reference=_mix,
        body=_mix_body,
        traits=frozenset({Trait.PER_SAMPLE}),
        min_opset=13,
        samples=(
            Sample(((2, 3, 5, 4), (2, 3, 4, 8))),
            Sample(((2, 4, 3, 7), (2, 2, 7, 5)), note="grouped queries"),
            Sample(((1, 1, 1, 1), (1, 1, 1, 2))),
            Sample(((2, 2, 0, 3), (2, 2, 3, 4)), note="no queries"),
        ),
    )
)


# --- attention --------------------------------------------------------------------------------------------------------------

_ATTENTION_DOC = """
Attention: ``softmax(cap(scale * query key^T) + mask) value`` per head, and zeros for a query that may see no key.

``query`` [batch, heads, queries, head]; ``key`` [batch, kv_heads, keys, head] and ``value`` [batch, kv_heads, keys, width],
where kv_heads divides heads and query head ``h`` reads key head ``h * kv_heads / heads``: grouped queries without a repeated
copy of keys and values. ``mask`` broadcasts to [batch, heads, queries, keys]: boolean (true: may be seen) or numbers that
are added. ``softcap`` c > 0 caps scores before the mask, ``c * tanh(scores / c)``. The result is [batch, heads, queries,
width] in the type of ``query``; NaN among the scores gives NaN.

Keys and values may be stored as a cache keeps them: float16 or bfloat16 next to wider queries, or int8 codes with a scale per
token and key head, ``key_scale`` and ``value_scale`` [batch, kv_heads, keys, 1] (``code * scale``). They are read as float32
(float64 next to float64 queries), as all is computed; kernels widen what they read and write no copy.

Source: *Attention Is All You Need*, 2017; grouped queries: *GQA*, 2023; soft-capping: *Gemma 2*, 2024.
"""

#: Types of keys and values next to queries of another type.
_STORED = frozenset({DType.F16, DType.BF16, DType.I8})


def _check_stored(name: str, query: TensorType, stored: TensorType, scale: TensorType | None) -> None:
    """Raise VerifyError for keys or values that are not stored in one of the ways that the op reads."""
    kind = stored.dtype
    if kind is not None and query.dtype is not None and kind is not query.dtype and kind not in _STORED:
        raise VerifyError(f"actgraph.attention: {name} {stored} is neither {query.dtype} as query nor f16, bf16 or i8")
    if kind is not None and (kind is DType.I8) != (scale is not None):
        wants = "needs a scale" if kind is DType.I8 else "takes no scale"
        raise VerifyError(f"actgraph.attention: {name} {stored} {wants}", f"{name}_scale goes with int8 codes")
    if scale is not None and stored.shape is not None:
        wanted = (*stored.shape[:3], 1)
        if scale.shape is not None and len(scale.shape) != 4:
            raise VerifyError(f"actgraph.attention: {name}_scale {scale} must be {TensorType(DType.F32, wanted)}")
        layout.check_into("attention", f"{name}_scale", scale.shape, wanted)
        layout.check_into("attention", f"the rows of {name}", wanted, scale.shape)


def _attention_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    query, key, value, mask, key_scale, value_scale = types
    assert query is not None and key is not None and value is not None
    if attributes["softcap"] < 0:
        raise VerifyError(f"actgraph.attention: softcap is {attributes['softcap']}", "0 caps nothing")
    _check_stored("key", query, key, key_scale)
    _check_stored("value", query, value, value_scale)
    pattern = _pattern_infer([query, key, mask], {"is_causal": False})[0]
    return _mix_infer([pattern, value], {})


def _numbers(stored: torch.Tensor, scale: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor:
    """Keys or values as arithmetic reads them."""
    compute = layout.torch_compute(query).dtype
    return stored.to(compute) if scale is None else stored.to(compute) * scale.to(compute)


def _body_numbers(b: BodyBuilder, stored: BodyValue, scale: BodyValue | None, compute: DType) -> BodyValue:
    values = b.cast(stored, compute)
    return values if scale is None else values * b.cast(scale, compute)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    pattern = _probabilities(query, _numbers(key, key_scale, query), mask, scale, softcap, is_causal=False)
    return (pattern @ _repeated(_numbers(value, value_scale, query), query.shape[1])).to(query.dtype)


def _attention_eager(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    if key.dtype != query.dtype or value.dtype != query.dtype:
        key, value = _numbers(key, key_scale, query), _numbers(value, value_scale, query)
    if query.dtype not in (torch.float32, torch.float64):  # torch's kernels round the pattern to the small type as well
        return _attention(query, key, value, mask, scale=scale, softcap=softcap)
    if softcap or key.shape[2] == 0 or (mask is not None and mask.dim() != 4):
        return _attention(query, key, value, mask, scale=scale, softcap=softcap)
    grouped = key.shape[1] != query.shape[1]
    bias = mask if mask is None or mask.dtype == query.dtype or not mask.is_floating_point() else mask.to(query.dtype)
    return scaled_dot_product_attention(query, key, value, bias, scale=single(scale), enable_gqa=grouped)


def _attention_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    query, key, value, mask, key_scale, value_scale = operands
    assert query is not None and key is not None and value is not None
    pattern = _body_probabilities(b, query, key, mask, attributes["softcap"], is_causal=False, key_scale=key_scale)
    values = _body_numbers(b, value, value_scale, pattern.dtype)
    return [b.cast(_grouped_product(b, pattern, values, query, value), query.dtype)]


_STORED_DOC = "as query, or f16, bf16, or i8 codes with scales"


def _sample(
    *shapes: tuple[int, ...] | None,
    rules: Sequence[Rule] = (normal, normal, normal, normal),
    note: str = "",
    dtypes: tuple[DType, ...] = (),
    **given: Any,
) -> Sample:
    """Shapes of query, key, value and perhaps mask, and of scales where keys or values are drawn as codes."""
    query, key, value, *mask = shapes
    assert key is not None and value is not None
    scaled = [(*x[:3], 1) if rule is _codes else None for x, rule in zip((key, value), rules[1:3], strict=True)]
    every = (query, key, value, *(mask or [None]), *scaled)
    drawn = draws(*rules[:3], rules[3] if len(rules) > 3 else normal, _scales, _scales)
    return Sample(every, {"scale": 0.5, **given}, draw=drawn, note=note, dtypes=dtypes)


def _scales(rng: Any, shape: tuple[int, ...], dtype: DType) -> Any:
    return scales(rng, shape, dtype).astype(DType.F64.numpy if dtype is DType.F64 else DType.F32.numpy)


def _few(rng: Any, shape: tuple[int, ...], dtype: DType) -> Any:
    return boolean(rng, shape, dtype) & (rng.random(shape) < 0.3)


def _half(rng: Any, shape: tuple[int, ...], dtype: DType) -> Any:
    return normal(rng, shape, DType.F16)


_codes = integers(-127, 128, DType.I8)
_SEEN = (normal, normal, normal, boolean)
_NO_WIDER = (DType.F32, DType.F16, DType.BF16)

register(
    OpDef(
        name="attention",
        doc=_ATTENTION_DOC,
        inputs=(
            Operand("query", "[batch, heads, queries, head]"),
            Operand("key", f"[batch, kv_heads, keys, head]; {_STORED_DOC}", dtypes=COMPUTE_FLOATS | {DType.I8}),
            Operand("value", f"[batch, kv_heads, keys, width]; {_STORED_DOC}", dtypes=COMPUTE_FLOATS | {DType.I8}),
            Operand("mask", "keys that may be seen, or numbers to add", dtypes=COMPUTE_FLOATS | {DType.BOOL}, optional=True),
            Operand("key_scale", "of int8 keys, [batch, kv_heads, keys, 1]", optional=True),
            Operand("value_scale", "of int8 values, [batch, kv_heads, keys, 1]", optional=True),
        ),
        outputs=("y",),
        infer=_attention_infer,
        reference=_attention,
        eager=_attention_eager,
        body=_attention_body,
        attributes=(
            Attribute("scale", "float", "what products of query and key are multiplied by", structural=False),
            Attribute("softcap", "float", "the bound that tanh puts on the scores; 0: none", default=0.0),
        ),
        traits=frozenset({Trait.PER_SAMPLE}),
        min_opset=14,
        samples=(
            _sample((2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 6)),
            _sample((2, 4, 3, 8), (2, 2, 7, 8), (2, 2, 7, 8), scale=0.35, note="grouped queries"),
            _sample((2, 4, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4), (2, 1, 3, 5), rules=_SEEN),
            _sample((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 4), (5, 6), softcap=2.0, note="capped"),
            _sample((2, 2, 3, 4), (2, 1, 3, 4), (2, 1, 3, 4), (2, 1, 3, 3), scale=1.0, rules=(normal, normal, normal, _few),
                    note="rows that may see no key"),
            _sample((2, 2, 0, 4), (2, 2, 3, 4), (2, 2, 3, 4), note="no queries"),
            _sample((1, 4, 1, 8), (1, 1, 9, 8), (1, 1, 9, 8), (1, 1, 1, 9), scale=0.35, rules=_SEEN,
                    note="one token, one key head"),
            _sample((2, 4, 1, 8), (2, 2, 9, 8), (2, 2, 9, 6), (2, 1, 1, 9), rules=(normal, _codes, _codes, boolean),
                    note="codes"),
            _sample((2, 3, 2, 8), (2, 3, 9, 8), (2, 3, 9, 8), rules=(normal, _half, _half), dtypes=_NO_WIDER,
                    note="in half precision"),
            _sample((1, 4, 1, 8), (1, 1, 5, 8), (1, 1, 5, 4), rules=(normal, _half, _codes), softcap=3.0, dtypes=_NO_WIDER,
                    note="keys in half precision, values in codes"),
        ),
    )
)  # fmt: skip
