"""The acceptance properties of steering: exact neutral settings, and agreement with the formulas of the papers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from actgraph.errors import VerifyError
from actgraph.ops import DType, TensorType, get_op
from actgraph.ops.torch_library import torch_op
from tests.conformance.harness import build, run_evaluator, run_onnxruntime, same_bits, types_of

BITS = np.array([math.nan, math.inf, -math.inf, -0.0, 0.0, 1.5, -2.5, 1e-30], np.float32)


def everywhere(name: str, operands: list, attributes: dict, opset: int = 21) -> dict[str, np.ndarray]:
    """The result of one call in torch, onnxruntime (function kept and inlined) and the reference evaluator."""
    op = get_op(name)
    operands = [*operands, *[None] * (len(op.inputs) - len(operands))]
    tensors = [None if a is None else torch.from_numpy(a) for a in operands]
    results = {"torch": torch_op(name)(*tensors, **op.complete(attributes)).numpy()}
    kept = build(op, op.complete(attributes), types_of(operands), opset)
    inlined = build(op, op.complete(attributes), types_of(operands), opset, inlined=True)
    results["onnxruntime, kept"] = run_onnxruntime(kept, operands)[0]
    results["onnxruntime, inlined"] = run_onnxruntime(inlined, operands)[0]
    results["evaluator"] = run_evaluator(kept, operands)[0]
    return results


def tokens(dtype: type = np.float32) -> np.ndarray:
    return np.stack([np.roll(BITS, i) for i in range(6)]).reshape(2, 3, 8).astype(dtype)


VECTOR = np.array([1, -2, 3, math.nan, math.inf, -1, 0.5, -0.0], np.float32)
BASIS = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 2)))[0].astype(np.float32)
OFF = np.zeros((2, 3), bool)
ROWS = np.random.default_rng(3).standard_normal((2, 8)).astype(np.float32)
NEUTRAL = {
    "latent_edit, mask false": ("latent_edit", [VECTOR[None], ROWS[:1], None, None, None, OFF], {"mode": "set", "value": 3.0}),
    "latent_edit, mask 0.0": (
        "latent_edit",
        [ROWS, ROWS, None, None, None, OFF.astype(np.float32)],
        {"normalize": "layer_norm"},
    ),
    "latent_edit, add 0": ("latent_edit", [np.stack([VECTOR, VECTOR])], {}),
    "latent_edit, add values 0": ("latent_edit", [ROWS, None, None, None, np.zeros(2, np.float32)], {"mode": "add"}),
    "shift, scale 0": ("shift", [VECTOR], {"scale": 0.0}),
    "shift, strength 0": ("shift", [VECTOR, np.zeros(1, np.float32)], {"scale": 3.0}),
    "shift, mask false": ("shift", [VECTOR, None, OFF], {"scale": 3.0}),
    "shift, mask 0.0": ("shift", [VECTOR, None, OFF.astype(np.float32)], {"scale": 3.0}),
    "shift, restore, mask false": ("shift", [VECTOR, None, OFF], {"norm": "restore"}),
    "shift, relative, scale 0": ("shift", [VECTOR], {"norm": "relative", "scale": 0.0}),
    "lowrank_map, mask false": ("lowrank_map", [BASIS, np.eye(2, dtype=np.float32), OFF], {}),
    "lowrank_map, mask 0.0": ("lowrank_map", [BASIS, np.eye(2, dtype=np.float32), OFF.astype(np.float32)], {}),
    "target_angle, mask false": ("target_angle", [BASIS, np.ones(1, np.float32), OFF], {}),
    "target_angle, above nothing": ("target_angle", [BASIS, np.ones(1, np.float32)], {"when": "above", "threshold": 1e30}),
    "channel_scale, gamma 1": ("channel_scale", [np.ones(8, np.float32)], {}),
    "channel_scale, mask false": ("channel_scale", [VECTOR, OFF], {}),
    "channel_scale, mask 0.0": ("channel_scale", [VECTOR, OFF.astype(np.float32)], {}),
    "threshold_gate, always open": ("threshold_gate", [np.array(-math.inf, np.float32)], {}),
    "threshold_gate, soft, always open": ("threshold_gate", [np.full(8, -math.inf, np.float32)], {"mode": "soft"}),
    "threshold_gate, gamma 1": ("threshold_gate", [np.full(8, -math.inf, np.float32), None, np.ones(8, np.float32)], {}),
    "threshold_gate, mask false": ("threshold_gate", [VECTOR, None, VECTOR, OFF], {}),
    "threshold_gate, soft, mask 0.0": ("threshold_gate", [VECTOR, None, VECTOR, OFF.astype(np.float32)], {"mode": "soft"}),
    "gate, threshold below all": ("gate", [], {"threshold": -1.0}),
    "clip, no bounds": ("clip", [], {}),
    "index_gate, all channels": ("index_gate", [np.arange(8)], {}),
    "topk_gate, all channels": ("topk_gate", [], {"k": 8}),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("setting", NEUTRAL)
def test_neutral_settings_keep_every_bit(setting: str, dtype: type) -> None:
    """Off means the same bits, also for -0.0, infinities and NaN in x, and NaN and infinity in the vector."""
    name, side, attributes = NEUTRAL[setting]
    x = tokens(dtype)
    if setting == "target_angle, above nothing":
        x = np.where(np.isfinite(x), x, dtype(-0.0))  # a coordinate of inf is above everything
    for who, result in everywhere(name, [x, *side], attributes).items():
        assert same_bits(result, x), f"{who}: {result}"


@pytest.mark.parametrize("name", ["shift", "lowrank_map", "target_angle", "channel_scale", "threshold_gate"])
def test_masks_leave_other_tokens_alone(name: str) -> None:
    """A masked token is untouched bit for bit while its neighbour is edited; 0/1 masks of any type agree."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 3, 8)).astype(np.float32)
    side = {
        "shift": [VECTOR[:3].repeat(3)[:8], None],
        "lowrank_map": [BASIS, np.eye(2, dtype=np.float32)],
        "target_angle": [BASIS, np.ones((), np.float32)],
        "channel_scale": [np.arange(8, dtype=np.float32)],
        "threshold_gate": [np.zeros(8, np.float32), None, np.arange(2, 10, dtype=np.float32)],
    }[name]
    mask = np.array([[True, False, True], [False, False, True]])
    full = everywhere(name, [x, *side], {})["torch"]
    by_bool = everywhere(name, [x, *side, mask], {})
    by_float = everywhere(name, [x, *side, mask.astype(np.float32)], {})
    for who in by_bool:
        for result in (by_bool[who], by_float[who]):
            assert same_bits(result[~mask], x[~mask]), who
            np.testing.assert_allclose(result[mask], full[mask], rtol=1e-6, atol=1e-6)
            assert (np.abs(result[mask] - x[mask]).max(-1) > 1e-2).all(), who


def torch_call(name: str, *operands: torch.Tensor, **attributes: object) -> torch.Tensor:
    op = get_op(name)
    return torch_op(name)(*operands, **op.complete(attributes))


def test_restored_norm_is_the_old_norm() -> None:
    x, v = torch.randn(4, 7, 32, dtype=torch.float64), torch.randn(32, dtype=torch.float64)
    y = torch_call("shift", x, v, scale=3.0, norm="restore")
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)
    direction = torch.nn.functional.normalize(x + 3 * v, dim=-1)
    torch.testing.assert_close(torch.nn.functional.normalize(y, dim=-1), direction)


def test_relative_shift_is_a_fraction_of_the_norm() -> None:
    """Physics Steering: ``|h' - h| / |h| = alpha`` per sample, and ``+alpha`` and ``-alpha`` average to h."""
    x, v = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64), torch.randn(1, 1, 4, 5, 6, dtype=torch.float64)
    axes = (-3, -2, -1)
    up = torch_call("shift", x, v, scale=0.25, norm="relative", norm_axes=axes, axis=2)
    down = torch_call("shift", x, v, scale=-0.25, norm="relative", norm_axes=axes, axis=2)
    size = torch.linalg.vector_norm(up - x, dim=axes) / torch.linalg.vector_norm(x, dim=axes)
    torch.testing.assert_close(size, torch.full_like(size, 0.25))
    torch.testing.assert_close((up + down) / 2, x)


def test_lowrank_map_ablates_and_rotates() -> None:
    """Ablation removes the direction; a rotation keeps norms, turns by its angle, and two of them add up."""
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(16, 2, dtype=torch.float64)).Q
    ablated = torch_call("lowrank_map", x, basis[:, :1], -torch.eye(1, dtype=torch.float64))
    torch.testing.assert_close(ablated, x - (x @ basis[:, :1]) * basis[:, 0])
    assert (ablated @ basis[:, 0]).abs().max() < 1e-12

    def turn(h: torch.Tensor, angle: float) -> torch.Tensor:
        rotation = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
        return torch_call("lowrank_map", h, basis, (rotation - torch.eye(2, dtype=torch.float64)).T)

    turned = turn(x, 0.7)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turn(turned, 0.4), turn(x, 1.1))

    def angle_of(h: torch.Tensor) -> torch.Tensor:
        c = h @ basis
        return torch.atan2(c[..., 1], c[..., 0])

    difference = (angle_of(turned) - angle_of(x)) % (2 * math.pi)
    torch.testing.assert_close(difference, torch.full_like(difference, 0.7))
    outside = torch.eye(16, dtype=torch.float64) - basis @ basis.T
    torch.testing.assert_close(turned @ outside, x @ outside)


def test_a_matrix_for_each_row() -> None:
    """Each row of a batch is mapped by its own matrix, as alone; with an axis in the middle, too."""
    x, basis = torch.randn(3, 5, 16), torch.linalg.qr(torch.randn(16, 2)).Q
    matrices = torch.randn(3, 2, 2)
    together = torch_call("lowrank_map", x, basis, matrices[:, None])
    alone = torch.cat([torch_call("lowrank_map", x[i : i + 1], basis, matrices[i]) for i in range(3)])
    torch.testing.assert_close(together, alone)
    turned = torch_call("lowrank_map", x.transpose(1, 2), basis, matrices[:, None], axis=1)
    torch.testing.assert_close(turned.transpose(1, 2), alone)
    assert (together - torch_call("lowrank_map", x, basis, matrices[0])).abs().max() > 1e-2


def test_target_angle_sends_gated_tokens_to_the_angle() -> None:
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(16, 2, dtype=torch.float64)).Q
    y = torch_call("target_angle", x, basis, torch.tensor(2.0, dtype=torch.float64), when="above")
    above = (x @ basis)[..., 0] > 0
    assert 0 < above.sum() < above.numel()
    assert torch.equal(y[~above], x[~above])
    c = (y @ basis)[above]
    torch.testing.assert_close(torch.atan2(c[:, 1], c[:, 0]), torch.full_like(c[:, 0], 2.0))
    torch.testing.assert_close(c.norm(dim=-1), (x @ basis)[above].norm(dim=-1))


def test_gradients_at_zero_tokens_are_finite() -> None:
    """Padding rows are often exactly zero; norms must not turn their gradient into NaN."""
    x = torch.zeros(2, 8, requires_grad=True)
    v = torch.randn(8)
    for norm in ("restore", "relative"):
        (gradient,) = torch.autograd.grad(torch_call("shift", x, v, norm=norm).sum(), x)
        assert gradient.isfinite().all(), norm
    angle = torch_call("target_angle", x, torch.from_numpy(BASIS), torch.ones(()))
    assert torch.autograd.grad(angle.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize(
    ("name", "shapes", "axis", "message"),
    [
        ("shift", [(2, 3, 8), (7,)], -1, "vector"),
        ("shift", [(2, 3, 8), (8,), None, (2, 3, 1)], -1, "mask"),
        ("shift", [(2, 3, 8), (8,), (4,)], -1, "strength"),
        ("shift", [(2, 3, 8), (8,)], 3, "axis 3"),
        ("shift", [(3, 8), (2, 3, 8)], -1, "vector"),
        ("lowrank_map", [(2, 8), (7, 2), (2, 2)], -1, "basis"),
        ("lowrank_map", [(2, 8), (8, 2), (3, 3)], -1, "matrix"),
        ("lowrank_map", [(2, 3, 8), (8, 2), (2, 2, 2)], -1, "matrix"),
        ("lowrank_map", [(2, 3, 8), (8, 2), (2,)], -1, "matrix"),
        ("target_angle", [(2, 8), (8, 3), ()], -1, "2 columns"),
        ("channel_scale", [(2, 8), (4,)], -1, "gamma"),
    ],
)
def test_operands_that_do_not_fit_are_refused(name: str, shapes: list, axis: int, message: str) -> None:
    """Nothing is broadcast to a shape that the user did not mean: ``infer`` and the torch op say what is wrong."""
    op = get_op(name)
    types = [None if s is None else TensorType(DType.F32, s) for s in shapes]
    types += [None] * (len(op.inputs) - len(types))
    with pytest.raises(VerifyError, match=message):
        op.infer(types, op.complete({"axis": axis}))
    with pytest.raises(VerifyError, match=message):
        torch_call(name, *[None if s is None else torch.zeros(s) for s in shapes], axis=axis)


def test_infer_over_symbolic_shapes() -> None:
    """Names are equal to themselves, unknown sizes pass, and known mismatches next to names are found."""
    op = get_op("shift")
    x = TensorType(DType.F32, ("batch", "seq", 64))
    attributes = op.complete({})
    assert op.infer([x, TensorType(DType.F32, (64,)), None, TensorType(DType.BOOL, ("batch", "seq"))], attributes) == [x]
    assert op.infer([x, TensorType(DType.F32, None), None, None], attributes) == [x]
    with pytest.raises(VerifyError, match="vector"):
        op.infer([x, TensorType(DType.F32, (63,)), None, None], attributes)
    with pytest.raises(VerifyError, match="mask"):
        op.infer([x, TensorType(DType.F32, (64,)), None, TensorType(DType.BOOL, ("batch", "seq", 64))], attributes)


def autoencoder(kind: str, channels: int = 16, latents: int = 40) -> dict[str, torch.Tensor]:
    """Weights of a whole random autoencoder, float64."""
    generator = torch.Generator().manual_seed(7)
    drawn = {
        "W_enc": torch.randn(channels, latents, generator=generator, dtype=torch.float64) / channels**0.5,
        "W_dec": torch.randn(latents, channels, generator=generator, dtype=torch.float64),
        "b_enc": torch.randn(latents, generator=generator, dtype=torch.float64) * 0.3,
        "b_dec": torch.randn(channels, generator=generator, dtype=torch.float64),
    }
    if kind == "jumprelu":
        drawn["threshold"] = torch.rand(latents, generator=generator, dtype=torch.float64)
    return drawn


def whole(x: torch.Tensor, sae: dict[str, torch.Tensor], edit: object, normalize: str = "none") -> torch.Tensor:
    """Encode with all latents, edit, decode, add the error: what SAELens does with ``use_error_term``, its formulas."""
    n, undo = x, lambda h: h
    if normalize == "rescale":
        factor = x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True)
        n, undo = x * factor, lambda h: h / factor
    if normalize == "layer_norm":
        mu = x.mean(-1, keepdim=True)
        std = (x - mu).std(-1, keepdim=True)
        n, undo = (x - mu) / (std + 1e-5), lambda h: h * std + mu
    pre = n @ sae["W_enc"] + sae["b_enc"]
    f = torch.relu(pre)
    if "threshold" in sae:
        f = f * (pre > sae["threshold"])
    error = x - undo(f @ sae["W_dec"] + sae["b_dec"])
    return undo(edit(f.clone()) @ sae["W_dec"] + sae["b_dec"]) + error  # type: ignore[operator]


@pytest.mark.parametrize("normalize", ["none", "rescale", "layer_norm"])
@pytest.mark.parametrize("kind", ["relu", "jumprelu"])
def test_latent_edit_is_the_whole_autoencoder(kind: str, normalize: str) -> None:
    """ESR's acceptance (a) and (c): the rows of the edited latents give what all latents and the error term give."""
    sae = autoencoder(kind)
    x = torch.randn(3, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 + 0.3
    chosen = [3, 17, 18, 39]
    rows = (sae["W_dec"][chosen], sae["W_enc"].T[chosen], sae["b_enc"][chosen])
    thresholds = sae["threshold"][chosen] if kind == "jumprelu" else None
    values = torch.tensor([0.0, 4.0, -1.0, 2.5], dtype=torch.float64)

    def edited(mode: str, v: torch.Tensor | None, h: torch.Tensor = x, **attributes: object) -> torch.Tensor:
        return torch_call("latent_edit", h, *rows, thresholds, v, None, mode=mode, normalize=normalize, **attributes)

    def at(new: object) -> object:
        def change(f: torch.Tensor) -> torch.Tensor:
            f[..., chosen] = new(f[..., chosen])  # type: ignore[operator]
            return f

        return change

    for mode, new in (("set", lambda f: values), ("add", lambda f: f + values), ("scale", lambda f: f * values)):
        want = whole(x, sae, at(new), normalize)
        torch.testing.assert_close(edited(mode, values), want, rtol=1e-6, atol=1e-5)
        assert (want - x).abs().max() > 0.1, mode
    if normalize == "none":  # adding moves what a later clamp would read; in this order they are the edit of one code
        both = edited("add", values, edited("set", None, value=1.5))
        torch.testing.assert_close(both, whole(x, sae, at(lambda f: torch.full_like(f, 1.5) + values)), rtol=1e-6, atol=1e-5)
    n = whole(x, sae, lambda f: f, normalize)
    torch.testing.assert_close(n, x)  # no edit is the identity
    own: list[torch.Tensor] = []
    whole(x, sae, lambda f: own.append(f[..., chosen].clone()) or f, normalize)
    torch.testing.assert_close(edited("set", own[0]), x, rtol=1e-9, atol=1e-9)
    silent = (own[0] == 0).all(-1)
    ablated = edited("set", None)
    assert 0 < silent.sum() < silent.numel()
    assert torch.equal(ablated[silent], x[silent])
    assert ((ablated - x).abs().amax(-1)[~silent] > 1e-3).all()


def test_latent_edit_keeps_a_silent_token_bit_for_bit_everywhere() -> None:
    """Ablating latents that do not fire leaves -0.0 and every other bit, in every engine."""
    x = np.where(tokens() == tokens(), np.nan_to_num(tokens(), posinf=2.0, neginf=-2.0), np.float32(0.25))
    assert np.signbit(x[x == 0]).any()
    low = np.full(2, -100.0, np.float32)
    for attributes in (
        {"mode": "set"},
        {"mode": "scale", "value": 3.0},
        *({"mode": "set", "normalize": n} for n in ("rescale", "layer_norm")),
    ):
        for who, result in everywhere("latent_edit", [x, ROWS, ROWS, low], attributes).items():
            assert same_bits(result, x), f"{who} {attributes}"
