"""Steering fields: a direction with a spatial pattern, as strong as a fraction of the activation.

Source: Physics Steering: Causal Control of Cross-Domain Concepts in a Physics Foundation Model (2025). ``h' = h + alpha D
|h| / |D|`` with norms over channels and space, one factor for each sample (and time step). ``D`` is the difference of means
of two regimes, each file standardised by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from actgraph.errors import InputError, PassError
from actgraph.formats.artifacts import Artifact, load_artifact
from actgraph.formats.vectors import model_fingerprint
from actgraph.graph import Graph, Node, Site, Value
from actgraph.graph.executor import executor_for
from actgraph.passes.places import Selector
from actgraph.passes.steer.edit import Edit, EditPass
from actgraph.pipeline.base import PassContext, PassResult

Array = np.ndarray[Any, Any]
KIND = "physics_delta"
_MADE_BY = "make one with actgraph.passes.steer.physics.delta"
Adaptation = Literal["drop", "pad", "interpolate", "none"]


@dataclass(frozen=True)
class Delta:
    """The pattern at one site: ``[channels, *space]`` float64, its channels first, whatever the layout of the site."""

    site: str
    pattern: Array
    model: str = ""

    def save(self, path: str | Path) -> Path:
        """Write what the pass ``physics_steer`` reads."""
        return Artifact(KIND, {"pattern": self.pattern.astype(np.float32)}, {"site": self.site}, self.model).save(path)


def delta(
    graph: Graph, feature: Sequence[Mapping[str, Array]], control: Sequence[Mapping[str, Array]], *, site: str, axis: int = 1
) -> Delta:
    """The difference between two regimes at a site.

    feature, control: inputs of the graph, a dict of arrays for each simulation (with leading axes such as batch and time).
    axis: the site's channel axis; those before it are averaged over, those behind it are space.
    Each simulation's activation is standardised over channels and space (unbiased deviation) for each leading index, then
    averaged. Raises InputError where the two cannot be told apart, or have activations of different shapes.
    """
    for regime in (feature, control):
        if isinstance(regime, Mapping):
            raise InputError("a regime is one dict of arrays", "give a list: a dict for each simulation")
    if not feature or not control:
        raise InputError("a regime has no simulations", "give inputs of both")
    value = graph.site(site).value
    runner = executor_for(graph).open(graph, [value])
    means = []
    for regime in (feature, control):
        patterns = [_standardised(np.asarray(runner(dict(inputs))[value.name], np.float64), axis) for inputs in regime]
        if len({pattern.shape for pattern in patterns}) != 1:
            raise InputError(f"simulations have different shapes at {site}", "give inputs of one size")
        means.append(np.mean(patterns, axis=0))
    if means[0].shape != means[1].shape:
        raise InputError(f"the regimes have the shapes {means[0].shape} and {means[1].shape} at {site}", "give one size")
    pattern = means[0] - means[1]
    if not pattern.any():
        raise InputError(f"the two regimes are the same at {site}", "give regimes that differ")
    return Delta(graph.site(site).name, pattern, model_fingerprint(graph))


def _standardised(h: Array, axis: int) -> Array:
    """The mean over leading axes of ``h`` standardised over channels and space."""
    axis %= h.ndim
    axes = tuple(range(axis, h.ndim))
    deviation = h.std(axes, ddof=1, keepdims=True)
    standard = (h - h.mean(axes, keepdims=True)) / np.where(deviation == 0, 1.0, deviation)
    return np.asarray(standard.reshape(-1, *h.shape[axis:]).mean(0))


def adapted(pattern: Array, shape: Sequence[int], how: Adaptation) -> Array:
    """``pattern [channels, *space]`` for activations of ``shape`` (``[channels, *space]``): larger axes are cut about their
    middle; then, where sizes still differ, ``drop`` averages over space, ``pad`` adds zeros at the high end, ``interpolate``
    is linear in each axis (corners not aligned), and ``none`` broadcasts axes of size 1. Raises InputError where it cannot.
    """
    pattern = np.asarray(pattern, np.float64)
    if pattern.ndim != len(shape) or pattern.shape[0] != shape[0]:
        raise InputError(
            f"the pattern is {list(pattern.shape)} and activations are {list(shape)}", "use a pattern of this site"
        )
    for place, size in enumerate(shape[1:], 1):
        spare = pattern.shape[place] - size
        if spare > 0:
            pattern = np.take(pattern, np.arange(spare // 2, spare // 2 + size), axis=place)
    if pattern.shape == tuple(shape):
        return pattern
    if how == "none":
        if any(have not in (1, size) for size, have in zip(shape, pattern.shape, strict=True)):
            raise InputError(
                f"the pattern is {list(pattern.shape)} and is not broadcast to {list(shape)}", "use drop, pad or interpolate"
            )
        return np.broadcast_to(pattern, tuple(shape)).copy()
    if how == "drop":
        return np.broadcast_to(pattern.mean(tuple(range(1, pattern.ndim)), keepdims=True), tuple(shape)).copy()
    if how == "pad":
        return np.pad(pattern, [(0, size - have) for size, have in zip(shape, pattern.shape, strict=True)])
    for place, size in enumerate(shape[1:], 1):
        pattern = _interpolated(pattern, place, size)
    return pattern


def _interpolated(pattern: Array, axis: int, size: int) -> Array:
    have = pattern.shape[axis]
    where = np.clip((np.arange(size) + 0.5) * have / size - 0.5, 0, have - 1)
    low = np.floor(where).astype(int)
    high = np.minimum(low + 1, have - 1)
    part = (where - low).reshape([-1 if a == axis else 1 for a in range(pattern.ndim)])
    return np.asarray(np.take(pattern, low, axis) * (1 - part) + np.take(pattern, high, axis) * part)


class PhysicsSteer(EditPass):
    """Add a spatial pattern, as strong as ``alpha`` times the activation: ``h' = h + alpha D |h| / |D|``, norms over
    channels and space.

    The pattern is adapted to the traced sizes: cut about its middle where it is larger, then ``drop`` (its mean over space),
    ``pad`` (zeros at the high end), ``interpolate`` (linear) or ``none`` (broadcasting). Where axes of space are dynamic,
    ``drop`` applies, and ``none`` and ``interpolate`` to a pattern of size 1 along them. ``alpha`` below 0 steers the other
    way; 0 is the identity.
    """

    name: ClassVar[str] = "physics_steer"
    off: ClassVar[Mapping[str, Any]] = {"alpha": 0.0}

    delta: str = Field(description=f"The file with the pattern: {_MADE_BY}.", json_schema_extra={"path": True})
    site: Selector = Field(default=(), description="Where; default: the site of the pattern.")
    alpha: float = Field(default=0.3, allow_inf_nan=False, description="Strength as a fraction of the activation's norm.")
    adapt: Adaptation = Field(default="drop", description="What happens where sizes of space differ.")
    axis: int = Field(default=1, description="The channel axis of the site; axes before it are samples, those behind it space.")

    def targets(self, graph: Graph) -> Selector:
        return str(load_artifact(self.delta, KIND, _MADE_BY).notes.get("site", ""))

    def hook(self, graph: Graph, site: Site, inputs: Mapping[str, Array]) -> Callable[[Array], Array] | None:
        pattern, shape = load_artifact(self.delta, KIND, _MADE_BY).array("pattern").astype(np.float64), site.type.shape or ()
        place = self.axis % len(shape)
        space = shape[place + 1 :]
        if not all(isinstance(size, int) for size in space) and (self.adapt == "drop" or pattern[0].size == 1):
            pattern = pattern.mean(tuple(range(1, pattern.ndim))).reshape(-1, *[1] * len(space))

        def edited(rows: Array) -> Array:  # channels last: [samples ..., space ..., channels]
            direction = np.moveaxis(adapted(pattern, (rows.shape[-1], *rows.shape[place:-1]), self.adapt), 0, -1)
            sizes = np.sqrt(np.square(rows).sum(tuple(range(place, rows.ndim)), keepdims=True))
            return np.asarray(rows + self.alpha * sizes * direction / np.linalg.norm(direction.ravel()))

        return self.at_tokens(edited, inputs)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        file = load_artifact(self.delta, KIND, _MADE_BY)
        self.check_model(file.model, graph, self.delta)
        return self.run_at(graph, context, pattern=file.array("pattern"))

    def apply(self, edit: Edit, site: Site, width: int) -> str:
        assert site.type.dtype is not None and site.type.shape is not None
        pattern: Array = edit.shared["pattern"]
        shape, place = site.type.shape, self.axis % len(site.type.shape)
        if pattern.shape[0] != width:
            raise PassError(f"physics_steer: the pattern has {pattern.shape[0]} channels, and {site.name} is {site.type}")
        if self.alpha == 0:
            return "identity"
        space = shape[place + 1 :]
        open_axes = [axis for axis, size in enumerate(space, 1) if not isinstance(size, int)]
        if open_axes and (self.adapt == "drop" or pattern[0].size == 1):
            pattern = pattern.mean(tuple(range(1, pattern.ndim))).reshape(width, *[1] * len(space))
        one = pattern.ndim == 1 + len(space) and all(pattern.shape[axis] == 1 for axis in open_axes)
        if open_axes and (self.adapt == "pad" or not one):
            why = f"the sizes of space are not fixed ({site.type}), and adapt={self.adapt} needs them"
            return edit.declined(site, f"{why}: say adapt=drop")
        try:
            pattern = adapted(pattern, (width, *(size if isinstance(size, int) else 1 for size in space)), self.adapt)
        except InputError as error:
            raise PassError(f"physics_steer: at {site.name} {error.message}", error.hint) from error
        axes = tuple(range(place - len(shape), 0))
        attributes = {"axis": place - len(shape), "norm": "relative", "norm_axes": axes, "scale": self.alpha}
        data = pattern.reshape(*[1] * place, *pattern.shape).astype(site.type.dtype.numpy)
        keep: list[Node] = []
        vector: Value | Array = data
        if open_axes:  # |D| is that of the pattern everywhere: it is spread over space in the graph
            keep.append(edit.editor.insert("clip", [edit.editor.site_value(site), 0.0, 0.0]))
            vector = edit.editor.insert("add", [keep[0].output, data]).output
        mask = edit.mask()
        operands = [vector, None, mask] if mask is not None else [vector]
        edit.editor.insert_at(site, "actgraph.shift", operands, attributes, keep=keep)
        edit.result.details.append({"site": site.name, "rule": "inserted", "alpha": self.alpha, "pattern": list(pattern.shape)})
        return "inserted"
