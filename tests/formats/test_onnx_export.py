"""Export of FX graphs to ONNX: numbers, names, weights, provenance, sites."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

import actgraph as ag
from actgraph.errors import UnsupportedError
from actgraph.formats.onnx_export import lowest_opset, to_onnx
from actgraph.formats.trace import trace
from actgraph.graph.executor import executor_for
from actgraph.graph.fx_types import array_of
from actgraph.graph.onnx import OnnxGraph
from actgraph.graph.parity import compare, difference, sample_inputs
from actgraph.graph.provenance import PassRecord
from actgraph.graph.recognize import assign_sites
from actgraph.graph.sites import SiteKind
from actgraph.ops.dtypes import DType
from tests import zoo


@functools.cache
def exported(name: str) -> OnnxGraph:
    """Shared: tests that edit take a clone."""
    return to_onnx(zoo.captured(name))


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options)


def cases(name: str) -> list[dict[str, Any]]:
    """Inputs of many sizes, and with padding on either side where there is a mask."""
    found = []
    for batch, length in ((1, 1), (2, 5), (3, 17), (1, 8)):
        inputs = zoo.inputs(name, batch, length, seed=batch + length)
        found.append(inputs)
        mask = inputs.get("attention_mask")
        if mask is None or mask.shape[1] < 3:
            continue
        for side in (slice(None, 2), slice(-2, None)):
            padded = {key: value.copy() for key, value in inputs.items()}
            padded["attention_mask"][-1, side] = 0
            if "position_ids" in padded:
                padded["position_ids"] = np.maximum(np.cumsum(padded["attention_mask"], 1) - 1, 0)
            found.append(padded)
    return found


@pytest.mark.parametrize("name", zoo.NAMES)
def test_stock_onnxruntime_agrees_with_torch(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    exported(name).save(path)
    onnx.checker.check_model(path, full_check=True)
    run = session(path)
    outputs = [value.name for value in run.get_outputs()]
    assert outputs == [label for label, _ in zoo.captured(name).outputs()]
    taken = {value.name for value in run.get_inputs()}
    for inputs in cases(name):
        results = run.run(None, {key: value for key, value in inputs.items() if key in taken})
        wanted = zoo.eager(name, inputs)
        for label, result in zip(outputs, results, strict=True):
            found = difference(label, wanted[label], result)
            assert found.within(1e-4, 0.0), f"{found} on {[(k, v.shape) for k, v in inputs.items()]}"


@pytest.mark.parametrize("name", zoo.NAMES)
def test_names_types_and_provenance_survive(name: str) -> None:
    source, result = zoo.captured(name), exported(name)
    result.verify()
    assert [(v.name, v.type) for v in result.inputs()] == [(v.name, v.type) for v in source.inputs()]
    assert [(label, v.type) for label, v in result.outputs()] == [(label, v.type) for label, v in source.outputs()]
    names = {v.name for node in source.nodes() for v in node.outputs if v.uses and v.dtype is not None and v.dtype.is_float}
    same = names & {v.name for node in result.nodes() for v in node.outputs}
    assert len(same) > 0.75 * len(names), "values keep their names, except those that equal their operand"
    allowed = {dim for v in source.inputs() for dim in v.shape or () if isinstance(dim, str)}
    for node in result.nodes():
        origin = node.origin
        assert origin.sources, node.name
        for value in node.outputs:
            assert value.dtype is not None and value.shape is not None, value.name
            for dim in value.shape:
                assert dim is not None, f"{value.name} {value.type}"
                if isinstance(dim, str):  # never torch's s72
                    assert any(known in dim for known in allowed), f"{value.name} {value.type}"
    scopes = {node.origin.scope for node in source.nodes()}
    assert {node.origin.scope for node in result.nodes()} <= scopes
    assert len({node.name for node in result.nodes()}) == len(result.nodes())


@pytest.mark.parametrize("name", zoo.TINY)
def test_weights_are_shared_and_keep_names_and_ties(name: str) -> None:
    source = zoo.captured(name)
    result = to_onnx(source)
    by_name = {parameter.name: parameter for parameter in result.parameters()}
    for parameter in source.parameters():
        if parameter.name not in by_name:
            assert "position_ids" in parameter.name or not parameter.uses, parameter.name
            continue
        twin = by_name[parameter.name]
        assert twin.type == parameter.type
        assert set(result.aliases(twin)) == set(source.aliases(parameter))
        if parameter.type.shape:
            assert np.shares_memory(source.read(parameter), result.read(twin)), parameter.name
    own = {p.name for p in source.parameters()}
    extra = sum(result.read(p).nbytes for p in result.parameters() if p.name not in own)
    assert extra < 4096, "constants that the export adds are small"


def test_tied_embedding_is_stored_once() -> None:
    result = exported("stories260k")
    shapes = [p.type.shape for p in result.parameters()]
    assert shapes.count((512, 64)) == 1
    table = next(p for p in result.parameters() if p.type.shape == (512, 64))
    assert {use.node.op for use in table.uses if use.node is not None} == {"onnx.Gather", "onnx.Transpose"}
    assert set(result.aliases(table)) == {"model.embed_tokens.weight", "lm_head.weight"}


def test_file_holds_no_paths_of_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    to_onnx(zoo.capture("llama")).save(path)
    data = path.read_bytes()
    for text in (b"site-packages", b"modeling_llama.py", str(Path(__file__).parents[2]).encode(), b"stack_trace"):
        assert text not in data, text
    node = next(n for n in onnx.load(path).graph.node if n.name == "linear_1")
    props = {p.key: p.value for p in node.metadata_props}
    assert props["actgraph.scope"] == "model.layers.0.self_attn.k_proj"
    assert "k_proj" in props["namespace"]


# --- sites ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.TINY)
def test_every_site_is_carried_over(name: str) -> None:
    source, result = zoo.captured(name), exported(name)
    before, after = source.sites(), result.sites()
    assert [site.name for site in after] == [site.name for site in before]
    assert result.site_table.removed == source.site_table.removed
    for old, new in zip(before, after, strict=True):
        assert (new.role, new.aliases) == (old.role, old.aliases)
        assert new.type == old.type, old.name
        if old.kind is not SiteKind.VIRTUAL:  # what was inside a fused op is a value now
            assert new.kind is old.kind, old.name


@pytest.mark.parametrize("name", zoo.TINY)
def test_recognition_finds_the_same_sites_in_what_was_exported(name: str) -> None:
    """Without the table that came along: the spelling of the export is one that the recognisers read."""
    carried = exported(name)
    fresh = assign_sites(carried)
    for site in carried.sites():
        if site.role == "module" or site.kind is SiteKind.EDGE:
            continue
        for spelling in (site.name, *site.aliases):
            if spelling in carried.site_table.role_names or spelling.split(".")[0] in ("linear", "norm", "activation", "conv"):
                anchor = fresh.anchors[fresh.aliases.get(spelling, spelling)]
                assert anchor.key == site.anchor.key, spelling


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral", "mamba", "t5", "resnet"])
def test_sites_denote_the_same_numbers(name: str) -> None:
    source, result = zoo.captured(name), exported(name)
    pairs = {}
    for site in source.sites():
        if site.kind is not SiteKind.VALUE or site.type.dtype is None or not site.type.dtype.is_float:
            continue
        if site.type.shape and site.type.shape[0] == "2*batch*seq":
            continue  # rows sorted by expert; torch's sort is not stable, so rows of one expert have no order (see below)
        pairs[site.name] = (site.value, result.site(site.name).value)
    assert len(pairs) > 20
    report = compare(source, result, [zoo.inputs(name)], rtol=1e-4, atol=1e-6, values=pairs)
    report.check()


def test_expert_rows_are_the_same_in_another_order() -> None:
    source, result = zoo.captured("mixtral"), exported("mixtral")
    rows = []
    for graph in (source, result):
        value = graph.site("blocks.1.moe.experts.hidden").value
        found = executor_for(graph).open(graph, [value])(zoo.inputs("mixtral"))[value.name]
        rows.append(found[np.lexsort(np.round(found, 3).T)])
    assert rows[0].shape == (2 * 2 * 8, zoo.HIDDEN)
    assert difference("hidden", rows[0], rows[1]).within(1e-4, 0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral"])
def test_an_edit_at_a_site_does_the_same_before_and_after_export(name: str) -> None:
    """Edges too: an edge site of one reader must not touch the other readers of the same value."""
    source = zoo.captured(name)
    plain = exported(name)
    chosen = [s.name for s in source.sites() if s.kind is not SiteKind.VIRTUAL and s.type.dtype is DType.F32]
    chosen = [n for n in chosen if n.startswith("linear.1:in") or n.startswith("blocks.0.") or ":in" in n][:9]
    inputs = zoo.inputs(name)
    moved = 0
    for site in chosen:
        left, right = zoo.captured(name), plain.clone()
        for graph in (left, right):
            with graph.edit("test") as editor:
                editor.insert_at(graph.site(site), "mul", [np.float32(1.7)])
        compare(left, right, [inputs], rtol=1e-4).check()
        if site == chosen[0]:
            compare(left, to_onnx(left), [inputs], rtol=1e-4).check()
        moved += compare(source, left, [inputs], rtol=1e-3).max_rel > 1e-3
    assert moved >= len(chosen) // 2


# --- ops, opsets, dtypes --------------------------------------------------------------------------------------------------


def test_actgraph_ops_become_functions_with_provenance(tmp_path: Path) -> None:
    graph = zoo.captured("llama")
    vector = np.linspace(-1, 1, zoo.WIDTH, dtype=np.float32)
    with graph.edit("steer", "steer{site=blocks.0.resid_post scale=2}") as editor:
        editor.insert_at(graph.site("blocks.0.resid_post"), "actgraph.shift", [vector], {"scale": 2.0}, name="steer.0")
    graph.history.append(PassRecord("steer", "steer{site=blocks.0.resid_post scale=2}", {"inserted": 1}))
    graph.notes.append("a note")
    result = to_onnx(graph)
    result.verify()
    (node,) = [n for n in result.nodes() if n.op == "actgraph.shift"]
    assert node.origin.created_by == "steer" and node.origin.options.startswith("steer{")
    assert node.attributes["scale"] == 2.0
    assert len(result.functions) == 1
    assert result.history == graph.history and result.notes == graph.notes
    assert result.site("blocks.0.resid_post").value == node.output
    report = compare(graph, result, [zoo.inputs("llama")], rtol=1e-4)
    report.check()
    assert compare(zoo.captured("llama"), result, [zoo.inputs("llama")], rtol=1e-4).max_rel > 1e-2
    path = tmp_path / "steered.onnx"
    result.save(path)
    stock = session(path).run(None, zoo.inputs("llama"))[0]
    assert difference("logits", graph.run(zoo.inputs("llama"))["logits"], stock).within(1e-4, 0)


def test_grouped_matmul_is_one_op_with_the_stored_weights() -> None:
    result = exported("mixtral")
    nodes = [n for n in result.nodes() if n.op == "actgraph.grouped_linear"]
    assert len(nodes) == 4
    assert all(n.operands[1] is not None and n.operands[1].is_parameter for n in nodes)


def test_opset_is_the_lowest_that_serves() -> None:
    assert exported("llama").opset == 18
    assert exported("bert").opset == 20  # Gelu
    assert to_onnx(zoo.captured("llama"), 21).opset == 21
    with pytest.raises(UnsupportedError, match="opset 17"):
        to_onnx(zoo.captured("llama"), 17)
    with pytest.raises(UnsupportedError, match="needs at least 20"):
        to_onnx(zoo.captured("bert"), 18)
    assert lowest_opset(zoo.captured("resnet")) == 18


@pytest.mark.parametrize("opset", [18, 19, 20, 21, 22, 23])
def test_every_opset_computes_the_same(opset: int) -> None:
    graph = zoo.captured("phi3")
    compare(graph, to_onnx(graph, opset), [zoo.inputs("phi3")], rtol=1e-4).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_element_types_are_exported_as_they_are(dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.LayerNorm(8), nn.Linear(8, 4)).to(dtype)
    graph = trace(module, (torch.randn(3, 6, dtype=dtype),), dynamic={"input": ("batch", None)})
    result = to_onnx(graph)
    kind = DType.of(dtype)
    assert {v.dtype for _, v in result.outputs()} == {kind} and {v.dtype for v in result.inputs()} == {kind}
    assert all(p.dtype == kind for p in result.parameters() if len(p.type.shape or ()) > 1)
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)
    if dtype is not torch.bfloat16:  # onnxruntime's CPU provider has no bfloat16
        tolerance = 2e-3 if dtype is torch.float16 else 1e-6
        compare(graph, result, [sample_inputs(graph)], rtol=tolerance).check()


# --- single ops and odd graphs ---------------------------------------------------------------------------------------------


class Attend(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, mask, **self.options)


@pytest.mark.parametrize(
    ("options", "mask", "heads"),
    [
        ({}, None, 4),
        ({"is_causal": True}, None, 4),
        ({"scale": 0.3}, "bool", 4),
        ({"scale": 1.0}, "float", 4),
        ({"enable_gqa": True}, "bool", 2),
        ({"enable_gqa": True, "is_causal": True}, None, 2),
    ],
)
def test_attention_agrees_with_torch_for_rows_without_a_key(options: dict[str, Any], mask: str | None, heads: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def tensors(batch: int, queries: int, keys: int) -> dict[str, torch.Tensor]:
        sizes = {"q": (batch, 4, queries, 8), "k": (batch, heads, keys, 8), "v": (batch, heads, keys, 8)}
        found = {key: torch.randn(size, generator=generator) for key, size in sizes.items()}
        if mask is not None:
            allowed = torch.rand((batch, 1, queries, keys), generator=generator) > 0.4
            allowed[0, 0, queries // 2] = False
            found["mask"] = allowed if mask == "bool" else torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
        return found

    module = Attend(**options)
    dims = {"q": ("batch", None, "rows", None), "k": ("batch", None, "keys", None), "v": ("batch", None, "keys", None)}
    if mask is not None:
        dims["mask"] = ("batch", None, "rows", "keys")
    result = to_onnx(trace(module, (), tensors(2, 5, 6), dynamic=dims))
    for batch, queries, keys in ((1, 1, 1), (2, 5, 6), (3, 7, 4)):
        given = tensors(batch, queries, keys)
        wanted = module(**given).numpy()
        assert np.isfinite(wanted).all()
        got = result.run({key: value.numpy() for key, value in given.items()})["output"]
        assert difference("output", wanted, got).within(1e-5, 1e-7)
        if mask is not None:
            assert not got[0, :, queries // 2].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_attention_of_other_types(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    given = {key: torch.randn(2, 4, 5, 8, generator=generator).to(dtype) for key in "qkv"}
    given["mask"] = torch.rand((2, 1, 5, 5), generator=generator) > 0.4
    result = to_onnx(trace(Attend(), (), given))
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)
    assert {v.dtype for node in result.nodes() for v in node.outputs} == {DType.of(dtype), DType.BOOL}
    run = ReferenceEvaluator(ir.to_proto(result.model))  # of all types, and exact in float64 where onnxruntime is not
    (got,) = run.run(None, {key: array_of(value) for key, value in given.items()})
    tolerance = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float64: 1e-12}[dtype]
    assert difference("output", array_of(Attend()(**given)), got).within(tolerance, 0)


class Rotate(nn.Module):
    """Rotary embedding by complex numbers, as Llama's reference code has it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turns", torch.polar(torch.ones(3, 4), torch.arange(12.0).reshape(3, 4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.turns.unsqueeze(0)).flatten(2)


def test_complex_numbers() -> None:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    result = to_onnx(trace(Rotate(), (x,), dynamic={"x": ("batch", None, None)}))
    for batch in (1, 3):
        given = torch.randn(batch, 3, 8)
        assert difference("o", Rotate()(given).numpy(), result.run({"x": given.numpy()})["output"]).within(1e-5, 0)


class Odd(nn.Module):
    """Ops whose translation goes through promotion, decomposition, functions of torch's library, or our own rules."""

    def forward(self, x: torch.Tensor, i: torch.Tensor) -> dict[str, torch.Tensor]:
        a, b, c = torch.split(x, [1, 2, 3], dim=-1)
        parts = x.unbind(1)
        return {
            "promoted": x * i + 2 * i + (i > 1),
            "integer_mean": i.float().mean() + i / 2,
            "softplus": nn.functional.softplus(x) + nn.functional.mish(x) + nn.functional.hardswish(x),
            "split": torch.cat([c, b, a], -1),
            "unbind": parts[0] - parts[1],
            "transposed": x.permute(2, 0, -2).transpose(0, -1) + x.mT.transpose(1, 2).transpose(0, 1),
            "index": x[:, :, torch.tensor([0, 2, -1])],
            "floor": torch.div(i, 2, rounding_mode="floor") + i // 3,
            "reshaped": x.reshape(x.shape[0] * x.shape[1], -1).sum(0),
            "flattened": x.flatten(1),
            "norms": nn.functional.rms_norm(x, (6,)) + nn.functional.layer_norm(x, (6,)),
            "logical": torch.where(x.isnan() | (x > 0.5), x.new_zeros(()), x),
            "same": x.clone(),
            "slice": x[:, 1:, ::2],
            "roll": torch.roll(x, 2, -1) + x.flip(-1),
            "cumsum": x.cumsum(1).clamp(-1, 1),
            "variance": x.var(-1) + x.std(-1),
            "addcmul": torch.addcmul(x, x, x, value=0.5) + torch.lerp(x, x * 2, 0.25),
        }


def test_odd_ops() -> None:
    x, i = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1)), torch.arange(36).reshape(2, 3, 6) % 7 + 1
    graph = trace(Odd(), (), {"x": x, "i": i}, dynamic={"x": ("batch", None, None), "i": ("batch", None, None)})
    result = to_onnx(graph)
    result.verify()
    for batch in (1, 2, 5):
        given = {"x": np.random.default_rng(batch).standard_normal((batch, 3, 6)).astype(np.float32)}
        given["i"] = np.random.default_rng(batch).integers(1, 9, (batch, 3, 6))
        with torch.no_grad():
            wanted = Odd()(*(torch.from_numpy(v) for v in given.values()))
        got = result.run(given)
        assert set(got) == set(wanted)
        for key, value in wanted.items():
            found = difference(key, value.numpy(), got[key])
            assert found.within(1e-5, 1e-6), found


class Native(nn.Module):
    """ONNX ops called from torch code: one that torch implements, one that only has a type."""

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rotated = torch.onnx.ops.rotary_embedding(x, table, table)
        other = torch.onnx.ops.symbolic("com.example::Special", (x,), {"alpha": 2}, dtype=x.dtype, shape=x.shape, version=1)
        return rotated, other


def test_onnx_ops_of_torch_code_are_kept() -> None:
    x, table = torch.randn(1, 2, 3, 8), torch.randn(1, 3, 4)
    result = to_onnx(trace(Native(), (x, table)))
    assert result.opset == 23
    ops = {node.op: node for node in result.nodes()}
    assert set(ops) == {"onnx.RotaryEmbedding", "com.example.Special"}
    assert ops["com.example.Special"].attributes == {"alpha": 2}
    assert result.model.opset_imports["com.example"] == 1


class Constants(nn.Module):
    """A module with an argument that is computed from constants alone: its sites survive, and edits there work."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = torch.zeros(3).unsqueeze(0) + 1
        return self.inner(x, bias) + bias


class Inner(nn.Module):
    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return x + bias.clone() * 2


def test_sites_on_constants_survive() -> None:
    graph = trace(Constants(), (torch.ones(2, 3),))
    result = to_onnx(graph)
    assert [site.name for site in result.sites()] == [site.name for site in graph.sites()]
    assert "inner:in" in {site.name for site in graph.sites()}
    x = np.ones((2, 3), np.float32)
    for each in (graph, result):
        assert np.array_equal(each.run({"x": x})["output"], np.full((2, 3), 4.0, np.float32))
        with each.edit("test") as editor:
            editor.insert_at(each.site("inner:in"), "mul", [np.float32(10)])
        assert np.array_equal(each.run({"x": x})["output"], np.full((2, 3), 22.0, np.float32))


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y - 1, (x,))


def test_control_flow() -> None:
    graph = trace(Branch(), (torch.ones(3),))
    result = to_onnx(graph)
    for x in (np.ones(3, np.float32), -np.ones(3, np.float32)):
        assert np.array_equal(result.run({"x": x})["output"], x * 2 if x.sum() > 0 else x - 1)


class Passing(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y = x + 1
        return x, y, y


def test_outputs_that_are_inputs_or_twice_the_same_value() -> None:
    result = to_onnx(trace(Passing(), (torch.ones(2),)))
    got = result.run({"x": np.zeros(2, np.float32)})
    assert [a.tolist() for a in got.values()] == [[0, 0], [1, 1], [1, 1]]
    assert list(got) == ["output", "output_1", "output_2"]


def test_optional_inputs_keep_their_default(tmp_path: Path) -> None:
    from actgraph.graph.context import graph_context

    graph = zoo.captured("mlp")
    with graph.edit("test") as editor:
        step = graph_context(graph, editor, "step")
        cast = editor.insert("cast", [step], {"to": DType.F32}).output
        editor.insert_at(graph.site("linear.0"), "add", [cast])
    result = to_onnx(graph)
    assert result.role("step") == graph.role("step") and result.optional == {"step"}
    path = tmp_path / "model.onnx"
    result.save(path)
    run = session(path)
    x = zoo.inputs("mlp")
    assert difference("o", zoo.eager("mlp", x)["output"], run.run(None, x)[0]).within(1e-4, 0)
    moved = run.run(None, {**x, "step": np.array([3])})[0]
    assert difference("o", graph.run({**x, "step": np.array([3])})["output"], moved).within(1e-4, 0)
    assert not difference("o", moved, run.run(None, x)[0]).within(1e-2, 0)


def test_an_op_that_onnx_lacks_is_named() -> None:
    class Special(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvalsh(x)

    graph = trace(Special(), (torch.eye(3),))
    with pytest.raises(UnsupportedError, match="linalg_eigh"):
        to_onnx(graph)


def test_export_is_deterministic_and_leaves_the_graph_alone() -> None:
    graph = zoo.captured("gpt2")
    before = graph.text()
    first, second = to_onnx(graph), to_onnx(graph)
    assert graph.text() == before
    assert first.text() == second.text() and first.content_hash() == second.content_hash()


class _Linears(torch.nn.Module):
    """Two linears of their own, and one weight that two linears share."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(64, 128), torch.nn.Linear(128, 64, bias=False)
        self.shared = torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared(torch.relu(self.shared(self.b(torch.relu(self.a(x))))))


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("inline", ["none", "all"])
def test_quantized_weights_are_stored_as_the_product_reads_them(tmp_path, rank, inline):
    x = torch.randn(3, 2, 64)[0 if rank == 2 else slice(None)]
    graph = ag.trace(_Linears().eval(), (x,), dynamic={"x": ("batch", "seq", None)[3 - rank :]}, name="linears")
    packed = ag.run(graph, "quantize{weights=int8}", reproducer=False).graph
    path = packed.save(tmp_path / "m.onnx", inline=inline)
    model = onnx.load(path)
    codes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer if tensor.name.endswith("_int8")}
    assert codes["a.weight_int8"] == (64, 128) and codes["b.weight_int8"] == (128, 64)
    readers = {name: node.op_type for node in model.graph.node for name in node.input}
    makers = {name: node for node in model.graph.node for name in node.output}
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    direct = [node for node in products if makers[node.input[1]].input[0] in ("a.weight_int8", "b.weight_int8")]
    assert len(direct) == 2 and all("Dequantize" in makers[node.input[1]].op_type for node in direct)
    assert "Dequantize" in readers["a.weight_int8"]
    loaded = ag.load(path)
    for left, right in zip(packed.views.linears(), loaded.views.linears(), strict=True):
        np.testing.assert_array_equal(left.read_weight(), right.read_weight())
    given = {"x": x.numpy()}
    np.testing.assert_allclose(next(iter(loaded.run(given).values())), next(iter(packed.run(given).values())), atol=1e-5)


def test_onnxruntime_multiplies_quantized_weights_without_unpacking_them(tmp_path):
    """Neither a transposition nor a dequantization is left at run time, whichever dialect was quantized."""
    graph = ag.trace(_Linears().eval(), (torch.randn(3, 2, 64),), dynamic={"x": ("batch", "seq", None)}, name="linears")
    for dialect in (graph, to_onnx(graph)):
        path = ag.run(dialect, "quantize{weights=int8}", reproducer=False).graph.save(tmp_path / "m.onnx", inline="all")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        ops = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
        assert ops.count("MatMulNBits") >= 2 and "Transpose" not in ops
