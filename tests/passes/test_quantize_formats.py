"""Weight formats beyond int8 per channel: codes, groups, error bounds, files, and what cannot be stored so."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.errors import InputError, OptionError, PassError
from actgraph.graph import Graph
from actgraph.graph.graph import parameter_bytes
from actgraph.ops import DType
from actgraph.ops.quantizer import dequantize_array
from actgraph.passes.quantize.weights import Format, bfloat16, formats, quantized
from tests.passes.conftest import apply, as_dialect, hf_stories, relative, run, token_inputs

FORMATS = ["weights=int4", "weights=int4 group_size=0", "weights=int8 group_size=16", "weights=fp8", "weights=bf16"]

ALL_FORMS = [formats("int4", None), formats("int8", 16), formats("int4", 0), formats("fp8", None)]


def rounded(weight: np.ndarray, options: str) -> np.ndarray:
    """A direct reference for ``[out, in]``, written out."""
    if "fp8" in options:
        scale = np.abs(weight).max(1, keepdims=True) / 448
        return (weight / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    if "bf16" in options:
        bits = weight.view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    steps = 7 if "int4" in options else 127
    group = {"weights=int4": 32, "weights=int8 group_size=16": 16}.get(options, weight.shape[1])
    result = np.empty_like(weight)
    for start in range(0, weight.shape[1], group):
        part = weight[:, start : start + group]
        scale = np.abs(part).max(1, keepdims=True) / steps
        result[:, start : start + group] = np.clip(np.rint(part / scale), -steps, steps) * scale
    return result


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "form", [formats("int4", None), formats("int8", 16), formats("int4", 0), formats("fp8", None)], ids=str
)
def test_errors_are_at_most_half_a_step(form: Format, axis: int) -> None:
    """Also where a weight is worked on block by block and the last group is short."""
    weight = np.random.default_rng(0).normal(0, 1, (2100, 2056)).astype(np.float32)
    weight = weight if axis == 0 else np.ascontiguousarray(weight.T)
    q, scale, zero = quantized(weight, axis, form)
    along = 1 - axis if form.group else axis
    back = dequantize_array(q, scale, zero, axis=along, block_size=form.group)
    channels_first = (lambda a: a) if axis == 0 else np.transpose
    error, wide = channels_first(np.abs(back - weight)), channels_first(weight)
    if form.dtype is DType.F8E4M3:
        assert zero is None and (error <= np.maximum(np.abs(wide) * 2.0**-4, scale[:, None] * 2.0**-9) * 1.0001).all()
        return
    group = form.group or wide.shape[1]
    steps = {"int4": 7, "int8": 127}[form.name]
    for start in range(0, wide.shape[1], group):
        half = np.abs(wide[:, start : start + group]).max(1, keepdims=True) / steps / 2
        assert (error[:, start : start + group] <= half * 1.0001).all()
    middle = 8 if form.name == "int4" else 0
    assert zero is not None and (zero == middle).all() and np.abs(q.astype(int) - middle).max() == steps


@pytest.mark.parametrize("options", FORMATS)
def test_weights_against_rounded_weights_in_torch(stories: Graph, options: str) -> None:
    import copy

    model = copy.deepcopy(hf_stories())
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(torch.from_numpy(rounded(module.weight.numpy(), options)))
        reference = model(**{k: torch.from_numpy(v) for k, v in token_inputs().items()}, use_cache=False).logits.numpy()
    packed = apply(stories, f"quantize{{{options}}}")
    assert relative(reference, run(packed)) < 1e-5
    assert relative(run(stories), run(packed)) > 1e-3


@pytest.mark.parametrize("options", FORMATS)
def test_exported(stories: Graph, options: str, tmp_path: Path) -> None:
    """As it is, and with a gate fused into every linear, which lays packed codes and their groups out anew."""
    plain = apply(stories, f"sparsify{{threshold=0.05}}, quantize{{{options}}}")
    fused = apply(plain, "fuse")
    assert relative(run(plain), run(fused)) < 1e-5
    for graph, inline in ((plain, "all"), (fused, "none"), (fused, "all")):
        loaded = ag.load(graph.save(tmp_path / "model.onnx", inline=inline))
        assert relative(run(graph), run(loaded)) < 1e-5
    linears = [node for node in fused.nodes() if node.op == "actgraph.linear"]
    assert len(linears) == 36
    assert {node.attributes.get("packed", "") for node in linears} == {"i4" if "int4" in options else ""}


def test_perplexity_of_each_format() -> None:
    from actgraph.calibrate.perplexity import perplexity
    from tests import zoo

    stories = zoo.captured("stories260k")
    found = {"float32": perplexity(stories)}
    for options in FORMATS:
        found[options] = perplexity(apply(stories, f"quantize{{{options}}}"))
    print({name: round(value, 3) for name, value in found.items()})
    exact = found["float32"]
    assert abs(found["weights=int8 group_size=16"] / exact - 1) < 0.01
    assert exact < found["weights=fp8"] < 1.05 * exact
    assert abs(found["weights=bf16"] / exact - 1) < 0.001 and found["weights=bf16"] != exact
    assert found["weights=fp8"] < found["weights=int4"] < found["weights=int4 group_size=0"] < 1.3 * exact


def test_four_bits_are_an_eighth(stories: Graph) -> None:
    packed = apply(stories, "quantize{weights=int4 group_size=0 embeddings=true}")
    codes = [p for p in packed.parameters() if p.name.endswith("_int4")]
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    before = sum(parameter_bytes(p) for p in stories.parameters() if any(name in p.name for name in linear))
    inside = sum(parameter_bytes(p) for p in codes if any(name in p.name for name in linear))
    assert inside * 8 == before


def test_golden(tiny: Graph, dialect: str, golden) -> None:  # type: ignore[no-untyped-def]
    packed = apply(tiny, "quantize{weights=int4 group_size=4}")
    golden(f"passes/quantize_int4.{dialect}", packed.text())
    assert 1e-3 < relative(run(tiny), run(packed)) < 0.5


def test_golden_of_bfloat16(tiny: Graph, dialect: str, golden) -> None:  # type: ignore[no-untyped-def]
    packed = apply(tiny, "quantize{weights=bf16 embeddings=true}")
    golden(f"passes/quantize_bf16.{dialect}", packed.text())
    assert 1e-4 < relative(run(tiny), run(packed)) < 0.02


def test_bfloat16_halves_the_file(stories: Graph, tmp_path: Path) -> None:
    """And a file with weights of 16 bits is what a stock onnxruntime runs: the casts are standard operators."""
    packed = apply(stories, "quantize{weights=bf16 embeddings=true}")
    large = [p for p in packed.parameters() if len(p.shape or ()) == 2]
    assert len(large) >= 36 and {p.dtype for p in large} == {DType.BF16}
    files = [graph.save(tmp_path / f"{index}.onnx") for index, graph in enumerate((stories, packed))]
    sizes = [file.stat().st_size for file in files]
    floats = sum(parameter_bytes(p) for p in stories.parameters())
    assert sizes[0] - sizes[1] == pytest.approx(floats / 2, rel=0.05)  # the rest is the text of the graph
    import onnxruntime

    session = onnxruntime.InferenceSession(files[1], providers=["CPUExecutionProvider"])
    assert relative(run(packed), session.run(["logits"], token_inputs())[0]) < 1e-5


def test_bfloat16_rounds_to_even_and_refuses_infinity() -> None:
    weight = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20, 1e-40], np.float32)
    assert bfloat16(weight).astype(np.float32).tolist()[:4] == [1.0, 1 + 2**-6, -1.0, 1 + 2**-7]
    for bad in (np.inf, np.nan, 3.4e38):
        with pytest.raises(InputError, match="not finite in bfloat16"):
            bfloat16(np.array([1, bad], np.float32))


def test_bfloat16_again_and_of_narrow_weights(tiny: Graph) -> None:
    with pytest.raises(PassError, match="its weight is bf16 already, read as f32: fold stores it so"):
        apply(tiny, "quantize{weights=bf16}, quantize{weights=int8}")
    half = apply(tiny, "cast{dtype=f16}")
    with pytest.raises(PassError, match="its weight is f16, no wider than bf16"):
        apply(half, "quantize{weights=bf16}")
    both = apply(tiny, "quantize{weights=bf16}, fold, quantize{weights=int8}")
    assert sum(node.op == "actgraph.dequantize" for node in both.nodes()) == 4
    assert 1e-4 < relative(run(apply(tiny, "quantize{weights=int8}")), run(both)) < 0.05


def test_convolutions_in_bfloat16(dialect: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3)).eval()
    traced = ag.trace(model, (torch.randn(2, 3, 9, 9),), dynamic={"input": ("batch", None, None, None)})
    packed = apply(as_dialect(traced, dialect), "quantize{weights=bf16}")
    x = np.random.default_rng(0).normal(0, 1, (2, 3, 9, 9)).astype(np.float32)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(layer.weight.bfloat16().float())
        want = model(torch.from_numpy(x)).numpy()
    assert relative(want, run(packed, {"input": x})) < 1e-5
    assert sorted(p.shape for p in packed.parameters() if p.dtype is DType.BF16) == [(4, 8, 3, 3), (8, 3, 3, 3)]


class TwoWays(torch.nn.Module):
    """One weight, read as it is and transposed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(torch.nn.functional.linear(x, self.weight)) @ self.weight.transpose(0, 1)


@pytest.mark.parametrize("options", FORMATS)
def test_a_weight_that_is_read_in_two_ways(dialect: str, options: str) -> None:
    model = TwoWays().eval()
    graph = as_dialect(ag.trace(model, (torch.randn(3, 16),), dynamic={"x": ("rows", None)}, name="two"), dialect)
    x = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)
    packed = apply(graph, f"quantize{{{options}}}", inputs={"x": x})
    weight = rounded(model.weight.detach().numpy(), options)
    want = np.tanh(x @ weight.T) @ weight.T
    assert relative(want, run(packed, {"x": x})) < 1e-5


def test_what_cannot_be_stored_so_is_declined_or_refused(stories: Graph) -> None:
    for name in ("fp8", "bf16"):
        with pytest.raises(OptionError, match="no groups"):
            apply(stories, f"quantize{{weights={name} group_size=32}}")
    odd = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4), torch.nn.Linear(4, 4)).eval()
    graph = ag.trace(odd, (torch.randn(2, 6),), dynamic={"input": ("batch", None)})
    report = ag.run(graph, "quantize{weights=int4}").report[0]
    assert report.counts["weights packed"] == 1
    assert [d.reason.split(":")[0] for d in report.declined] == ["an odd number of 4-bit codes does not fill bytes"] * 2
    conv = ag.trace(torch.nn.Conv2d(3, 4, 3).eval(), (torch.randn(1, 3, 8, 8),))
    with pytest.raises(PassError, match="int4 is for linears"):
        ag.run(conv, "quantize{weights=int4}")
