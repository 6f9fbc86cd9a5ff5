"""The grouped linear against plain loops and against the op that transformers exports."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actgraph.errors import VerifyError
from actgraph.ops import DType, TensorType, get_op
from actgraph.ops.torch_library import torch_op
from tests.conformance.harness import build, run_onnxruntime, types_of


def case(rows: int = 12, experts: int = 4, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(0, experts, (rows,), generator=generator).sort().values
    counts = torch.bincount(chosen, minlength=experts)
    x = torch.randn(rows, 8, generator=generator)
    weights = torch.randn(experts, 6, 8, generator=generator)
    return [x, weights, counts.cumsum(0).to(torch.int32), torch.randn(experts, 6, generator=generator), chosen]


def test_rows_meet_their_own_expert() -> None:
    x, weights, offsets, bias, chosen = case()
    want = torch.einsum("ri,roi->ro", x, weights[chosen]) + bias[chosen]
    torch.testing.assert_close(torch_op("grouped_linear")(x, weights, offsets, bias), want)
    torch.testing.assert_close(get_op("grouped_linear").reference(x, weights, offsets, bias), want)


def test_equals_the_op_of_transformers() -> None:
    """What a mixture-of-experts model of transformers exports computes the same from the transposed weights."""
    pytest.importorskip("transformers.integrations.moe")
    x, weights, offsets, *_ = case()
    theirs = torch.ops.transformers.grouped_mm_fallback(x, weights.transpose(-2, -1), offsets)
    torch.testing.assert_close(torch_op("grouped_linear")(x, weights, offsets), theirs, rtol=0, atol=0)


def test_one_body_for_any_number_of_rows() -> None:
    """One onnxruntime session (dynamic rows) serves prefill and decode, empty experts and no rows at all."""
    op = get_op("grouped_linear")
    operands = [t.numpy() for t in case()[:3]] + [None]
    types = [TensorType(DType.F32, (None, 8)), *types_of(operands)[1:]]
    model = build(op, {}, types, 18)
    for rows in (0, 1, 2, 12, 100):
        x, weights, offsets, *_ = case(rows, seed=rows)
        got = run_onnxruntime(model, [x.numpy(), weights.numpy(), offsets.numpy(), None])[0]
        np.testing.assert_allclose(got, torch_op("grouped_linear")(x, weights, offsets).numpy(), rtol=1e-5, atol=1e-5)


def test_gradients() -> None:
    x, weights, offsets, bias, _ = case()
    inputs = [t.double().requires_grad_() for t in (x, weights, bias)]
    assert torch.autograd.gradcheck(lambda x, w, b: torch_op("grouped_linear")(x, w, offsets, b), inputs, fast_mode=True)


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, weights, offsets, bias, _ = case()
    op = torch_op("grouped_linear")
    for operands, message in [
        ((x[:, :7], weights, offsets), "last axis of weights"),
        ((x, weights, offsets[:3]), "one per expert"),
        ((x, weights[0], offsets), "rank 3"),
        ((x, weights, offsets, bias[:, :5]), "bias"),
    ]:
        with pytest.raises(VerifyError, match=message):
            op(*operands)


def test_infer_over_names() -> None:
    op = get_op("grouped_linear")
    x = TensorType(DType.F32, ("2*tokens", 8))
    weights, offsets = TensorType(DType.F32, (4, 6, 8)), TensorType(DType.I32, (4,))
    assert op.infer([x, weights, offsets, None], {}) == [TensorType(DType.F32, ("2*tokens", 6))]
