"""Taps, clipping and casts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.errors import OptionError, PassError
from actgraph.formats.onnx_export import to_onnx
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


def test_tap_of_some_tokens(both_stories: dict[str, Graph]) -> None:
    """The tokens of the clause as they are, and zeros for the others, in both dialects."""
    inputs = token_inputs()
    for graph in both_stories.values():
        whole = apply(graph, "tap{site=blocks.2.resid_post}").run(inputs)["blocks.2.resid_post"]
        some = apply(graph, 'tap{site=blocks.2.resid_post where="2:5 ! row(1)"}').run({**inputs, "row_index": np.arange(2)})
        expected = np.zeros_like(whole)
        expected[0, 2:5] = whole[0, 2:5]
        assert np.array_equal(some["blocks.2.resid_post"], expected)
        assert np.array_equal(some["logits"], graph.run(inputs)["logits"])
    with pytest.raises(PassError, match="is about tokens"):
        apply(both_stories["fx"], "tap{site=blocks.0.attn.pattern where=2:}")


def test_tap_of_some_tokens_is_zero_elsewhere(both_stories: dict[str, Graph]) -> None:
    """Of whatever the others hold, negative numbers, NaN and infinity, the output has +0.0."""
    inputs, site = token_inputs(), "blocks.2.resid_post"
    bad = np.where(np.arange(64) % 2, np.nan, -np.inf).astype(np.float32)
    for graph in both_stories.values():
        spoilt = graph.clone()
        with spoilt.edit("spoil") as editor:
            editor.insert_at(spoilt.site(site), "add", [np.where(np.arange(64) < 3, bad, 0).astype(np.float32)])
        made = apply(spoilt, f"tap{{site={site} where=2:5}}", parity="none").run(inputs)[site]
        others = np.delete(made, np.s_[2:5], axis=1)
        assert not others.any() and not np.signbit(others).any() and np.isnan(made[:, 2:5, 1]).all()


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
    floats = {p.name: p.dtype for p in cast.parameters() if p.dtype is not None and p.dtype.is_float}
    kept = {name for name, kind in floats.items() if kind != dtype}  # rotary angles stay in single precision
    assert set(floats.values()) - {"f32"} == {dtype} and all("inv_freq" in name for name in kept)
    assert [v.dtype for _, v in cast.outputs()] == ["f32"]
    error = relative(run(stories), run(cast))
    assert error < {"f16": 2e-2, "bf16": 1e-1, "f64": 1e-5}[dtype]
    assert error > 0


@pytest.mark.parametrize("options", ["", "{embeddings=true}", "{activations=static}"])
def test_cast_leaves_scales_alone(dialect: str, options: str) -> None:
    """Weights of about 1e-6 have scales of 1e-8, which are 0 in half precision; what they dequantize is not."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(16, 8), torch.nn.Linear(8, 8))
    with torch.no_grad():
        for weight in (model[0].weight, model[1].weight):
            weight.copy_(torch.sign(weight) * (0.5 + torch.rand_like(weight)) * 2e-6)
        model["embeddings" in options].weight.mul_(5e5)  # products of two such numbers would be 0 in half precision anyway
        model[1].bias.zero_()
    ids = torch.arange(6).reshape(2, 3)
    graph = ag.trace(model.eval(), (ids,), dynamic={"input": ("batch", "seq")})
    if dialect == "onnx":
        graph = to_onnx(graph)
    corpus = [{"input": np.arange(16).reshape(2, 8)}]
    quantized = apply(graph, f"quantize{options}", corpus=corpus)
    cast = apply(quantized, "cast{dtype=f16}")
    cast.verify()
    kept = {p.name: p.dtype for p in cast.parameters() if "scale" in p.name or p.name.startswith("fake_quant")}
    assert kept and "f16" not in kept.values()
    assert all(n.output.dtype == "f16" for n in cast.nodes() if n.op == "actgraph.dequantize")
    assert next(linear for linear in cast.views.linears()).output.dtype == "f16"
    weight, again = (g.views.linears()[0].read_weight().astype(np.float64) for g in (quantized, cast))
    assert relative(weight, again) < 0.02, "half precision has a few bits left at this size"
    if "embeddings" in options:
        rows, again = (
            apply(g, "tap{site='linear.0:in' prefix=t.}", parity="none").run({"input": ids.numpy()})["t.linear.0:in"]
            for g in (quantized, cast)
        )
        assert rows.dtype == np.float32 and again.dtype == np.float16
        assert relative(rows, again.astype(np.float32)) < 0.02


def test_cast_unties_a_scale_from_numbers() -> None:
    """A parameter that is a scale here and a factor there: each reader has the type that it needs."""
    graph = ag.trace(torch.nn.Linear(4, 4).eval(), (torch.randn(2, 4),), dynamic={"input": ("batch", None)})
    with graph.edit("test") as editor:
        scale = editor.add_parameter("shared", np.full((4,), 1e-8, np.float32))
        linear = graph.views.linears()[0]
        codes = editor.add_parameter("codes", np.full((4, 4), 100, np.int8))
        made = editor.insert("actgraph.dequantize", [codes, scale, None], {"axis": 0, "dtype": "f32"}, before=linear.nodes[0])
        node, index = linear.matrix
        editor.set_operand(node, index, made.output)
        shifted = editor.insert("add", [linear.output, scale], after=linear.output.producer)
        editor.redirect(linear.output, shifted.output)
        editor.erase_dead()
    cast = apply(graph, "cast{dtype=f16}")
    assert sorted((p.name, str(p.dtype)) for p in cast.parameters() if "shared" in p.name) == [
        ("shared", "f32"), ("shared_untied", "f16"),
    ]  # fmt: skip


def test_what_is_dequantized_comes_out_cast(tiny: Graph) -> None:
    """No cast stands between a dequantizer and its product, which engines fuse."""
    cast = apply(tiny, "quantize, cast{dtype=f16}")
    assert {str(node.output.dtype) for node in cast.nodes() if node.op == "actgraph.dequantize"} == {"f16"}
    readers = [use.node for n in cast.nodes() if n.op == "actgraph.dequantize" for use in n.output.uses]
    assert len(readers) == 4 and all(r.prim.op in ("linear", "matmul") for r in readers)
    assert relative(run(apply(tiny, "quantize")), run(cast)) < 1e-2


def test_cast_of_a_quantized_file(tiny: Graph, tmp_path: Path) -> None:
    """A file of plain ONNX ops: QuantizeLinear wants its input in the type of its scale."""
    quantized = apply(tiny, "quantize{activations=static}", corpus=[{"ids": np.arange(16).reshape(4, 4)}])
    plain = ag.load(quantized.save(tmp_path / "plain.onnx", inline="all"))
    assert any(node.op == "onnx.QuantizeLinear" for node in plain.nodes())
    cast = apply(plain, "cast{dtype=f16}")
    cast.verify()
    for node in cast.nodes():
        if node.op in ("onnx.QuantizeLinear", "onnx.DequantizeLinear"):
            assert node.operands[1].dtype == "f32"
    assert relative(run(plain), run(cast)) < 5e-2


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
