"""cast and the numbers that fill masks, and operators that do not take the type."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import actgraph as ag
from actgraph.errors import PassError, UnsupportedError
from actgraph.formats.onnx_export import to_onnx
from actgraph.graph import Graph
from actgraph.ops.dtypes import DType
from tests import zoo
from tests.passes.conftest import apply, relative

_LOWEST = torch.finfo(torch.float32).min


class Scores(torch.nn.Module):
    """One head of attention that is built as eager code of transformers builds it: a mask of fills is added to the scores."""

    def __init__(self, fill: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fill = fill
        self.embed = torch.nn.Embedding(32, 8)
        self.query, self.key = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.register_buffer("stored", torch.triu(torch.full((6, 6), _LOWEST), diagonal=1))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        scores = self.query(x) @ self.key(x).transpose(-1, -2)
        length = input_ids.shape[1]
        padded = attention_mask[:, None, :] == 0
        causal = torch.ones(length, length, dtype=torch.bool).triu(1)
        mask = padded | causal
        if self.fill == "where":
            scores = scores + torch.where(mask, _LOWEST, torch.zeros(()))
        elif self.fill == "masked_fill":
            scores = scores + torch.zeros(mask.shape).masked_fill(mask, _LOWEST)
        elif self.fill == "full":
            scores = torch.where(mask, torch.full((1, 1), _LOWEST), scores)
        elif self.fill == "times":
            scores = scores + mask.float() * -1e9
        else:
            scores = torch.clamp(scores + self.stored + padded.float() * _LOWEST, min=_LOWEST)
        return scores.softmax(-1) @ x


def _scores(fill: str) -> Graph:
    arguments = (torch.arange(12).reshape(2, 6), torch.ones(2, 6, dtype=torch.int64))
    sizes = ("batch", None if fill == "stored" else "seq")
    return ag.trace(Scores(fill).eval(), arguments, dynamic={"input_ids": sizes, "attention_mask": sizes}, name=fill)


def _left_padded() -> dict[str, np.ndarray]:
    mask = np.ones((2, 6), np.int64)
    mask[1, :3] = 0
    return {"input_ids": np.arange(12).reshape(2, 6), "attention_mask": mask}


@pytest.mark.parametrize("fill", ["where", "masked_fill", "full", "times", "stored"])
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_masked_rows_stay_finite(fill: str, dtype: str) -> None:
    """Rows of fills only (left padding under a causal mask) are uniform; with -inf in place of the fills they were NaN."""
    graph = _scores(fill)
    before = graph.run(_left_padded())
    cast = apply(graph, f"cast{{dtype={dtype}}}", parity="none")
    cast.verify()
    for name, expected in before.items():
        found = cast.run(_left_padded())[name]
        assert np.isfinite(found).all()
        seen = np.array([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]], bool)
        assert relative(expected[seen], found[seen]) < 5e-2


@pytest.mark.parametrize("fill", ["where", "full", "times", "stored"])
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_masked_rows_stay_finite_in_onnx(fill: str, dtype: str, tmp_path: Path) -> None:
    graph = to_onnx(_scores(fill))
    cast = apply(graph, f"cast{{dtype={dtype}}}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = cast.save(tmp_path / "cast.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    if dtype == "f16":
        assert all(np.isfinite(array).all() for array in cast.run(_left_padded()).values())
    for parameter in cast.parameters():
        data = cast.read(parameter)
        if data.dtype.kind == "f" or parameter.dtype == "bf16":
            assert np.isfinite(data.astype(np.float64)).all()


def test_infinity_stays_infinite() -> None:
    class Blocked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)
            self.register_buffer("blocked", torch.tensor([0.0, -torch.inf, _LOWEST, 0.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x) + self.blocked
            return torch.where(y > 1e30, float("-inf"), y)

    graph = ag.trace(Blocked().eval(), (torch.randn(2, 4),), dynamic={"x": ("batch", None)})
    cast = apply(graph, "cast{dtype=f16}", parity="none")
    (parameter,) = [p for p in cast.parameters() if p.name.endswith("blocked")]
    data = cast.read(parameter).astype(np.float64)
    assert data.tolist() == [0, -np.inf, -65504, 0]


@pytest.mark.parametrize(
    ("value", "dtype", "hint"), [(1e6, "f16", "use bf16"), (3.4e38, "bf16", "use f32"), (-3.4e38, "f16", "use f32")]
)
def test_weights_out_of_range_are_refused(value: float, dtype: str, hint: str) -> None:
    """Also those that are as large as a fill: a linear reads them. The hint names a type that can hold them."""
    model = torch.nn.Linear(2, 2).eval()
    with torch.no_grad():
        model.weight.fill_(value)
    graph = ag.trace(model, (torch.randn(2, 2),), dynamic={"input": ("batch", None)})
    with pytest.raises(PassError, match=f"beyond the range of {dtype}") as caught:
        apply(graph, f"cast{{dtype={dtype}}}", parity="none")
    assert caught.value.hint.startswith(hint)


def test_parity_sees_rows_padded_on_the_left() -> None:
    """The samples of parity have a row padded on either side, so that rows without an allowed key are compared."""
    report = ag.run(_scores("where"), "cast{dtype=f16}", parity="each").report
    assert report[0].change is not None
    mask = ag.sample_inputs(_scores("where"), padding="both")["attention_mask"]
    assert mask[-1, 0] == 0 and mask[-1, -1] == 1 and mask[-2, 0] == 1 and mask[-2, -1] == 0


class Angles(torch.nn.Module):
    """Ops that ONNX has no bfloat16 of in opset 18: Cos, Sin, TopK."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.linear(x)
        return torch.cos(y) * torch.sin(y) + torch.ones_like(y), y.topk(2).values


def _angles() -> Graph:
    return ag.trace(Angles().eval(), (torch.randn(2, 4),), dynamic={"x": ("batch", None)}, name="angles")


@pytest.mark.parametrize("inline", ["none", "all"])
def test_export_of_types_that_a_schema_excludes(inline: str, tmp_path: Path) -> None:
    cast = apply(_angles(), "clip{site=linear.0 max=1}, cast{dtype=bf16}")
    with pytest.warns(UserWarning, match="computes in bfloat16 .*onnxruntime"):
        path = cast.save(tmp_path / "angles.onnx", inline=inline)
    onnx.checker.check_model(str(path), full_check=True)
    loaded = ag.load(path)
    for op in ("onnx.Cos", "onnx.Sin", "onnx.TopK"):
        (node,) = [n for n in loaded.nodes() if n.op == op]
        assert node.operands[0].dtype == "f32" and node.output.dtype == "f32"
    assert any(note.startswith("angles computes in bfloat16") for note in loaded.notes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to say of float32
        _angles().save(tmp_path / "plain.onnx")


def test_cast_of_an_onnx_graph_keeps_float32_where_it_must(tmp_path: Path) -> None:
    result = ag.run(to_onnx(_angles()), "cast{dtype=bf16}")
    assert "not checked from cast on" in result.report.parity, "onnxruntime has no kernels, and that is said"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = result.graph.save(tmp_path / "angles.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    (cos,) = [n for n in result.graph.nodes() if n.op == "onnx.Cos"]
    assert cos.operands[0].dtype == "f32"
    assert {p.dtype for p in result.graph.parameters() if p.dtype is not None and p.dtype.is_float} == {"bf16"}
    with pytest.raises(UnsupportedError):
        ag.run(to_onnx(_angles()), "cast{dtype=bf16}", parity="each")


def test_verify_fails_a_file_that_does_not_open(tmp_path: Path) -> None:
    """onnxruntime has no bfloat16 kernels: that is a failed check with its reason, and not an error."""
    from actgraph.cli.verify import check_exports

    checks = list(check_exports(apply(_angles(), "cast{dtype=bf16}"), tmp_path, [{"x": np.ones((2, 4), np.float32)}], 1e-4))
    assert len(checks) == 2
    assert all(check.verdict == "FAILED" and "onnxruntime cannot run" in check.detail for check in checks)


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_rotary_angles_stay_in_single_precision(dialect: str, dtype: str) -> None:
    """At position 4097 neighbouring angles are one number in half precision."""
    graph = zoo.captured("llama") if dialect == "fx" else zoo.exported("llama")
    rewritten = ag.run(graph, f"cast{{dtype={dtype}}}", parity="none").graph
    turned = [node for node in rewritten.nodes() if node.prim is not None and node.prim.op in ("cos", "sin")]
    assert turned and all(node.operands[0] is not None and node.operands[0].dtype is DType.F32 for node in turned)
    frequencies = [parameter for parameter in rewritten.parameters() if "inv_freq" in parameter.name]
    assert all(parameter.dtype is DType.F32 for parameter in frequencies)
    others = {parameter.dtype for parameter in rewritten.parameters() if parameter.type.rank == 2}
    assert others == {DType(dtype)}
