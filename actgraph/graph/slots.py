"""Slots: state across calls, as a pair of an input and an output of a graph.

A pass declares a slot with ``Editor.add_slot`` and writes it with ``Editor.write_slot``. What stands in the file is explicit:
the input holds the old content, the output the new one, and whoever runs the graph feeds one back to the other. A session may
keep both in one buffer and write in place (``update = scatter`` or ``ring``). Slots are set back by ``reset``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from actgraph.errors import ActgraphError, InputError, VerifyError
from actgraph.graph.graph import Array, Graph, Role
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import Shape, TensorType

#: When a slot is set back to ``init``, and how a graph writes it.
RESETS = ("request", "session", "never")
UPDATES = ("replace", "append", "scatter", "ring")
STATE_IN, STATE_OUT = "state_in.", "state_out."
_SLOTS = "slots"  # the key of a graph's metadata that holds what types alone do not say


@dataclass(frozen=True)
class Slot:
    """State across calls: the graph input ``input`` and the graph output ``output``.

    init: the number that fills the slot at first (a slot that grows starts with no entries). reset: when it is filled again
    (``request``: for each new request of a row, ``session``: never within a session, ``never``: it outlives sessions).
    update: the output is the whole new content (``replace``), the old content with entries appended along the axis that grows
    (``append``), or the old content with some entries written over: at their positions (``scatter``), or at their positions
    modulo the number of places (``ring``, which holds the last tokens and is never full). Both may be done in place, where
    nothing reads the old content after the write.
    input, output: their names, ``state_in.<name>`` and ``state_out.<name>`` where a convention has no others.
    """

    name: str
    dtype: DType
    shape: Shape
    init: float = 0.0
    reset: str = "request"
    update: str = "replace"
    input: str = ""
    output: str = ""

    def __post_init__(self) -> None:
        if self.reset not in RESETS:
            raise InputError(f"slot {self.name}: reset is {self.reset!r}", f"choose {', '.join(RESETS)}")
        if self.update not in UPDATES:
            raise InputError(f"slot {self.name}: update is {self.update!r}", f"choose {', '.join(UPDATES)}")
        object.__setattr__(self, "input", self.input or f"{STATE_IN}{self.name}")
        object.__setattr__(self, "output", self.output or f"{STATE_OUT}{self.name}")

    @property
    def type(self) -> TensorType:
        return TensorType(self.dtype, self.shape)

    def __str__(self) -> str:
        return f"{self.name}: {self.type} {{init = {self.init:g}, reset = {self.reset}, update = {self.update}}}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name, "dtype": self.dtype.value, "shape": list(self.shape), "init": self.init, "reset": self.reset,
            "update": self.update, "input": self.input, "output": self.output,
        }  # fmt: skip

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Slot:
        return Slot(
            data["name"], DType(data["dtype"]), tuple(data["shape"]), float(data["init"]), data["reset"], data["update"],
            data.get("input", ""), data.get("output", ""),
        )  # fmt: skip


def slots_of(graph: Graph) -> dict[str, Slot]:
    """The slots of a graph, by name: its inputs with role SLOT, with what ``declare_slot`` recorded."""
    recorded: dict[str, dict[str, Any]] = json.loads(graph.metadata.get(_SLOTS, "{}"))
    names = {data.get("input", f"{STATE_IN}{name}"): name for name, data in recorded.items()}
    found = {}
    for value in graph.inputs():
        if graph.role(value.name) is not Role.SLOT:
            continue
        name = names.get(value.name, value.name.removeprefix(STATE_IN))
        if value.dtype is None or value.shape is None:
            raise VerifyError(f"slot {name} of {graph.name} has no known type")
        found[name] = Slot(name, value.dtype, value.shape, **recorded.get(name, {}))
    return found


def initial(slot: Slot, batch: int) -> Array:
    """The content of ``slot`` before the first call, for ``batch`` rows: no entries where it grows."""
    sizes = [size if isinstance(size, int) else (batch if axis == 0 else 0) for axis, size in enumerate(slot.shape)]
    return np.full(sizes, slot.init, slot.dtype.numpy)


def with_initial_slots(graph: Graph, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """``inputs`` and, for the slots that they lack, their first content, so that a graph with state runs as one without."""
    slots = [slot for slot in slots_of(graph).values() if slot.input not in inputs]
    if not slots:
        return dict(inputs)
    dims = {slot.shape[0] for slot in slots}
    of_rows = [v.name for v in graph.inputs() if v.shape and v.shape[0] in dims and isinstance(v.shape[0], str)]
    batch = next((len(inputs[name]) for name in of_rows if name in inputs), 1)
    return {**inputs, **{slot.input: initial(slot, batch) for slot in slots}}


def places(graph: Graph) -> int | None:
    """How many tokens the slots of ``graph`` hold in all; ``None`` where none is of fixed size (a ring is never full)."""
    fixed = [slot.shape[2] for slot in slots_of(graph).values() if slot.update == "scatter" and len(slot.shape) > 2]
    return min((size for size in fixed if isinstance(size, int)), default=None)


def advance(slots: Iterable[Slot], results: Mapping[str, Array]) -> dict[str, Array]:
    """The state for the next call, by input name, from the ``results`` of this one."""
    return {slot.input: results[slot.output] for slot in slots}


def slot_problems(graph: Graph) -> Iterator[str]:
    """What is wrong with the slots of ``graph``, one line each: every one is read and written, with types that fit."""
    try:
        written = {label: value for label, value in graph.outputs() if graph.role(label) is Role.SLOT}
        slots = slots_of(graph)
    except KeyError:
        return  # an input or output without a role, which the verifier says itself
    except (InputError, VerifyError, TypeError, ValueError) as error:
        yield error.message if isinstance(error, ActgraphError) else f"its slots are recorded wrongly: {error}"
        return
    recorded = json.loads(graph.metadata.get(_SLOTS, "{}"))
    yield from (f"slot {name} is declared, and no input holds it" for name in recorded if name not in slots)
    for slot in slots.values():
        value = written.pop(slot.output, None)
        if value is None:
            yield f"slot {slot.name} is read and not written: there is no output {slot.output} of that role"
        elif value.dtype is not None and value.dtype is not slot.dtype:
            yield f"slot {slot.name} is {slot.type} and {value.type} is written to it"
        elif value.shape is not None and not _fits(slot, value.shape):
            rule = "grow along one axis" if slot.update == "append" else "keep its shape"
            yield f"slot {slot.name} is {slot.type} and {value.type} is written to it, which should {rule} ({slot.update})"
    yield from (f"the output {label} is that of no slot" for label in written)


def _fits(slot: Slot, written: Shape) -> bool:
    if len(slot.shape) != len(written):
        return False
    changed = [(old, new) for old, new in zip(slot.shape, written, strict=True) if old != new and None not in (old, new)]
    known = None not in slot.shape and None not in written
    return (len(changed) == 1 or (not changed and not known)) if slot.update == "append" else not changed


def declare_slot(graph: Graph, slot: Slot) -> None:
    """Record how a slot of ``graph`` is named, starts, is reset and updated (its type is that of its input)."""
    recorded = json.loads(graph.metadata.get(_SLOTS, "{}"))
    recorded[slot.name] = {"init": slot.init, "reset": slot.reset, "update": slot.update}
    if slot.input != f"{STATE_IN}{slot.name}" or slot.output != f"{STATE_OUT}{slot.name}":
        recorded[slot.name] |= {"input": slot.input, "output": slot.output}
    graph.metadata[_SLOTS] = json.dumps(recorded, sort_keys=True)
