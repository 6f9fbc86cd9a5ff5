"""Clipping activations to a range.

Source: FT-ClipAct (2019) and Ranger (2020) for clipping as protection against faults; the bounds may be given or come from
calibration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from actgraph.calibrate.statistics import Request
from actgraph.errors import OptionError
from actgraph.graph import Graph
from actgraph.graph.graph import Array
from actgraph.passes.places import SitePass
from actgraph.pipeline.base import UNBOUNDED, PassContext, PassResult

Bound = float | Array | None


class Clip(SitePass):
    """Bound each site to ``[min, max]``. NaN passes.

    ``percentile=99.9`` takes the bounds from calibration: the 0.1 and 99.9 percentiles of the signed activation, per tensor or
    per channel. ``policy=zero`` maps out-of-range values to 0, as FT-ClipAct does, instead of to the bound.
    """

    name: ClassVar[str] = "clip"
    family: ClassVar[str] = "clip"
    repeatable: ClassVar[bool] = True
    off: ClassVar[Mapping[str, Any]] = {"min": -math.inf, "max": math.inf, "percentile": None, "per": "tensor"}

    min: float | None = Field(default=None, description="Lower bound.")
    max: float | None = Field(default=None, description="Upper bound.")
    percentile: float | None = Field(default=None, gt=50.0, le=100.0, description="Bounds from calibration, in percent.")
    per: Literal["tensor", "channel"] = Field(default="tensor", description="One range for the site, or one for each channel.")
    axis: int = Field(default=-1, description="The channel axis (1 for NCHW images).")
    policy: Literal["saturate", "zero"] = Field(default="saturate", description="What becomes of values out of range.")

    @model_validator(mode="after")
    def _bounds(self) -> Clip:
        if (self.percentile is None) == (self.min is None and self.max is None):
            raise OptionError("clip takes either min and max, or percentile", "for example max=6, or percentile=99.9")
        if self.percentile is None and self.per == "channel":
            raise OptionError("clip per=channel takes its bounds from calibration", "give percentile")
        if any(bound is not None and math.isnan(bound) for bound in (self.min, self.max)):
            raise OptionError("clip: a bound is NaN", "give numbers; .inf and -.inf leave a side open")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise OptionError(f"clip: min={self.min:g} is above max={self.max:g}", "swap them")
        return self

    def requests(self, graph: Graph) -> Sequence[Request]:
        if self.percentile is None:
            return ()
        return [self._request(site.name) for site in self.select(graph)]

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        result = PassResult(expected_change="activations out of range are clipped", expected_size=UNBOUNDED)
        with context.edit(graph) as editor:
            for site in self.select(graph):
                low, high = self._range(context, site.name)
                attributes: dict[str, object] = {"policy": self.policy}
                operands: list[Array] = []
                if self.per == "channel":
                    dtype = site.type.dtype.numpy if site.type.dtype is not None else np.dtype(np.float32)
                    operands = [np.asarray(low, dtype), np.asarray(high, dtype)]
                    attributes["axis"] = self.axis
                else:
                    attributes |= {name: float(bound) for name, bound in (("min", low), ("max", high)) if bound is not None}
                editor.insert_at(site, "actgraph.clip", operands, attributes)
                result.counts["clipped"] += 1
                result.details.append({"site": site.name, "min": _shown(low), "max": _shown(high)})
        return result

    def _range(self, context: PassContext, name: str) -> tuple[Bound, Bound]:
        if self.percentile is None:
            return self.min, self.max
        assert context.statistics is not None
        share = self.percentile / 100.0
        low, high = context.statistics.sketch(self._request(name)).quantile(np.array([1.0 - share, share]))
        return low, high

    def _request(self, name: str) -> Request:
        return Request(name, "quantile", axis=self.axis if self.per == "channel" else None)


def _shown(bound: Bound) -> object:
    array = np.asarray(bound, np.float64) if bound is not None else None
    if array is None or array.ndim == 0:
        return None if array is None else float(array)
    return f"{array.min():.4g} .. {array.max():.4g} over {array.size} channels"
