"""Quantization: codes, error bounds, sharing, embeddings, activations, and what stays in float."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.errors import PassError
from actgraph.formats.onnx_export import to_onnx
from actgraph.graph import Graph
from actgraph.graph.graph import parameter_bytes
from actgraph.passes.quantize.weights import symmetric_int8
from tests import zoo
from tests.passes.conftest import apply, hf_stories, relative, run, token_inputs


@pytest.mark.parametrize("axis", [0, 1])
def test_codes_are_symmetric_per_channel(axis: int) -> None:
    weight = np.random.default_rng(0).normal(0, 1, (6, 9)).astype(np.float32)
    weight[(slice(None),) * axis + (2,)] = 0
    q, scale = symmetric_int8(weight, axis)
    wide = np.moveaxis(weight, axis, 0)
    codes = np.moveaxis(q, axis, 0)
    for channel, (row, code) in enumerate(zip(wide, codes, strict=True)):
        expected = max(abs(float(v)) for v in row) / 127 or 1.0
        assert scale[channel] == pytest.approx(expected, rel=1e-6)
        assert all(
            abs(float(v) - int(c) * scale[channel]) <= scale[channel] / 2 * (1 + 1e-5) for v, c in zip(row, code, strict=True)
        )
    assert codes.min() >= -127 and scale[2] == 1 and not codes[2].any()


def test_large_weights_are_packed_block_by_block_alike() -> None:
    weight = np.random.default_rng(0).normal(0, 1, (2100, 4096)).astype(np.float32)
    q, scale = symmetric_int8(weight, 0)
    assert np.array_equal(q, np.clip(np.rint(weight / scale[:, None]), -127, 127).astype(np.int8))


def test_weights_against_rounded_weights_in_torch(stories: Graph) -> None:
    """Direct reference: the transformers model with each linear's weight rounded in place."""
    import copy

    model = copy.deepcopy(hf_stories())
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                scale = module.weight.abs().amax(1, keepdim=True) / 127
                module.weight.copy_(torch.round(module.weight / scale).clamp(-127, 127) * scale)
        reference = model(**{k: torch.from_numpy(v) for k, v in token_inputs().items()}, use_cache=False).logits.numpy()
    quantized = apply(stories, "quantize{weights=int8}")
    assert relative(reference, run(quantized)) < 1e-5
    assert relative(run(stories), run(quantized)) > 1e-3


def test_perplexity_moves_by_less_than_a_percent(stories: Graph) -> None:
    from actgraph.calibrate.perplexity import perplexity

    before = perplexity(stories)
    after = perplexity(apply(stories, "quantize{weights=int8}"))
    assert before == pytest.approx(5.17, abs=0.005)
    assert abs(after / before - 1) < 0.01


def test_model_shrinks_and_floats_go(stories: Graph) -> None:
    quantized = apply(stories, "quantize{weights=int8 embeddings=true}")
    sizes = [sum(parameter_bytes(p) for p in g.parameters()) for g in (stories, quantized)]
    assert sizes[1] < 0.35 * sizes[0]
    assert not any(
        p.dtype == "f32" and len(p.shape or ()) == 2 and p.shape[0] * p.shape[1] > 1024 for p in quantized.parameters()
    )


def test_tied_embedding_keeps_its_float_form_unless_asked(stories: Graph) -> None:
    out = ag.run(stories, "quantize{weights=int8}")
    assert "both forms are stored" in str(out.report)
    table = next(p for p in out.graph.parameters() if "embed_tokens" in p.name and p.dtype == "f32")
    assert table.shape == (512, 64)
    packed = apply(stories, "quantize{weights=int8 embeddings=true}")
    assert relative(run(out.graph), run(packed)) < 0.2  # rows are rounded as well
    assert not np.array_equal(run(out.graph), run(packed))


def test_embeddings_are_packed_whatever_the_weights(tiny: Graph) -> None:
    """The rows of the table alone are rounded: absmax / 127 of each row."""
    out = ag.run(tiny, "quantize{weights=none embeddings=true}")
    assert dict(out.report[0].counts) == {"embeddings packed": 1}
    ids = {"ids": np.arange(16).reshape(2, 8)}
    before, after = (apply(g, "tap{site=embed}").run(ids)["embed"] for g in (tiny, out.graph))
    scale = np.abs(before).max(-1, keepdims=True) / 127
    assert np.allclose(after, np.rint(before / scale) * scale, atol=1e-6) and not np.array_equal(before, after)
    assert not any(p.dtype == "f32" and p.shape == (16, 8) and "embed" in p.name for p in out.graph.parameters())


def test_a_packed_table_says_who_still_reads_it_in_float(stories: Graph, dialect: str) -> None:
    out = ag.run(stories, "quantize{weights=none embeddings=true}")
    assert "stays in float for" in str(out.report)


def test_embeddings_without_a_table_are_mentioned() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4)).eval()
    graph = ag.trace(model, (torch.randn(2, 4),), dynamic={"input": ("batch", None)})
    assert "embeddings=true did nothing" in str(ag.run(graph, "quantize{embeddings=true}").report)


@pytest.mark.parametrize("form", ["grouped", "split", "batched", "batched file"])
def test_experts_are_declined_by_name(form: str) -> None:
    """The matrices of experts stay in float, and the report says so for each stack of them."""
    graph = (
        ag.load(zoo.stock_onnx("mixtral_batched"))
        if form == "batched file"
        else zoo.captured("mixtral_batched" if form == "batched" else "mixtral")
    )
    if form == "split":
        graph = to_onnx(graph)
    stacks = sorted(p.name for p in graph.parameters() if p.type.rank == 3)
    assert len(stacks) == 4
    for options in ("", "{weights=none activations=dynamic}"):
        out = ag.run(graph, f"quantize{options}", parity="none", reproducer=False)
        declined = [d.reason for d in out.report[0].declined if "experts" in d.reason]
        assert sorted(reason.split()[0] for reason in declined) == stacks
        assert sorted(p.name for p in out.graph.parameters() if p.type.rank == 3 and p.dtype == "f32") == stacks
    one = ag.run(graph, "quantize{site='blocks.0.attn.q'}", parity="none", reproducer=False)
    assert not one.report[0].declined, "nobody asked for the experts"


def test_a_weight_that_is_squeezed_and_unsqueezed_is_packed(dialect: str) -> None:
    """Mamba's convolution reads its stored weight through two reshapes that cancel."""
    graph = zoo.captured("mamba") if dialect == "fx" else ag.load(zoo.stock_onnx("mamba"))
    out = ag.run(graph, "quantize", parity="none")
    assert out.report[0].counts["weights packed"] == 9 and not out.report[0].declined
    weights = [(c.weight.producer.op if c.weight.producer else "", c.weight.shape) for c in out.graph.views.convs()]
    assert weights == [("actgraph.dequantize", (64, 1, 4))] * 2
    by_fold = ag.run(graph, "fold, quantize", parity="none").graph
    inputs = zoo.inputs("mamba")
    assert relative(run(graph, inputs), run(out.graph, inputs)) < 0.1
    assert relative(run(by_fold, inputs), run(out.graph, inputs)) < 1e-5


def test_a_weight_that_is_really_computed_is_declined() -> None:
    class Computed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.scaled = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(self.plain(x), self.scaled.weight.exp())

    graph = ag.trace(Computed().eval(), (torch.randn(2, 4),), dynamic={"x": ("batch", None)})
    (declined,) = ag.run(graph, "quantize", parity="none").report[0].declined
    assert "is computed, not read as it is stored: fold may help" in declined.reason
    assert not ag.run(graph, "fold, quantize", parity="none").report[1].declined


def test_a_weight_read_through_a_transpose_is_stored_so(tiny: Graph, dialect: str) -> None:
    """No transpose of codes is left to run at each call, and the codes are those of the float weight."""
    before = [linear.read_weight() for linear in tiny.views.linears()]
    quantized = apply(tiny, "quantize")
    assert not any(node.prim is not None and node.prim.op == "transpose" for node in quantized.nodes())
    stored = {p.name: p.shape for p in quantized.parameters() if p.name.endswith("weight_int8")}
    assert stored["head.weight_int8"] == ((16, 8) if dialect == "fx" else (8, 16))
    for weight, linear in zip(before, quantized.views.linears(), strict=True):
        scale = np.abs(weight).max(1, keepdims=True) / 127
        assert np.allclose(linear.read_weight(), np.rint(weight / scale) * scale, atol=1e-6)


def test_a_table_that_a_head_reads_transposed_keeps_its_rows() -> None:
    """One store of codes for both readers: rows for the lookup, a transpose for the product."""

    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = torch.nn.Embedding(16, 8)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(self.table(ids), self.table.weight)

    ids = torch.arange(6).reshape(2, 3)
    graph = ag.trace(Tied().eval(), (ids,), dynamic={"ids": ("batch", "seq")})
    outputs = []
    for each in (graph, to_onnx(graph)):
        quantized = apply(each, "quantize{embeddings=true}")
        assert [p.shape for p in quantized.parameters() if p.dtype == "i8" and p.type.rank == 2] == [(16, 8)]
        outputs.append(run(quantized, {"ids": ids.numpy()}))
    assert relative(*outputs) < 1e-5
    assert 1e-5 < relative(run(graph, {"ids": ids.numpy()}), outputs[0]) < 0.05


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_activations(stories: Graph, activations: str) -> None:
    quantized = apply(stories, f"quantize{{weights=none activations={activations}}}")
    quantizers = [node for node in quantized.nodes() if node.op == "actgraph.fake_quant"]
    # q, k and v read one value and share one quantizer; so do gate and up: o, down and the head have their own.
    assert len(quantizers) == 5 * 4 + 1
    error = relative(run(stories), run(quantized))
    assert 1e-4 < error < 0.3


def test_dynamic_activations_against_torch(tiny: Graph) -> None:
    """Per-token absmax / 127, rounded half to even, on the input of one linear."""
    tapped = apply(
        tiny,
        "tap{site=blocks.0.mlp.norm}, "
        "quantize{weights=none activations=dynamic site=linear.0}, tap{site='linear.0:in' prefix=q.}",
    )
    out = tapped.run({"ids": np.array([[1, 2, 3]], np.int64)})
    x = torch.from_numpy(out["blocks.0.mlp.norm"])
    scale = x.abs().amax(-1, keepdim=True) / 127
    assert np.allclose(out["q.linear.0:in"], (torch.round(x / scale).clamp(-127, 127) * scale).numpy(), atol=1e-6)


@pytest.mark.parametrize("embeddings", ["false", "true"])
def test_scales_of_half_precision_models_are_float32(embeddings: str) -> None:
    """A scale is absmax / 127: in half precision, those of weights that half precision holds well would be subnormal or 0."""

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(16, 8), torch.nn.Linear(8, 5, bias=False))
    for weight in model.parameters():
        weight.data *= 1e-4
    half = ag.trace(model.half().eval(), (torch.zeros(2, 3, dtype=torch.long),), dynamic={"input": ("batch", "seq")})
    quantized = apply(half, f"quantize{{weights=int8 embeddings={embeddings}}}")
    scales = [p for p in quantized.parameters() if p.name.endswith("_scale")]
    assert len(scales) == (2 if embeddings == "true" else 1) and {p.dtype for p in scales} == {"f32"}
    (linear,) = quantized.views.linears()
    assert relative(half.views.linears()[0].read_weight().astype(np.float32), linear.read_weight().astype(np.float32)) < 1e-2
    if embeddings == "true":
        ids = {"input": np.arange(6).reshape(2, 3)}
        tapped = [apply(g, "tap{site='linear.0:in' prefix=t.}").run(ids)["t.linear.0:in"] for g in (half, quantized)]
        assert tapped[1].dtype == np.float16 and relative(*(t.astype(np.float32) for t in tapped)) < 1e-2


def test_convolutions_too() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3)).eval()
    graph = ag.trace(model, (torch.randn(2, 3, 9, 9),), dynamic={"input": ("batch", None, None, None)})
    quantized = apply(graph, "quantize{weights=int8}")
    x = {"input": np.random.default_rng(0).normal(0, 1, (2, 3, 9, 9)).astype(np.float32)}
    assert 1e-5 < relative(run(graph, x), run(quantized, x)) < 2e-2
    assert sum(node.op == "actgraph.dequantize" for node in quantized.nodes()) == 2


def test_again_is_an_error(stories: Graph) -> None:
    with pytest.raises(PassError):
        apply(stories, "quantize{weights=int8}, quantize{weights=int8}")


def test_ignore(stories: Graph) -> None:
    quantized = apply(stories, "quantize{weights=int8 ignore=[logits, 'blocks.*.attn.*']}")
    assert sum(node.op == "actgraph.dequantize" for node in quantized.nodes()) == 5 * 3, "gate, up and down of five blocks"


@pytest.mark.parametrize("options", ["weights=int8", "weights=int8 embeddings=true", "weights=none activations=dynamic"])
def test_golden(tiny: Graph, dialect: str, options: str, golden) -> None:  # type: ignore[no-untyped-def]
    quantized = apply(tiny, f"quantize{{{options}}}")
    golden(f"passes/quantize_{'_'.join(o.split('=')[1] for o in options.split())}.{dialect}", quantized.text())
    assert 1e-5 < relative(run(tiny), run(quantized)) < 0.1


def test_dialects_agree(both_stories: dict[str, Graph]) -> None:
    fx, onnx = (run(apply(graph, "quantize{weights=int8 embeddings=true}")) for graph in both_stories.values())
    assert relative(fx, onnx) < 1e-5


def test_each_packed_weight_is_listed(tiny: Graph) -> None:
    """Once for a weight, with its type before and how many scales it has; the bytes of all come last."""
    result = ag.run(tiny, "quantize{weights=int8}")
    *packed, whole = result.report[0].details
    assert len(packed) == result.report[0].counts["weights packed"] == 4
    assert {row["packed"] for row in packed} == {"i8, 12 scales", "i8, 8 scales", "i8, 16 scales"}
    assert all(row["type"].startswith("f32[") and row["read by"] == 1 for row in packed)
    assert whole["bytes after"] < whole["bytes before"] and packed[0]["site"] in result.report.details("quantize")
