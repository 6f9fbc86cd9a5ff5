"""Numeric parity: how far the outputs move over each pass, against what the pass declared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from actgraph.errors import InputError, OptionError, ParityError
from actgraph.graph.executor import executor_for
from actgraph.graph.graph import Role, parameter_bytes
from actgraph.graph.parity import difference, is_optional, sample_inputs
from actgraph.ops.dtypes import DType
from actgraph.pipeline.base import Pass, PassResult
from actgraph.pipeline.instruments import Instrument, Run
from actgraph.pipeline.report import Change, human

if TYPE_CHECKING:
    from actgraph.graph import Graph

Array = np.ndarray[Any, Any]
Inputs = Mapping[str, Array]

MODES = ("auto", "each", "boundary", "none")
#: Above this size of parameters ``auto`` leaves parity out: running doubles the memory that a pipeline needs.
LARGE = 512 * 10**6
#: Rounding in the outputs' own precision: sums in another order move them by a few units in the last place.
_ULPS = 8


class Parity(Instrument):
    """Runs the graph on sample inputs before and after.

    mode: ``each`` pass, ``boundary`` (input against result), or ``auto``: each, unless the model is large or cannot be run.
    inputs: arrays by input name; default: token ids drawn from the vocabulary (normal numbers for float inputs), with padding
    in the last row. A pass that declared ``exact`` and moved an output by more than its tolerance raises ParityError; so does
    one that moved it by more than the size it declared. Tolerances are no tighter than 8 units in the last place of the output.
    """

    def __init__(self, mode: str = "auto", inputs: Inputs | None = None) -> None:
        if mode not in MODES:
            raise OptionError(f"parity is {mode!r}", f"choose {', '.join(MODES)}")
        self.mode = mode
        self.inputs = inputs
        self._first: dict[str, Array] | None = None
        self._last: dict[str, Array] = {}

    def start(self, run: Run) -> None:
        report = run.report
        if self.mode == "none" or not len(run.pipeline):
            report.parity = "not checked"
            return
        size = sum(parameter_bytes(parameter) for parameter in run.source.parameters())
        if self.mode == "auto" and size > LARGE:
            report.parity = f"not checked: the model has {human(size)} (parity=each checks)"
            return
        try:
            inputs = self.inputs or sample_inputs(run.source, padding="right", seed=run.seed)
            self._first = self._last = _outputs(run.source, inputs)
        except Exception as error:
            if self.mode != "auto":
                message = f"{run.source.name} does not run on sample inputs: {error}"
                raise InputError(message, "give inputs, or parity=none") from error
            report.parity = f"not checked: the input graph does not run on sample inputs ({error})"
            return
        self.inputs = inputs
        checked = "after each pass" if self.mode != "boundary" else "of input and result"
        report.parity = f"{checked}, on {', '.join(f'{name} {list(array.shape)}' for name, array in inputs.items())}"

    def after(self, run: Run, step: Pass, result: PassResult) -> None:
        if self._first is None or self.inputs is None or self.mode == "boundary":
            return
        outputs = _outputs(run.graph, self.inputs)
        run.row.change = change = measure(self._last, outputs)
        exact = result.expected_change == "exact"
        change.tolerance = max(result.tolerance, _rounding(self._last)) if exact else result.expected_size
        self._last = outputs
        if exact and change.missing:
            lost = change.missing[0]
            raise ParityError(f"the output {lost} is gone or has another shape, and {step.name} promises exact outputs")
        if change.tolerance is not None and not change.relative <= change.tolerance:
            promised = "exact outputs" if exact else f"'{result.expected_change}'"
            raise ParityError(
                f"the output {change.output} moved by {change.relative:.3g} relative, and {step.name} promises {promised} "
                f"within {change.tolerance:.3g}"
            )

    def finish(self, run: Run) -> None:
        if self._first is not None and self.inputs is not None:
            last = self._last if self.mode != "boundary" else _outputs(run.graph, self.inputs)
            run.report.change = measure(self._first, last)


def measure(before: Mapping[str, Array], after: Mapping[str, Array]) -> Change:
    """The largest movement of any output of ``before``; NaN or infinity on one side only is an infinite one."""
    worst, moved, missing = "", 0.0, []
    for name, left in before.items():
        right = after.get(name)
        if right is None or right.shape != left.shape:
            missing.append(name)
            continue
        found = difference(name, left.astype(np.float64), right.astype(np.float64))
        size = np.inf if found.mismatched else found.max_rel
        if size > moved or not worst:
            worst, moved = name, float(size)
    return Change(moved, worst, missing=tuple(missing))


def _outputs(graph: Graph, inputs: Inputs) -> dict[str, Array]:
    """The outputs on ``inputs``, cast to what the graph takes now; inputs that it does not declare are left out."""
    given = {}
    for value in graph.inputs():
        if value.name in inputs:
            array = inputs[value.name]
            given[value.name] = array.astype(value.dtype.numpy, copy=False) if value.dtype is not None else array
        elif graph.role(value.name) in (Role.USER, Role.CONTEXT) and not is_optional(graph, value):
            raise InputError(f"there is no sample for the input {value!r}")
    return executor_for(graph).open(graph)(given)


def _rounding(outputs: Mapping[str, Array]) -> float:
    floats = [DType.of(array.dtype) for array in outputs.values() if DType.of(array.dtype).is_float]
    bits = {DType.F64: 52, DType.F32: 23, DType.F16: 10, DType.BF16: 7}
    return max((_ULPS * 2.0 ** -bits.get(dtype, 2) for dtype in floats), default=0.0)
