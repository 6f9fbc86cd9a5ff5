"""What the tests of passes share: one readable tiny model, the real model, and direct references."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.graph import Graph
from actgraph.graph.graph import Array
from tests import zoo


class TinyBlock(torch.nn.Module):
    """Embedding, one pre-norm gated feed-forward with a residual add, a final norm and a head: small enough to read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(16, 8)
        self.norm = torch.nn.LayerNorm(8)
        self.gate = torch.nn.Linear(8, 12, bias=False)
        self.up = torch.nn.Linear(8, 12, bias=False)
        self.down = torch.nn.Linear(12, 8, bias=False)
        self.final = torch.nn.LayerNorm(8)
        self.head = torch.nn.Linear(8, 16)
        for weight in self.parameters():
            weight.data *= 2.0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        h = self.norm(x)
        x = x + self.down(torch.nn.functional.silu(self.gate(h)) * self.up(h))
        return self.head(self.final(x))


@functools.cache
def _tiny(dialect: str) -> Graph:
    graph = ag.trace(TinyBlock().eval(), (torch.arange(6).reshape(2, 3),), dynamic={"ids": ("batch", "seq")}, name="tiny")
    return graph if dialect == "fx" else _as_onnx(graph)


@functools.cache
def _stories(dialect: str) -> Graph:
    return in_dialect("stories260k", dialect)


def in_dialect(name: str, dialect: str) -> Graph:
    """A model of the zoo as traced from torch, or as ONNX."""
    return zoo.captured(name) if dialect == "fx" else zoo.exported(name)


def as_dialect(graph: Graph, dialect: str) -> Graph:
    """A traced graph, or the ONNX one that it exports to."""
    return graph if dialect == "fx" else _as_onnx(graph)


def _as_onnx(graph: Graph) -> Graph:
    from actgraph.formats.onnx_export import to_onnx

    return to_onnx(graph)


@pytest.fixture(params=["fx", "onnx"])
def dialect(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tiny(dialect: str) -> Graph:
    return _tiny(dialect).clone()


@pytest.fixture
def stories(dialect: str) -> Graph:
    return _stories(dialect).clone()


@pytest.fixture
def both_stories() -> dict[str, Graph]:
    return {name: _stories(name).clone() for name in ("fx", "onnx")}


TINY_IDS = np.array([[1, 2, 3, 4], [9, 8, 15, 0]], np.int64)


def tiny_inputs() -> dict[str, Array]:
    return {"ids": TINY_IDS}


def token_inputs(batch: int = 2, length: int = 12, seed: int = 3) -> dict[str, Array]:
    """Token ids with BOS, no padding."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 500, (batch, length)).astype(np.int64)
    ids[:, 0] = 1
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.broadcast_to(np.arange(length, dtype=np.int64), ids.shape).copy(),
    }


def corpus_batches(graph: Graph, batch_size: int = 8) -> Iterator[dict[str, Array]]:
    """Padded batches of the packaged sample text."""
    from actgraph.calibrate.batches import batches
    from actgraph.calibrate.corpora import Corpus
    from actgraph.calibrate.encode import Signature, samples

    for batch in batches(Signature.of(graph), samples(graph, Corpus.of()), batch_size=batch_size):
        yield dict(batch.inputs)


def run(graph: Graph, inputs: dict[str, Array] | None = None) -> Array:
    """The first output of the graph."""
    given = inputs if inputs is not None else (tiny_inputs() if graph.inputs()[0].name == "ids" else token_inputs())
    return next(iter(graph.run(given).values()))


def relative(a: Array, b: Array) -> float:
    """Largest absolute difference over the largest absolute value of ``a``."""
    return float(np.abs(a - b).max() / np.abs(a).max())


def apply(graph: Graph, pipeline: str, **options: Any) -> Graph:
    """The graph after a pipeline (the given graph is left alone)."""
    return ag.run(graph, pipeline, **options).graph


def hf_stories() -> Any:
    """The real model in transformers, as reference."""
    return zoo.model("stories260k")


def hooked_logits(module: str, edit: Callable[[torch.Tensor], torch.Tensor], inputs: dict[str, Array] | None = None) -> Array:
    """Logits of the transformers model with ``edit`` applied to the output of ``module`` by a forward hook."""
    model = hf_stories()
    target = model.get_submodule(module)

    def hook(_: Any, __: Any, output: Any) -> Any:
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    handle = target.register_forward_hook(hook)
    try:
        with torch.no_grad():
            tensors = {k: torch.from_numpy(v) for k, v in (inputs or token_inputs()).items()}
            return model(**tensors, use_cache=False).logits.numpy()
    finally:
        handle.remove()
