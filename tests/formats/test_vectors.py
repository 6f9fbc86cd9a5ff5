"""Steering vector files: what is written is read, and a damaged file is one clear line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from actgraph.errors import InputError, SiteError
from actgraph.formats.fingerprints import surely_differ
from actgraph.formats.onnx_export import to_onnx
from actgraph.formats.vectors import (
    SteeringVector,
    check_vector,
    load_vector,
    model_fingerprint,
    name_sites,
    tokenizer_fingerprint,
    vector_messages,
)
from tests import zoo

V = np.arange(4, dtype=np.float32)


def test_round_trip(tmp_path: Path) -> None:
    vector = SteeringVector({"blocks.1.resid_post": V}, "model", "mean_difference", "last", {"positive": "3"})
    again = load_vector(vector.save(tmp_path / "v.safetensors"))
    assert np.array_equal(again.directions["blocks.1.resid_post"], V)
    assert (again.model, again.method, again.position, again.notes) == ("model", "mean_difference", "last", {"positive": "3"})


def test_a_bare_tensor_is_a_vector(tmp_path: Path) -> None:
    save_file({"anything": V}, tmp_path / "v.safetensors")
    assert np.array_equal(load_vector(tmp_path / "v.safetensors").for_site(("blocks.0.resid_post",)), V)


@pytest.mark.parametrize(("manifest", "message"), [("{broken", "is damaged"), (json.dumps([1, 2]), "is no object")])
def test_a_damaged_manifest_is_one_clear_line(tmp_path: Path, manifest: str, message: str) -> None:
    save_file({"vector": V}, tmp_path / "v.safetensors", metadata={"actgraph": manifest})
    with pytest.raises(InputError, match=message) as error:
        load_vector(tmp_path / "v.safetensors")
    assert "v.safetensors" in error.value.message and error.value.hint


def test_a_target_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        SteeringVector({"": V}).save(tmp_path / "no" / "such" / "folder" / "v.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_repr_is_one_line_without_the_arrays() -> None:
    directions = {f"blocks.{i}.resid_post": np.full(1000, 0.1, np.float32) for i in range(6)}
    shown = repr(SteeringVector(directions, "model", "mean_difference", "last"))
    assert shown.startswith("SteeringVector(blocks.0.resid_post [1000] norm 3.162, ") and "2 more" in shown
    assert "mean_difference" in shown and "array" not in shown and len(shown) < 300
    assert repr(SteeringVector({"": V})) == "SteeringVector((any site) [4] norm 3.742)"


# --- the manifest -------------------------------------------------------------------------------------------------------


def test_everything_comes_back_and_bytes_are_the_same(tmp_path: Path) -> None:
    plane = np.array([[1, 0, 0, 0], [0, 1, 0, 0]], np.float32)
    vector = SteeringVector(
        {"blocks.1.resid_post": V, "blocks.0.mlp.out": 2 * V}, "f32[8,4]:00", "pca", "last", {"pairs": "7"},
        {"blocks.1.resid_post": plane, "": plane[:1]}, "tokenizer.json[8]:11", "llama", "generated", "relative", 0.25,
    )  # fmt: skip
    again = load_vector(vector.save(tmp_path / "v.safetensors"))
    for key in ("model", "method", "position", "notes", "tokenizer", "model_type", "where", "scale", "recommended_scale"):
        assert getattr(again, key) == getattr(vector, key), key
    for held in ("directions", "bases"):
        arrays, expected = getattr(again, held), getattr(vector, held)
        assert arrays.keys() == expected.keys() and all(np.array_equal(arrays[name], expected[name]) for name in expected)
    directions, bases = (dict(reversed(list(held.items()))) for held in (vector.directions, vector.bases))
    turned = replace(vector, directions=directions, bases=bases)
    assert turned.save(tmp_path / "w.safetensors").read_bytes() == (tmp_path / "v.safetensors").read_bytes()


def test_a_file_of_the_first_version_is_read(tmp_path: Path) -> None:
    """Written as actgraph 0.1.0 wrote it."""
    manifest = {
        "format": "actgraph.steering_vector/1",
        "model": "m",
        "method": "pca",
        "position": "last",
        "notes": {"a": "b", "n": 3},
    }
    save_file({"embed": V, "vector": 2 * V}, tmp_path / "v.safetensors", metadata={"actgraph": json.dumps(manifest)})
    vector = load_vector(tmp_path / "v.safetensors")
    assert (vector.model, vector.method, vector.position, vector.notes) == ("m", "pca", "last", {"a": "b", "n": "3"})
    assert np.array_equal(vector.directions["embed"], V) and np.array_equal(vector.directions[""], 2 * V)
    assert (vector.scale, vector.where, vector.recommended_scale, vector.bases) == ("raw", "all", None, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": "loud"}, "scale is not 'loud'"),
        ({"scale": 3}, "is no text"),
        ({"recommended_scale": "big"}, "no number"),
        ({"recommended_scale": float("nan")}, "no finite number"),
        ({"notes": ["a"]}, "notes"),
        ({"sites": {"embed": 1}}, "sites"),
        ({"sites": {"embed": "vector", "other": "vector"}}, "one site twice"),
        ({"format": "actgraph.steering_vector/3"}, "newer actgraph"),
    ],
)
def test_a_manifest_with_wrong_values(change: dict[str, object], message: str, tmp_path: Path) -> None:
    manifest = {"format": "actgraph.steering_vector/2", **change}
    save_file({"embed": V, "other": V}, tmp_path / "v.safetensors", metadata={"actgraph": json.dumps(manifest)})
    with pytest.raises(InputError, match=message) as error:
        load_vector(tmp_path / "v.safetensors")
    assert "v.safetensors" in error.value.message and error.value.hint


def test_what_cannot_be_a_vector(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\[2, 4\], not \[width\]"):
        SteeringVector({"embed": np.ones((2, 4), np.float32)})
    with pytest.raises(InputError, match=r"\[4\], not \[k, width\]"):
        SteeringVector({}, bases={"embed": V})
    with pytest.raises(InputError, match="embed holds NaN"):
        SteeringVector({"embed": np.full(4, np.inf, np.float32)}).save(tmp_path / "v.safetensors")
    assert not list(tmp_path.iterdir())
    save_file({"model.embed": np.ones((3, 4), np.float32), "model.norm": V}, tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match="holds no steering vector"):
        load_vector(tmp_path / "weights.safetensors", bases=True)


# --- bases --------------------------------------------------------------------------------------------------------------

PLANE = np.array([[1, 0, 0, 0], [0, 1, 0, 0]], np.float32)


def test_a_basis_is_no_direction(tmp_path: Path) -> None:
    path = SteeringVector({}, bases={"embed": PLANE}).save(tmp_path / "v.safetensors")
    with pytest.raises(InputError, match="basis of 2 directions for embed, and one direction is needed") as error:
        load_vector(path)
    assert "v.safetensors" in error.value.message and error.value.hint
    vector = load_vector(path, bases=True)
    assert vector.sites == ("embed",)
    with pytest.raises(InputError, match="one direction is needed"):
        vector.for_site(("embed",))
    with pytest.raises(InputError, match="one direction is needed"):
        vector.for_site(("blocks.0.resid_post",))
    assert np.array_equal(vector.basis_for_site(("nothing", "embed")), PLANE)
    save_file({"plane": PLANE}, tmp_path / "bare.safetensors")
    assert np.array_equal(load_vector(tmp_path / "bare.safetensors", bases=True).basis_for_site(("anything",)), PLANE)


def test_directions_and_bases_beside_each_other() -> None:
    vector = SteeringVector({"a": V, "b": 2 * V}, bases={"a": PLANE})
    assert np.array_equal(vector.for_site(("a",)), V) and np.array_equal(vector.basis_for_site(("a",)), PLANE)
    assert np.array_equal(vector.basis_for_site(("b",)), 2 * V[None])  # a direction is a basis of one
    with pytest.raises(InputError, match="no basis for c"):
        vector.basis_for_site(("c",))
    assert "a basis [2, 4]" in repr(vector)
    assert vector.select(["b"]).sites == ("b",) and not vector.select(["b"]).bases
    with pytest.raises(InputError, match="not for c"):
        vector.select(["a", "c"])


# --- algebra ------------------------------------------------------------------------------------------------------------


def test_sums_and_multiples() -> None:
    one, other = SteeringVector({"a": V, "b": 2 * V}, "m", "pca"), SteeringVector({"b": V, "a": V**2}, method="caa")
    result = 0.8 * one - other / 2 + -one * np.float32(0.5)
    assert list(result.directions) == ["a", "b"] and result.directions["a"].dtype == np.float32
    np.testing.assert_allclose(result.directions["a"], 0.3 * V - V**2 / 2, rtol=1e-6)
    np.testing.assert_allclose(result.directions["b"], 0.3 * 2 * V - V / 2, rtol=1e-6)
    assert (result.model, result.method) == ("m", "pca + caa + pca")
    scaled = np.float64(2) * one
    assert isinstance(scaled, SteeringVector) and np.array_equal(scaled.directions["b"], 4 * V)
    assert np.array_equal(one.directions["a"], V)  # the parts stay as they are


def test_the_meaning_of_a_scale_follows() -> None:
    unit = SteeringVector({"": V}, recommended_scale=3.0).normalized()
    assert unit.scale == "unit" and abs(np.linalg.norm(unit.directions[""]) - 1) < 1e-6 and unit.recommended_scale is None
    assert (-unit).scale == "unit" and (2 * unit).scale == (unit + unit).scale == "raw"
    relative = SteeringVector({"": V}, scale="relative", where="prompt")
    assert (2 * relative + relative).scale == "relative" and (2 * relative).where == "prompt"
    with pytest.raises(InputError, match="different units: relative and unit"):
        relative + replace(unit, where="prompt")
    with pytest.raises(InputError, match="different tokens: prompt and all"):
        relative - unit


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_directions_of_any_size_are_normalized(size: float) -> None:
    unit = SteeringVector({"": V * np.float32(size)}).normalized().directions[""]
    np.testing.assert_allclose(unit, V / np.linalg.norm(V), rtol=1e-6)


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (lambda v: v + SteeringVector({"a": V, "c": V}), "only one of them is for b, c"),
        (lambda v: v - SteeringVector({"a": V, "b": V[:3]}), "4 and 3 numbers for b"),
        (lambda v: v + replace(v, model="f32[8,4]:01"), "different models: f32.8,4.:00 and f32.8,4.:01"),
        (lambda v: v + replace(v, tokenizer="tokenizer.json[9]:1"), "different tokenizers"),
        (lambda v: v * float("nan"), "multiplied by nan"),
        (lambda v: v / 0, "divided by 0"),
        (lambda v: v * 1e300, "beyond the range"),
        (lambda v: replace(v, directions={"a": V, "b": 0 * V}).normalized(), "direction of b is zero"),
        (lambda v: 2 * replace(v, bases={"a": PLANE}), "bases"),
    ],
)
def test_what_cannot_be_combined(compute: Callable[[SteeringVector], object], message: str) -> None:
    vector = SteeringVector({"a": V, "b": V}, "f32[8,4]:00", tokenizer="tokenizer.json[8]:1")
    with pytest.raises(InputError, match=message) as error:
        compute(vector)
    assert error.value.hint


@pytest.mark.parametrize("other", ["x", None, True, [1.0], np.ones(4)])
def test_numbers_and_vectors_only(other: object) -> None:
    vector = SteeringVector({"": V})
    for compute in (lambda: vector * other, lambda: vector / other, lambda: vector + other, lambda: other - vector):  # type: ignore[operator]
        with pytest.raises(TypeError):
            compute()


# --- does it fit? -------------------------------------------------------------------------------------------------------


def test_a_vector_that_fits_is_accepted() -> None:
    for name, width in (("stories260k", 64), ("llama", zoo.WIDTH)):
        graph = zoo.captured(name)
        direction = np.ones(width, np.float32)
        made = SteeringVector.extracted(graph, {"blocks.0.resid_post": direction}, method="caa", where="generated")
        known = name == "stories260k"  # the random model has no tokenizer
        assert (made.where, made.model_type, bool(made.tokenizer)) == ("generated", "llama", known)
        assert made.model == model_fingerprint(graph) != ""
        for dialect in (graph,) if known else (graph, to_onnx(graph)):
            check_vector(made, dialect, "blocks.0.resid_post")
            check_vector(made, dialect, dialect.site("blocks.1.resid_pre"))
            check_vector(SteeringVector({"": direction}), dialect, "blocks.0.mlp.out")
            check_vector(SteeringVector({}, bases={"embed": np.ones((3, width), np.float32)}), dialect, "embed")
            assert vector_messages(made, dialect) == []


def test_a_vector_that_does_not_fit_is_refused() -> None:
    graph = zoo.captured("stories260k")
    site = graph.site("blocks.2.resid_post")
    fits = SteeringVector.extracted(graph, {site.name: np.ones(64, np.float32)})
    other = zoo.captured("llama")
    for vector, subject, message in (
        (replace(fits, directions={site.name: np.ones(63, np.float32)}), graph, r"63 numbers but blocks\.2\.resid_post is f32"),
        (fits, other, f"{re.escape(fits.model)} is not {re.escape(model_fingerprint(other))}"),
        (replace(fits, tokenizer="tokenizer.json[513]:00"), graph, f"513.*:00 is not {re.escape(fits.tokenizer)}"),
        (replace(fits, directions={}, bases={site.name: np.ones((2, 32), np.float32)}), graph, "32 numbers"),
        (replace(fits, bases={site.name: np.ones((2, 32), np.float32)}), graph, "32 numbers"),
    ):
        with pytest.raises(InputError, match=message) as error:
            check_vector(vector, subject, site if subject is graph else "blocks.1.resid_post", called="v.safetensors")
        assert "v.safetensors" in error.value.message and error.value.hint
    check_vector(fits, graph, "blocks.1.resid_post")  # a single direction serves any site of its width
    two = replace(fits, directions={site.name: np.ones(64, np.float32), "embed": np.ones(64, np.float32)})
    with pytest.raises(InputError, match=r"nothing for blocks\.1\.resid_post"):
        check_vector(two, graph, "blocks.1.resid_post")
    with pytest.raises(InputError, match="63 numbers"):  # the wrong axis
        check_vector(replace(fits, directions={"": np.ones(63, np.float32)}), graph, site, axis=7)


def test_sites_get_the_names_of_the_graph() -> None:
    graph = zoo.captured("llama")
    ones, plane = np.ones(zoo.WIDTH, np.float32), np.eye(2, zoo.WIDTH, dtype=np.float32)
    foreign = SteeringVector(
        {"blocks.0.hook_resid_post": ones, "layer=1,component=mlp_output": 2 * ones, "blocks.1.resid_pre": 3 * ones, "": ones},
        "m",
        bases={"model.layers[1].output": plane},
    )
    named = name_sites(foreign, graph)
    with pytest.raises(InputError, match="names one site of"):
        name_sites(replace(foreign, directions={"embed": ones, "blocks.0.resid_pre": ones, "hook_embed": ones}), graph)
    assert (
        list(named.directions) == ["blocks.0.resid_post", "blocks.1.mlp.out", "blocks.1.resid_pre", ""] and named.model == "m"
    )
    assert list(named.bases) == ["blocks.1.resid_post"] and np.array_equal(named.directions["blocks.1.mlp.out"], 2 * ones)
    check_vector(foreign, graph, "layer=1,component=mlp_output")
    with pytest.raises(SiteError, match=r"blocks\.7"):
        name_sites(SteeringVector({"blocks.7.hook_resid_post": ones}), graph)


def test_the_tokenizer_is_told_by_what_its_ids_mean() -> None:
    graph = zoo.captured("stories260k")
    known = tokenizer_fingerprint(graph)
    assert known.startswith("tokenizer.json[512]:")
    files = dict(graph.companions.tokenizer_files)
    data = json.loads(files["tokenizer.json"])

    def of(**change: object) -> str:
        graph.companions.tokenizer_files = {**files, "tokenizer.json": json.dumps({**data, **change}, indent=3).encode()}
        return tokenizer_fingerprint(graph)

    assert of() == known == of(padding={"strategy": "BatchLongest"}, truncation=None, post_processor=None)
    model = data["model"]
    assert of(model={**model, "merges": [" ".join(merge) for merge in model["merges"]]}) == known  # an older spelling
    swapped = {**model["vocab"], "a": model["vocab"]["b"], "b": model["vocab"]["a"]}
    for change in ({"model": {**model, "vocab": swapped}}, {"model": {**model, "merges": model["merges"][:-1]}}):
        assert surely_differ(of(**change), known)
    assert surely_differ(of(added_tokens=[*data["added_tokens"], {"id": 512, "content": "<new>"}]), known)
    assert tokenizer_fingerprint(graph).startswith("tokenizer.json[513]:")
    graph.companions.tokenizer_files = {"vocab.txt": b"a\nb\n"}
    graph.companions.tokenizer = None
    assert tokenizer_fingerprint(graph).startswith("vocab.txt:") and not surely_differ(tokenizer_fingerprint(graph), known)
    graph.companions.tokenizer_files = {}
    assert tokenizer_fingerprint(graph) == "" and not surely_differ("", known)


def test_files_of_other_methods_are_no_vectors(tmp_path: Path) -> None:
    from actgraph.formats.artifacts import Artifact

    momenta = {"blocks.0.attn.head_out": np.ones(64, np.float32)}
    other = Artifact("activation_momentum", momenta).save(tmp_path / "momenta.safetensors")
    with pytest.raises(InputError, match="holds activation momentum, no steering vector"):
        load_vector(other)
