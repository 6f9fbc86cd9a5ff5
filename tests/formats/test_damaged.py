"""Damaged files of every format are refused in one clear line, or still hold a model: nothing else comes out."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.errors import ActgraphError
from actgraph.formats.vectors import load_vector


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
