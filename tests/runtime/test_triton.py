"""The Triton kernels against the references of their ops: by Triton's interpreter, or on a CUDA device where there is one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actgraph.errors import VerifyError
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import get_op
from actgraph.ops.torch_library import torch_op
from tests.conformance.harness import Case, to_torch, types_of
from tests.runtime import interpreted
from tests.runtime.interpreted import CUDA, DEVICE, plan, reads

from actgraph.runtime.kernels.triton import register  # isort: skip  # after the kernels, which it would import compiled

KERNELS = {kernel.op: kernel for kernel in register.triton_kernels()}
#: The interpreter cuts numbers to bfloat16, a device rounds them.
ROUNDING = {torch.float32: 2e-5, torch.float16: 2**-10, torch.bfloat16: 2**-8 if CUDA else 2**-7}

traced = pytest.mark.skipif(CUDA, reason="reads are recorded by the interpreter")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, on the NaN of the tests


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    with interpreted.library():
        yield


def on_device(operands: Any) -> list[Any]:
    return [None if t is None else t.to(DEVICE) for t in operands]


def agree(got: torch.Tensor, want: torch.Tensor, size: float | None = None) -> None:
    """Equal but for rounding, NaN for NaN. ``size``: how large the terms of the sums are."""
    assert got.dtype == want.dtype and got.shape == want.shape
    rounding = ROUNDING[want.dtype]
    torch.testing.assert_close(
        got.cpu().float(), want.cpu().float(), rtol=rounding, atol=(size or 1.0) * 2e-5, equal_nan=True
    )  # fmt: skip


def cases() -> list[Case]:
    floats = (DType.F32, DType.F16, DType.BF16)
    made = []
    for name in KERNELS:
        op = get_op(name)
        for index, sample in enumerate(op.samples):
            made += [Case(op, index, dtype) for dtype in sample.dtypes or floats if dtype in floats]
    return made


@pytest.mark.parametrize("case", cases(), ids=str)
def test_conforms(case: Case) -> None:
    """The conformance grid of the ops; what a kernel declines is listed, so that it cannot decline more unnoticed."""
    operands, kernel = case.operands(), KERNELS[case.op.name]
    claimed = kernel.claims(types_of(operands), case.attributes)
    axis, shape = case.attributes.get("axis", -1), case.sample.shapes[0] or ()
    channels = [
        s for o, s in zip(case.op.inputs, case.sample.shapes, strict=False) if o.name in ("vector", "gamma", "lo", "hi")
    ]
    assert claimed == (bool(shape) and axis in (-1, len(shape) - 1) and all(s is None or len(s) <= 1 for s in channels))
    if not claimed:
        return
    tensors = [to_torch(a) for a in operands]
    want = case.op.reference(*tensors, **case.attributes)
    got = kernel.implementation(*on_device(tensors), **case.attributes)
    assert isinstance(want, torch.Tensor)
    agree(got, want, 10.0)
    if case.op.exact == "bits" and (CUDA or case.dtype is not DType.BF16):
        assert torch.equal(got.cpu().nan_to_num(7.0), want.nan_to_num(7.0))
        assert torch.equal(got.cpu().signbit() & ~want.isnan(), want.signbit() & ~want.isnan())


# --- linear: formats, layouts, gates, numbers of tokens -----------------------------------------------------------------------

FORMS = {
    "float": {}, "bf16": {"kind": torch.bfloat16}, "f16": {"kind": torch.float16},
    "i8": {"kind": torch.int8, "scale": "output"}, "i8 one": {"kind": torch.int8, "scale": "one"},
    "u8 zero": {"kind": torch.uint8, "scale": "output", "zero": torch.uint8},
    "i8 groups": {"kind": torch.int8, "scale": "group", "block": 16},
    "i8 wide groups": {"kind": torch.int8, "scale": "group", "block": 128, "zero": torch.int8},
    "i8 odd groups": {"kind": torch.int8, "scale": "group", "block": 7, "zero": torch.int32},
    "u4": {"packed": "u4", "scale": "group", "block": 32, "zero": torch.uint8},
    "u4 outputs": {"packed": "u4", "scale": "output"},
    "i4": {"packed": "i4", "scale": "group", "block": 8}, "i4 odd groups": {"packed": "i4", "scale": "group", "block": 5},
    "e4m3": {"kind": torch.float8_e4m3fn, "scale": "output"}, "e5m2": {"kind": torch.float8_e5m2},
}  # fmt: skip


def weight_of(form: str, layout: str, outputs: int, inputs: int, dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
    """Weight, scale and zero point of a random weight, and the attributes that go with them."""
    spec: dict[str, Any] = FORMS[form]
    generator = torch.Generator().manual_seed(outputs * 1000 + inputs)
    shape = [outputs, inputs] if layout == "out_in" else [inputs, outputs]
    kind = spec.get("kind", dtype)
    if spec.get("packed"):
        weight = torch.randint(0, 256, (shape[0], shape[1] // 2), generator=generator, dtype=torch.uint8)
    elif kind in (torch.int8, torch.uint8):
        weight = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).view(kind)
    else:
        weight = torch.randn(shape, generator=generator).to(kind)
    block = spec.get("block", 0)
    groups = -(-inputs // block) if block else 0
    scales = {
        None: None,
        "one": [],
        "output": [outputs],
        "group": [outputs, groups] if layout == "out_in" else [groups, outputs],
    }
    lie = scales[spec.get("scale")]
    scale = None if lie is None else torch.rand(lie, generator=generator) * 0.02 + 0.01
    zero = None if "zero" not in spec else torch.randint(0, 15, lie or [], generator=generator).to(spec["zero"])
    return [weight, scale, zero], {"layout": layout, "block_size": block, "packed": spec.get("packed", "")}


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("form", FORMS)
def test_linear_of_every_format(form: str, layout: str) -> None:
    """Sizes that fill no tile, few and many tokens, each gate; half precision where the format is multiplied in it."""
    op, outputs, inputs = get_op("linear"), 46, 150
    plans = [
        (1, torch.float32, {}), (3, torch.float32, {"keep": "abs>", "threshold": 0.8}), (8, torch.float16, {}),
        (9, torch.float32, {"keep": "x>=", "threshold": 0.1}), (20, torch.float16, {}),
        (2, torch.bfloat16, {"keep": "top_k", "k": 9}),
        (35, torch.bfloat16, {"keep": "top_k", "k": 40}),
    ]  # fmt: skip
    for tokens, dtype, gate in plans:
        x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        stored, attributes = weight_of(form, layout, outputs, inputs, dtype)
        bias = torch.linspace(-1, 1, outputs).to(dtype)
        want = op.reference(x, *stored, bias, **attributes, **gate)
        got = KERNELS["linear"].implementation(*on_device([x, *stored, bias]), **attributes, **gate)
        agree(got, want, 10.0)
        assert want.float().std() > 0.2  # so that a wrong sum cannot pass


@pytest.mark.parametrize("tokens", [2, 11])
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_not_a_number_and_infinity(layout: str, tokens: int) -> None:
    """They spread over the outputs of their token alone, by streams and by tiles; where ``kept`` is 0 there is +0.0."""
    x = torch.randn(tokens, 70, generator=torch.Generator().manual_seed(0))
    x[0, 3], x[1, 5] = torch.nan, torch.inf
    (weight, *_), attributes = weight_of("float", layout, 33, 70, torch.float32)
    kept = torch.rand(tokens, 33, generator=torch.Generator().manual_seed(1)) > 0.5
    for keep in ("none", "abs>"):
        for mask in (None, kept, torch.where(kept, torch.nan, -0.0)):
            arguments = [x, weight, None, None, None, None, None, mask]
            want = get_op("linear").reference(*arguments, **attributes, keep=keep, threshold=0.5)
            got = KERNELS["linear"].implementation(*on_device(arguments), **attributes, keep=keep, threshold=0.5)
            agree(got, want, 10.0)
            assert got[0].isnan().sum() == (33 if mask is None else kept[0].sum())
            assert mask is None or not got.cpu()[~kept].signbit().any()


def test_all_float8_codes() -> None:
    """Each of the 256 codes, NaN, infinities and subnormals among them."""
    one = torch.ones(1, 1)
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        weight = torch.arange(256).to(torch.uint8).view(kind).reshape(256, 1)
        got = KERNELS["linear"].implementation(*on_device([one, weight]))
        torch.testing.assert_close(got.cpu()[0], weight.float()[:, 0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 70), (2, 0, 70), (3, 0), (0, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    """No tokens give no rows; no inputs give the bias."""
    x, weight, bias = torch.zeros(shape), torch.ones(5, shape[-1]), torch.arange(5.0)
    agree(KERNELS["linear"].implementation(*on_device([x, weight, None, None, bias])), x @ weight.T + bias)
    agree(KERNELS["linear"].implementation(*on_device([x, weight[:0]])), x @ weight[:0].T)


def test_the_inputs_are_split_and_summed_in_order() -> None:
    """A narrow, long product is cut into parts; the same bits come out of each run."""
    x, weight = torch.randn(1, 9000), torch.randn(4, 9000)
    assert plan.stream(1, 4, 9000, out_in=True, device=DEVICE).parts > 1
    assert plan.stream(1, 4, 9000, out_in=False, device=DEVICE).parts > 1
    for layout, stored in (("out_in", weight), ("in_out", weight.T.contiguous())):
        for gate in ({}, {"keep": "abs>", "threshold": 0.7}):
            runs = [KERNELS["linear"].implementation(*on_device([x, stored]), layout=layout, **gate) for _ in range(2)]
            agree(runs[0], get_op("linear").reference(x, stored, layout=layout, **gate), 100.0)
            assert torch.equal(*runs)


def test_compaction() -> None:
    """Active channels in ascending order, across blocks, with their gated values; NaN is active, -0.0 is not."""
    x = torch.randn(3, 2500, generator=torch.Generator().manual_seed(0))
    x[:, 7], x[1, 8], x[:, 9] = -0.0, torch.nan, 0.1
    x[:, 100:2000] = 0
    gated = torch.where(x.abs() <= 0.5, 0.0, x)
    active = (gated != 0).any(0).nonzero()[:, 0]
    gate = interpreted.linear.Gate("abs>", 0.5, None, True)
    values, indices, count = (t.cpu() for t in interpreted.linear._compact(x.to(DEVICE), gate))
    assert count.item() == len(active) and 8 in active and 7 not in active and 9 not in active
    assert torch.equal(indices[: count.item()].long(), active)
    torch.testing.assert_close(values[:, : count.item()], gated[:, active], rtol=0, atol=0, equal_nan=True)


# --- what is read -------------------------------------------------------------------------------------------------------------


@traced
@pytest.mark.parametrize("form", ["float", "i8", "u4"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_rows_of_dropped_inputs_are_not_read(form: str, tokens: int) -> None:
    x = torch.randn(tokens, 150, generator=torch.Generator().manual_seed(tokens))
    stored, attributes = weight_of(form, "in_out", 64, 150, torch.float32)
    active = (x.abs() > 1.3).any(0).numpy()
    assert 10 < active.sum() < 80
    with reads(stored[0]) as counts:
        KERNELS["linear"].implementation(x, *stored, **attributes, keep="abs>", threshold=1.3)
    assert np.array_equal(counts, np.broadcast_to(active[:, None], counts.shape))


@pytest.mark.parametrize("keep", ["abs>", "top_k", "listed"])
def test_dropped_inputs_do_not_meet_their_weights(keep: str) -> None:
    """The same on any device: NaN in the rows that must not be read reach nothing."""
    x = torch.randn(1, 90, generator=torch.Generator().manual_seed(5))
    listed = torch.tensor([3, 80, 4, -1])
    gate: dict[str, Any] = {"abs>": {"threshold": 1.0}, "top_k": {"k": 7}, "listed": {}}[keep] | {"keep": keep}
    gated = interpreted.linear.torch_gate(x, None, listed, keep=keep, threshold=1.0, k=7)
    weight = torch.randn(90, 40)
    poisoned = torch.where((gated != 0).T, weight, torch.nan)
    operands = [x, poisoned, None, None, None, None, listed if keep == "listed" else None]
    got = KERNELS["linear"].implementation(*on_device(operands), layout="in_out", **gate)
    agree(got, gated @ weight, 10.0)
    assert (KERNELS["linear"].implementation(*on_device([x, poisoned]), layout="in_out")).isnan().all()


@traced
@pytest.mark.parametrize("form", ["float", "i8", "u4"])
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_weights_of_masked_outputs_are_not_read(form: str, layout: str) -> None:
    """Rows of [N, K]; columns of [K, N] where a byte holds one weight."""
    x = torch.randn(2, 70)
    stored, attributes = weight_of(form, layout, 64, 70, torch.float32)
    kept = torch.rand(2, 64, generator=torch.Generator().manual_seed(3)) > 0.8
    needed = kept.any(0).numpy()
    assert 10 < needed.sum() < 50
    with reads(stored[0]) as counts:
        KERNELS["linear"].implementation(x, *stored, None, None, None, kept, **attributes)
    if layout == "out_in":
        assert np.array_equal(counts, np.broadcast_to(needed[:, None], counts.shape))
    elif form != "u4":
        assert np.array_equal(counts, np.broadcast_to(needed, counts.shape))


@traced
@pytest.mark.parametrize("tokens", [3, 30])
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_outputs_that_nothing_keeps_cost_nothing(layout: str, tokens: int) -> None:
    """Neither the weight nor the input is read for them."""
    x, kept = torch.randn(tokens, 70), torch.zeros(tokens, 64)
    stored, attributes = weight_of("float", layout, 64, 70, torch.float32)
    with reads(stored[0]) as weights, reads(x) as inputs:
        got = KERNELS["linear"].implementation(x, *stored, None, None, None, kept, **attributes)
    assert not weights.any() and not inputs.any() and not got.any()


@traced
@pytest.mark.parametrize("form", ["float", "u4"])
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("tokens", [1, 8])
def test_a_weight_is_read_once_for_few_tokens(form: str, layout: str, tokens: int) -> None:
    stored, attributes = weight_of(form, layout, 64, 1030, torch.float32)
    with reads(stored[0]) as counts:
        KERNELS["linear"].implementation(torch.randn(tokens, 1030), *stored, **attributes)
    assert (counts == 1).all()


# --- feed_forward -------------------------------------------------------------------------------------------------------------


def block_of(form: str, gated: bool, sizes: tuple[int, int, int]) -> tuple[list[Any], dict[str, Any]]:
    inputs, neurons, outputs = sizes
    up, attributes = weight_of(form, "out_in", neurons, inputs, torch.float32)
    gate, _ = weight_of(form, "out_in", neurons, inputs, torch.float32)
    gate[0] = gate[0].flip(0).contiguous()
    down, _ = weight_of(form, "in_out", outputs, neurons, torch.float32)
    operands = [up[0], down[0], gate[0] if gated else None, up[1], down[1], gate[1] if gated else None]
    return operands, {"block_size": attributes["block_size"], "packed": attributes["packed"]}


@pytest.mark.parametrize("tokens", [1, 5, 12])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_feed_forward_of_every_activation(activation: str, tokens: int) -> None:
    """With and without gate, each kind of sparsity, over the formats in turn."""
    op, kernel = get_op("feed_forward"), KERNELS["feed_forward"]
    forms = ["float", "i8", "i8 groups", "i4", "e4m3", "i8 one"]
    for place, (gated, sparse) in enumerate((g, s) for g in (True, False) for s in ("none", "act", "hidden")):
        operands, attributes = block_of(forms[place], gated, (38, 74, 26))
        x = torch.randn(tokens, 38, generator=torch.Generator().manual_seed(place)) * 0.3
        biases = [torch.linspace(-1, 1, 74), torch.linspace(-1, 1, 26), torch.linspace(1, -1, 74) if gated else None]
        attributes |= {"activation": activation, "sparse": sparse, "threshold": 0.4}
        want = op.reference(x, *operands, *biases, **attributes)
        agree(kernel.implementation(*on_device([x, *operands, *biases]), **attributes), want, 20.0)
        if sparse != "none":
            assert (want - op.reference(x, *operands, *biases, **attributes | {"sparse": "none"})).abs().max() > 0.02


@traced
@pytest.mark.parametrize("sparse", ["act", "hidden", "none"])
def test_weights_of_dropped_neurons_are_not_read(sparse: str) -> None:
    """ "act": rows of up and down; "hidden": rows of down. The rest is read once."""
    (up, down, gate, *scales), attributes = block_of("i8", True, (38, 200, 26))
    x = torch.randn(2, 38, generator=torch.Generator().manual_seed(0)) * 0.1
    operands = [x, up, down, gate, *scales]
    g = x @ (gate.float() * scales[2][:, None]).T
    u = x @ (up.float() * scales[0][:, None]).T
    act = torch.nn.functional.silu(g)
    stay = (act if sparse == "act" else act * u).abs() > 0.5
    active = stay.any(0).numpy() if sparse != "none" else np.ones(200, bool)
    assert sparse == "none" or 20 < active.sum() < 180
    with reads(up) as ups, reads(down) as downs, reads(gate) as gates:
        KERNELS["feed_forward"].implementation(*operands, **attributes, sparse=sparse, threshold=0.5)
    assert (gates == 1).all()
    assert np.array_equal(ups, np.broadcast_to(active[:, None] if sparse == "act" else 1, ups.shape))
    assert np.array_equal(downs, np.broadcast_to(active[:, None], downs.shape))


@pytest.mark.parametrize("tokens", [2, 12])
def test_a_dropped_activation_silences_whatever_up_is(tokens: int) -> None:
    """0 times infinity is not computed: the product is +0.0 by the word of the op."""
    operands, _ = block_of("float", True, (38, 74, 26))
    x, infinite = torch.randn(tokens, 38, generator=torch.Generator().manual_seed(0)) * 0.1, torch.zeros(74)
    sizes = torch.nn.functional.silu(x @ operands[2].T).abs().amax(0)
    infinite[sizes.argmin()] = torch.inf
    arguments = [x, *operands, infinite]
    attributes = {"sparse": "act", "threshold": float(sizes.sort().values[:2].mean())}
    want = get_op("feed_forward").reference(*arguments, **attributes)
    assert want.isfinite().all() and not get_op("feed_forward").reference(*arguments).isfinite().any()
    agree(KERNELS["feed_forward"].implementation(*on_device(arguments), **attributes), want, 20.0)


@pytest.mark.parametrize("tokens", [2, 12])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_feed_forward_hides_no_nan(activation: str, tokens: int) -> None:
    """Every activation passes a NaN on to its own token, and to no other."""
    operands, _ = block_of("float", False, (38, 74, 26))
    x = torch.randn(tokens, 38, generator=torch.Generator().manual_seed(0)) * 0.3
    x[1, 7] = torch.nan
    got = KERNELS["feed_forward"].implementation(*on_device([x, *operands]), activation=activation)
    assert got[1].isnan().all() and got.isnan().any(1).sum() == 1


def test_half_precision_takes_codes_that_it_holds() -> None:
    """i8 codes less a u8 zero point reach -383, which bfloat16 rounds."""
    weight, scale = torch.zeros(4, 8, dtype=torch.int8), torch.ones(4)
    for codes, zero, packed, exact in (
        (weight, None, "", True), (weight, torch.int8, "", True), (weight, torch.uint8, "", False),
        (weight.view(torch.uint8), torch.int8, "", False), (weight.view(torch.uint8), torch.int8, "u4", True),
        (weight, torch.int32, "", False),
    ):  # fmt: skip
        point = None if zero is None else torch.zeros(4, dtype=zero)
        held = interpreted.linear.stored(codes, scale, point, layout="out_in", block=0, packed=packed)
        assert held.codes == exact


def test_shift_by_nothing_and_of_nothing() -> None:
    """Norms of 0 do not divide."""
    x, zeros = torch.randn(3, 40), torch.zeros(40)
    for norm in ("relative", "restore"):
        for h in (x, torch.zeros(3, 40)):
            got = KERNELS["shift"].implementation(*on_device([h, zeros]), norm=norm)
            agree(got, h)


# --- registration -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed() -> Iterator[list[str]]:
    """The kernels as implementations of the ops on this device; the list collects the names of those that ran."""
    ran: list[str] = []
    with pytest.MonkeyPatch.context() as patch, torch.library._scoped_library("actgraph", "IMPL") as library:

        def spied() -> Any:
            for kernel in KERNELS.values():

                def run(*operands: Any, kernel: Any = kernel, **attributes: Any) -> Any:
                    ran.append(kernel.op)
                    return kernel.implementation(*operands, **attributes)

                yield type(kernel)(kernel.op, kernel.name, kernel.engine, kernel.device, kernel.claims, run)

        patch.setattr(register, "triton_kernels", lambda: tuple(spied()))
        register.implement(library, DEVICE.type.upper())
        yield ran


def test_calls_of_the_op_reach_the_kernel(installed: list[str]) -> None:
    x, weight = on_device([torch.randn(2, 3, 16), torch.randn(10, 16)])
    agree(torch_op("linear")(x, weight, keep="abs>", threshold=0.5), torch.where(x.abs() > 0.5, x, 0.0) @ weight.T)
    assert installed == ["linear"]


def test_what_a_kernel_declines_runs_by_the_reference(installed: list[str]) -> None:
    x, weight = on_device([torch.randn(2, 16, dtype=torch.float64), torch.randn(10, 16, dtype=torch.float64)])
    torch.testing.assert_close(torch_op("linear")(x, weight), x @ weight.T)
    image, vector = on_device([torch.randn(2, 4, 3, 5), torch.randn(4)])
    torch.testing.assert_close(torch_op("shift")(image, vector, axis=1), image + vector[:, None, None])
    assert installed == []


def test_what_does_not_fit_is_refused(installed: list[str]) -> None:
    with pytest.raises(VerifyError, match="input axis of weight"):
        torch_op("linear")(*on_device([torch.zeros(2, 16), torch.zeros(10, 15)]))
    assert installed == []


def test_gradients_are_those_of_the_op(installed: list[str]) -> None:
    x, weight, bias = (t.requires_grad_() for t in on_device([torch.randn(4, 16), torch.randn(10, 16), torch.randn(10)]))
    operands = [x, weight, None, None, bias]
    attributes = {"keep": "abs>", "threshold": 0.5}
    for run in (torch_op("linear"), get_op("linear").reference):
        y = run(*operands, **attributes)
        gradients = torch.autograd.grad(y.square().sum(), (x, weight, bias))
        if run is torch_op("linear"):
            ours = gradients
    assert installed == ["linear"]
    for got, want in zip(ours, gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_compiled_graphs_call_the_kernel(installed: list[str]) -> None:
    """No graph break; and results have the strides that the fake kernel promised, also for operands that lie otherwise."""
    vector, weight = on_device([torch.randn(16), torch.randn(10, 16)])

    gate, shift, linear = torch_op("gate"), torch_op("shift"), torch_op("linear")

    def model(x: torch.Tensor) -> torch.Tensor:
        h = gate(shift(x.transpose(0, 1), vector, scale=0.5), threshold=0.3)
        return linear(h, weight).transpose(0, 1) * 2

    x = torch.randn(3, 4, 16).to(DEVICE)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        agree(compiled(x), model(x))
        assert installed == ["shift", "gate", "linear"] * 2
        shifted = shift(x.transpose(0, 1), vector)
        assert shifted.stride() == get_op("shift").reference(x.transpose(0, 1), vector).stride() != (48, 16, 1)


def test_nothing_needs_triton_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a device, with an old one, or without Triton ``install`` says no and imports nothing."""
    package = sys.modules[register.__package__]
    for name in list(sys.modules):
        if name.split(".")[0] == "triton":
            monkeypatch.setitem(sys.modules, name, None)
        elif name.startswith(f"{package.__name__}.") and name != register.__name__:
            monkeypatch.setitem(sys.modules, name, None)
            monkeypatch.delattr(package, name.rpartition(".")[2])
    found: list[str] = []
    monkeypatch.setattr(importlib.util, "find_spec", found.append)
    monkeypatch.setattr(register, "_LIBRARY", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for there, capability in ((False, (9, 0)), (True, (7, 5)), (True, (9, 0))):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, capability=capability: capability)
        assert register.install() is False
    assert found == ["triton"]  # asked for by the last one alone, and not there
    register.triton_kernels.cache_clear()
    with pytest.raises(ImportError):
        register.triton_kernels()


@pytest.mark.skipif(CUDA, reason="the kernels may be installed already")
def test_installing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dispatcher has the kernels for CUDA, and the registry knows them; once."""
    known: list[Any] = []
    monkeypatch.setattr(register, "_LIBRARY", None)
    monkeypatch.setattr(register, "usable", lambda device=None: True)
    monkeypatch.setattr(register, "register_kernel", known.append)

    def there() -> list[bool]:
        return [torch._C._dispatch_has_kernel_for_dispatch_key(f"actgraph::{name}", "CUDA") for name in KERNELS]

    assert register.install() and register.install()
    try:
        assert all(there()) and [k.op for k in known] == list(KERNELS)
    finally:
        register._LIBRARY._destroy()
    assert not any(there())


@pytest.fixture(scope="module")
def benchmark() -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("benchmark_gpu", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.skipif(CUDA, reason="there is a CUDA device")
def test_the_benchmark_says_that_there_is_no_device(benchmark: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    assert benchmark.main(["--out", str(out)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("there is no CUDA device: torch") and "nothing was measured" in said.err
    assert not out.exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_benchmark_compares_like_with_like(benchmark: Any, installed: list[str]) -> None:
    """Ours and every peer of every case give the numbers of the reference, but for the rounding of their types."""
    cases = list(benchmark.cases(["linear", "feed_forward", "shift"], benchmark.FORMS, [1, 9], (96, 64), DEVICE, 10000))
    assert len(cases) == 5 * 2 * 3 * 2 + 2
    for case in cases:
        peers = case.peers.values() if not case.name["sparsity"] else ()  # which drop nothing
        for run in (case.ours, *peers):
            for copy in (0, case.copies - 1):
                assert (run(copy).float() - case.want).norm() < 0.02 * case.want.norm(), case.name
    sizes = {(c.name["op"], c.name["form"], c.name["sparsity"]): c.touched for c in cases if c.name["tokens"] == 1}
    assert sizes["linear", "i8", 0.0] == 96 * 64 + 96 * 4 and sizes["linear", "u4", 0.0] == 96 * 32 + 96 * 2 * 4
    assert 0.45 < sizes["linear", "bf16", 0.5] / sizes["linear", "bf16", 0.0] < 0.55
    assert set(installed) == {"linear", "feed_forward", "shift"}


@pytest.mark.slow
@pytest.mark.skipif(CUDA, reason="the other tests compile")
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles(capability: int, tmp_path: Path) -> None:
    """What the interpreter takes, Triton's compiler takes, too: machine code for a device that is not there."""
    script = Path(__file__).with_name("compile_triton.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(script.parents[2])}
    command = [sys.executable, str(script), str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    report = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["kernel"] for line in report} >= {
        "compact", "stream_out_in", "stream_in_out", "sum_parts", "tiles", "neurons", "combine_flat",
        "shift", "channel_scale", "lowrank_map", "latent_edit", "clip", "gate",
    }  # fmt: skip
    assert max(line["stack"] for line in report) <= 64, "a kernel spills registers"
    assert max(line["shared"] for line in report) <= 100 * 1024
