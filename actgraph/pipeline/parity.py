"""Numeric parity: how far the outputs move over each pass, against what the pass declared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from actgraph.errors import InputError, OptionError, ParityError, UnsupportedError
from actgraph.graph.executor import executor_for
from actgraph.graph.graph import Role, parameter_bytes
from actgraph.graph.parity import difference, is_optional, real, sample_inputs, unknown_vocabularies
from actgraph.graph.slots import with_initial_slots
from actgraph.ops.dtypes import DType
from actgraph.pipeline.base import UNBOUNDED, Pass, PassResult
from actgraph.pipeline.instruments import Instrument, Run
from actgraph.pipeline.report import Change, human

if TYPE_CHECKING:
    from actgraph.graph import Graph

Array = np.ndarray[Any, Any]
Inputs = Mapping[str, Array]
Steps = Sequence[tuple[Pass, PassResult]]

MODES = ("auto", "each", "boundary", "none")
#: Above this size of parameters ``auto`` leaves parity out: running doubles the memory that a pipeline needs.
LARGE = 512 * 10**6
#: Above this number of nodes ``auto`` compares the input with the result only: opening a graph to run it once takes seconds.
MANY = 10_000
#: Tokens of the sample inputs, or fewer where a pass makes a graph that takes no more.
_TOKENS = 7
#: Rounding in the outputs' own precision: sums in another order move them by a few units in the last place.
_ULPS = 8


class Parity(Instrument):
    """Runs the graph on sample inputs before and after.

    mode: ``each`` pass, ``boundary`` (input against result), or ``auto``: each, unless the model is large (boundary for
    one of many nodes) or cannot be run.
    inputs: arrays by input name; default: token ids drawn from the vocabulary (normal numbers for float inputs), with padding
    on the right in one row and on the left in another.
    A pass that moves an output by more than the size that it declared raises ParityError (at the boundary: by
    more than the sizes of all passes allow together), and so does one that makes a finite number NaN or infinite, whatever its
    size. Sizes are no tighter than 8 units in the last place of the output. Outputs that are NaN on all sample inputs, or have
    no elements, prove nothing: that is said, and ``each`` and ``boundary`` refuse when there is nothing else.

    Graphs are opened with ``optimize=False``: optimizing takes longer than the one run, and would add its own rounding to what
    the pass did. So this measures passes and says nothing of what an optimizing engine makes of the result, such as a linear of
    int8 weights that is fused and multiplied in another way; `actgraph verify` runs exported files as they are used.
    """

    def __init__(self, mode: str = "auto", inputs: Inputs | None = None) -> None:
        if mode not in MODES:
            raise OptionError(f"parity is {mode!r}", f"choose {', '.join(MODES)}")
        self.mode = mode
        self.inputs = inputs
        self._boundary = mode == "boundary"
        self._first: dict[str, Array] | None = None
        self._last: dict[str, Array] = {}
        self._steps: list[tuple[Pass, PassResult]] = []

    def start(self, run: Run) -> None:
        report = run.report
        if self.mode == "none" or not len(run.pipeline):
            report.parity = "not checked"
            return
        size = sum(parameter_bytes(parameter) for parameter in run.source.parameters())
        if self.mode == "auto" and size > LARGE:
            report.parity = f"not checked: the model has {human(size)} (parity=each checks)"
            return
        self._boundary = self.mode == "boundary" or (self.mode == "auto" and len(run.source.nodes()) > MANY)
        given = bool(self.inputs)
        try:
            limits = (limit for step in run.pipeline if (limit := step.token_limit) is not None)
            inputs = self.inputs or sample_inputs(run.source, seq=min([_TOKENS, *limits]), padding="both", seed=run.seed)
            self._first = self._last = _outputs(run.source, inputs)
        except Exception as error:
            if self.mode != "auto":
                message = f"{run.source.name} does not run on sample inputs: {error}"
                raise InputError(message, "give inputs, or parity=none") from error
            report.parity = f"not checked: the input graph does not run on sample inputs ({error})"
            return
        vacuous = [name for name, array in self._first.items() if np.isnan(real(array)).all()]
        if len(vacuous) == len(self._first):
            what = "gives no outputs" if not vacuous else f"gives no numbers but NaN on sample inputs ({', '.join(vacuous)})"
            if self.mode != "auto":
                raise InputError(f"{run.source.name} {what}, so that parity proves nothing", "give inputs, or parity=none")
            report.parity, self._first = f"not checked: the input graph {what}", None
            return
        self.inputs = inputs
        checked = "after each pass" if not self._boundary else "of input and result"
        report.parity = f"{checked}, on {', '.join(f'{name} {list(array.shape)}' for name, array in inputs.items())}"
        if not given and (unknown := unknown_vocabularies(run.source, inputs)):
            report.parity += f"; only ids 0 and 1 in {', '.join(unknown)}, whose vocabulary is unknown"
        if vacuous:
            report.parity += f"; nothing to compare in {', '.join(vacuous)} (NaN, or no elements)"

    def after(self, run: Run, step: Pass, result: PassResult) -> None:
        if self._first is None or self.inputs is None:
            return
        self._steps.append((step, result))
        if self._boundary:
            return
        outputs = self._outputs_after(run, step.name)
        if outputs is None:
            return
        run.row.change = change = _measure_seen(self._last, outputs, self.inputs)
        _check(change, self._last, outputs, [(step, result)], self.inputs)
        self._last = outputs

    def finish(self, run: Run) -> None:
        if self._first is None or self.inputs is None:
            return
        last = self._last if not self._boundary else self._outputs_after(run, "the passes")
        if last is None:
            return
        run.report.change = change = _measure_seen(self._first, last, self.inputs)
        if self._boundary:
            _check(change, self._first, last, self._steps, self.inputs)

    def _outputs_after(self, run: Run, what: str) -> dict[str, Array] | None:
        """The outputs now; ``None``, and it is said, where ``auto`` may not insist that the engine of the dialect runs them."""
        assert self.inputs is not None
        try:
            return _outputs(run.graph, self.inputs)
        except UnsupportedError as error:
            if self.mode != "auto" or "NOT_IMPLEMENTED" not in error.message:  # an invalid graph is an error in any mode
                raise
            run.report.parity, self._first = f"not checked from {what} on: {error}", None
            return None


def measure(before: Mapping[str, Array], after: Mapping[str, Array]) -> Change:
    """The largest movement of any output of ``before``; NaN or infinity on one side only is an infinite one."""
    worst, moved, compared, missing, broken = "", 0.0, 0, [], ""
    for name, array in before.items():
        left, right = real(array), real(after[name]) if name in after else None
        if right is not None and not broken and _breaks(left, right):
            broken = name
        if right is None or right.shape != left.shape:
            missing.append(name)
            continue
        found = difference(name, left, right)
        compared += found.compared
        size = np.inf if found.mismatched else found.max_rel
        if size > moved or not worst:
            worst, moved = name, float(size)
    return Change(moved, worst, missing=tuple(missing), compared=compared, broken=broken)


def _measure_seen(before: Mapping[str, Array], after: Mapping[str, Array], inputs: Inputs) -> Change:
    """``measure`` where the inputs are not padded on the left; NaN and infinity count everywhere.

    Such a position sees nothing but padding, and its output is arbitrary: scores of fills, rounded otherwise in each type.
    """
    whole = measure(before, after)
    mask = inputs.get("attention_mask")
    if whole.broken or whole.missing or mask is None or mask.ndim != 2:
        return whole
    padding = np.cumsum(mask != 0, axis=1) == 0
    if not padding.any():
        return whole

    def seen(outputs: Mapping[str, Array]) -> dict[str, Array]:
        return {name: array[~padding] if array.shape[:2] == padding.shape else array for name, array in outputs.items()}

    return measure(seen(before), seen(after))


def _breaks(left: Array, right: Array) -> bool:
    """Whether ``right`` has NaN or infinity where ``left`` has none (anywhere, if their shapes differ)."""
    finite = np.isfinite(left)
    return bool((~np.isfinite(right) & (finite if left.shape == right.shape else finite.all())).any())


def _check(
    change: Change, before: Mapping[str, Array], after: Mapping[str, Array], steps: Steps, inputs: Inputs | None = None
) -> None:
    """Hold ``change`` against what ``steps`` declare, and write the size that they allow into it. Raises ParityError."""
    names = " and ".join(dict.fromkeys(step.name for step, _ in steps))
    promise = "promises" if len({step.name for step, _ in steps}) == 1 else "promise"
    if change.broken:
        raise ParityError(
            f"the output {change.broken} became NaN or infinite over {names}", "no pass may do that, whatever it declares"
        )
    size = math.prod(1.0 + result.expected_size for _, result in steps) - 1.0  # each is relative to what the former one left
    if size == UNBOUNDED:
        return
    change.tolerance = size = max(size, _rounding(before))
    reasons = [result.expected_change for _, result in steps if result.expected_change != "exact"]
    promised = f"{' and '.join(map(repr, reasons)) or 'exact outputs'} within {size:.3g}"
    if change.missing:
        raise ParityError(f"the output {change.missing[0]} is gone or has another shape, and {names} {promise} {promised}")
    if reasons and not all(_is_float(array) for array in before.values()):
        # A rounding may flip an index or a flag, by any amount: sizes bound the numbers behind them.
        floats = {name: array for name, array in before.items() if _is_float(array)}
        change = measure(floats, after) if inputs is None else _measure_seen(floats, after, inputs)
    if not change.relative <= size:
        raise ParityError(
            f"the output {change.output} moved by {change.relative:.3g} relative, and {names} {promise} {promised}",
            "parity='none' (--parity none) goes on all the same: a rounding may flip what gates drop behind it; a pass says "
            "how far outputs may move as the expected_size of its result, UNBOUNDED where no bound is known",
        )


def _is_float(array: Array) -> bool:
    return DType.of(array.dtype).is_float or np.iscomplexobj(array)


def _outputs(graph: Graph, inputs: Inputs) -> dict[str, Array]:
    """The outputs on ``inputs``, cast to what the graph takes now; inputs that it does not declare are left out."""
    given = {}
    for value in graph.inputs():
        if value.name in inputs:
            array = inputs[value.name]
            given[value.name] = array.astype(value.dtype.numpy, copy=False) if value.dtype is not None else array
        elif graph.role(value.name) in (Role.USER, Role.CONTEXT) and not is_optional(graph, value):
            raise InputError(f"there is no sample for the input {value!r}")
    return executor_for(graph).open(graph, optimize=False)(with_initial_slots(graph, given))


def _rounding(outputs: Mapping[str, Array]) -> float:
    floats = [DType.of(array.dtype) for array in outputs.values() if DType.of(array.dtype).is_float]
    bits = {DType.F64: 52, DType.F32: 23, DType.F16: 10, DType.BF16: 7}
    return max((_ULPS * 2.0 ** -bits.get(dtype, 2) for dtype in floats), default=0.0)
