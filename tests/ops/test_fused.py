"""The ops that kernels claim whole, against transformers' own modules and plain compositions, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actgraph.errors import VerifyError
from actgraph.ops import DType
from actgraph.ops.quantizer import pack_nibbles, quantize_array, weight_parameters
from actgraph.ops.torch_library import torch_op

feed_forward, rms_norm, layer_norm, rotary = map(torch_op, ("feed_forward", "rms_norm", "layer_norm", "rotary"))


def weights(*shapes: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("sparse", ["none", "act", "hidden"])
@pytest.mark.parametrize("gated", [True, False])
def test_feed_forward_is_the_composition(sparse: str, gated: bool) -> None:
    x, up, down, gate, up_bias, down_bias, gate_bias = weights((2, 3, 8), (12, 8), (12, 6), (12, 8), (12,), (6,), (12,))
    cut = lambda v: torch_op("gate")(v, threshold=0.4)  # noqa: E731
    act = torch.nn.functional.silu(torch.nn.functional.linear(x, gate if gated else up, gate_bias if gated else up_bias))
    act = cut(act) if sparse == "act" else act
    hidden = act * torch.nn.functional.linear(x, up, up_bias) if gated else act
    hidden = cut(hidden) if sparse == "hidden" else hidden
    extra = (gate, None, None, None, up_bias, down_bias, gate_bias) if gated else (None, None, None, None, up_bias, down_bias)
    got = feed_forward(x, up, down, *extra, sparse=sparse, threshold=0.4)
    torch.testing.assert_close(got, hidden @ down + down_bias, rtol=1e-5, atol=1e-5)
    if sparse != "none":
        assert (got - feed_forward(x, up, down, *extra)).abs().max() > 0.05


def test_feed_forward_of_packed_codes_has_the_implicit_zero_point() -> None:
    x, up, down, gate = weights((3, 16), (32, 16), (32, 6), (32, 16))
    stored, plain = [], []
    for weight, axis in ((up, 1), (down, 0), (gate, 1)):
        scale, zero = weight_parameters(weight.numpy(), DType.U4, axis=axis, block_size=16)
        codes = quantize_array(weight.numpy(), scale, zero, DType.U4, axis=axis, block_size=16)
        assert (zero == 8).all()
        stored.append((torch.from_numpy(pack_nibbles(codes)), torch.from_numpy(scale)))
        numbers = torch_op("dequantize")(
            torch.from_numpy(codes.astype("uint8")), *(torch.from_numpy(p) for p in (scale, zero)), axis=axis, block_size=16
        )
        plain.append(numbers)
    (u, us), (d, ds), (g, gs) = stored
    got = feed_forward(x, u, d, g, us, ds, gs, packed="u4", block_size=16, sparse="act", threshold=0.3)
    torch.testing.assert_close(got, feed_forward(x, *plain, sparse="act", threshold=0.3), rtol=1e-5, atol=1e-5)


def test_a_token_that_is_not_finite_keeps_to_itself() -> None:
    x, up, down, gate = weights((4, 8), (12, 8), (12, 6), (12, 8))
    want = feed_forward(x, up, down, gate, sparse="act", threshold=0.3)
    x[1, 2], x[2, 0] = torch.nan, torch.inf
    got = feed_forward(x, up, down, gate, sparse="act", threshold=0.3)
    torch.testing.assert_close(got[[0, 3]], want[[0, 3]], rtol=0, atol=0)
    assert not got[1].isfinite().any()


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_of_torch_and_gemma(offset: float) -> None:
    x, weight, bias = weights((2, 3, 8), (8,), (8,))
    want = torch.nn.functional.rms_norm(x, (8,), weight + offset, 1e-6)
    torch.testing.assert_close(rms_norm(x, weight, offset=offset), want, rtol=1e-6, atol=1e-6)
    want = torch.nn.functional.layer_norm(x, (8,), weight, bias, 1e-5)
    torch.testing.assert_close(layer_norm(x, weight, bias, eps=1e-5), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_rotary_of_transformers(style: str) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    cohere = pytest.importorskip("transformers.models.cohere.modeling_cohere")
    x, angles = weights((2, 3, 4, 8), (2, 4, 4))
    wide = torch.cat([angles, angles], -1) if style == "half" else angles.repeat_interleave(2, -1)
    module = llama if style == "half" else cohere
    want, _ = module.apply_rotary_pos_emb(x, x, wide.cos(), wide.sin())
    torch.testing.assert_close(rotary(x, wide.cos(), wide.sin(), style=style), want, rtol=1e-6, atol=1e-6)


def test_rotary_of_a_part_leaves_the_rest() -> None:
    x, angles = weights((2, 3, 4, 10), (1, 4, 6))
    got = rotary(x, angles.cos(), angles.sin(), rotary_dim=6)
    assert torch.equal(got[..., 6:], x[..., 6:])
    torch.testing.assert_close(got[..., :6], rotary(x[..., :6].contiguous(), angles.cos(), angles.sin()))


@pytest.mark.parametrize(
    ("op", "operands", "attributes", "message"),
    [
        (feed_forward, ((2, 8), (12, 8), (11, 6)), {}, "neurons of down_weight: 11"),
        (feed_forward, ((2, 7), (12, 8), (12, 6)), {}, "channels of x"),
        (feed_forward, ((2, 8), (12, 8), (12, 6), (12, 7)), {}, "inputs of gate_weight"),
        (feed_forward, ((2, 8), (12, 8), (12, 6), None, None, None, (12,)), {}, "no gate_weight"),
        (feed_forward, ((2, 8), (12, 8), (12, 6), *[None] * 7, (12,)), {}, "takes no thresholds"),
        (feed_forward, ((2, 8), (12, 8), (12, 6), *[None] * 4, (11,)), {}, "up_bias"),
        (rms_norm, ((2, 8), (7,)), {}, "one number per channel"),
        (layer_norm, ((2, 8), (8,), (1, 8)), {}, "one number per channel"),
        (rotary, ((2, 3, 8), (1, 3, 8), (1, 3, 8)), {}, "batch, heads, seq, head"),
        (rotary, ((1, 2, 3, 8), (1, 3, 6), (1, 3, 6)), {}, "does not broadcast to"),
        (rotary, ((1, 2, 3, 8), (1, 3, 6), (1, 3, 6)), {"rotary_dim": 10}, "no even part"),
    ],
)
def test_what_does_not_fit_is_refused(op: Any, operands: Any, attributes: dict[str, Any], message: str) -> None:
    tensors = [None if shape is None else torch.ones(shape) for shape in operands]
    with pytest.raises(VerifyError, match=message):
        op(*tensors, **attributes)
