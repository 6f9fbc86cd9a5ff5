"""Numeric comparison of two graphs.

``compare`` runs both graphs, of any dialects, on the same inputs and measures how far apart their outputs (and, on request,
values inside) are. The relative error of a pair is ``max|a - b| / max|a|`` with the left graph as the reference: one number
per tensor, relative to the scale of the tensor and not of the single element, because elements near zero carry no
information about relative precision. Where the reference is all zeros it is infinite unless both are. NaN on both sides and
tensors without elements are no evidence: a comparison in which nothing else was compared fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actgraph.errors import InputError, ParityError
from actgraph.graph.executor import executor_for
from actgraph.graph.graph import Array, Graph, Role, Value
from actgraph.graph.slots import places, slots_of, with_initial_slots
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import Dim

#: Vocabulary operations after which ids are still the same ids.
_SAME_IDS = frozenset({"identity", "cast", "reshape", "transpose", "expand", "slice"})
#: Ids drawn for an input of which nothing tells its vocabulary are below this: what has an embedding has two rows.
_UNKNOWN_VOCABULARY = 2
#: Output names whose last axis scores tokens or classes: agreement of the best one is reported.
_SCORES = frozenset({"logits", "lm_logits", "prediction_logits", "seq_relationship_logits"})


@dataclass(frozen=True)
class Difference:
    """How far one pair of tensors is apart, over all inputs.

    max_abs, max_rel: the largest errors over all inputs (``max_rel`` as defined in the module docstring).
    worst: where the largest absolute error is: number of the input, then the index in the tensor; values left and right.
    mismatched: elements that are NaN or infinite on one side only (or infinite with different signs).
    same_argmax: the share of positions whose best score has the same index on both sides; ``None`` for other tensors.
    elements, compared: how many there are, and how many were compared: all but those that are NaN on both sides.
    """

    name: str
    max_abs: float
    max_rel: float
    worst: tuple[int, ...] = ()
    left: float = 0.0
    right: float = 0.0
    mismatched: int = 0
    same_argmax: float | None = None
    problem: str = ""  # why the tensors cannot be compared: different shapes or dtypes
    elements: int = 0
    compared: int = 0

    def within(self, rtol: float, atol: float) -> bool:
        """Whether the pair agrees: no problem, equal NaN and infinity, and one of both errors within its tolerance.

        A tensor that is NaN everywhere on both sides does not; one without elements does.
        """
        if self.problem or self.mismatched or (self.elements and not self.compared):
            return False
        return self.max_rel <= rtol or self.max_abs <= atol

    def __str__(self) -> str:
        if self.problem:
            return f"{self.name}: {self.problem}"
        if not self.compared:
            return f"{self.name}: nothing compared, {'all NaN on both sides' if self.elements else 'no elements'}"
        text = f"{self.name}: max abs {self.max_abs:.3g}, rel {self.max_rel:.3g}"
        if self.max_abs > 0:
            text += f" at input {self.worst[0]}, {list(self.worst[1:])} ({self.left:.6g} and {self.right:.6g})"
        if self.mismatched:
            text += f", {self.mismatched} elements NaN or infinite on one side only"
        if self.same_argmax is not None:
            text += f", argmax agrees {self.same_argmax:.2%}"
        return text


@dataclass(frozen=True)
class ParityReport:
    """The result of ``compare``. ``ok`` is true when something was compared and every pair agrees within the tolerances."""

    left: str
    right: str
    rtol: float
    atol: float
    inputs: int
    outputs: tuple[Difference, ...]
    values: tuple[Difference, ...] = ()
    missing: tuple[str, ...] = field(default=())  # outputs that only one of the graphs has

    @property
    def ok(self) -> bool:
        return not self.problem

    @property
    def problem(self) -> str:
        """Why the graphs do not agree, in one line; empty when they do."""
        if self.missing:
            return f"only one of them has the outputs {', '.join(self.missing)}"
        pairs = (*self.outputs, *self.values)
        failed = [d for d in pairs if not d.within(self.rtol, self.atol)]
        if failed:
            return f"{max(failed, key=_badness)}{f' and {len(failed) - 1} more' if len(failed) > 1 else ''}"
        if not any(d.compared for d in pairs):
            return "nothing was compared: " + ("; ".join(map(str, pairs)) or "they have no output in common")
        return ""

    @property
    def worst(self) -> Difference | None:
        """The pair with the largest relative error (or one that cannot be compared)."""
        return max((*self.outputs, *self.values), key=_badness, default=None)

    @property
    def max_rel(self) -> float:
        """The largest relative error over all pairs; infinite where one cannot be compared."""
        return max((np.inf if d.problem or d.mismatched else d.max_rel for d in (*self.outputs, *self.values)), default=0.0)

    @property
    def max_abs(self) -> float:
        """The largest absolute error over all pairs."""
        return max((np.inf if d.problem else d.max_abs for d in (*self.outputs, *self.values)), default=0.0)

    def check(self) -> ParityReport:
        """The report itself. Raises ParityError naming the worst pair when the graphs do not agree."""
        if self.ok:
            return self
        if self.missing:
            hint = "compare graphs with equal outputs"
        elif not any(d.compared for d in (*self.outputs, *self.values)):
            hint = "give inputs on which the graphs compute numbers"
        else:
            hint = f"tolerance is {self.rtol:g} relative or {self.atol:g} absolute"
        raise ParityError(f"{self.left} and {self.right} disagree: {self.problem}", hint)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON data."""
        return {
            "left": self.left, "right": self.right, "rtol": self.rtol, "atol": self.atol, "inputs": self.inputs, "ok": self.ok,
            "problem": self.problem, "missing": list(self.missing), "outputs": [_as_dict(d) for d in self.outputs],
            "values": [_as_dict(d) for d in self.values],
        }  # fmt: skip

    def __str__(self) -> str:
        verdict = "agree" if self.ok else "disagree"
        head = f"{self.left} and {self.right} {verdict} on {self.inputs} inputs (rtol {self.rtol:g}, atol {self.atol:g})"
        lines = [f"  {d}" for d in (*self.outputs, *self.values)]
        if not self.ok and not any(d.compared for d in (*self.outputs, *self.values)):
            lines.append(f"  {self.problem}")
        return "\n".join([head, *lines, *(f"  only one has {name}" for name in self.missing)])


def _badness(d: Difference) -> tuple[bool, bool, int, float]:
    """The order from pairs that agree to those that disagree most."""
    return bool(d.problem), bool(d.elements and not d.compared), d.mismatched, d.max_rel


def compare(
    left: Graph,
    right: Graph,
    inputs_list: Iterable[Mapping[str, Array]],
    *,
    rtol: float,
    atol: float = 0.0,
    values: Sequence[tuple[Value, Value]] | Mapping[str, tuple[Value, Value]] = (),
    optimize: bool = True,
) -> ParityReport:
    """Run both graphs on each of ``inputs_list`` and compare their outputs by name.

    A graph is given those inputs that it declares, so that one with an extra optional input can be compared with one
    without; slots that are not among them start empty. Outputs with role TAP or SLOT that only one graph has are ignored;
    any other is reported as missing.
    values: pairs ``(value of left, value of right)`` to compare as well, by name when given as a mapping; all of them are
    fetched in the same run.
    optimize: let the engines rewrite the graphs as they usually do; without, equal nodes compute equal bits in any two graphs.
    """
    pairs = dict(values) if isinstance(values, Mapping) else {a.name: (a, b) for a, b in values}
    runners = [
        executor_for(graph).open(graph, list(dict.fromkeys(pair[side] for pair in pairs.values())), optimize=optimize)
        for side, graph in enumerate((left, right))
    ]
    common, missing = _common_outputs(left, right)
    gauges = {name: _Gauge(name) for name in common}
    inner = {name: _Gauge(name) for name in pairs}
    count = 0
    for inputs in inputs_list:
        _check_feeds((left, right), inputs)
        results = [
            runner(with_initial_slots(graph, _accepted(graph, inputs)))
            for runner, graph in zip(runners, (left, right), strict=True)
        ]
        for name, gauge in gauges.items():
            gauge.add(count, results[0][name], results[1][name])
        for name, (a, b) in pairs.items():
            inner[name].add(count, results[0][a.name], results[1][b.name])
        count += 1
    if count == 0:
        raise InputError("there are no inputs to compare on", "give at least one dictionary of arrays")
    return ParityReport(
        left.name, right.name, rtol, atol, count,
        tuple(g.result() for g in gauges.values()), tuple(g.result() for g in inner.values()), missing,
    )  # fmt: skip


def difference(name: str, left: Array, right: Array) -> Difference:
    """How far two arrays are apart."""
    gauge = _Gauge(name)
    gauge.add(0, left, right)
    return gauge.result()


def real(array: Array) -> Array:
    """``array`` in float64; complex numbers as their two parts along a new last axis."""
    if np.iscomplexobj(array):
        return np.stack([array.real, array.imag], axis=-1).astype(np.float64)
    return array.astype(np.float64)


class _Gauge:
    """Accumulates the difference of one pair over inputs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.found = Difference(name, 0.0, 0.0)
        self.positions = 0
        self.agreeing = 0

    def add(self, number: int, left: Array, right: Array) -> None:
        if self.found.problem:
            return
        left, right = np.asarray(left), np.asarray(right)
        if left.shape != right.shape:
            self.found = Difference(self.name, np.inf, np.inf, problem=f"shapes {list(left.shape)} and {list(right.shape)}")
            return
        if left.dtype != right.dtype:
            self.found = Difference(
                self.name, np.inf, np.inf, problem=f"types {DType.of(left.dtype).value} and {DType.of(right.dtype).value}"
            )
            return
        if left.size == 0:
            return
        a, b = real(left), real(right)
        self._scores(a, b)
        comparable = np.isfinite(a) & np.isfinite(b)
        same = comparable | (np.isnan(a) & np.isnan(b)) | (a == b)
        error = np.abs(np.where(comparable, a, 0.0) - np.where(comparable, b, 0.0))
        place = np.unravel_index(int(np.argmax(error)), error.shape)
        max_abs = float(error[place])
        scale = float(np.max(np.abs(np.where(np.isfinite(a), a, 0.0))))
        max_rel = 0.0 if max_abs == 0.0 else (max_abs / scale if scale > 0 else np.inf)
        was = self.found
        worse = max_abs > was.max_abs
        self.found = Difference(
            self.name, max(was.max_abs, max_abs), max(was.max_rel, max_rel),
            (number, *map(int, place)) if worse else was.worst,
            float(a[place]) if worse else was.left, float(b[place]) if worse else was.right,
            was.mismatched + int(np.count_nonzero(~same)),
            elements=was.elements + a.size,
            compared=was.compared + int(np.count_nonzero(~(np.isnan(a) & np.isnan(b)))),
        )  # fmt: skip

    def _scores(self, a: Array, b: Array) -> None:
        if self.name in _SCORES and a.ndim:
            best = np.argmax(a, axis=-1) == np.argmax(b, axis=-1)
            self.positions += best.size
            self.agreeing += int(np.count_nonzero(best))

    def result(self) -> Difference:
        if not self.positions or self.found.problem:
            return self.found
        return Difference(**{**self.found.__dict__, "same_argmax": self.agreeing / self.positions})


def _as_dict(d: Difference) -> dict[str, Any]:
    return {**d.__dict__, "worst": list(d.worst)}


def _common_outputs(left: Graph, right: Graph) -> tuple[list[str], tuple[str, ...]]:
    first, second = ([name for name, _ in graph.outputs()] for graph in (left, right))
    missing = [name for name in first if name not in second and left.role(name) not in (Role.TAP, Role.SLOT)]
    missing += [name for name in second if name not in first and right.role(name) not in (Role.TAP, Role.SLOT)]
    return [name for name in first if name in second], tuple(missing)


def _check_feeds(graphs: Sequence[Graph], inputs: Mapping[str, Array]) -> None:
    for graph in graphs:
        for value in graph.inputs():
            if value.name not in inputs and graph.role(value.name) is Role.USER and not is_optional(graph, value):
                taken = "; ".join(f"{g.name} takes {', '.join(v.name for v in g.inputs())}" for g in graphs)
                raise InputError(f"{graph.name} needs {value.name!r}, and the inputs are {', '.join(inputs)} ({taken})",
                                 "compare models that take the same inputs, or give inputs for both")  # fmt: skip


def _accepted(graph: Graph, inputs: Mapping[str, Array]) -> dict[str, Array]:
    declared = {value.name for value in graph.inputs()}
    return {name: array for name, array in inputs.items() if name in declared}


# --- inputs ---------------------------------------------------------------------------------------------------------------


def sample_inputs(graph: Graph, batch: int = 2, seq: int = 7, seed: int = 0, *, padding: str = "none") -> dict[str, Array]:
    """Plausible inputs of ``graph``: equal arguments give equal arrays.

    Token ids are within the vocabulary, positions count up, masks are ones; ``padding="left"`` or ``"right"`` masks about
    a third of the last row (``"both"``: of the last row on the left and of the one before on the right), with positions as
    Hugging Face makes them; graphs without a mask are given none. Other float inputs are standard normal. Sizes:
    ``batch`` and ``seq`` for dimensions of these names, ``seq`` for other named ones, static ones as they are; a dimension
    that the companions' sample inputs know is taken from there when it has another name. Optional inputs are left out. A
    cache of fixed size is given no more tokens than it holds.
    """
    seq = min(seq, places(graph) or seq)
    rng = np.random.Generator(np.random.PCG64([seed, batch, seq]))
    sizes: dict[str, int] = {}
    for name, sample in graph.companions.sample_inputs.items():
        declared = next((v for v in graph.inputs() if v.name == name), None)
        if declared is not None and declared.shape is not None:
            known = zip(declared.shape, np.shape(sample), strict=False)
            sizes.update({dim: n for dim, n in known if isinstance(dim, str) and dim.isidentifier()})
    for slot in slots_of(graph).values():  # the state is what it is before the first call
        sizes.update({dim: 0 for dim in slot.shape[1:] if isinstance(dim, str) and dim.isidentifier()})
    sizes.update({"batch": batch, "seq": seq})
    if padding not in ("none", "left", "right", "both"):
        raise InputError(f"padding must be none, left, right or both, not {padding!r}")
    if not any("mask" in value.name for value in graph.inputs()):
        padding = "none"  # positions alone tell of several sequences, and not of padding
    result: dict[str, Array] = {}
    for value in graph.inputs():
        if graph.role(value.name) not in (Role.USER, Role.CONTEXT) or is_optional(graph, value):
            continue
        shape = tuple(_size(dim, sizes, seq) for dim in value.shape or ())
        result[value.name] = _plausible(graph, value, shape, padding, rng)
    return result


def is_optional(graph: Graph, value: Value) -> bool:
    """Whether an input has a default."""
    from actgraph.graph.context import input_default

    return input_default(graph, value.name) is not None


def _size(dim: Dim, sizes: Mapping[str, int], fallback: int) -> int:
    if isinstance(dim, int):
        return dim
    if dim is None:
        return fallback
    if dim in sizes:
        return sizes[dim]
    from actgraph.graph.specialise import fixed_size

    try:
        result = fixed_size(dim, sizes)  # an expression such as 2*seq
    except InputError:  # seq/4 where it does not divide
        return fallback
    return result if isinstance(result, int) else fallback


def _mask(shape: tuple[int, ...], padding: str) -> Array:
    """Ones, with about a third of the last row masked on one side; ``both``: on the left, and the row before on the right."""
    mask = np.ones(shape, np.int64)
    length = shape[-1]
    pad = max(length // 3, int(length == 2))
    if padding in ("left", "both") and pad:
        mask[-1, :pad] = 0
        if padding == "both" and shape[0] > 1:
            mask[-2, length - pad :] = 0
    elif padding == "right" and pad:
        mask[-1, length - pad :] = 0
    return mask


def _plausible(graph: Graph, value: Value, shape: tuple[int, ...], padding: str, rng: np.random.Generator) -> Array:
    name, dtype = value.name, value.dtype or DType.F32
    if len(shape) == 2 and not dtype.is_float:
        if "mask" in name:
            return _mask(shape, padding).astype(dtype.numpy)
        if "position" in name:
            counted: Array = np.maximum(np.cumsum(_mask(shape, padding), axis=-1) - 1, 0)
            return counted.astype(dtype.numpy)
    if name.endswith("type_ids"):
        return np.zeros(shape, dtype.numpy)
    if dtype is DType.BOOL:
        return np.ones(shape, np.bool_)
    if _is_drawn(value, len(shape)):
        return rng.integers(0, vocabulary(graph, value) or _UNKNOWN_VOCABULARY, shape).astype(dtype.numpy)
    return rng.standard_normal(shape).astype(dtype.numpy)


def _is_drawn(value: Value, rank: int) -> bool:
    """Whether an input holds ids at random: an integer that is no mask, position or type."""
    if value.dtype is None or not value.dtype.is_integer or value.name.endswith("type_ids"):
        return False
    return rank != 2 or not ("mask" in value.name or "position" in value.name)


def vocabulary(graph: Graph, value: Value) -> int | None:
    """How many different ids an integer input may hold: the rows of the smallest table it indexes, else the configured number.

    ``None``: unknown.
    """
    tables = list(_tables(value))
    if tables:
        return min(tables)
    configured = graph.companions.config.get("vocab_size")
    return int(configured) if isinstance(configured, int) and configured > 1 else None


def _tables(value: Value) -> Iterator[int]:
    """The rows of each table that ``value`` indexes, as it is or in another shape or integer type."""
    pending, seen = [value], {value}
    while pending:
        ids = pending.pop()
        for use in ids.uses:
            prim = use.node.prim if use.node is not None else None
            if prim is None or not prim.operands:
                continue
            if prim.op in _SAME_IDS and prim.operands[0] == ids:
                pending += [output for output in prim.outputs if output not in seen]
                seen.update(prim.outputs)
            elif prim.op == "gather" and len(prim.operands) > 1 and prim.operands[1] == ids:
                table, axis = prim.operands[0], int(prim.attributes.get("axis") or 0)
                rows = table.shape[axis] if isinstance(table, Value) and table.shape else None
                if isinstance(rows, int):
                    yield rows


def unknown_vocabularies(graph: Graph, inputs: Mapping[str, Array]) -> list[str]:
    """The inputs for which ``sample_inputs`` drew only 0 and 1, because nothing tells which ids they may hold."""
    return [
        value.name
        for value in graph.inputs()
        if value.name in inputs and _is_drawn(value, inputs[value.name].ndim) and vocabulary(graph, value) is None
    ]
