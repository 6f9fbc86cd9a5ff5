"""Taps, clipping and casts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.errors import OptionError, PassError
from actgraph.graph import Graph, Role
from actgraph.passes.clip.clip import Clip
from tests.passes.conftest import apply, corpus_batches, hf_stories, relative, run, token_inputs


def test_tap_returns_what_transformers_returns(stories: Graph) -> None:
    out = apply(stories, "tap{site='blocks.*.resid_post'}").run(token_inputs())
    with torch.no_grad():
        states = hf_stories()(
            **{k: torch.from_numpy(v) for k, v in token_inputs().items()}, use_cache=False, output_hidden_states=True
        ).hidden_states
    for index in range(4):  # transformers norms the last one
        assert relative(states[index + 1].numpy(), out[f"blocks.{index}.resid_post"]) < 1e-5
    assert np.array_equal(out["logits"], run(stories)), "a tap changes nothing"


def test_tap_marks_its_outputs(stories: Graph) -> None:
    tapped = apply(stories, "tap{site=blocks.1.attn.out prefix=debug.}")
    assert [name for name, _ in tapped.outputs()] == ["logits", "debug.blocks.1.attn.out"]
    assert tapped.role("debug.blocks.1.attn.out") is Role.TAP
    with pytest.raises(PassError):
        apply(tapped, "tap{site=blocks.1.attn.out prefix=debug.}")


def test_tap_inside_a_fused_attention(stories: Graph) -> None:
    pattern = apply(stories, "tap{site=blocks.0.attn.pattern}").run(token_inputs())["blocks.0.attn.pattern"]
    assert pattern.shape == (2, 8, 12, 12)
    assert np.allclose(pattern.sum(-1), 1, atol=1e-5)
    assert not np.triu(pattern, 1).any(), "a causal model does not look ahead"


def test_clip_bounds_and_nan() -> None:
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(4, 4), torch.nn.ReLU()).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(4))
        model[1].bias.zero_()
    graph = ag.trace(model, (torch.randn(2, 4),), dynamic={"input": ("batch", None)})
    x = {"input": np.array([[-1.0, 1.0, 3.0, np.nan], [0.5, 2.0, 2.5, np.inf]], np.float32)}
    x["input"][1, 3] = 9.0
    saturated = run(apply(graph, "clip{site='linear.0' min=-0.5 max=2}"), {"input": x["input"][1:]})
    assert saturated.tolist() == [[0.5, 2.0, 2.0, 2.0]]
    zeroed = run(apply(graph, "clip{site='linear.0' max=2 policy=zero}"), {"input": x["input"][1:]})
    assert zeroed.tolist() == [[0.5, 2.0, 0.0, 0.0]]
    first = run(apply(graph, "clip{site='activation.0' min=0.25 max=2}"), x)
    assert np.isnan(first[0]).any(), "NaN passes"


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_clip_at_percentiles_of_the_calibration(stories: Graph, per: str) -> None:
    clipped = apply(stories, f"clip{{site=blocks.2.mlp.hidden percentile=90 per={per}}}, tap{{site=blocks.2.mlp.hidden}}")
    tapped = apply(stories, "tap{site=blocks.2.mlp.hidden}")
    batches = list(corpus_batches(stories))
    plain, seen = (
        np.concatenate([g.run(b)["blocks.2.mlp.hidden"][b["attention_mask"].astype(bool)] for b in batches])
        for g in (tapped, clipped)
    )
    low, high = np.quantile(plain, [0.1, 0.9], axis=0 if per == "channel" else None)
    expected = np.clip(plain, low, high)
    assert np.abs(seen - expected).max() < 0.02 * np.abs(plain).max()
    assert (seen == expected).mean() > 0.5 and relative(run(stories), run(clipped)) > 1e-4


def test_clip_options(stories: Graph) -> None:
    for bad in ("site=blocks.0.mlp.act", "site=blocks.0.mlp.act min=2 max=1", "site=blocks.0.mlp.act min=1 per=channel"):
        with pytest.raises(OptionError):
            apply(stories, f"clip{{{bad}}}")


@pytest.mark.parametrize("bounds", [{"min": float("nan")}, {"min": 0.0, "max": float("nan")}])
def test_clip_refuses_bounds_that_are_not_numbers(bounds: dict[str, float]) -> None:
    """NaN compares false with everything: no check of the order of the bounds would notice it."""
    with pytest.raises(OptionError, match="a bound is NaN"):
        Clip(site="linear.0", **bounds)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f64"])
def test_cast(stories: Graph, dialect: str, dtype: str) -> None:
    if dialect == "onnx" and dtype == "bf16":
        pytest.skip("onnxruntime's CPU engine has no bfloat16 MatMul")
    cast = apply(stories, f"cast{{dtype={dtype}}}")
    cast.verify()
    assert {p.dtype for p in cast.parameters() if p.dtype is not None and p.dtype.is_float} == {dtype}
    assert [v.dtype for _, v in cast.outputs()] == ["f32"]
    error = relative(run(stories), run(cast))
    assert error < {"f16": 2e-2, "bf16": 1e-1, "f64": 1e-5}[dtype]
    assert error > 0


def test_cast_refuses_overflow() -> None:
    model = torch.nn.Linear(2, 2).eval()
    with torch.no_grad():
        model.weight.fill_(1e6)
    graph = ag.trace(model, (torch.randn(2, 2),), dynamic={"input": ("batch", None)})
    with pytest.raises(PassError, match="beyond the range of f16"):
        apply(graph, "cast{dtype=f16}")


@pytest.mark.parametrize(
    "step", ["tap{site=blocks.0.mlp.hidden}", "clip{site=blocks.0.mlp.hidden min=-0.1 max=0.2}", "cast{dtype=f16}"]
)
def test_golden(tiny: Graph, dialect: str, step: str, golden) -> None:  # type: ignore[no-untyped-def]
    edited = apply(tiny, step)
    golden(f"passes/{step.partition('{')[0]}.{dialect}", edited.text())
    error = relative(run(tiny), run(edited))
    low, high = {"tap": (0, 0), "clip": (1e-2, 2), "cast": (1e-5, 1e-2)}[step.partition("{")[0]]
    assert low <= error <= high
