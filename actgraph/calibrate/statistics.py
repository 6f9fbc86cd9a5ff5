"""What a pass may ask of a site, and what it gets.

A ``Request`` names a site and a statistic. ``Statistics`` holds one accumulator per request; statistics of parts of a corpus
merge into those of the whole: counts, bins, minima and maxima exactly, float64 moments within 1e-9 for any split.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from actgraph.calibrate.accumulators import Accumulator, Count, Extreme, Gram, Histogram, Layout, Moment
from actgraph.calibrate.pooled import Rows
from actgraph.calibrate.sketch import QuantileSketch
from actgraph.errors import InputError, OptionError
from actgraph.graph.where import Where

Array = np.ndarray[Any, Any]


class Statistic(enum.StrEnum):
    """The statistics. Padding is never part of them; NaN is an error that names the site."""

    MIN = "min"
    MAX = "max"
    ABSMAX = "absmax"
    ZEROS = "zeros"  # how many elements are exactly zero
    COUNT = "count"  # how many elements were seen
    MEAN = "mean"  # float64, as are all moments
    ABSMEAN = "absmean"  # mean of |x|
    SECOND_MOMENT = "second_moment"  # mean of x*x
    L2 = "l2"  # square root of the sum of x*x: the column norms of activation-aware pruning
    NORM = "norm"  # mean over tokens of the L2 norm of the token's vector
    GRAM = "gram"  # sum over tokens of x x^T: [channels, channels] float64
    HISTOGRAM = "histogram"  # counts in `bins` equal bins of [low, high), with what lies below and above
    QUANTILE = "quantile"  # a sketch that answers any quantile
    ABS_QUANTILE = "abs_quantile"  # the same of |x|
    ROWS = "rows"  # the pooled vector of each document, in their order: [documents, channels] float32


class Tokens(enum.StrEnum):
    """The tokens of a row that count. First and last are those among the valid ones.

    ``response``: those that predict the tokens of the response, from the last one of the prompt to the last but one of all
    (documents with a prompt and a response). ``span``: those of the marked span (documents with a span).
    """

    ALL = "all"
    FIRST = "first"
    LAST = "last"
    NOT_FIRST = "not_first"
    RESPONSE = "response"
    SPAN = "span"


_EXTREMES = frozenset({Statistic.MIN, Statistic.MAX, Statistic.ABSMAX})
_COUNTS = frozenset({Statistic.ZEROS, Statistic.COUNT})
_SKETCHES = frozenset({Statistic.QUANTILE, Statistic.ABS_QUANTILE})
_OF_VECTORS = frozenset(
    {Statistic.GRAM, Statistic.NORM, Statistic.ROWS}
)  # these need the channel axis even when they reduce over it


@dataclass(frozen=True)
class Request:
    """One statistic at one site.

    site: a site's name (any spelling that names one site). kind: see ``Statistic``.
    axis: keep one result per channel of this axis of the site's value; ``None`` keeps one for the whole tensor. For ``gram``
    and ``norm`` it is the axis of the vectors (``None``: the last).
    positions: keep one result per position in the row as well (counted over valid tokens, so padding on the left is right too).
    tokens: which tokens count; where: a clause that they have to meet as well (see ``actgraph.graph.where``).
    pool: the mean over those tokens first, so that every document is one row.
    low, high, bins: the range and number of bins of a histogram.
    resolution: a sketch has ``2**resolution`` bins per octave; its quantiles are within ``2**-resolution`` of the true ones,
    relative (0.4 % for 8), for magnitudes above 1e-12.
    """

    site: str
    kind: Statistic | str
    axis: int | None = None
    positions: bool = False
    tokens: Tokens | str = Tokens.ALL
    where: str = "all"
    pool: bool = False
    low: float = 0.0
    high: float = 0.0
    bins: int = 0
    resolution: int = 8

    def __post_init__(self) -> None:
        for name, kind in (("kind", Statistic), ("tokens", Tokens)):
            try:
                object.__setattr__(self, name, kind(getattr(self, name)))
            except ValueError as error:
                message = f"a statistic's {name} cannot be {getattr(self, name)!r}"
                raise OptionError(message, f"one of {', '.join(kind)}") from error
        if self.kind is Statistic.HISTOGRAM and not (self.bins > 0 and self.low < self.high):
            raise OptionError("a histogram needs low < high and bins > 0", "use kind='quantile' when the range is not known")
        if self.kind in _OF_VECTORS and self.positions:
            raise OptionError(f"the {self.kind} is over all tokens", "leave out positions")
        object.__setattr__(self, "where", str(Where.parse(self.where)))
        if self.kind is Statistic.ROWS and not self.pool:
            raise OptionError("rows are of documents", "say pool=True")
        if self.pool and self.positions:
            raise OptionError("a pooled statistic has no positions", "leave out positions")
        if not 0 <= self.resolution <= 12:
            raise OptionError(f"resolution is {self.resolution}, outside of 0 to 12")

    @property
    def channel_axis(self) -> int | None:
        """The axis whose channels must be told apart; ``None`` when elements alone matter."""
        return -1 if self.axis is None and (self.kind in _OF_VECTORS or self.pool) else self.axis

    @property
    def layout(self) -> Layout:
        """What results are kept for."""
        return Layout(channels=self.axis is not None and self.kind not in _OF_VECTORS, positions=self.positions)

    def accumulator(self) -> Accumulator:
        """A new, empty accumulator."""
        kind = Statistic(self.kind)
        if kind in _EXTREMES:
            return Extreme(kind.value, self.layout)
        if kind in _COUNTS:
            return Count(kind.value, self.layout)
        if kind in _SKETCHES:
            return QuantileSketch(self.layout, self.resolution, absolute=kind is Statistic.ABS_QUANTILE)
        if kind is Statistic.GRAM:
            return Gram()
        if kind is Statistic.ROWS:
            return Rows()
        if kind is Statistic.HISTOGRAM:
            return Histogram(self.layout, self.low, self.high, self.bins)
        return Moment(kind.value, self.layout)

    def __str__(self) -> str:
        given = [f"{f.name}={getattr(self, f.name)}" for f in fields(self)[2:] if getattr(self, f.name) != f.default]
        return " ".join([f"{self.kind} of {self.site}", *given])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for files."""
        return {key: str(value) if isinstance(value, enum.StrEnum) else value for key, value in asdict(self).items()}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Request:
        return Request(**data)


@dataclass
class Statistics:
    """The results of some requests.

    ``statistics[request]`` (or ``statistics[site, kind]``) is a float64 array (counts: int64) of shape ``[]``, ``[channels]``,
    ``[positions]`` or ``[positions, channels]``; a ``QuantileSketch`` for quantiles; a ``Histogram`` for a histogram.
    documents, tokens: how much of the corpus was seen (tokens: rows times valid positions, 0 where inputs are no sequences).
    """

    accumulators: dict[Request, Accumulator] = field(default_factory=dict)
    documents: int = 0
    tokens: int = 0

    def __contains__(self, request: object) -> bool:
        return request in self.accumulators

    def __iter__(self) -> Iterator[Request]:
        return iter(self.accumulators)

    def __len__(self) -> int:
        return len(self.accumulators)

    def accumulator(self, request: Request) -> Accumulator:
        """The accumulator of a request. Raises InputError when it was not collected."""
        try:
            return self.accumulators[request]
        except KeyError:
            raise InputError(f"the {request} was not collected", "return it from the pass's requests(graph)") from None

    def __getitem__(self, request: Request | tuple[str, str]) -> Any:
        """The result of a request. Raises InputError when it was not collected or nothing was seen at the site."""
        if not isinstance(request, Request):
            request = Request(*request)
        found = self.accumulator(request)
        if found.empty:
            raise InputError(f"calibration saw nothing at {request.site}: the {request} is not defined", "use a larger corpus")
        return found if isinstance(found, (QuantileSketch, Histogram)) else found.read()

    def array(self, request: Request) -> Array:
        """``self[request]`` where that is an array."""
        result = self[request]
        if not isinstance(result, np.ndarray):
            raise InputError(f"the {request} is no array", "ask it for a quantile or its counts")
        return result

    def sketch(self, request: Request) -> QuantileSketch:
        """``self[request]`` where that is a quantile sketch."""
        result = self[request]
        if not isinstance(result, QuantileSketch):
            raise InputError(f"the {request} is no quantile sketch", "request the kind quantile or abs_quantile")
        return result

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of both parts together; neither is changed. Raises InputError when the requests differ."""
        if set(self.accumulators) != set(other.accumulators):
            odd = min(set(self.accumulators) ^ set(other.accumulators), key=str)
            raise InputError(f"statistics of different requests cannot merge: only one has the {odd}")
        merged = {request: result.merge(other.accumulators[request]) for request, result in self.accumulators.items()}
        return Statistics(merged, self.documents + other.documents, self.tokens + other.tokens)

    def only(self, requests: Iterator[Request] | set[Request] | list[Request]) -> Statistics:
        """The part that answers ``requests``. Raises InputError when one was not collected."""
        return Statistics({request: self.accumulator(request) for request in requests}, self.documents, self.tokens)
