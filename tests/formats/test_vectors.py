"""Steering vector files: what is written is read, and a damaged file is one clear line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from actgraph.errors import InputError
from actgraph.formats.vectors import SteeringVector, load_vector

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
