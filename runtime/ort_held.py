"""The held lowering of ONNX graphs: slots are values of onnxruntime, bound to its inputs and outputs once.

A slot of fixed size that nothing but its write reads is bound as input and output to one buffer: onnxruntime's ScatterElements
then writes in place. Slots that grow stay onnxruntime's own values: what came out of one call goes into the next, uncopied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnxruntime as ort

from actgraph.errors import InputError
from actgraph.graph.graph import Array, Graph
from actgraph.graph.onnx import OnnxGraph
from actgraph.graph.slots import Slot, initial, slots_of
from actgraph.runtime.ort_engine import OrtRunner, array_of_value, first_line, value_of
from actgraph.runtime.state import by_token, check_contents, entries


class HeldOnnx:
    """One graph of a program, opened. Immutable, so that sessions in several threads may run it with their own values."""

    def __init__(self, graph: Graph) -> None:
        assert isinstance(graph, OnnxGraph)
        self.graph = graph
        self.runner = OrtRunner(graph)
        slots = list(slots_of(graph).values())
        self.donated = [slot for slot in slots if _donates(graph, slot)]
        self.moving = [slot for slot in slots if slot not in self.donated]
        ours = {slot.output for slot in self.donated}
        self.optional = frozenset(graph.optional)
        #: Outputs that onnxruntime allocates, in the order in which they are bound.
        self.allocated = [name for name, _ in graph.outputs() if name not in ours]

    def run(self, binding: ort.IOBinding) -> None:
        """Raises InputError with onnxruntime's reason."""
        try:
            self.runner.session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime raises its own classes, which derive from Exception directly
            raise InputError(f"onnxruntime cannot run these inputs: {first_line(error)}") from error


class OrtState:
    """The slots of one session as values of onnxruntime. See ``State``."""

    def __init__(self, graphs: Mapping[str, HeldOnnx], slots: Sequence[Slot], batch: int, limit: int | None) -> None:
        self._graphs, self._slots, self._batch = graphs, slots, batch
        self.reset()

    def reset(self) -> None:
        self._values = {slot.input: value_of(initial(slot, self._batch)) for slot in self._slots}
        self._bindings: dict[str, ort.IOBinding] = {}

    @property
    def bytes(self) -> int:
        return sum(value.tensor_size_in_bytes() for value in self._values.values())

    def run(self, stage: str, inputs: Mapping[str, Array], used: int) -> dict[str, Array]:
        held = self._graphs[stage]
        if stage not in self._bindings:
            self._bindings[stage] = self._bind(held)
        binding = self._bindings[stage]
        for name, array in inputs.items():
            if name in held.optional:  # onnxruntime finds these by value only
                binding.bind_ortvalue_input(name, value_of(array))
            else:
                binding.bind_cpu_input(name, array)
        for slot in held.moving:
            binding.bind_ortvalue_input(slot.input, self._values[slot.input])
        for name in held.allocated:  # anew: what a call returned is the caller's
            binding.bind_output(name)
        held.run(binding)
        results = dict(zip(held.allocated, binding.get_outputs()[: len(held.allocated)], strict=True))
        for slot in held.moving:
            self._values[slot.input] = results.pop(slot.output)
        return {name: array_of_value(value) for name, value in results.items()}

    def _bind(self, held: HeldOnnx) -> ort.IOBinding:
        """What stays bound from call to call: the buffers that are written in place."""
        binding = held.runner.session.io_binding()
        for name in held.allocated:
            binding.bind_output(name)
        for slot in held.donated:
            binding.bind_ortvalue_input(slot.input, self._values[slot.input])
            binding.bind_ortvalue_output(slot.output, self._values[slot.input])
        return binding

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
