"""The op ``feed_forward``: up (and gate), activation, threshold and down in one, so that dropped neurons are never read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from actgraph.errors import VerifyError
from actgraph.ops import layout as lay
from actgraph.ops.body import compute_dtype
from actgraph.ops.drawing import draws, integers, normal, positive, scales
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import Attribute, Attributes, OpDef, Operand, Sample, Trait, register
from actgraph.ops.shapes import Dim, TensorType
from actgraph.ops.sparsity import GATE
from actgraph.ops.weights import BLOCK_SIZE, PACKED, WEIGHTS, body_weight, check_weight, torch_weight

if TYPE_CHECKING:
    import torch

    from actgraph.ops.body import BodyBuilder, BodyValue

#: The activations that the op knows; ``relu2`` is the square of ``relu``.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")

_DOC = """
A feed-forward block: ``y = (activation(x Wg + bg) * (x Wu + bu)) Wd + bd``; without a gate it is
``y = activation(x Wu + bu) Wd + bd``.

``x`` [.., K]; ``up_weight`` and ``gate_weight`` [F, K] (a row per neuron); ``down_weight`` [F, N] (a row per neuron, too);
``y`` [.., N] of the type of ``x``. Biases are [F], [F] and [N]. Scales make codes of the weights, as in ``linear``: [], [1],
one per output channel ([F]; [N] for ``down_weight``), or with ``block_size`` g one per group along the inputs ([F, ceil(K/g)];
[ceil(F/g), N] for ``down_weight``). Codes are symmetric: there are no zero points, and ``packed`` "u4" has the implicit one 8.
A weight without a scale holds numbers; codes and numbers may be mixed unless ``packed``.

``sparse`` says which neurons are dropped by ``keep`` and ``threshold`` (or ``thresholds`` [] or [F]), rules of ``gate``:
"none"; "act", the gate is on the activation, so that rows of ``up_weight`` and ``down_weight`` of dropped neurons are not
read; "hidden", the gate is on the input of down, so that those of ``down_weight`` are not. Dropped neurons contribute
nothing: with "act" the product is +0.0 where the gated activation is 0, whatever ``up`` is there. Weights must be finite.
Without a gate "act" and "hidden" are the same.

float16 and bfloat16 are computed in float32 throughout and rounded once. A token that holds a NaN or an infinity has
unspecified results; other tokens are not affected. The gradient flows to everything but ``thresholds``.

Sources: Shazeer, *GLU Variants Improve Transformer*, 2020; So et al., *Primer*, 2021 (relu2); *CATS*, 2024 ("act");
*TEAL*, 2024 and *ProSparse* (FATReLU), 2024 ("hidden").
"""

_UP, _DOWN = "out_in", "in_out"


def _infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    x, up, down, gate, up_scale, down_scale, gate_scale, up_bias, down_bias, gate_bias, thresholds = types
    assert x is not None and up is not None and down is not None
    if gate is None and (gate_scale is not None or gate_bias is not None):
        raise VerifyError("actgraph.feed_forward: there is no gate_weight, so it has no scale and no bias either")
    neurons, inputs = _weight("up_weight", up, up_scale, _UP, attributes)
    outputs, hidden = _weight("down_weight", down, down_scale, _DOWN, attributes)
    _same("the neurons of down_weight", hidden, neurons)
    if gate is not None:
        rows, columns = _weight("gate_weight", gate, gate_scale, _UP, attributes)
        _same("the neurons of gate_weight", rows, neurons)
        _same("the inputs of gate_weight", columns, inputs)
    if x.shape is not None:
        if not x.shape:
            raise VerifyError("actgraph.feed_forward: x needs a channel axis")
        _same("the channels of x", x.shape[-1], inputs)
    for name, bias, size in (
        ("up_bias", up_bias, neurons),
        ("gate_bias", gate_bias, neurons),
        ("down_bias", down_bias, outputs),
    ):
        if bias is not None and bias.shape is not None:
            if len(bias.shape) != 1:
                raise VerifyError(f"actgraph.feed_forward: {name} {bias} must have rank 1")
            _same(name, bias.shape[0], size)
    if thresholds is not None:
        if attributes["sparse"] == "none":
            raise VerifyError("actgraph.feed_forward: sparse = 'none' takes no thresholds")
        if thresholds.shape is not None and len(thresholds.shape) > 1:
            raise VerifyError(f"actgraph.feed_forward: thresholds {thresholds} must be [] or one per neuron")
        if thresholds.shape:
            _same("thresholds", thresholds.shape[0], neurons)
    return [TensorType(x.dtype, None if x.shape is None else (*x.shape[:-1], outputs))]


def _weight(name: str, weight: TensorType, scale: TensorType | None, layout: str, attributes: Attributes) -> tuple[Dim, Dim]:
    packed = attributes["packed"]
    if scale is not None and weight.dtype is DType.U8 and not packed:
        raise VerifyError(f"actgraph.feed_forward: codes of {name} are symmetric (i8, float8, or 4 bits packed), not u8")
    if packed and scale is None:
        raise VerifyError(f"actgraph.feed_forward: {name} is packed and needs a scale")
    block = attributes["block_size"] if scale is not None else 0
    return check_weight("feed_forward", name, weight, scale, None, layout=layout, block=block, packed=packed)


def _same(name: str, size: Dim, expected: Dim) -> None:
    if isinstance(size, int) and isinstance(expected, int) and size != expected:
        raise VerifyError(f"actgraph.feed_forward: {name}: {size}, expected {expected}")


def _activate(h: torch.Tensor, activation: str) -> torch.Tensor:
    from torch.nn import functional

    if activation == "silu":
        return functional.silu(h)
    if activation in ("gelu", "gelu_tanh"):
        return functional.gelu(h, approximate="none" if activation == "gelu" else "tanh")
    positive_part = functional.relu(h)
    return positive_part if activation == "relu" else positive_part * positive_part


def _activate_body(b: BodyBuilder, h: BodyValue, activation: str) -> BodyValue:
    if activation == "silu":
        return h * b.op("Sigmoid", h)
    if activation == "gelu":
        return h * 0.5 * (b.op("Erf", h * math.sqrt(0.5)) + 1)
    if activation == "gelu_tanh":
        return h * 0.5 * (b.op("Tanh", (h + h * h * h * 0.044715) * math.sqrt(2 / math.pi)) + 1)
    positive_part = b.op("Relu", h)
    return positive_part if activation == "relu" else positive_part * positive_part


def _feed_forward(
    x: torch.Tensor,
    up_weight: torch.Tensor,
    down_weight: torch.Tensor,
    gate_weight: torch.Tensor | None = None,
    up_scale: torch.Tensor | None = None,
    down_scale: torch.Tensor | None = None,
    gate_scale: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    thresholds: torch.Tensor | None = None,
    *,
    activation: str = "silu",
    block_size: int = 0,
    packed: str = "",
    sparse: str = "none",
    keep: str = "abs>",
    threshold: float = 0.0,
) -> torch.Tensor:
    import torch

    h = lay.torch_compute(x)

    def product(
        value: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None, layout: str
    ) -> torch.Tensor:
        middle = None if scale is None or packed != "u4" else torch.full_like(scale, 8, dtype=torch.int32)
        block = block_size if scale is not None else 0
        y = value @ torch_weight(weight, scale, middle, h.dtype, layout=layout, block=block, packed=packed)
        return y if bias is None else y + bias.to(h.dtype)

    def drop(value: torch.Tensor) -> torch.Tensor:
        result = GATE.reference(value, thresholds, threshold=threshold, keep=keep)
        assert not isinstance(result, tuple)
        return result

    up = product(h, up_weight, up_scale, up_bias, _UP)
    if gate_weight is None:
        hidden = _activate(up, activation)
        hidden = hidden if sparse == "none" else drop(hidden)
    else:
        act = _activate(product(h, gate_weight, gate_scale, gate_bias, _UP), activation)
        if sparse == "act":
            act = drop(act)
            hidden = (act * up).masked_fill(act == 0, 0.0)
        else:
            hidden = act * up if sparse == "none" else drop(act * up)
    return product(hidden, down_weight, down_scale, down_bias, _DOWN).to(x.dtype)


def _body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    x, up_weight, down_weight, gate_weight, up_scale, down_scale, gate_scale, up_bias, down_bias, gate_bias, thresholds = (
        operands
    )
    assert x is not None and up_weight is not None and down_weight is not None
    packed, sparse, compute = attributes["packed"], attributes["sparse"], compute_dtype(x.dtype)

    def product(value: BodyValue, weight: BodyValue, scale: BodyValue | None, bias: BodyValue | None, layout: str) -> BodyValue:
        middle = None if scale is None or packed != "u4" else b.cast(b.cast(scale, DType.F32) * 0.0 + 8.0, DType.U8)
        block = attributes["block_size"] if scale is not None else 0
        matrix = body_weight(b, weight, scale, middle, compute, layout=layout, block=block, packed=packed)
        y = b.op("MatMul", value, matrix, rank=x.rank)
        return y if bias is None else y + b.cast(bias, compute)

    def drop(value: BodyValue) -> BodyValue:
        return GATE.body(b, [value, thresholds], {"keep": attributes["keep"], "axis": -1})[0]

    h = b.up(x)
    up = product(h, up_weight, up_scale, up_bias, _UP)
    if gate_weight is None:
        hidden = _activate_body(b, up, attributes["activation"])
        hidden = hidden if sparse == "none" else drop(hidden)
    else:
        act = _activate_body(b, product(h, gate_weight, gate_scale, gate_bias, _UP), attributes["activation"])
        if sparse == "act":
            act = drop(act)
            hidden = b.where(act.equal(0), 0.0, act * up)
        else:
            hidden = act * up if sparse == "none" else drop(act * up)
    return [b.cast(product(hidden, down_weight, down_scale, down_bias, _DOWN), x.dtype)]


# --- samples ----------------------------------------------------------------------------------------------------------------


def _sample(
    tokens: tuple[int, ...],
    sizes: tuple[int, int, int],
    *,
    gated: bool = True,
    scaled: str = "",
    bias: bool = False,
    thresholds: tuple[int, ...] | None = None,
    kind: DType | None = None,
    dtypes: tuple[DType, ...] = (DType.F32,),
    note: str = "",
    **attributes: Any,
) -> Sample:
    """``sizes`` are K, F and N; ``scaled`` "channel" or "group" gives the scales their shapes."""
    inputs, neurons, outputs = sizes
    group, half = attributes.get("block_size", 0), 2 if attributes.get("packed") else 1
    up_scale: tuple[int, ...] | None = None
    down_scale: tuple[int, ...] | None = None
    if scaled == "channel":
        up_scale, down_scale = (neurons,), (outputs,)
    elif scaled == "group":
        up_scale, down_scale = (neurons, -(-inputs // group)), (-(-neurons // group), outputs)
    up_shape = (neurons, inputs // half)
    shapes = (
        (*tokens, inputs), up_shape, (neurons, outputs // half), up_shape if gated else None,
        up_scale, down_scale, up_scale if gated else None,
        (neurons,) if bias else None, (outputs,) if bias else None, (neurons,) if bias and gated else None, thresholds,
    )  # fmt: skip
    weight = normal if kind is None else integers(0, 256, kind) if kind is DType.U8 else integers(-127, 128, kind)
    rules = (normal, weight, weight, weight, scales, scales, scales, normal, normal, normal, positive)
    return Sample(shapes, attributes, dtypes=dtypes, draw=draws(*rules), note=note)


_ALL = (DType.F64, DType.F32, DType.F16, DType.BF16)
_SOME = (DType.F32, DType.BF16)
_SMALL = (8, 12, 6)

_SAMPLES = (
    _sample((2, 3), _SMALL, dtypes=_ALL),
    _sample((2, 3), _SMALL, bias=True, sparse="act", threshold=0.3, dtypes=_ALL),
    _sample((2, 3), _SMALL, bias=True, thresholds=(12,), sparse="hidden", activation="gelu_tanh", dtypes=_ALL),
    _sample((2, 3), _SMALL, sparse="act", keep="x>=", threshold=0.5, thresholds=(), activation="relu", dtypes=_SOME),
    _sample((2, 3), _SMALL, gated=False, bias=True, activation="gelu", dtypes=_SOME),
    _sample((2, 3), _SMALL, gated=False, sparse="act", keep="x>=", threshold=0.5, activation="relu2", dtypes=_ALL),
    _sample((4,), _SMALL, gated=False, sparse="hidden", threshold=0.5, activation="relu"),
    _sample((4,), _SMALL, bias=True, scaled="channel", kind=DType.I8, sparse="act", threshold=0.4, dtypes=_SOME),
    _sample((4,), (10, 12, 6), scaled="group", kind=DType.I8, block_size=4, sparse="hidden", threshold=1.0, note="short"),
    _sample((4,), (16, 32, 6), scaled="group", kind=DType.U8, packed="u4", block_size=16, dtypes=_SOME),
    _sample((4,), (16, 32, 6), scaled="channel", kind=DType.U8, packed="i4", gated=False, activation="silu"),
    _sample((4,), _SMALL, scaled="channel", kind=DType.F8E4M3, bias=True, sparse="act", threshold=0.3, note="float8"),
    _sample((0, 3), _SMALL, bias=True, sparse="act", threshold=0.3, note="no tokens"),
    _sample((), _SMALL, activation="gelu_tanh", note="one token without axes"),
    _sample((3,), (67, 131, 33), scaled="channel", kind=DType.I8, sparse="act", threshold=0.3, note="large"),
)  # fmt: skip

FEED_FORWARD = register(
    OpDef(
        name="feed_forward",
        doc=_DOC,
        inputs=(
            Operand("x", "[.., K]"),
            Operand("up_weight", "[F, K], numbers or codes", dtypes=WEIGHTS),
            Operand("down_weight", "[F, N], numbers or codes", dtypes=WEIGHTS),
            Operand("gate_weight", "[F, K], numbers or codes; absent: no gate", dtypes=WEIGHTS, optional=True),
            Operand("up_scale", "of codes: [], [1], [F] or [F, ceil(K/g)]", optional=True),
            Operand("down_scale", "of codes: [], [1], [N] or [ceil(F/g), N]", optional=True),
            Operand("gate_scale", "of codes: [], [1], [F] or [F, ceil(K/g)]", optional=True),
            Operand("up_bias", "[F]", optional=True),
            Operand("down_bias", "[N]", optional=True),
            Operand("gate_bias", "[F]", optional=True),
            Operand("thresholds", "in place of the attribute: [] or [F]", optional=True),
        ),
        outputs=("y",),
        infer=_infer,
        reference=_feed_forward,
        body=_body,
        attributes=(
            Attribute("activation", "str", "the nonlinearity", default="silu", choices=ACTIVATIONS),
            BLOCK_SIZE,
            PACKED,
            Attribute("sparse", "str", "what the gate is on", default="none", choices=("none", "act", "hidden")),
            Attribute("keep", "str", "which neurons stay, as in gate", default="abs>", choices=("abs>", "x>=")),
            Attribute("threshold", "float", "of the gate, for the whole tensor", default=0.0, structural=False),
        ),
        traits=frozenset({Trait.PER_TOKEN}),
        min_opset=13,
        samples=_SAMPLES,
    )
)
