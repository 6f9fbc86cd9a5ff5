"""Small models with something to calibrate, in both dialects."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

import actgraph as ag
from actgraph.graph import Graph
from tests import zoo

Array = np.ndarray[Any, Any]


class Mlp(torch.nn.Module):
    """No sequence: rows alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.Linear(4, 6)
        self.down = torch.nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


class Convolutions(torch.nn.Module):
    """Images: channels on axis 1."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 5, 3)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(pixel_values)).mean((2, 3))


class Flattening(torch.nn.Module):
    """Joins rows and positions into one axis, as mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(20, 4)
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids) * attention_mask[..., None]
        return self.inner(x.reshape(-1, 4)).reshape(x.shape)


@functools.cache
def _mlp() -> Graph:
    return ag.trace(Mlp().eval(), (torch.randn(2, 4),), dynamic={"x": ("batch", None)}, name="mlp")


@functools.cache
def _convolutions() -> Graph:
    shape: tuple[str | None, ...] = ("batch", None, None, None)
    return ag.trace(Convolutions().eval(), (torch.randn(2, 3, 8, 8),), dynamic={"pixel_values": shape}, name="convolutions")


@functools.cache
def _flattening() -> Graph:
    ids, mask = torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64)
    names = ("batch", "seq")
    return ag.trace(Flattening().eval(), (ids, mask), dynamic={"input_ids": names, "attention_mask": names}, name="flattening")


def mlp() -> Graph:
    return _mlp().clone()


def convolutions() -> Graph:
    return _convolutions().clone()


def flattening() -> Graph:
    return _flattening().clone()


def stories(dialect: str = "fx") -> Graph:
    return zoo.captured("stories260k") if dialect == "fx" else zoo.exported("stories260k")


def padded(rows: list[list[int]], *, left: bool = False) -> dict[str, Array]:
    """A batch of token ids with its mask and positions; padding is a loud id."""
    length = max(map(len, rows))
    ids, mask = np.full((len(rows), length), 499), np.zeros((len(rows), length), np.int64)
    for index, row in enumerate(rows):
        where = slice(length - len(row), length) if left else slice(0, len(row))
        ids[index, where], mask[index, where] = row, 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)}


def words(count: int) -> Any:
    """A tokenizer of the words ``0`` to ``count - 1``, each its own id, without special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(count)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer
