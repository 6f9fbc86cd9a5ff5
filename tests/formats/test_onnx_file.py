"""Loading and saving .onnx: round trips, external data, atomic writes, places that cannot be written."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import numpy_helper

import actgraph  # noqa: F401  # installs the engines
from actgraph.errors import InputError, UnsupportedError
from actgraph.formats import load, onnx_stream, save
from actgraph.formats.onnx_file import load_onnx, save_onnx, serialize
from actgraph.graph.graph import Companions, Role
from actgraph.graph.onnx import OnnxGraph
from actgraph.graph.provenance import PassRecord
from actgraph.graph.sites import SiteKind
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import TensorType
from tests import zoo
from tests.graph import onnx_models as models

MNIST = Path(__file__).parents[1] / "data" / "mnist.onnx"


def edited(make=models.mlp) -> OnnxGraph:
    """A graph with an edit of every kind: an op at an output, a tap, an optional input, a changed weight, a note."""
    graph = make()
    with graph.edit("steer", "steer{scale=2}") as editor:
        value = next(node.output for node in graph.nodes() if node.output.dtype is DType.F32)
        node = editor.insert("actgraph.shift", [value, np.ones(value.shape[-1], np.float32)], {"scale": 2.0})
        editor.redirect(value, node.output)
        last = graph.outputs()[0][1]
        end = editor.insert("mul", [last, 0.5])
        editor.redirect(last, end.output)
        editor.add_output(last, "tap", role=Role.TAP)
        offset = editor.add_input("offset", TensorType(DType.F32, (1,)), role=Role.CONTEXT, default=np.zeros(1, np.float32))
        shifted = editor.insert("add", [end.output, offset])
        editor.redirect(end.output, shifted.output)
    graph.history.append(PassRecord("steer", "steer{scale=2}", {"inserted": 1}))
    graph.notes.append("a note")
    graph.metadata["key"] = "value"
    return graph


def stock_run(path: Path, inputs) -> dict[str, np.ndarray]:
    """What a stock onnxruntime session computes on the file alone."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(inputs)), strict=True))


def assert_equal(left, right) -> None:
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


# --- round trips ------------------------------------------------------------------------------------------------------

MAKERS = [models.mlp, models.branches, models.loop, lambda: models.old(13), lambda: models.chain(6)]


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("make", MAKERS[:3] + MAKERS[4:])
def test_kept_functions_round_trip(tmp_path, make, external):
    graph = edited(make)
    inputs = models.feed(make())
    expected = graph.run(inputs)
    path = save(graph, tmp_path / "m.onnx", external_data=external)
    back = load(path)
    back.verify()
    assert back.content_hash() == graph.content_hash()
    assert back.text() == graph.text(), "names, types, sites, provenance and history"
    assert [site.name for site in back.sites()] == [site.name for site in graph.sites()]
    assert [n.origin for n in back.nodes()] == [n.origin for n in graph.nodes()]
    assert (back.history, back.notes, back.metadata) == (graph.history, graph.notes, graph.metadata)
    assert back.role("tap") is Role.TAP and back.role("offset") is Role.CONTEXT and back.optional == {"offset"}
    assert_equal(back.run(inputs), expected)
    assert_equal(stock_run(path, inputs), expected)
    onnx.checker.check_model(str(path), full_check=True)


@pytest.mark.parametrize("make", MAKERS[:3] + MAKERS[4:])
def test_inlined_files_hold_standard_ops_only(tmp_path, make):
    graph = edited(make)
    inputs = models.feed(make())
    path = save_onnx(graph, tmp_path / "m.onnx", inline="all")
    proto = onnx.load(path)
    assert not proto.functions and {entry.domain for entry in proto.opset_import} == {""}
    assert_equal(stock_run(path, inputs), graph.run(inputs))
    back = load_onnx(path)
    back.verify()
    assert [site.name for site in back.sites()] == [site.name for site in graph.sites()]
    made = [node for node in back.nodes() if node.key.metadata_props.get("actgraph.inlined")]
    assert made and all(node.origin.created_by == "steer" and node.origin.options == "steer{scale=2}" for node in made)
    assert all(output.shape is not None for node in made for output in node.outputs)
    assert graph.text() == edited(make).text(), "saving does not change the graph"


def test_selective_inlining(tmp_path):
    graph = models.mlp()
    with graph.edit("p") as editor:
        for name, op, operands in (("h", "actgraph.shift", [np.ones(4, np.float32)]), ("a", "actgraph.clip", [])):
            value = graph.value(name)
            node = editor.insert(op, [value, *operands], {"min": -1.0, "max": 0.5} if not operands else {})
            editor.redirect(value, node.output)
    path = save_onnx(graph, tmp_path / "m.onnx", inline=["shift"])
    proto = onnx.load(path)
    assert [function.name for function in proto.functions] == ["Clip"]
    assert_equal(stock_run(path, models.feed(graph)), graph.run(models.feed(graph)))


def test_foreign_functions_and_unknown_nodes_are_kept(tmp_path):
    graph = models.function_call()
    with graph.edit("p") as editor:
        node = editor.insert("actgraph.shift", [graph.value("a"), np.ones(4, np.float32)])
        editor.redirect(graph.value("a"), node.output)
    for inline in ("none", "all"):
        proto = onnx.load(save_onnx(graph, tmp_path / "m.onnx", inline=inline))
        assert "local" in {function.domain for function in proto.functions}
        mystery = next(node for node in proto.graph.node if node.op_type == "Mystery")
        assert mystery.domain == "unknown" and mystery.attribute[0].i == 2
    back = load_onnx(tmp_path / "m.onnx")
    back.verify()


def test_same_graph_same_bytes(tmp_path):
    first = save(edited(), tmp_path / "a.onnx").read_bytes()
    second = save(load(tmp_path / "a.onnx"), tmp_path / "b.onnx").read_bytes()
    assert first == save(edited(), tmp_path / "c.onnx").read_bytes()
    assert onnx.load_from_string(second) == onnx.load_from_string(first), "a file read and written again is the same model"


def test_outputs_have_public_names_whatever_edits_did(tmp_path):
    graph = models.mlp()
    with graph.edit("p") as editor:
        end = editor.insert("mul", [graph.value("y"), 2.0])
        editor.redirect(graph.value("y"), end.output)  # output y is now mul.0, while value y goes on
        editor.add_output(graph.value("y"), "mul.0")  # ... and the names cross over
        editor.add_output(graph.value("y"), "bias")  # a parameter has this name
        editor.add_output(graph.value("x"), "x_again")
    inputs = models.feed(graph)
    expected = graph.run(inputs)
    path = save(graph, tmp_path / "m.onnx")
    assert_equal(stock_run(path, inputs), expected)
    back = load(path)
    assert back.text() == graph.text()
    np.testing.assert_array_equal(expected["y"], expected["mul.0"] * 2)
    stripped = onnx.load(path)
    del stripped.metadata_props[:]
    onnx.save(stripped, path)
    assert_equal(load(path).run(inputs), expected)


def test_types_of_values_survive(tmp_path):
    kinds = {
        "f64": np.float64, "f16": np.float16, "i32": np.int32, "u8": np.uint8, "bool": np.bool_,
        "bf16": DType.BF16.numpy, "f8e4m3": DType.F8E4M3.numpy, "i4": DType.I4.numpy, "u4": DType.U4.numpy,
    }  # fmt: skip
    graph = models.mlp(21)
    with graph.edit() as editor:
        for name, kind in kinds.items():
            value = editor.add_parameter(name, np.arange(7).astype(kind).reshape(7, 1))
            editor.add_output(value, f"out_{name}")
        empty = editor.add_parameter("empty", np.zeros((0, 3), np.float32))
        editor.add_output(empty, "out_empty")
    for external in (False, True):
        back = load(save(graph, tmp_path / "m.onnx", external_data=external))
        assert back.text() == graph.text()
        for name, kind in kinds.items():
            array = back.read(back.value(name))
            assert array.dtype == np.dtype(kind)
            np.testing.assert_array_equal(array.astype(np.float32), np.arange(7).reshape(7, 1).astype(kind).astype(np.float32))


def test_quantization_annotations_are_kept(tmp_path):
    proto = models.parse("""<ir_version: 9, opset_import: ["": 18]>
        g (float[n] x) => (float[n] y) { h = Relu(x)  y = Neg(h) }""")
    annotation = proto.graph.quantization_annotation.add(tensor_name="h")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="s")
    onnx.save(proto, tmp_path / "m.onnx")
    save(load(tmp_path / "m.onnx"), tmp_path / "n.onnx")
    assert list(onnx.load(tmp_path / "n.onnx").graph.quantization_annotation) == [annotation]


def test_string_tensors(tmp_path):
    graph = models.graph(
        """<ir_version: 9, opset_import: ["": 18]> g (int64[n] i) => (string[n] y) <string[2] words = {"one", "zwölf"}>
        { y = Gather(words, i) }"""
    )
    path = save(graph, tmp_path / "m.onnx")
    assert load(path).text() == graph.text()
    assert stock_run(path, {"i": np.array([1, 0])})["y"].tolist() == ["zwölf", "one"]


def test_companions_travel_beside_the_file(tmp_path):
    tokenizer = (
        b'{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,"pre_tokenizer":null,'
        b'"post_processor":null,"decoder":null,"model":{"type":"WordLevel","vocab":{"a":0,"b":1},"unk_token":"a"}}'
    )
    graph = models.mlp()
    graph.companions = Companions(
        tokenizer_files={"tokenizer.json": tokenizer, "vocab.txt": b"a\nb\n"}, config={"model_type": "mlp"},
        generation_config={"eos_token_id": 1}, source="org/model", sample_inputs={"x": np.ones((1, 2, 4), np.float32)},
    )  # fmt: skip
    (tmp_path / "config.json").write_text('{"somebody": "else"}')
    back = load(save(graph, tmp_path / "m.onnx")).companions
    assert (tmp_path / "config.json").read_text() == '{"somebody": "else"}', "files of others are not overwritten"
    assert (tmp_path / "tokenizer.json").is_file()
    assert back.config == {"model_type": "mlp"} and back.generation_config == {"eos_token_id": 1} and back.source == "org/model"
    assert back.tokenizer_files == graph.companions.tokenizer_files
    assert back.tokenizer.encode("b").ids == [1]
    np.testing.assert_array_equal(back.sample_inputs["x"], np.ones((1, 2, 4)))
    plain = models.mlp()
    assert load(save(plain, tmp_path / "n.onnx")).companions.tokenizer is None, "the tokenizer there is not its own"


def test_files_of_other_tools_find_companions(tmp_path):
    shutil.copy(MNIST, tmp_path / "m.onnx")
    (tmp_path / "config.json").write_text('{"model_type": "cnn"}')
    assert load(tmp_path / "m.onnx").companions.config == {"model_type": "cnn"}


# --- real architectures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "resnet", "stories260k"])
def test_edits_at_sites_survive_files(tmp_path, name):
    """A file of stock torch.onnx.export: an edit at a site, then both kinds of file; sites, hash and numbers are kept."""
    graph = load(zoo.stock_onnx(name))
    inputs = zoo.inputs(name, 2, 6)
    before = graph.run(inputs)
    chosen = [
        site for site in graph.sites()
        if site.kind is SiteKind.VALUE and site.type.dtype is DType.F32 and site.type.rank in (3, 4) and site.aliases
    ]  # fmt: skip
    site = chosen[len(chosen) // 2]
    width = site.type.shape[-1] if isinstance(site.type.shape[-1], int) else 1
    with graph.edit("steer", "steer{}") as editor:
        editor.insert_at(site, "actgraph.shift", [np.full(width, 0.7, np.float32)])
    graph.verify()
    expected = graph.run(inputs)
    assert max(np.abs(expected[key] - before[key]).max() for key in before) > 1e-2
    kept = load(save(graph, tmp_path / "kept.onnx"))
    assert kept.content_hash() == graph.content_hash()
    inlined = load(save(graph, tmp_path / "inlined.onnx", inline="all"))
    listed = [(s.name, s.aliases, s.role, s.kind, s.type) for s in graph.sites()]
    for back, path in ((kept, tmp_path / "kept.onnx"), (inlined, tmp_path / "inlined.onnx")):
        back.verify()
        assert [(s.name, s.aliases, s.role, s.kind, s.type) for s in back.sites()] == listed
        result = stock_run(path, inputs)
        for key in expected:
            np.testing.assert_allclose(result[key], expected[key], rtol=1e-5, atol=1e-5)


# --- old files --------------------------------------------------------------------------------------------------------


def test_mnist_is_lifted_when_an_op_needs_it(tmp_path):
    """Opset 8, IR 3: loads as it is; an edit lifts it, and it agrees with its original outputs."""
    graph = load(MNIST)
    graph.verify()
    assert graph.opset == 8 and graph.model.ir_version == 3
    inputs = {"Input3": np.random.default_rng(0).standard_normal((1, 1, 28, 28)).astype(np.float32)}
    expected = stock_run(MNIST, inputs)
    assert_equal(graph.run(inputs), expected)
    plus = graph.value("Plus30_Output_0")
    with graph.edit("steer") as editor:
        node = editor.insert("actgraph.shift", [plus, np.ones(8, np.float32)], {"scale": 0.0, "axis": 1})
        editor.redirect(plus, node.output)
    graph.verify()
    assert graph.value("Plus30_Output_0") == plus, "handles survive"
    assert graph.opset >= 13 and graph.model.ir_version >= 10 and [v.name for v in graph.model.graph.inputs] == ["Input3"]
    assert "opset raised from 8" in graph.notes[0]
    path = save(graph, tmp_path / "m.onnx")
    np.testing.assert_allclose(stock_run(path, inputs)["Plus214_Output_0"], expected["Plus214_Output_0"], rtol=1e-5, atol=1e-4)
    back = load(path)
    assert back.content_hash() == graph.content_hash() and back.notes == graph.notes
    with graph.edit("steer") as editor:
        editor.set_parameter(node.operands[1], np.full(8, 3.0, np.float32))
        editor.insert("identity", [plus])
    node.key.attributes["scale"] = ir.AttrFloat32("scale", 1.0)
    moved = np.abs(graph.run(inputs)["Plus214_Output_0"] - expected["Plus214_Output_0"]).max()
    assert moved > 1, "the edit acts where it should"


@pytest.mark.parametrize("opset", [7, 8, 9, 10, 11, 12, 13, 15, 18, 21])
def test_every_opset_loads_edits_and_saves(tmp_path, opset):
    graph = models.mlp(opset)
    before = graph.run(models.feed(graph))
    with graph.edit("p") as editor:
        node = editor.insert("actgraph.shift", [graph.value("h"), np.zeros(4, np.float32)])
        editor.redirect(graph.value("h"), node.output)
    path = save(graph, tmp_path / "m.onnx")
    assert load(path).opset >= opset
    np.testing.assert_allclose(stock_run(path, models.feed(graph))["y"], before["y"], rtol=1e-6)


def test_converters_that_add_nodes_and_constants(tmp_path):
    graph = models.old(9)
    inputs = models.feed(graph)
    before = graph.run(inputs)
    handles = graph.nodes()
    with graph.edit("p") as editor:
        node = editor.insert("actgraph.shift", [graph.value("c"), np.zeros(4, np.float32)])
        editor.redirect(graph.value("c"), node.output)
    graph.verify()
    assert graph.opset >= 13
    assert [h.name for h in handles] == ["s", "u", "c", "p", "l", "q", "y"]
    assert all(n.origin.sources for n in graph.nodes() if not n.origin.created_by)
    path = save(graph, tmp_path / "m.onnx")
    np.testing.assert_allclose(stock_run(path, inputs)["y"], before["y"], rtol=1e-6)


def test_bodies_and_foreign_nodes_are_lifted_too():
    graph = models.graph(
        """<ir_version: 8, opset_import: ["": 11, "unknown": 3]>
        g (float[n, 4] x, bool flag) => (float[n, 4] y, z)
        {
          h = Relu(x)
          z = unknown.Mystery <k = 2> (h)
          y = If (flag) <
            then_branch = yes () => (float[n, 4] t) { s = ReduceSum <axes = [1]> (h)  t = Add(h, s) },
            else_branch = no () => (float[n, 4] e) { e = Clip(h) } >
        }"""
    )
    mystery = graph.value("z").producer
    with graph.edit("p") as editor:
        node = editor.insert("actgraph.shift", [graph.value("h"), np.zeros(4, np.float32)])
        editor.redirect(graph.value("h"), node.output)
    graph.verify()
    assert mystery.op == "unknown.Mystery" and mystery.attributes == {"k": 2} and graph.model.opset_imports["unknown"] == 3
    with graph.edit("p") as editor:
        editor.remove_output("z")
        mystery.key.domain, mystery.key.op_type = "", "Identity"  # so that onnxruntime can run it
        mystery.key.attributes.clear()
    inputs = {**models.feed(graph), "flag": np.array(True)}
    h = np.maximum(inputs["x"], 0)
    np.testing.assert_allclose(graph.run(inputs)["y"], h + h.sum(1, keepdims=True), rtol=1e-6)


# --- external data ----------------------------------------------------------------------------------------------------


def big(width: int = 600) -> OnnxGraph:
    return models.graph(
        f"""<ir_version: 9, opset_import: ["": 18]> g (float[n, {width}] x) => (float[n, {width}] y)
        {{ h = MatMul(x, w)  y = Add(h, bias) }}""",
        w=models.weights(width, width), bias=models.weights(width, seed=1),
    )  # fmt: skip


def test_external_data_is_named_by_content_and_mapped(tmp_path):
    graph = big()
    path = save(graph, tmp_path / "m.onnx", external_data=True)
    (data,) = tmp_path.glob("*.data")
    assert data.name.startswith("m.") and path.stat().st_size < 4000 < data.stat().st_size
    back = load(path)
    array = back.read(back.value("w"))
    assert not array.flags.writeable and not array.flags.owndata and array.flags.aligned
    np.testing.assert_array_equal(array, graph.read(graph.value("w")))
    assert_equal(stock_run(path, models.feed(graph)), graph.run(models.feed(graph)))
    onnx.checker.check_model(str(path), full_check=True)


def test_saving_over_the_file_the_graph_came_from(tmp_path):
    path = save(big(), tmp_path / "m.onnx", external_data=True)
    graph = load(path)
    expected = graph.run(models.feed(graph))
    with graph.edit("p") as editor:
        editor.set_parameter(graph.value("bias"), models.weights(600, seed=2))
    save(graph, path, external_data=True)
    for old in tmp_path.glob("*.data"):
        if old.name.encode() not in path.read_bytes():
            old.unlink()  # even when the old data goes, the open graph goes on
    np.testing.assert_array_equal(graph.read(graph.value("w")), models.weights(600, 600))
    assert load(path).content_hash() == graph.content_hash()
    save(graph, path, external_data=True)
    assert np.abs(load(path).run(models.feed(graph))["y"] - expected["y"]).max() > 0.01


def test_two_writers_of_one_content_share_the_data_file(tmp_path):
    save(big(), tmp_path / "m.onnx", external_data=True)
    before = sorted(p.name for p in tmp_path.iterdir())
    save(big(), tmp_path / "m.onnx", external_data=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_stock_external_data_loads(tmp_path):
    proto = ir.to_proto(big().model)
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="sub.bin", size_threshold=0)
    graph = load(tmp_path / "m.onnx")
    np.testing.assert_array_equal(graph.read(graph.value("w")), models.weights(600, 600))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.unlink(), "is missing"),
        (lambda data: data.write_bytes(data.read_bytes()[:1000]), "too short"),
        (lambda data: data.write_bytes(b""), "cannot be read"),
    ],
)
def test_broken_external_data_is_said_at_load(tmp_path, change, message):
    path = save(big(), tmp_path / "m.onnx", external_data=True)
    change(next(tmp_path.glob("*.data")))
    with pytest.raises(InputError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_models_in_a_store_of_links_load(tmp_path):
    """As in the Hugging Face cache: names are links to blobs."""
    save(big(), tmp_path / "m.onnx", external_data=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for number, file in enumerate(sorted(p for p in tmp_path.iterdir() if p.is_file())):
        file.rename(tmp_path / "blobs" / str(number))
        (tmp_path / "snapshot" / file.name).symlink_to(tmp_path / "blobs" / str(number))
    graph = load(tmp_path / "snapshot" / "m.onnx")
    np.testing.assert_array_equal(graph.read(graph.value("w")), models.weights(600, 600))


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname", "link.bin"])
def test_external_data_outside_of_the_folder_is_refused(tmp_path, location):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(64))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    proto = models.parse("""<ir_version: 9, opset_import: ["": 18]> g (float[4] x) => (float[4] y) { y = Add(x, w) }""")
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    proto.graph.initializer.append(tensor)
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match="outside"):
        load(folder / "m.onnx")


# --- bad files and bad places -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [1, 6, 99])
def test_opsets_out_of_range(tmp_path, opset):
    proto = onnx.load(MNIST)
    proto.opset_import[0].version = opset
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(UnsupportedError, match=f"opset {opset}"):
        load(tmp_path / "m.onnx")


def test_missing_file_and_options(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_onnx(tmp_path / "none.onnx")
    with pytest.raises(InputError, match="no loading option 'dtype'"):
        load_onnx(MNIST, dtype="float16")


def test_places_that_cannot_be_written(tmp_path):
    graph = models.mlp()
    with pytest.raises(InputError, match="cannot write"):
        save(graph, tmp_path / "missing" / "m.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(InputError, match="is a directory"):
        save(graph, tmp_path / "folder.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.onnx"]


@pytest.mark.parametrize(("at", "external"), [("write_model", False), ("write_model", True), ("write_data", True)])
def test_a_full_disk_leaves_the_old_file_whole(tmp_path, monkeypatch, external, at):
    path = save(models.mlp(), tmp_path / "m.onnx")
    before = path.read_bytes()
    original = getattr(onnx_stream, at)

    def full(stream, *rest):
        original(stream, *rest)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(onnx_stream, at, full)
    with pytest.raises(InputError, match="no space left"):
        save(big(), path, external_data=external)
    assert path.read_bytes() == before
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


@pytest.mark.parametrize(("at", "external"), [("write_model", False), ("write_model", True), ("write_data", True)])
def test_a_model_that_cannot_be_written_leaves_all_files_beside_it(tmp_path, monkeypatch, external, at):
    """Companions, the data file and the model change together or not at all."""
    old, new = big(), big()
    old.companions = Companions(config={"a": 1}, tokenizer_files={"vocab.txt": b"a"}, sample_inputs={"x": np.zeros(2)})
    new.companions = Companions(
        config={"a": 2}, generation_config={"b": 1}, tokenizer_files={"vocab.txt": b"b"}, sample_inputs={"x": np.ones(2)}
    )
    with new.edit() as editor:
        editor.set_parameter(new.value("w"), new.read(new.value("w")) * 2)
    path = save(old, tmp_path / "m.onnx", external_data=True)
    before = {place.name: place.read_bytes() for place in tmp_path.rglob("*")}
    assert {"m.onnx", "config.json", "vocab.txt", "m.sample_inputs.npz"} < set(before)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(onnx_stream, at, full)
        with pytest.raises(InputError, match="no space left"):
            save(new, path, external_data=external)
    assert {place.name: place.read_bytes() for place in tmp_path.rglob("*")} == before
    save(new, path, external_data=external)
    assert load(path).companions.sample_inputs["x"].tolist() == [1, 1] and load(path).companions.config == {"a": 2}


def test_a_read_only_file_is_not_replaced(tmp_path, monkeypatch):
    path = save(models.mlp(), tmp_path / "m.onnx")
    before = path.read_bytes()
    path.chmod(0o444)
    if os.access(path, os.W_OK):  # the superuser may write everything; then the answer is made up
        monkeypatch.setattr(os, "access", lambda target, mode: mode != os.W_OK)
    with pytest.raises(InputError, match="read-only"):
        save(big(), path)
    assert path.read_bytes() == before


def test_symbolic_links_are_written_through(tmp_path):
    (tmp_path / "real").mkdir()
    save(models.mlp(), tmp_path / "real" / "m.onnx")
    (tmp_path / "link.onnx").symlink_to(tmp_path / "real" / "m.onnx")
    save(big(), tmp_path / "link.onnx")
    assert (tmp_path / "link.onnx").is_symlink() and "w" in {p.name for p in load(tmp_path / "real" / "m.onnx").parameters()}


# --- the writer -------------------------------------------------------------------------------------------------------


def test_streamed_bytes_are_what_protobuf_reads():
    graph = edited()
    proto = onnx.load_from_string(serialize(graph.clone()))
    assert {t.name for t in proto.graph.initializer} == set(graph.model.graph.initializers)
    for tensor in proto.graph.initializer:
        stored = graph.model.graph.initializers[tensor.name].const_value
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), stored.numpy())
    onnx.checker.check_model(proto, full_check=True)
