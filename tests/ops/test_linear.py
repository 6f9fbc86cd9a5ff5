"""The fused linear against the ops that it stands for, composed, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from actgraph.errors import VerifyError
from actgraph.ops import DType, get_op
from actgraph.ops.quantizer import pack_nibbles, quantize_array, weight_parameters
from actgraph.ops.torch_library import torch_op
from tests.conformance.harness import build, run_onnxruntime, types_of

linear, gate, dequantize = torch_op("linear"), torch_op("gate"), torch_op("dequantize")


def case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(2, 3, 16, generator=generator),
        torch.randn(10, 16, generator=generator),
        torch.randn(10, generator=generator),
    )


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("keep", ["none", "abs>", "x>=", "top_k", "listed"])
def test_is_the_composition(layout: str, keep: str) -> None:
    """A gate, a dequantization and a linear, one by one, give the same numbers."""
    x, weight, bias = case()
    scale, zero = (torch.from_numpy(p) for p in weight_parameters(weight.numpy(), DType.U8, symmetric=False))
    codes = torch.from_numpy(quantize_array(weight.numpy(), scale.numpy(), zero.numpy(), DType.U8))
    listed = torch.tensor([1, 5, 7, -1])
    gated = {
        "none": lambda: x,
        "abs>": lambda: gate(x, threshold=0.7),
        "x>=": lambda: gate(x, threshold=0.7, keep="x>="),
        "top_k": lambda: torch_op("topk_gate")(x, k=5),
        "listed": lambda: torch_op("index_gate")(x, listed),
    }[keep]()
    want = torch.nn.functional.linear(gated, dequantize(codes, scale, zero), bias)
    stored = codes if layout == "out_in" else codes.T.contiguous()
    extra: dict[str, Any] = {"k": 5} if keep == "top_k" else {"threshold": 0.7} if keep in ("abs>", "x>=") else {}
    indices = listed if keep == "listed" else None
    got = linear(x, stored, scale, zero, bias, None, indices, layout=layout, keep=keep, **extra)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert keep == "none" or (got - torch.nn.functional.linear(x, dequantize(codes, scale, zero), bias)).abs().max() > 0.1


def test_groups_of_packed_codes_in_both_layouts() -> None:
    """[N, K] packed along K with groups (as MatMulNBits) and [K, N] packed along N hold the same weight."""
    x, weight, _ = case()
    scale, zero = weight_parameters(weight.numpy(), DType.U4, axis=1, block_size=8)
    codes = quantize_array(weight.numpy(), scale, zero, DType.U4, axis=1, block_size=8)
    want = x @ dequantize(torch.from_numpy(codes.astype(np.uint8)), torch.from_numpy(scale), torch.from_numpy(zero),
                          axis=1, block_size=8).T  # fmt: skip
    both = (("out_in", codes, scale, zero), ("in_out", codes.T, scale.T, zero.T))
    for layout, q, s, z in both:
        operands = [torch.from_numpy(np.ascontiguousarray(a)) for a in (pack_nibbles(q), s, z)]
        got = linear(x, *operands, layout=layout, packed="u4", block_size=8)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_kept_outputs_and_the_rest_is_plus_zero() -> None:
    x, weight, bias = case()
    kept = gate(torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(1)), threshold=0.6)
    kept[0, 0, 0] = torch.nan  # not 0: computed
    got = linear(x, weight, bias=bias, kept=kept)
    want = torch.where(kept != 0, torch.nn.functional.linear(x, weight, bias), 0.0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    zeros = got[kept == 0]
    assert zeros.numel() > 10 and not torch.signbit(zeros).any() and got[0, 0, 0] != 0
    torch.testing.assert_close(linear(x, weight, bias=bias, kept=kept != 0), got, rtol=0, atol=0)


def test_half_precision_is_rounded_once() -> None:
    """bfloat16 in, the product in float32, one rounding: the dequantized weight itself is not rounded."""
    x, weight, _ = case()
    x = x.bfloat16()
    scale, _ = weight_parameters(weight.numpy())
    codes = torch.from_numpy(quantize_array(weight.numpy(), scale))
    got = linear(x, codes, torch.from_numpy(scale))
    want = x.float() @ dequantize(codes, torch.from_numpy(scale)).T
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want.bfloat16(), rtol=0, atol=0)


def test_dropped_inputs_do_not_count_where_x_is_not_finite() -> None:
    """The listed channels alone are read: NaN elsewhere in x does not spread."""
    x, weight, _ = case()
    x[..., 3] = torch.nan
    listed = torch.tensor([0, 1, 2, 4])
    torch.testing.assert_close(linear(x, weight, indices=listed, keep="listed"), x[..., listed] @ weight[:, listed].T)


def test_one_session_for_any_number_of_tokens() -> None:
    op = get_op("linear")
    x, weight, bias = case()
    attributes = op.complete({"keep": "abs>", "threshold": 0.5})
    types = types_of([x.numpy(), weight.numpy(), None, None, bias.numpy(), None, None, None])
    model = build(op, attributes, types, 18)
    for tokens in (0, 1, 5):
        rows = torch.randn(2, tokens, 16)
        got = run_onnxruntime(model, [rows.numpy(), weight.numpy(), None, None, bias.numpy()])[0]
        want = linear(rows, weight, bias=bias, keep="abs>", threshold=0.5).numpy()
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("operands", "attributes", "message"),
    [
        ({"weight": torch.zeros(10, 15)}, {}, "input axis of weight"),
        ({"weight": torch.zeros(10, 1)}, {}, "channel axis of x"),
        ({"weight": torch.zeros(10, 16), "bias": torch.zeros(9)}, {}, "bias"),
        ({"weight": torch.zeros(10, 16, dtype=torch.int8)}, {}, "has no scale"),
        ({"weight": torch.zeros(10, 16), "scale": torch.ones(10)}, {}, "takes no scale"),
        ({"weight": torch.zeros(10, 16), "indices": torch.zeros(3, dtype=torch.int64)}, {}, "keep = 'listed'"),
        ({"weight": torch.zeros(10, 16)}, {"keep": "listed"}, "keep = 'listed'"),
        ({"weight": torch.zeros(10, 16)}, {"keep": "top_k"}, "k = 0"),
        ({"weight": torch.zeros(10, 16)}, {"k": 3}, "k = 3"),
        ({"weight": torch.zeros(10, 16), "thresholds": torch.ones(16)}, {}, "takes no thresholds"),
        ({"weight": torch.zeros(10, 16), "thresholds": torch.ones(15)}, {"keep": "abs>"}, "one value per channel"),
        ({"weight": torch.zeros(10, 16), "kept": torch.ones(3, 10)}, {}, "shape of the result"),
        ({"weight": torch.zeros(10, 8, dtype=torch.int8), "scale": torch.ones(10)}, {"packed": "u4"}, "packed codes"),
        ({"weight": torch.zeros(10, 16, dtype=torch.int8), "scale": torch.ones(10, 3)}, {"block_size": 8}, "per block"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(operands: dict[str, torch.Tensor], attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        linear(case()[0], **operands, **attributes)
