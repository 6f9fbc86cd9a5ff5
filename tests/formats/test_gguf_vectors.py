"""GGUF control vectors: the bytes of the gguf package, its files as repeng writes them, llama.cpp's rules, and damage."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actgraph as ag
from actgraph.errors import InputError, UnsupportedError
from actgraph.formats.gguf_vectors import layer_of, read_gguf, write_gguf
from actgraph.formats.vectors import SteeringVector, load_vector, vector_messages
from tests import zoo

gguf = pytest.importorskip("gguf")

RNG = np.random.default_rng(0)
DIRECTIONS = {layer: RNG.standard_normal(zoo.WIDTH).astype(np.float32) for layer in (3, 1, 2)}


def foreign(path: Path, tensors: dict[str, Any], architecture: str = "controlvector", **keys: Any) -> Path:
    """A file as repeng's ``export_gguf`` writes it; ``keys`` are further ones of the section ``controlvector``."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {"model_hint": "llama", "layer_count": len(tensors), **keys}.items():
        add = writer.add_string if isinstance(value, str) else writer.add_bool if isinstance(value, bool) else writer.add_uint32
        add(f"controlvector.{key}", value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def ours(**more: Any) -> SteeringVector:
    return SteeringVector({f"blocks.{n}.resid_post": v for n, v in DIRECTIONS.items()}, model_type="llama", **more)


def test_a_file_of_repeng(tmp_path: Path) -> None:
    path = foreign(tmp_path / "v.gguf", {f"direction.{n}": v for n, v in DIRECTIONS.items()})
    vector = load_vector(path)
    assert list(vector.directions) == ["blocks.1.resid_post", "blocks.2.resid_post", "blocks.3.resid_post"]
    for n, direction in DIRECTIONS.items():
        assert np.array_equal(vector.for_site((f"blocks.{n}.resid_post",)), direction)
    assert (vector.model_type, vector.scale, vector.where, vector.model) == ("llama", "raw", "all", "")
    assert "direction.n was read as blocks.n.resid_post" in vector.notes["mapping"]


def test_what_we_write_repeng_and_llama_cpp_read(tmp_path: Path) -> None:
    """Through the package alone, by the rules of repeng's ``import_gguf`` and llama.cpp's ``common_control_vector_load``."""
    reader = gguf.GGUFReader(ours().save(tmp_path / "v.gguf"))
    texts = {key: bytes(field.parts[-1]).decode() for key, field in reader.fields.items() if field.types[0].name == "STRING"}
    assert texts["general.architecture"] == "controlvector" and texts["controlvector.model_hint"] == "llama"
    count = reader.get_field("controlvector.layer_count")
    assert count.types[0].name == "UINT32" and count.contents() == 3
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.2", "direction.3"]
    for tensor in reader.tensors:
        n = int(tensor.name.split(".")[1])
        assert tensor.tensor_type.name == "F32" and tensor.shape.tolist() == [zoo.WIDTH]
        assert np.array_equal(tensor.data, DIRECTIONS[n]) and not np.array_equal(tensor.data, DIRECTIONS[1 + n % 3])


def test_the_bytes_are_those_of_the_package(tmp_path: Path) -> None:
    """A file with our keys written by hand has the bytes of ours; the header comes first and tensors stand in order."""
    keys: dict[str, Any] = {
        "actgraph.format": "actgraph.steering_vector/2", "actgraph.site": "blocks.{n}.resid_post", "actgraph.layer_base": 0,
        "actgraph.where": "all", "actgraph.scale": "raw",
    }  # fmt: skip
    by_hand = foreign(tmp_path / "hand.gguf", {f"direction.{n}": DIRECTIONS[n] for n in (1, 2, 3)}, **keys)
    written = ours().save(tmp_path / "ours.gguf").read_bytes()
    assert written == by_hand.read_bytes() and written.startswith(b"GGUF\x03\x00\x00\x00")
    again = SteeringVector(dict(reversed(list(ours().directions.items()))), model_type="llama").save(tmp_path / "again.gguf")
    assert again.read_bytes() == written
    assert written[-4 * zoo.WIDTH :] == DIRECTIONS[3].tobytes()


def test_our_keys_come_back(tmp_path: Path) -> None:
    facts: dict[str, Any] = {
        "model": "f32[96,32]:0123456789abcdef", "tokenizer": "tokenizer.json[96]:fedcba9876543210", "method": "pca",
        "position": "last", "where": "generated", "scale": "unit", "recommended_scale": 0.1,
    }  # fmt: skip
    again = load_vector(ours(**facts, notes={"positive": "3"}).save(tmp_path / "v.gguf"))
    assert {key: getattr(again, key) for key in facts} == facts and again.notes["positive"] == "3"
    bare = SteeringVector({"blocks.1.resid_post": DIRECTIONS[1]}).save(tmp_path / "bare.gguf")
    assert gguf.GGUFReader(bare).get_field("controlvector.model_hint").contents() == "unknown"  # repeng wants one
    assert load_vector(bare).model_type == ""


def test_a_file_of_repeng_steers_the_block_that_repeng_steers(tmp_path: Path) -> None:
    """Equal to a forward hook on the block with that number, and not to one on its neighbour."""
    import torch

    module, inputs = zoo.model("llama"), zoo.inputs("llama")
    graph = zoo.captured("llama")
    path = foreign(tmp_path / "v.gguf", {"direction.1": DIRECTIONS[1]})
    steered = ag.run(graph, f"steer{{vector={path} scale=0.5}}", parity="none", reproducer=False).graph.run(inputs)["logits"]

    def reference(layer: int) -> Any:
        def hook(block: Any, given: Any, output: Any) -> Any:
            return output + 0.5 * torch.from_numpy(DIRECTIONS[1])

        handle = module.model.layers[layer].register_forward_hook(hook)  # type: ignore[union-attr,index]
        try:
            with torch.no_grad():
                return module(**{name: torch.as_tensor(value) for name, value in inputs.items()}).logits.numpy()
        finally:
            handle.remove()

    assert np.abs(steered - reference(1)).max() < 1e-4
    assert np.abs(steered - reference(0)).max() > 1e-2


@pytest.mark.parametrize(
    ("site", "layer"),
    [
        ("blocks.5.resid_post", 5), ("blocks.6.resid_pre", 5), ("blocks.5.hook_resid_post", 5), ("blocks.5.hook_out", 5),
        ("model.layers.5", 5), ("blocks.1.resid_pre", 0), ("blocks.0.resid_pre", None), ("blocks.5.mlp.out", None),
        ("encoder.blocks.5.resid_post", None), ("embed", None), ("", None),
    ],
)  # fmt: skip
def test_the_layer_of_a_site(site: str, layer: int | None) -> None:
    assert layer_of(site) == layer


V = np.ones(4, np.float32)


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (SteeringVector({"blocks.0.resid_post": V}), "llama.cpp cannot steer layer 0"),
        (SteeringVector({"blocks.1.resid_pre": V}), "llama.cpp cannot steer layer 0"),
        (SteeringVector({"blocks.1.mlp.out": V}), "blocks.1.mlp.out is no output of a block"),
        (SteeringVector({"": V}), "the vector has no site"),
        (SteeringVector({}, bases={"blocks.1.resid_post": np.eye(2, 4, dtype=np.float32)}), "holds no bases"),
        (SteeringVector({"blocks.1.resid_post": V}, scale="relative"), "relative to the activation's norm"),
        (SteeringVector({"blocks.1.resid_post": V, "blocks.2.resid_post": V[:3]}), "one width"),
        (SteeringVector({"blocks.1.resid_post": V, "blocks.2.resid_pre": V}), "another direction"),
    ],
)
def test_what_gguf_cannot_express_is_refused(vector: SteeringVector, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as error:
        vector.save(tmp_path / "v.gguf")
    assert error.value.hint and not list(tmp_path.iterdir())


def test_layer_zero_is_read_and_said(tmp_path: Path) -> None:
    """By repeng's rule it is the output of the first block, whatever llama.cpp makes of it."""
    vector = load_vector(foreign(tmp_path / "v.gguf", {"direction.0": V, "direction.1": 2 * V}))
    assert np.array_equal(vector.directions["blocks.0.resid_post"], V)
    assert "llama.cpp would refuse" in vector.notes["mapping"]
    with pytest.raises(InputError, match="layer 0"):
        vector.save(tmp_path / "again.gguf")


def test_writers_that_count_from_one(tmp_path: Path) -> None:
    path = foreign(tmp_path / "v.gguf", {"direction.2": V, "direction.1": 2 * V})
    vector = read_gguf(path, layer_base=1)
    assert np.array_equal(vector.directions["blocks.1.resid_post"], V) and "blocks.{n-1}" in vector.notes["mapping"]
    with pytest.raises(InputError, match=r"direction\.1"):
        read_gguf(path, layer_base=2)


def test_files_in_the_wild(tmp_path: Path) -> None:
    """layer_count as the model's layers, further keys, other tensors, float16: read; the count proves nothing."""
    tensors = {"direction.27": V.astype(np.float16), "something.else": np.ones((2, 2), np.float32)}
    vector = load_vector(foreign(tmp_path / "v.gguf", tensors, layer_count=36, method="random", normalize=False))
    assert list(vector.directions) == ["blocks.27.resid_post"] and vector.directions["blocks.27.resid_post"].dtype == np.float32
    assert vector.method == "random" and vector.notes["layer_count"] == "36"
    other = load_vector(foreign(tmp_path / "w.gguf", {"direction.1": V}, architecture="llama"))
    assert "general.architecture=llama" in other.notes["mapping"]


def test_another_architecture_is_a_message(tmp_path: Path) -> None:
    graph = zoo.captured("llama")
    graph.companions.config = {"model_type": "llama"}
    for hint, said in (("llama", False), ("Llama", False), ("qwen3", True), ("unknown", False)):
        vector = load_vector(foreign(tmp_path / "v.gguf", {"direction.1": DIRECTIONS[1]}, model_hint=hint))
        messages = vector_messages(vector, graph, called="v.gguf")
        assert any("blocks.n.resid_post" in message and "v.gguf" in message for message in messages)
        assert any("architecture qwen3" in message for message in messages) == said


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"other": V}, "holds no control vector"),
        ({"direction.x": V}, "direction.x"),
        ({"direction.-1": V}, "direction.-1"),
        ({"direction.1": V, "direction.01": V}, "direction.01"),
        ({"direction.1": np.ones((2, 4), np.float32)}, r"float32\[2, 4\]"),
        ({"direction.1": np.ones(4, np.int32)}, "int32"),
        ({"direction.1": np.array([1, np.nan], np.float32)}, "NaN"),
    ],
)
def test_unsuitable_files(tensors: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as error:
        load_vector(foreign(tmp_path / "v.gguf", tensors))
    assert "v.gguf" in error.value.message and error.value.hint


def test_damaged_files_are_one_clear_line(tmp_path: Path) -> None:
    """Cut anywhere, or with bytes changed: refused, or still a vector. The array makes a length that may be anything."""
    path = tmp_path / "v.gguf"
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_array("controlvector.layers", b"\x01\x02\x03")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_tensor("direction.1", V)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = path.read_bytes()
    length = data.index(b"controlvector.layers") + len("controlvector.layers") + 8
    damaged = [data[:size] for size in range(0, len(data), 5)]
    damaged.append(data[:length] + b"\xff" * 6 + data[length + 6 :])
    rng = random.Random(0)
    for _ in range(60):
        place = rng.randrange(len(data))
        damaged.append(data[:place] + rng.randbytes(4) + data[place + 4 :])
    refused = 0
    with np.errstate(all="ignore"):
        for content in damaged:
            path.write_bytes(content)
            try:
                load_vector(path)
            except InputError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > len(damaged) // 2


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ours().save(tmp_path / "v.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    for action in (lambda: load_vector(path), lambda: write_gguf(ours(), tmp_path / "w.gguf")):
        with pytest.raises(UnsupportedError, match="need the package gguf") as error:
            action()
        assert "actgraph[gguf]" in error.value.hint
    assert not (tmp_path / "w.gguf").exists()
