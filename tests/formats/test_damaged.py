"""Damaged files of every format are refused in one clear line, or still hold a model: nothing else comes out."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import actgraph as ag
from actgraph.errors import ActgraphError, InputError
from actgraph.formats.onnx_file import load_onnx
from actgraph.formats.vectors import load_vector
from tests.formats.test_onnx_file import MNIST, edited
from tests.graph import onnx_models as models


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = torch.nn.Embedding(30, 40), torch.nn.Linear(40, 40)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(self.embed(ids)))


IDS = torch.zeros(2, 3, dtype=torch.int64)


def _foreign(path: Path) -> Path:
    torch.export.save(torch.export.export(Tiny().eval(), (IDS,)), path)
    return path


def _ours(path: Path) -> Path:
    return ag.trace(Tiny().eval(), (IDS,), dynamic={"ids": ("batch", "seq")}).save(path)


CASES: dict[str, tuple[Callable[[Path], Path], str, Callable[[Any], Any]]] = {
    "pt2": (_ours, "m.pt2", ag.load),
    "pt2 of torch": (_foreign, "m.pt2", ag.load),
    "onnx": (_ours, "m.onnx", ag.load),
    "vector": (lambda p: ag.SteeringVector({"embed": np.ones(40, np.float32)}).save(p), "v.safetensors", load_vector),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_line(case: str, tmp_path: Path) -> None:
    write, name, load = CASES[case]
    data = write(tmp_path / name).read_bytes()
    rng = random.Random(0)
    damaged = [data[: len(data) * part // 6] for part in range(6)]
    for _ in range(6):
        place = rng.randrange(len(data))
        damaged += [data[:place] + rng.randbytes(16) + data[place + 16 :], data[:place] + data[place + 50 :]]
    refused = 0
    for number, content in enumerate(damaged):
        path = tmp_path / f"bad{number}{Path(name).suffix}"
        path.write_bytes(content)
        try:
            load(path)
        except ActgraphError as error:  # any other error fails the test
            refused += 1
            assert error.exit_code == 2 and path.name in str(error)
            assert "\n" not in str(error) and len(str(error)) < 500
    assert refused >= 6, "all that are cut short, at least"


# --- .onnx more closely -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"not a model", bytes(range(256)) * 4])
def test_onnx_files_that_are_no_models(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        ag.load(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_truncated_onnx_files(tmp_path: Path) -> None:
    whole = MNIST.read_bytes()
    for length in (10, 500, len(whole) // 2, len(whole) - 1):
        (tmp_path / "m.onnx").write_bytes(whole[:length])
        with pytest.raises(InputError):
            ag.load(tmp_path / "m.onnx")


def test_damaged_onnx_files_are_refused_in_one_line_or_loaded(tmp_path: Path) -> None:
    """Bytes changed, lost or added anywhere: an error of ours, never another one, and most damage is noticed."""
    rng, refused, path = random.Random(0), 0, tmp_path / "damaged.onnx"
    sources = [edited(make).save(tmp_path / "m.onnx").read_bytes() for make in (models.mlp, models.branches)]
    for number in range(240):
        data = bytearray(sources[number % 2])
        for _ in range(rng.randint(1, 5)):
            place = rng.randrange(len(data))
            match rng.randrange(3):
                case 0:
                    data[place] = rng.randrange(256)
                case 1:
                    del data[place : place + rng.randint(1, 20)]
                case _:
                    data[place:place] = rng.randbytes(rng.randint(1, 9))
        path.write_bytes(data)
        try:
            graph = load_onnx(path)
            graph.text(sites=False)
            list(graph.structural_problems())
            graph.clone().text(sites=False)
        except ActgraphError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 120


def test_corrupt_onnx_weights(tmp_path: Path) -> None:
    proto = onnx.load(MNIST)
    proto.graph.initializer[0].ClearField("float_data")
    proto.graph.initializer[0].raw_data = bytes(12)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match="does not fit its shape"):
        ag.load(tmp_path / "m.onnx")
