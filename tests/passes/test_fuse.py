"""Fusing into the ops that kernels claim: equal numbers, exported and composed with other passes; sites; what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.errors import PassError, SiteError
from actgraph.graph import Graph
from actgraph.graph.fusion import fuse
from tests import zoo
from tests.passes.conftest import apply, in_dialect, relative, run, tiny_inputs, token_inputs
from tests.passes.test_kv_cache import stepwise

TEAL = "sparsify{method=teal threshold=0.05}"
CATS = "sparsify{method=cats threshold=0.1}"


def ops(graph: Graph) -> Counter[str]:
    """How often each op of ours is there."""
    return Counter(node.op.partition(".")[2] for node in graph.nodes() if node.op.startswith("actgraph."))


@pytest.mark.parametrize("method", ["teal", "cats"])
def test_golden(tiny: Graph, dialect: str, method: str, golden) -> None:  # type: ignore[no-untyped-def]
    before = f"sparsify{{method={method} threshold=0.25}}, quantize"
    fused = apply(tiny, f"{before}, fuse")
    golden(f"passes/fuse_{method}.{dialect}", fused.text())
    plain = apply(tiny, before)
    assert relative(run(plain), run(fused)) < 1e-5
    assert relative(run(tiny), run(fused)) > 1e-2, "the gates did something"
    for node in fused.nodes():
        if node.op.startswith("actgraph."):
            assert node.origin.created_by == "fuse" and node.origin.sources, f"{node.name} does not say where it is from"


@pytest.mark.parametrize(
    ("pipeline", "want"),
    [
        (TEAL, {"linear": 35, "rms_norm": 11, "rotary": 10}),
        (CATS, {"feed_forward": 5, "rms_norm": 11, "rotary": 10}),
        (f"{TEAL}, quantize", {"linear": 36, "rms_norm": 11, "rotary": 10}),
        (f"{CATS}, quantize", {"feed_forward": 5, "linear": 21, "rms_norm": 11, "rotary": 10}),
    ],
)
def test_the_real_model(stories: Graph, pipeline: str, want: dict[str, int]) -> None:
    plain, fused = apply(stories, pipeline), apply(stories, f"{pipeline}, fuse")
    assert ops(fused) == want
    assert relative(run(plain), run(fused)) < 1e-5
    assert relative(run(stories), run(fused)) > 1e-4


@pytest.mark.parametrize("name", ["gemma3", "gpt_neox"])
@pytest.mark.parametrize("pipeline", [TEAL, "quantize", CATS])
def test_other_architectures(name: str, dialect: str, pipeline: str) -> None:
    """Gemma has norms by 1 + weight and gelu_tanh, GPT-NeoX biases, layer norms, rotary of a part and no gate."""
    if name == "gpt_neox" and pipeline == CATS:
        pytest.skip("it has no gated feed-forward")
    graph = in_dialect(name, dialect)
    plain, fused = apply(graph, pipeline), apply(graph, f"{pipeline}, fuse{{dense=true}}")
    found, inputs = ops(fused), zoo.inputs(name)
    assert relative(run(plain, inputs), run(fused, inputs)) < 1e-5
    assert relative(run(graph, inputs), run(fused, inputs)) > 1e-3
    assert found["rotary"] and found["rms_norm" if name == "gemma3" else "layer_norm"] and not found["gate"]
    partial = [node.attributes.get("rotary_dim", 0) for node in fused.nodes() if node.op == "actgraph.rotary"]
    offsets = [node.attributes["offset"] for node in fused.nodes() if node.op == "actgraph.rms_norm"]
    assert all(partial) if name == "gpt_neox" else set(offsets) == {1.0}


@pytest.mark.parametrize("inline", ["none", "all"])
@pytest.mark.parametrize("pipeline", [f"{TEAL}, quantize, fuse", f"{CATS}, fuse"])
def test_exported(stories: Graph, pipeline: str, inline: str, tmp_path: Path) -> None:
    """A stock onnxruntime gives the same numbers, with the ops kept as functions and with their bodies inlined."""
    fused = apply(stories, pipeline)
    loaded = ag.load(fused.save(tmp_path / "fused.onnx", inline=inline))
    assert bool(ops(loaded)) == (inline == "none")
    if inline == "none":
        assert ops(loaded) == ops(fused)
    assert relative(run(fused), run(loaded)) < 1e-5


def test_gated_weights_lie_by_input_channel(stories: Graph) -> None:
    fused = apply(stories, f"{TEAL}, quantize, fuse")
    linears = [node for node in fused.nodes() if node.op == "actgraph.linear"]
    gated = [node for node in linears if node.attributes.get("keep") == "abs>"]
    assert len(gated) == 35 and all(node.attributes["layout"] == "in_out" for node in gated)
    (head,) = [node for node in linears if node not in gated]
    assert head.attributes.get("layout", "out_in") == "out_in"
    for node in gated:
        x, weight, scale, zero = (*node.operands, None)[:4]
        assert x is not None and weight is not None and x.shape is not None and weight.shape is not None
        assert weight.shape[0] == x.shape[-1] and str(weight.dtype) == "i8"
        assert scale is not None and scale.shape == weight.shape[1:] and zero is None


def test_output_gating_without_the_feed_forward(stories: Graph) -> None:
    """CATS: what up computes for a dropped neuron is multiplied by 0, so it need not be computed."""
    plain, fused = apply(stories, CATS), apply(stories, f"{CATS}, fuse{{feed_forwards=false}}")
    kept = [node.operands[-1] for node in fused.nodes() if node.op == "actgraph.linear"]
    assert len(kept) == 5 and all(v is not None and v.producer and v.producer.op == "actgraph.gate" for v in kept)
    assert relative(run(plain), run(fused)) < 1e-5


def test_a_gate_with_other_readers_stays_for_them(stories: Graph) -> None:
    tapped = f"{TEAL}, tap{{site=blocks.1.mlp.hidden}}"
    plain, fused = apply(stories, tapped), apply(stories, f"{tapped}, fuse")
    assert ops(fused)["gate"] == 1 and ops(fused)["linear"] == 35
    for name, value in plain.run(token_inputs()).items():
        assert relative(value, fused.run(token_inputs())[name]) < 1e-5


def test_values_that_others_read_are_not_fused_away(stories: Graph) -> None:
    tapped = f"{CATS}, tap{{site=blocks.1.mlp.up}}"
    result = ag.run(stories, f"{tapped}, fuse")
    fused, plain = result.graph, apply(stories, tapped)
    assert ops(fused)["feed_forward"] == 4 and ops(fused)["linear"] == 0, "up is not output-gated: its value is read"
    (declined,) = result.report[-1].declined
    assert declined.site == "blocks.1.mlp.out" and "read by others" in declined.reason
    for name, value in plain.run(token_inputs()).items():
        assert relative(value, fused.run(token_inputs())[name]) < 1e-5


def test_sites_stay_where_their_values_do(stories: Graph) -> None:
    fused = apply(stories, f"{CATS}, fuse")
    for name in ("blocks.0.mlp.out", "blocks.0.mlp.norm", "blocks.3.attn.q", "blocks.0.resid_post", "logits", "norm.1:in"):
        assert fused.site(name).type == stories.site(name).type
    with pytest.raises(SiteError, match="removed by fuse"):
        fused.site("blocks.0.mlp.hidden")
    with pytest.raises(SiteError, match="removed by fuse"):
        apply(stories, f"{TEAL}, fuse").site("blocks.0.mlp.hidden")
    rotary = apply(stories, "fuse")
    assert {site.name for site in stories.sites()} == {site.name for site in rotary.sites()}
    vector = str([1.0] * 64)
    steer = f"steer{{site=blocks.1.mlp.out vector={vector} scale=0.5}}"
    before, after = apply(stories, f"{CATS}, {steer}"), apply(stories, f"{CATS}, fuse, {steer}")
    assert relative(run(before), run(after)) < 1e-5
    assert relative(run(fused), run(after)) > 1e-2


def test_with_a_cache_before_and_behind(stories: Graph) -> None:
    """Generation is the same text with the cache inserted before the fusion, behind it, and with no fusion."""
    before = f"{TEAL}, quantize"
    texts = (
        f"{before}, kv_cache{{graphs=combined}}",
        f"{before}, kv_cache, fuse",
        f"{before}, fuse, kv_cache{{graphs=combined}}",
    )
    programs = [ag.run(stories, text).program for text in texts]
    fused = [graph for program in programs[1:] for graph in program]
    assert [ops(graph)["linear"] for graph in fused] == [36] * 3
    made = [ag.compile(program, kernels=False) for program in programs]  # the pass alone: kernels have tests of their own
    tokens = [ag.generate(each, "Once upon a time", 16).tokens for each in made]
    assert tokens[0] == tokens[1] == tokens[2] and len(tokens[0]) >= 16


class Shared(torch.nn.Module):
    """Two linears with one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = torch.nn.Linear(8, 8)
        self.b = torch.nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


def test_a_shared_weight_is_transposed_once() -> None:
    graph = ag.trace(Shared().eval(), (torch.randn(3, 8),), dynamic={"x": ("rows", None)}, name="shared")
    gated = apply(graph, "sparsify{threshold=0.2}", inputs={"x": np.ones((2, 8), np.float32)})
    fused = gated.clone()
    assert fuse(fused).counts == {"linear": 2}
    names = [p.name for p in fused.parameters()]
    assert sum(name.endswith("_in_out") for name in names) == 1 and len(names) == 3
    x = {"x": np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)}
    assert relative(run(gated, x), run(fused, x)) < 1e-5


GATES = {
    "topk_gate": ([], {"k": 3}, ""),
    "index_gate": ([np.array([1, 3, 6], np.int64)], {}, ""),
    "gate": ([np.linspace(0.1, 0.5, 8, dtype=np.float32)], {"keep": "x>="}, ""),
    "topk_gate by group": ([], {"k": 2, "group_size": 4}, "in groups"),
    "gate by token": ([np.full((3, 8), 0.2, np.float32)], {}, "neither one number nor one per channel"),
    "gate along tokens": ([None], {"threshold": 0.2, "axis": 1}, "along another axis"),
}


@pytest.mark.parametrize("case", list(GATES))
def test_every_gate(tiny: Graph, case: str) -> None:
    """Gates of each kind go into the linear, or stay with the reason."""
    operands, attributes, reason = GATES[case]
    ids = {"ids": tiny_inputs()["ids"][:, :3]}
    with tiny.edit(by="test") as editor:
        editor.insert_at(tiny.site("linear.0:in"), f"actgraph.{case.split()[0]}",
                         operands, attributes)  # fmt: skip
    fused = tiny.clone()
    result = fuse(fused, norms=False)
    assert relative(run(tiny, ids), run(fused, ids)) < 1e-5
    if reason:
        assert not result.counts and [reason in why for _, why in result.declined] == [True]
    else:
        assert result.counts == {"linear": 1} and not result.declined and not ops(fused)[case]


def test_what_was_asked_for_and_is_not_there_is_an_error(tiny: Graph) -> None:
    with pytest.raises(PassError, match="fuse changed nothing"):
        apply(tiny, "fuse{norms=false}")
    assert ops(apply(tiny, "fuse{norms=false dense=true}")) == {"feed_forward": 1, "linear": 1}


def test_site_and_ignore_choose(stories: Graph) -> None:
    one = apply(stories, f"{TEAL}, fuse{{site=blocks.1.attn.q norms=false rotary=false}}")
    assert ops(one) == {"linear": 1, "gate": 34}
    rest = apply(stories, f"{CATS}, fuse{{ignore='blocks.2.*'}}")
    assert ops(rest)["feed_forward"] == 4 and ops(rest)["rms_norm"] == 9


def test_a_fused_projection_of_gate_and_up_is_declined(dialect: str) -> None:
    graph = in_dialect("phi3", dialect)
    report = ag.run(graph, f"{CATS}, fuse").report[-1]
    assert {d.reason.split(":")[0] for d in report.declined} == {"gate and up are one projection"}


def test_half_precision() -> None:
    """bfloat16: one rounding in place of several."""
    graph = zoo.captured("llama")
    plain = apply(graph, f"cast{{dtype=bf16}}, {TEAL}")
    fused = apply(graph, f"cast{{dtype=bf16}}, {TEAL}, fuse")
    inputs = zoo.inputs("llama")
    exact = run(apply(graph, TEAL), inputs)
    errors = [relative(exact, run(each, inputs).astype(np.float32)) for each in (plain, fused)]
    assert 0 < errors[1] < 2 * errors[0] < 0.2
    assert ops(fused)["linear"] == 14


@pytest.mark.parametrize("storage", ["int8", "float16"])
@pytest.mark.parametrize("form", ["growing", "static"])
def test_attention_reads_a_cache_as_it_is_stored(dialect: str, form: str, storage: str) -> None:
    """Nothing is dequantized or cast in front of an attention, in prefill and decode, and the numbers stay."""
    cached = f"kv_cache{{graphs=combined form={form} storage={storage}}}"
    graph = apply(in_dialect("llama", dialect), cached, parity="none", reproducer=False)
    fused = apply(graph, "fuse{linears=false norms=false rotary=false feed_forwards=false}", parity="none", reproducer=False)
    kept = apply(graph, "fuse{attentions=false}", parity="none", reproducer=False)
    kind = {"int8": "i8", "float16": "f16"}[storage]
    for node in fused.nodes():
        if node.op == "actgraph.attention":
            query, key, value, _, *scales = node.operands
            assert query is not None and key is not None and value is not None
            assert (str(query.dtype), str(key.dtype), str(value.dtype)) == ("f32", kind, kind)
            assert [scale.shape[-1] for scale in scales if scale is not None and scale.shape] == [1] * 2 * (kind == "i8")
            assert node.origin.created_by == "fuse" and node.origin.sources
    assert ops(fused)["attention"] == ops(graph)["attention"] == 2 and ops(fused)["dequantize"] == 0
    assert ops(kept)["dequantize"] == ops(graph)["dequantize"]
    inputs = {"ids": np.random.default_rng(0).integers(3, zoo.VOCAB, (2, 9)), "mask": np.ones((2, 9), np.int64)}
    inputs["mask"][1, :3] = 0
    plain, found = (stepwise(g, inputs["ids"], inputs["mask"], (5, 1, 1, 2), 1e4) for g in (graph, fused))
    valid = inputs["mask"].astype(bool)
    assert relative(plain[valid], found[valid]) < 1e-5


def test_what_attention_cannot_read_as_stored_stays(dialect: str) -> None:
    """Scales that are not one for each row, and a cast that narrows."""
    graph = apply(in_dialect("llama", dialect), "kv_cache{graphs=combined storage=int8}", parity="none", reproducer=False)
    with graph.edit(by="test") as editor:
        for node in [node for node in graph.nodes() if node.op == "actgraph.dequantize"]:
            scale = np.full((1,), 0.01, np.float32)
            made = editor.insert(node.op, [node.operands[0], scale], {"dtype": "f32", "axis": -1}, before=node)
            editor.redirect(node.output, made.output)
        editor.erase_dead()
    assert fuse(graph, linears=False, norms=False, rotary=False, feed_forwards=False).counts["attention"] == 0
    assert all(str(n.operands[1].type.dtype) == "f32" for n in graph.nodes() if n.op == "actgraph.attention" and n.operands[1])


def test_the_pattern_of_a_stored_cache_cannot_be_tapped(dialect: str) -> None:
    graph = apply(in_dialect("llama", dialect), "kv_cache{graphs=combined storage=int8}, fuse", parity="none", reproducer=False)
    with pytest.raises(SiteError, match="reads keys and values as i8, and cannot be taken apart"):
        apply(graph, "tap{site=blocks.0.attn.pattern}", parity="none", reproducer=False)


def test_fused_caches_are_exported(tmp_path: Path) -> None:
    """A stock onnxruntime computes the same by the body of the attention over codes, kept or inlined."""
    graph = in_dialect("llama", "fx")
    fused = apply(graph, "kv_cache{graphs=combined storage=int8}, fuse", parity="none", reproducer=False)
    ids = np.random.default_rng(0).integers(3, zoo.VOCAB, (2, 6))
    want = stepwise(fused, ids, np.ones_like(ids), (4, 1, 1), 0.0)
    for inline in ("none", "all"):
        loaded = ag.load(fused.save(tmp_path / "fused.onnx", inline=inline))
        assert ops(loaded)["attention"] == (2 if inline == "none" else 0)
        assert relative(want, stepwise(loaded, ids, np.ones_like(ids), (4, 1, 1), 0.0)) < 1e-5


class OtherNorm(torch.nn.Module):
    """Looks like an RMS norm: rows are divided by the numbers of other rows, or columns are normalised."""

    def __init__(self, axis: int, keepdim: bool) -> None:
        super().__init__()
        self.axis, self.keepdim = axis, keepdim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt((x * x).mean(self.axis, keepdim=self.keepdim) + 1e-5)


@pytest.mark.parametrize(("axis", "keepdim"), [(-1, False), (0, True), (-1, True)])
def test_norms_over_other_axes_stay(dialect: str, axis: int, keepdim: bool) -> None:
    """In the graph that the pass saves, and in that which sessions of onnxruntime open."""
    from actgraph.formats.onnx_export import to_onnx
    from actgraph.graph.onnx import OnnxGraph
    from actgraph.runtime.ort_native import Writer
    from actgraph.runtime.ort_norms import fuse_norms

    x = torch.arange(64.0).reshape(8, 8) - 20
    traced = ag.trace(OtherNorm(axis, keepdim), (x,))
    graph = traced if dialect == "fx" else to_onnx(traced)
    whole = (axis, keepdim) == (-1, True)
    inputs = {graph.inputs()[0].name: x.numpy()}
    fused = graph.clone()
    assert fuse(fused).counts == ({"rms_norm": 1} if whole else {})
    np.testing.assert_allclose(run(fused, inputs), run(graph, inputs), rtol=1e-5)
    if isinstance(graph, OnnxGraph):
        twin = graph.clone()
        write = Writer(twin.model.graph)
        fuse_norms(write, twin.views.norms())
        write.finish(twin.model)
        opened = OnnxGraph(
            twin.model, twin.name, outputs=[name for name, _ in graph.outputs()], roles=dict(twin._roles), typed=True
        )
        assert any(node.op_type == "SimplifiedLayerNormalization" for node in twin.model.graph) == whole
        np.testing.assert_allclose(run(opened, inputs), run(graph, inputs), rtol=1e-5)


@pytest.mark.parametrize("kind", [torch.nn.LayerNorm, torch.nn.RMSNorm])
def test_norms_without_weights(dialect: str, kind: type[torch.nn.Module]) -> None:
    """Exporters give a layer norm ones in the size of its input."""
    from actgraph.formats.onnx_export import to_onnx

    norm = torch.nn.Sequential(kind(8, elementwise_affine=False))
    traced = ag.trace(norm, (torch.randn(2, 3, 8),), dynamic={"input": ("batch", None, None)})
    graph = traced if dialect == "fx" else to_onnx(traced)
    fused = graph.clone()
    assert sum(fuse(fused).counts.values()) == 1
    fused.verify()
    inputs = {"input": np.random.default_rng(0).standard_normal((4, 3, 8)).astype(np.float32)}
    np.testing.assert_allclose(run(fused, inputs), run(graph, inputs), atol=1e-6)
