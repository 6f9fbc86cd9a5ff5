"""Keep rules and range restriction: the golden rows of the method cards, in every engine."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from actgraph.ops import get_op
from actgraph.ops.registry import OpDef
from tests.conformance.harness import build, run_evaluator, run_onnxruntime, same_bits, types_of
from tests.ops.test_steering import everywhere, torch_call

NAN, INF = math.nan, math.inf


def row(*values: float) -> np.ndarray:
    return np.array([values], np.float32)


GOLDEN = {
    # FT-ClipAct, acceptance property 5
    "clipped activation": (
        "clip", [row(-INF, -1, 0, 1, 2, 2.1, INF, NAN)], {"min": 0, "max": 2, "policy": "zero", "nan": "zero"},
        row(0, 0, 0, 1, 2, 0, 0, 0),
    ),
    "saturating, NaN passes": (
        "clip", [row(-INF, -1, 0, 1, 2.1, INF, NAN)], {"min": -1, "max": 2}, row(-1, -1, 0, 1, 2, 2, NAN),
    ),
    "zeroing, NaN passes": ("clip", [row(-3, 0.5, 3, NAN)], {"min": -1, "max": 1, "policy": "zero"}, row(0, 0.5, 0, NAN)),
    "crossed bounds give the upper one": ("clip", [row(-1, 0, 1)], {"min": 0.5, "max": -0.5}, row(-0.5, -0.5, -0.5)),
    "bounds per channel": (
        "clip", [row(-3, 3, 3), np.array([-1, -2, -3], np.float32), np.array([1, 2, 4], np.float32)], {}, row(-1, 2, 3),
    ),
    "a NaN bound restricts nothing": ("clip", [row(-9, 9), None, np.array([NAN, 1], np.float32)], {}, row(-9, 1)),
    "on the threshold is dropped": (
        "gate", [row(-0.5, 0.5, 0.75, -0.75, NAN, INF)], {"threshold": 0.5}, row(0, 0, 0.75, -0.75, NAN, INF),
    ),
    "threshold 0 is the identity": ("gate", [row(-1e-30, 1e-30, 0, NAN)], {"threshold": 0}, row(-1e-30, 1e-30, 0, NAN)),
    "one-sided keeps the threshold": (
        "gate", [row(-9, 0.5, 0.25, NAN)], {"threshold": 0.5, "keep": "x>="}, row(0, 0.5, 0, NAN),
    ),
    "thresholds per channel": ("gate", [row(1, 1, 1), np.array([0.5, 1, 2], np.float32)], {}, row(1, 0, 0)),
    "above the threshold is open": (
        "threshold_gate",
        [row(1, 2, 3, NAN, INF, -4), np.array(0.5, np.float32), row(0.5, 0.75, NAN, 0, INF, 1)], {},
        row(0, 2, 3, 0, INF, -4),
    ),
    "a closed gate is zero whatever passes it": (
        "threshold_gate", [row(NAN, INF, -1), row(0, 0, -INF)[0], row(-1, 0, -INF), row(1, INF, 2)[0]], {}, row(0, 0, -2),
    ),
    "the gate itself": (
        "threshold_gate", [row(-1, 0, 1, INF), np.array(0, np.float32)], {"result": "gate"}, row(0, 0, 1, 1),
    ),
    "ties go to the lowest index": ("topk_gate", [row(1, -2, 2, 2, 0)], {"k": 2}, row(0, -2, 2, 0, 0)),
    "two of four": ("topk_gate", [row(1, 1, 1, 1, 4, 3, 2, 1)], {"k": 2, "group_size": 4}, row(1, 1, 0, 0, 4, 3, 0, 0)),
    "NaN ranks with infinity": ("topk_gate", [row(3, NAN, INF, -INF)], {"k": 2}, row(0, NAN, INF, 0)),
    "repeated and padded indices": ("index_gate", [row(1, 2, 3, NAN), np.array([2, 0, -1, 2])], {}, row(1, 0, 3, 0)),
}  # fmt: skip


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_rows(case: str) -> None:
    name, operands, attributes, want = GOLDEN[case]
    for who, result in everywhere(name, operands, attributes).items():
        assert same_bits(result, want), f"{who}: {result}, expected {want}"


def test_thresholds_mean_float32() -> None:
    """0.1 is the float32 nearest to it, in float64 graphs too: both dialects drop the same values."""
    edge = float(np.float32(0.1))
    x = np.array([[edge, np.nextafter(edge, 1), 0.1, 0.2]], np.float64)
    for who, result in everywhere("gate", [x], {"threshold": 0.1}).items():
        assert same_bits(result, np.array([[0, np.nextafter(edge, 1), 0, 0.2]])), who
    half = np.array([[0.1, 0.2]], np.float16)  # 0.09998 in float16, below the threshold as it is compared in float32
    for who, result in everywhere("gate", [half], {"threshold": 0.1}).items():
        assert same_bits(result, np.array([[0, 0.2]], np.float16)), who


def test_gate_gradient_is_its_mask() -> None:
    x = torch.tensor([[-1.0, 0.25, 0.5, 2.0]], requires_grad=True)
    t = torch.tensor(0.5, requires_grad=True)
    y = torch_call("gate", x, t)
    gx, gt = torch.autograd.grad(y.sum(), (x, t), allow_unused=True)
    assert gx.tolist() == [[1, 0, 0, 1]] and (gt is None or gt == 0)


def test_clip_gradients() -> None:
    """1 inside, 0 outside; bounds get the gradient of what saturates at them, nothing under the zeroing policy."""
    x = torch.tensor([-2.0, 0.0, 3.0, 4.0], requires_grad=True)
    lo, hi = torch.tensor(-1.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    gx, glo, ghi = torch.autograd.grad(torch_call("clip", x, lo, hi).sum(), (x, lo, hi))
    assert gx.tolist() == [0, 1, 0, 0] and glo == 1 and ghi == 2
    gx, ghi = torch.autograd.grad(torch_call("clip", x, None, hi, policy="zero").sum(), (x, hi))
    assert gx.tolist() == [1, 1, 0, 0] and ghi == 0


def strict(b, operands, attributes):  # type: ignore[no-untyped-def]
    """``|x| < t`` drops, in place of ``|x| <= t``."""
    return [b.where(b.op("Abs", operands[0]) < b.attribute("threshold", operands[0].dtype), 0.0, operands[0])]


def every_tie(b, operands, attributes):  # type: ignore[no-untyped-def]
    """Everything as large as the k-th value stays."""
    return [b.where(b.op("Abs", operands[0]) < _kth(b, operands[0], attributes["k"]), 0.0, operands[0])]


MUTANTS = {"gate": (strict, "on the threshold is dropped"), "topk_gate": (every_tie, "ties go to the lowest index")}


def _kth(b, x, k):  # type: ignore[no-untyped-def]
    values, _ = b.multi("TopK", b.op("Abs", x), b.ints([k]), dtypes=[None, None], ranks=[None, None], attributes={"axis": -1})
    return b.reduce("ReduceMin", values, [-1])


@pytest.mark.parametrize("name", ["gate", "topk_gate"])
def test_golden_rows_catch_near_misses(name: str) -> None:
    """The rows have power: bodies that are right almost everywhere fail them."""
    body, case = MUTANTS[name]
    _, operands, attributes, want = GOLDEN[case]
    op: OpDef = dataclasses.replace(get_op(name), body=body)
    operands = [*operands, *[None] * (len(op.inputs) - len(operands))]
    model = build(op, op.complete(attributes), types_of(operands), 21)
    assert not same_bits(run_evaluator(model, operands)[0], want)
    assert not same_bits(run_onnxruntime(model, operands)[0], want)
