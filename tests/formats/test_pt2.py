"""``.pt2`` files: stock torch runs them, loading gives the equal graph back, weights are stored once."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import actgraph as ag
from actgraph import formats
from actgraph.errors import InputError, UnsupportedError
from actgraph.formats.trace import trace
from actgraph.graph.fx import FxGraph
from actgraph.graph.graph import Role
from actgraph.graph.provenance import PassRecord
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import TensorType
from tests import zoo

F32 = np.float32


def stock(path: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    """What stock torch makes of the file."""
    out = torch.export.load(path).module()(**{key: torch.from_numpy(value) for key, value in inputs.items()})
    out = {"output": out} if isinstance(out, torch.Tensor) else out
    return {key: value.detach().numpy() for key, value in out.items()}


def steered(name: str) -> FxGraph:
    """A zoo graph with ops of ours in it, and a history."""
    graph = zoo.captured(name)
    with graph.edit("steer", "steer{site=blocks.0.resid_post}") as editor:
        site = graph.site("blocks.0.resid_post")
        editor.insert_at(site, "actgraph.shift", [np.full(site.value.shape[-1], 0.3, F32)])  # type: ignore[index,arg-type]
    with graph.edit("sparsify", "sparsify{sparsity=0.4}") as editor:
        site = graph.site("blocks.0.mlp.hidden")
        editor.insert_at(site, "actgraph.gate", [np.asarray(0.2, F32)])
    graph.history.append(PassRecord("steer", "steer{site=blocks.0.resid_post}", {"inserted": 1}))
    graph.notes.append("a note")
    graph.metadata["answer"] = "42"
    return graph


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "mixtral", "resnet", "mlp"])
def test_round_trip(name: str, tmp_path: Path) -> None:
    graph = zoo.captured(name)
    path = graph.save(tmp_path / "model.pt2")
    again = formats.load(path)
    assert again.text() == graph.text() and again.content_hash() == graph.content_hash()
    assert [s.name for s in again.sites()] == [s.name for s in graph.sites()]
    again.verify()
    inputs = zoo.inputs(name, batch=3, length=6)
    expected = graph.run(inputs)
    for key, value in again.run(inputs).items():
        np.testing.assert_array_equal(value, expected[key])
    for key, value in stock(path, inputs).items():
        assert np.abs(value - expected[key]).max() <= 2e-5 * np.abs(expected[key]).max()


def test_edited_graph_round_trip(tmp_path: Path) -> None:
    graph = steered("llama")
    assert (
        np.abs(graph.run(zoo.inputs("llama"))["logits"] - zoo.captured("llama").run(zoo.inputs("llama"))["logits"]).max() > 0.1
    )
    path = graph.save(tmp_path / "model.pt2")
    again = formats.load(path)
    assert again.content_hash() == graph.content_hash()
    assert again.history == graph.history and again.notes == graph.notes and again.metadata == graph.metadata
    assert again.dim_ranges == graph.dim_ranges
    ours = [n for n in again.nodes() if n.op.startswith("actgraph.")]
    assert {n.op: n.origin.created_by for n in ours} == {"actgraph.gate": "sparsify", "actgraph.shift": "steer"}
    for before, after in zip(graph.sites(), again.sites(), strict=True):
        assert (before.name, before.kind, str(before.type), before.aliases) == (
            after.name,
            after.kind,
            str(after.type),
            after.aliases,
        )
    value = again.site("blocks.0.resid_post").value  # still what its readers see: after the shift
    assert value.producer is not None and value.producer.op == "actgraph.shift"
    inputs = zoo.inputs("llama", batch=3, length=6)
    np.testing.assert_array_equal(again.run(inputs)["logits"], graph.run(inputs)["logits"])


def test_stock_torch_runs_the_file_without_actgraph(tmp_path: Path) -> None:
    graph = steered("llama")
    graph.save(tmp_path / "model.pt2")
    inputs = zoo.inputs("llama", batch=3, length=6)
    np.savez(tmp_path / "inputs.npz", **inputs)
    code = (
        "import sys, numpy as np, torch\n"
        "arrays = np.load('inputs.npz')\n"
        "out = torch.export.load('model.pt2').module()(**{k: torch.from_numpy(arrays[k]) for k in arrays.files})\n"
        "assert not any(name.startswith('actgraph') for name in sys.modules)\n"
        "np.save('out.npy', out['logits'].detach().numpy())\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={"PATH": "", "OMP_NUM_THREADS": "1"})
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), graph.run(inputs)["logits"], rtol=1e-4, atol=1e-5)


def test_kept_ops_stay_in_the_program(tmp_path: Path) -> None:
    graph = steered("llama")
    kept = torch.export.load(graph.save(tmp_path / "kept.pt2", ops="kept"))
    plain = torch.export.load(graph.save(tmp_path / "plain.pt2"))
    ours = [{str(n.target) for n in p.graph.nodes if "actgraph" in str(n.target)} for p in (kept, plain)]
    assert ours == [{"actgraph.shift.default", "actgraph.gate.default"}, set()]
    inputs = zoo.inputs("llama", length=5)
    np.testing.assert_allclose(stock(tmp_path / "kept.pt2", inputs)["logits"], graph.run(inputs)["logits"], atol=1e-5)
    assert formats.load(tmp_path / "kept.pt2").content_hash() == graph.content_hash()
    with pytest.raises(InputError, match="decomposed or kept"):
        graph.save(tmp_path / "x.pt2", ops="other")


def test_dynamic_sizes_and_limits_hold_in_stock_torch(tmp_path: Path) -> None:
    graph = zoo.captured("llama")
    path = graph.save(tmp_path / "model.pt2")
    for batch, length in ((1, 1), (2, 64), (5, 3)):
        inputs = zoo.inputs("llama", batch=batch, length=length)
        np.testing.assert_allclose(stock(path, inputs)["logits"], graph.run(inputs)["logits"], rtol=1e-4, atol=1e-5)
    with pytest.raises(Exception, match=r"64|[Gg]uard"):
        stock(path, zoo.inputs("llama", batch=1, length=65))


def test_each_weight_is_stored_once(tmp_path: Path) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(500, 100), nn.Linear(100, 500, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))

    graph = trace(Wide(), (torch.zeros(2, 3, dtype=torch.int64),))
    path = graph.save(tmp_path / "model.pt2")
    size = 500 * 100 * 4
    assert size < path.stat().st_size < 1.3 * size
    again = formats.load(path)
    assert isinstance(again, FxGraph)
    assert again.aliases(again.value("head.weight")) == ("embed.weight", "head.weight")
    state = again.to_torch().state_dict()
    assert state["embed.weight"].data_ptr() == state["head.weight"].data_ptr()


def test_companions_ride_in_the_file(tmp_path: Path) -> None:
    graph = zoo.captured("stories260k")
    again = formats.load(graph.save(tmp_path / "model.pt2"))
    ours, theirs = graph.companions, again.companions
    assert theirs.tokenizer_files == ours.tokenizer_files and theirs.config == ours.config
    assert theirs.generation_config == ours.generation_config and theirs.source == ours.source == "stories260k"
    assert theirs.tokenizer.encode("Once upon").ids == ours.tokenizer.encode("Once upon").ids
    for key, value in ours.sample_inputs.items():
        np.testing.assert_array_equal(theirs.sample_inputs[key], value)


def test_slots_and_optional_inputs_come_back(tmp_path: Path) -> None:
    graph = zoo.captured("mlp")
    with graph.edit("cache") as editor:
        state = editor.add_input("state_in.sum", TensorType(DType.F32, (1,)), role=Role.SLOT, default=np.zeros(1, F32))
        total = editor.insert("add", [state, np.ones(1, F32)])
        editor.add_output(total.output, "state_out.sum", role=Role.SLOT)
    again = formats.load(graph.save(tmp_path / "model.pt2"))
    assert again.role("state_in.sum") is Role.SLOT and again.role("state_out.sum") is Role.SLOT
    np.testing.assert_array_equal(again.run(zoo.inputs("mlp"))["state_out.sum"], [1])
    assert again.content_hash() == graph.content_hash()


def test_a_loaded_graph_can_be_edited(tmp_path: Path) -> None:
    graph = formats.load(zoo.captured("llama").save(tmp_path / "model.pt2"))
    before = graph.run(zoo.inputs("llama"))["logits"]
    with graph.edit("steer") as editor:
        value = editor.insert_at(graph.site("blocks.1.resid_post"), "actgraph.shift", [np.ones(zoo.WIDTH, F32)])
    assert str(value.type) == f"f32[batch, seq, {zoo.WIDTH}]"
    graph.verify()
    assert np.abs(graph.run(zoo.inputs("llama", length=11, seed=3))["logits"]).max() > 0
    assert np.abs(graph.run(zoo.inputs("llama"))["logits"] - before).max() > 1e-2
    with pytest.raises(InputError, match="only work for"), graph.edit("test") as editor:
        editor.insert("add", [value, np.ones((8, zoo.WIDTH), F32)])


def test_saving_over_the_file_that_a_graph_came_from(tmp_path: Path) -> None:
    path = zoo.captured("mlp").save(tmp_path / "model.pt2")
    graph = formats.load(path)
    expected = graph.run(zoo.inputs("mlp"))["output"]
    graph.save(path)
    np.testing.assert_array_equal(graph.run(zoo.inputs("mlp"))["output"], expected)
    np.testing.assert_array_equal(formats.load(path).run(zoo.inputs("mlp"))["output"], expected)


def test_bfloat16_and_integer_weights(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4).bfloat16()
            self.register_buffer("table", torch.arange(-4, 4, dtype=torch.int8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.bfloat16()).float() + self.table[:4].float()

    graph = trace(Mixed(), (torch.randn(2, 4),), dynamic={"x": ("n", None)})
    again = formats.load(graph.save(tmp_path / "model.pt2"))
    assert again.content_hash() == graph.content_hash()
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(F32)
    np.testing.assert_array_equal(again.run({"x": x})["output"], graph.run({"x": x})["output"])


def test_infinities_and_control_flow(tmp_path: Path) -> None:
    class Flow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.cond(x.sum() > 0, lambda v: v * 2, lambda v: v - 1, (x,))
            return y.masked_fill(y > 5, float("inf"))

    graph = trace(Flow(), (torch.ones(3),))
    graph.verify()
    assert any(n.op.startswith("higher_order.") for n in graph.nodes())
    path = graph.save(tmp_path / "model.pt2")
    again = formats.load(path)
    assert again.content_hash() == graph.content_hash()
    for x in (np.full(3, 4, F32), np.full(3, -4, F32)):
        expected = np.where(x.sum() > 0, x * 2, x - 1)
        expected = np.where(expected > 5, np.inf, expected)
        np.testing.assert_array_equal(graph.run({"x": x})["output"], expected)
        np.testing.assert_array_equal(again.run({"x": x})["output"], expected)
        np.testing.assert_array_equal(stock(path, {"x": x})["output"], expected)


def test_a_foreign_program_loads(tmp_path: Path) -> None:
    model = zoo.model("mlp")
    dim = torch.export.Dim("anything")
    program = torch.export.export(model, (torch.randn(3, 12),), dynamic_shapes={"x": {0: dim}})
    torch.export.save(program, tmp_path / "foreign.pt2")
    graph = ag.load(tmp_path / "foreign.pt2")
    graph.verify()
    assert graph.name == "foreign" and [str(v.type) for v in graph.inputs()] == ["f32[d0, 12]"]
    assert [name for name, _ in graph.outputs()] == ["output"]
    inputs = zoo.inputs("mlp", batch=4)
    np.testing.assert_allclose(graph.run(inputs)["output"], zoo.eager("mlp", inputs)["output"], rtol=1e-5, atol=1e-6)
    assert [s.name for s in graph.sites("linear.*")] == [s.name for s in zoo.captured("mlp").sites("linear.*")]


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 broken"])
def test_corrupt_files_give_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.pt2"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.pt2 is no readable") as caught:
        formats.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda row: row.update(version=999), "another version"),
        (lambda row: row.pop("nodes"), "is damaged"),
        (lambda row: row["nodes"][-1].update(args={"tuple": [{"node": "nowhere"}]}), "is damaged"),
        (lambda row: row["parameters"].append({**row["parameters"][0], "path": "more"}), "no data for parameter more"),
        (
            lambda row: row["nodes"][-2].update(target={"op": "nonsense.op.default"}),
            r"nonsense\.op\.default, which is not defined",
        ),
        (lambda row: row["nodes"][-2].update(target={"function": "os:system"}), "not an operation on sizes"),
    ],
)
def test_a_damaged_description_gives_one_line(spoil: Any, message: str, tmp_path: Path) -> None:
    path = zoo.captured("mlp").save(tmp_path / "model.pt2")
    damaged = tmp_path / "damaged.pt2"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(damaged, "w") as target:
        for item in source.infolist():
            data = source.read(item)
            if item.filename.endswith("actgraph.json"):
                row = json.loads(data)
                spoil(row)
                data = json.dumps(row).encode()
            target.writestr(item.filename, data)
    with pytest.raises(InputError, match=message) as caught:
        formats.load(damaged)
    assert "\n" not in str(caught.value)


def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    path = zoo.captured("mlp").save(tmp_path / "model.pt2")
    content = path.read_bytes()
    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(InputError, match="no space"):
        zoo.captured("mlp").save(path)
    assert path.read_bytes() == content and [p.name for p in tmp_path.iterdir()] == ["model.pt2"]
    with pytest.raises(InputError, match="cannot write"):
        zoo.captured("mlp").save(tmp_path / "missing" / "model.pt2")


def test_an_onnx_graph_is_refused(tmp_path: Path) -> None:
    graph = formats.load(Path(__file__).parent.parent / "data" / "mnist.onnx")
    with pytest.raises(UnsupportedError, match="ONNX graph"):
        graph.save(tmp_path / "model.pt2")
