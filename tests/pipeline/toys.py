"""Small passes and models for tests of the machinery, not of the passes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

import actgraph as ag
from actgraph.calibrate import Request
from actgraph.graph import Graph
from actgraph.pipeline import ROUNDING, UNBOUNDED, Declined, Pass, PassContext, PassResult, register
from actgraph.pipeline.registry import unregister

Array = np.ndarray[Any, Any]


class Net(torch.nn.Module):
    """Two linears and a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.Linear(4, 6)
        self.down = torch.nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


@functools.cache
def _net() -> Graph:
    return ag.trace(Net().eval(), (torch.randn(2, 4),), dynamic={"x": ("batch", None)}, name="net")


def net() -> Graph:
    return _net().clone()


X = {"x": np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)}


class Scale(Pass):
    """Multiply a site by a factor; declares a change, and by how much."""

    name: ClassVar[str] = "toy_scale"
    family: ClassVar[str] = "toy"
    repeatable: ClassVar[bool] = True

    factor: float = Field(default=1.0, description="Factor.")
    site: str = Field(default="linear.0", description="Where.")
    claim: Literal["honest", "exact", "small", "vague"] = Field(default="honest", description="What it says of the change.")

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        with context.edit(graph) as editor:
            site = graph.site(self.site)
            value = editor.site_value(site)
            node = editor.insert("mul", [value, np.float32(self.factor)], after=value.producer)
            editor.redirect(value, node.output, site.uses(graph))
        said = "exact" if self.claim == "exact" else "the site is scaled"
        sizes = {"honest": UNBOUNDED, "small": 0.01}
        result = PassResult(expected_change=said, expected_size=sizes.get(self.claim, ROUNDING))
        result.counts["scaled"] += 1
        result.details.append({"site": self.site, "factor": self.factor})
        return result


class Nothing(Pass):
    """Finds nothing."""

    name: ClassVar[str] = "toy_nothing"
    family: ClassVar[str] = "toy"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        return PassResult(declined=[Declined("linear.0", "it is too small")])


class Tidy(Pass):
    """Cleanup that may do nothing and keeps every value."""

    name: ClassVar[str] = "toy_tidy"
    family: ClassVar[str] = "toy"
    may_do_nothing: ClassVar[bool] = True
    preserves: ClassVar[frozenset[str]] = frozenset({"values"})

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        return PassResult()


class Measure(Pass):
    """Asks for statistics and keeps what it was given."""

    name: ClassVar[str] = "toy_measure"
    family: ClassVar[str] = "toy"
    repeatable: ClassVar[bool] = True
    preserves: ClassVar[frozenset[str]] = frozenset({"values"})
    seen: ClassVar[list[float]] = []

    site: str = Field(default="linear.0", description="Where.")
    kind: str = Field(default="absmax", description="What.")

    def requests(self, graph: Graph) -> Sequence[Request]:
        return [Request(graph.site(self.site).name, self.kind)]

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        assert context.statistics is not None
        found = float(context.statistics[Request(graph.site(self.site).name, self.kind)])
        type(self).seen.append(found)
        result = PassResult()
        result.counts["measured"] += 1
        result.details.append({"site": self.site, self.kind: found})
        return result


class Crash(Pass):
    """Breaks halfway through an edit."""

    name: ClassVar[str] = "toy_crash"
    family: ClassVar[str] = "toy"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        with context.edit(graph) as editor:
            editor.add_parameter("half_done", np.zeros(3, np.float32))
            raise ZeroDivisionError("division by zero\nin the second line")


class Anonymous(Pass):
    """Edits behind the context's back, so its nodes do not say where they come from."""

    name: ClassVar[str] = "toy_anonymous"
    family: ClassVar[str] = "toy"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        with graph.edit() as editor:
            site = graph.site("linear.0")
            editor.insert_at(site, "actgraph.gate", [None], {"threshold": 0.0})
        return PassResult(counts={"inserted": 1})  # type: ignore[arg-type]


class Options(Pass):
    """Every kind of option."""

    name: ClassVar[str] = "toy_options"
    family: ClassVar[str] = "toy"

    text: str = Field(default="", description="Text.")
    number: float = Field(default=0.0, description="A number.")
    count: int = Field(default=1, ge=1, le=9, description="A count.")
    flag: bool = Field(default=False, description="A flag.")
    choice: Literal["one", "two"] = Field(default="one", description="A choice.")
    maybe: float | None = Field(default=None, description="A number or nothing.")
    either: str | tuple[str, ...] = Field(default=(), description="Text or texts.")
    numbers: tuple[float, ...] = Field(default=(), description="Numbers.")
    grid: tuple[tuple[int, ...], ...] = Field(default=(), description="Lists of integers.")
    path: Path | None = Field(default=None, description="A file.")
    source: str = Field(default="", description="A file or a name.", json_schema_extra={"path": True})

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        return PassResult()


class FxOnly(Tidy):
    """Takes one dialect."""

    name: ClassVar[str] = "toy_onnx_only"
    dialects: ClassVar[frozenset[str]] = frozenset({"onnx"})


ALL: tuple[type[Pass], ...] = (Scale, Nothing, Tidy, Measure, Crash, Anonymous, Options, FxOnly)


@contextmanager
def registered() -> Iterator[None]:
    """The toy passes are known by name inside."""
    for cls in ALL:
        register(cls)
    Measure.seen.clear()
    try:
        yield
    finally:
        for cls in ALL:
            unregister(cls.name)
