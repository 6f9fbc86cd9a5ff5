"""The held lowering of ONNX graphs: slots are values of onnxruntime, bound to its inputs and outputs.

Growing caches are fused with their attentions where that is possible (see ``ort_fused``) and nothing is padding: then each is a
buffer with room for more tokens, bound as past and present at once. Else they stay onnxruntime's own values: what came out of
one call goes into the next, uncopied. A slot of fixed size that nothing but its write reads is one buffer, bound as input and
output: onnxruntime's ScatterElements then writes in place.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort

from actgraph.errors import InputError, UnsupportedError
from actgraph.graph.graph import Array, Graph
from actgraph.graph.onnx import OnnxGraph
from actgraph.graph.slots import Slot, initial, slots_of
from actgraph.runtime.ort_engine import array_of_value, first_line, open_graph, value_of
from actgraph.runtime.ort_fused import feeds, fuse
from actgraph.runtime.state import by_token, check_contents, entries, filled, room_for


class HeldOnnx:
    """One graph of a program. Immutable, so that sessions in several threads may run it with their own values.

    fused: the graph with fused attentions, for calls without padding; ``None`` where ``why_plain`` has a reason.
    """

    def __init__(self, graph: Graph, limit: int | None) -> None:
        assert isinstance(graph, OnnxGraph)
        self.graph = graph
        self.fused: Opened | None = None
        self.why_plain = ""
        self._plain: Opened | None = None
        self._lock = threading.Lock()
        try:
            self.fused = Opened(fuse(graph, limit), graph)
        except UnsupportedError as error:
            self.why_plain = error.message

    @property
    def plain(self) -> Opened:
        """The graph as it is, opened when it is first asked for."""
        with self._lock:
            if self._plain is None:
                self._plain = Opened(self.graph, self.graph)
            return self._plain


class Opened:
    """A session of onnxruntime on ``graph``, whose slots are those of ``source``."""

    def __init__(self, graph: OnnxGraph, source: OnnxGraph) -> None:
        self.session, self._weights = open_graph(graph)
        slots = list(slots_of(source).values())
        self.donated = [slot for slot in slots if _donates(source, slot)]
        self.moving = [slot for slot in slots if slot not in self.donated]
        self.slots = slots
        self.optional = frozenset(source.optional)
        self.inputs = {item.name for item in self.session.get_inputs()} | self.optional
        written = {slot.output for slot in slots}
        self.outputs = [name for name, _ in source.outputs() if name not in written]

    def run(self, binding: ort.IOBinding) -> None:
        """Raises InputError with onnxruntime's reason."""
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime raises its own classes, which derive from Exception directly
            raise InputError(f"onnxruntime cannot run these inputs: {first_line(error)}") from error

    def bind(self, binding: ort.IOBinding, inputs: Mapping[str, Array]) -> None:
        for name, array in inputs.items():
            if name in self.optional:  # onnxruntime finds these by value only
                binding.bind_ortvalue_input(name, value_of(array))
            elif name in self.inputs:
                binding.bind_cpu_input(name, array)


class OrtState:
    """The slots of one session as values of onnxruntime. See ``State``.

    It begins with fused graphs where there are some, and goes on with plain ones from the first padding on.
    """

    def __init__(self, graphs: Mapping[str, HeldOnnx], slots: Sequence[Slot], batch: int, limit: int | None) -> None:
        self._graphs, self._slots, self._batch, self._limit = graphs, slots, batch, limit
        self.reset()

    def reset(self) -> None:
        self._fused = all(held.fused is not None for held in self._graphs.values())
        self._used = self._room = 0
        self._values = {slot.input: value_of(initial(slot, self._batch)) for slot in self._slots}
        self._bindings: dict[str, ort.IOBinding] = {}

    @property
    def bytes(self) -> int:
        size = sum(int(value.tensor_size_in_bytes()) for value in self._values.values())
        return size * self._used // self._room if self._fused and self._room else size

    def run(self, stage: str, inputs: Mapping[str, Array], used: int) -> dict[str, Array]:
        count = inputs["input_ids"].shape[1]
        mask = inputs.get("attention_mask")
        if self._fused and mask is not None and not mask.all():
            self._unfuse()
        run = self._run_fused if self._fused else self._run_plain
        results = run(stage, inputs, used, count)
        self._used = used + count
        return results

    # --- fused ------------------------------------------------------------------------------------------------------------

    def _run_fused(self, stage: str, inputs: Mapping[str, Array], used: int, count: int) -> dict[str, Array]:
        opened = self._graphs[stage].fused
        assert opened is not None
        if used + count > self._room:
            self._grow(room_for(used + count, self._room, self._limit))
        binding = self._bindings.get(stage)
        if binding is None:
            binding = self._bindings[stage] = opened.session.io_binding()
            for name in opened.outputs:
                binding.bind_output(name)
            for slot in self._slots:
                binding.bind_ortvalue_input(slot.input, self._values[slot.input])
                binding.bind_ortvalue_output(slot.output, self._values[slot.input])
        else:
            for name in opened.outputs:  # anew: what a call returned is the caller's
                binding.bind_output(name)
        opened.bind(binding, inputs)
        opened.bind(binding, feeds(used, count, self._batch))
        opened.run(binding)
        return {
            name: array_of_value(value)
            for name, value in zip(opened.outputs, binding.get_outputs()[: len(opened.outputs)], strict=True)
        }

    def _grow(self, room: int) -> None:
        for slot in self._slots:
            buffer = filled(slot, self._batch, room)
            if self._used:
                entries(buffer, 0, self._used)[...] = entries(array_of_value(self._values[slot.input]), 0, self._used)
            self._values[slot.input] = value_of(buffer)
        self._room = room
        self._bindings.clear()

    def _unfuse(self) -> None:
        """Go on with the entries alone."""
        for slot in self._slots:
            array = entries(array_of_value(self._values[slot.input]), 0, self._used)
            self._values[slot.input] = value_of(np.ascontiguousarray(array))
        self._fused, self._room = False, 0
        self._bindings.clear()

    # --- plain ------------------------------------------------------------------------------------------------------------

    def _run_plain(self, stage: str, inputs: Mapping[str, Array], used: int, count: int) -> dict[str, Array]:
        opened = self._graphs[stage].plain
        names = [*opened.outputs, *(slot.output for slot in opened.moving)]
        binding = self._bindings.get(stage)
        if binding is None:
            binding = self._bindings[stage] = opened.session.io_binding()
            for name in names:
                binding.bind_output(name)
            for slot in opened.donated:
                binding.bind_ortvalue_input(slot.input, self._values[slot.input])
                binding.bind_ortvalue_output(slot.output, self._values[slot.input])
        else:
            for name in names:
                binding.bind_output(name)
        for slot in opened.moving:
            binding.bind_ortvalue_input(slot.input, self._values[slot.input])
        opened.bind(binding, inputs)
        opened.run(binding)
        results = dict(zip(names, binding.get_outputs()[: len(names)], strict=True))
        for slot in opened.moving:
            self._values[slot.input] = results.pop(slot.output)
        if opened.moving and len(self._bindings) > 1:  # another graph may write in place what has moved
            self._bindings = {stage: binding}
        return {name: array_of_value(value) for name, value in results.items()}

    # --- entries ----------------------------------------------------------------------------------------------------------

    def read(self, start: int, stop: int) -> dict[str, Array]:
        held = {slot.name: array_of_value(self._values[slot.input]) for slot in by_token(self._slots)}
        return {name: entries(array, start, stop).copy() for name, array in held.items()}

    def load(self, contents: Mapping[str, Array], count: int) -> None:
        check_contents(contents, self._slots, count)
        for slot in by_token(self._slots):
            array = contents[slot.name]
            if slot.update != "append":
                array = initial(slot, self._batch)
                entries(array, 0, count)[...] = contents[slot.name]
            self._values[slot.input] = value_of(array.copy())
        self._used = self._room = count
        self._bindings.clear()


def _donates(graph: OnnxGraph, slot: Slot) -> bool:
    """Whether the slot may be written in place: what writes it is the only reader of its content (others read its size)."""
    if slot.update not in ("scatter", "ring"):
        return False
    uses = graph.value(slot.input).uses
    content = [use.node for use in uses if use.node is None or use.node.op not in _READ_SIZES]
    return len(content) == 1 and content[0] is not None and content[0].op == "actgraph.cache_write"


#: Ops that read how large a tensor is, and not what is in it.
_READ_SIZES = ("actgraph.length", "actgraph.positions", "onnx.Shape", "onnx.Size")
