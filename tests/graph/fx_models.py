"""The small torch model of the tests of the FX dialect."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from actgraph.formats.trace import trace
from actgraph.graph.fx import FxGraph
from actgraph.graph.graph import Node


class Small(nn.Module):
    """Tied weights, an absent bias, several results of one op, and sizes that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor([2.0]), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.mix(self.embed(ids)) * self.scale
        left, right = x.chunk(2, dim=-1)
        values, _ = torch.cat([right, left], -1).topk(4, dim=-1)
        flat = values.reshape(ids.shape[0] * ids.shape[1], 4)
        return self.head(x) + flat.sum(-1).reshape(ids.shape)[..., None]


def traced() -> FxGraph:
    torch.manual_seed(0)
    return trace(Small(), (torch.ones(2, 3, dtype=torch.int64),), dynamic={"ids": ("batch", "seq")}, name="small")


def node(graph: FxGraph, op: str) -> Node:
    return next(n for n in graph.nodes() if n.op == op)


def run(graph: FxGraph, seed: int = 0) -> Any:
    ids = np.random.default_rng(seed).integers(0, 11, (3, 5))
    return graph.run({"ids": ids})["output"]
