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
from actgraph.ops.dtypes import COMPUTE_FLOATS, DType
from actgraph.ops.shapes import TensorType
from actgraph.runtime.claims import Claims
from actgraph.runtime.fusing import with_kernel_ops
from actgraph.runtime.ort_engine import array_of_value, first_line, open_graph, value_of, view_of_value
from actgraph.runtime.ort_fused import feeds, fuse
from actgraph.runtime.ort_kernels import claim
from actgraph.runtime.state import by_token, check_contents, entries, filled, room_for, to_reset

#: Bytes of weights below which one token is computed sooner by one thread than several threads have found each other.
_ALONE = 8 << 20


class HeldOnnx:
    """One graph of a program. Immutable, so that sessions in several threads may run it with their own values.

    fused: the graph with fused attentions, for calls without padding; ``None`` where ``why_plain`` has a reason.
    """

    def __init__(
        self, graph: Graph, limit: int | None, *, kernels: bool = False, prompts: bool = False, few: bool | None = None
    ) -> None:
        """limit: the tokens that a session can hold. kernels: run what has kernels with them. prompts: for no single tokens.

        few: of a graph that is not called by sessions, whether its calls have few tokens.
        """
        assert isinstance(graph, OnnxGraph)
        if kernels:
            graph = with_kernel_ops(graph, gates=not prompts, few=few)
        self.graph, self._kernels, self._steps = graph, kernels, few is None
        self.fused: Opened | None = None
        self.why_plain = ""
        slots = {slot.input for slot in slots_of(graph).values()}
        self._dims = {
            size: (value.name, axis)
            for value in graph.inputs()
            if value.name not in slots and value.name not in graph.optional
            for axis, size in enumerate(value.shape or ())
            if isinstance(size, str) and size.isidentifier()
        }
        self._plain: Opened | None = None
        self._lock = threading.Lock()
        try:
            self.fused = Opened(fuse(graph, limit), graph, kernels=kernels, steps=self._steps)
        except UnsupportedError as error:
            self.why_plain = error.message

    @property
    def plain(self) -> Opened:
        """The graph as it is, opened when it is first asked for."""
        with self._lock:
            if self._plain is None:
                self._plain = Opened(self.graph, self.graph, kernels=self._kernels, steps=self._steps)
            return self._plain

    @property
    def claims(self) -> Claims:
        """Of the graph that runs without padding, where there is one."""
        return (self.fused or self.plain).claims

    def sizes(self, inputs: Mapping[str, Array]) -> dict[str, int]:
        """The sizes of the named dimensions in ``inputs``."""
        return {size: inputs[name].shape[axis] for size, (name, axis) in self._dims.items() if name in inputs}


class Opened:
    """A session of onnxruntime on ``graph``, whose slots are those of ``source``.

    profile: where onnxruntime's profiler writes; ``graph`` is then what the session was opened on.
    """

    def __init__(
        self, graph: OnnxGraph, source: OnnxGraph, *, kernels: bool = False, profile: str = "", steps: bool = True
    ) -> None:
        """steps: calls are those of sessions, most of them with one token."""
        self.claims = Claims()
        if kernels:
            graph = graph.clone()
            self.claims = claim(graph)
        size = sum(
            value.const_value.nbytes for value in graph.model.graph.initializers.values() if value.const_value is not None
        )
        threads = 1 if steps and size < _ALONE else 0
        self.session, self._weights = open_graph(graph, threads=threads, kernels=kernels, profile=profile)
        self.graph = graph if profile else None
        slots = list(slots_of(source).values())
        self.donated = [slot for slot in slots if _donates(source, slot)]
        self.moving = [slot for slot in slots if slot not in self.donated]
        self.optional = frozenset(source.optional)
        self.inputs = {item.name for item in self.session.get_inputs()} | self.optional
        written = {slot.output for slot in slots}
        self.outputs = {name: value.type for name, value in source.outputs() if name not in written}


class Binding:
    """What a session has bound to the inputs and outputs of one ``Opened``.

    Binding costs as much as a small operator, so inputs stay bound to arrays of the binding's own while their shapes stay.
    """

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self._native: ort.IOBinding = opened.session.io_binding()
        self._arrays: dict[str, Array] = {}
        self._order: dict[str, None] = {}  # of the outputs, as they were first bound

    def hold(self, slot: Slot, value: ort.OrtValue) -> None:
        """One buffer for the old and the new content."""
        self._native.bind_ortvalue_input(slot.input, value)
        self._native.bind_ortvalue_output(slot.output, value)
        self._order[slot.output] = None

    def read(self, name: str, value: ort.OrtValue) -> None:
        self._native.bind_ortvalue_input(name, value)

    def run(
        self, inputs: Mapping[str, Array], dims: Mapping[str, int], moving: Sequence[str] = ()
    ) -> tuple[dict[str, Array], dict[str, ort.OrtValue]]:
        """The outputs, in memory of their own, and those called ``moving`` as values of onnxruntime.

        dims: sizes of named dimensions, for outputs that can be allocated before the call. Raises InputError.
        """
        for name, array in inputs.items():
            if name in self.opened.inputs:
                self._input(name, array)
        results: dict[str, Array] = {}
        unknown = list(moving)
        for name, kind in self.opened.outputs.items():
            memory = _allocated(kind, dims)
            if memory is None:
                unknown.append(name)
            else:
                results[name] = memory
                self._native.bind_ortvalue_output(name, value_of(memory))
                self._order[name] = None
        for name in unknown:
            self._native.bind_output(name)
            self._order[name] = None
        try:
            self.opened.session.run_with_iobinding(self._native)
        except Exception as error:  # onnxruntime raises its own classes, which derive from Exception directly
            raise InputError(f"onnxruntime cannot run these inputs: {first_line(error)}") from error
        if not unknown:
            return results, {}
        bound = dict(zip(self._order, self._native.get_outputs(), strict=True))
        results |= {name: array_of_value(bound[name]) for name in unknown if name not in moving}
        return {name: results[name] for name in self.opened.outputs}, {name: bound[name] for name in moving}

    def _input(self, name: str, array: Array) -> None:
        own = self._arrays.get(name)
        if own is not None and own.shape == array.shape:
            np.copyto(own, array)
            return
        own = self._arrays[name] = array.copy()
        if name in self.opened.optional:  # onnxruntime finds these by value only
            self._native.bind_ortvalue_input(name, value_of(own))
        else:
            self._native.bind_cpu_input(name, own)


def _allocated(kind: TensorType, dims: Mapping[str, int]) -> Array | None:
    """Memory for an output, where all its sizes are known."""
    if kind.shape is None or kind.dtype is None or kind.dtype not in COMPUTE_FLOATS or kind.dtype is DType.BF16:
        return None
    sizes = [dims.get(size) if isinstance(size, str) else size for size in kind.shape]
    return None if None in sizes else np.empty([size for size in sizes if size is not None], kind.dtype.numpy)


class OrtState:
    """The slots of one session as values of onnxruntime. See ``State``.

    It begins with fused graphs where there are some, and goes on with plain ones from the first padding on. Several tokens
    of several rows behind others are for plain graphs as well.
    """

    def __init__(self, graphs: Mapping[str, HeldOnnx], slots: Sequence[Slot], batch: int, limit: int | None) -> None:
        self._graphs, self._slots, self._batch, self._limit = graphs, slots, batch, limit
        self._values: dict[str, ort.OrtValue] = {}
        self.reset()

    def reset(self) -> None:
        self._fused = self._may_fuse = all(held.fused is not None for held in self._graphs.values())
        self._used = self._room = 0
        self._values |= {slot.input: value_of(initial(slot, self._batch)) for slot in to_reset(self._slots, self._values)}
        self._bindings: dict[str, Binding] = {}

    @property
    def bytes(self) -> int:
        size = sum(int(value.tensor_size_in_bytes()) for value in self._values.values())
        return size * self._used // self._room if self._fused and self._room else size

    def run(self, stage: str, inputs: Mapping[str, Array], used: int) -> dict[str, Array]:
        count = inputs["input_ids"].shape[1]
        mask = inputs.get("attention_mask")
        if mask is not None and not mask.all():
            self._may_fuse = False
        fused = self._may_fuse and (self._batch == 1 or count == 1 or not used)  # onnxruntime's limit
        if fused != self._fused:
            self._exchange(fused)
        dims = self._graphs[stage].sizes(inputs)
        results = self._run_fused(stage, inputs, dims, used, count) if self._fused else self._run_plain(stage, inputs, dims)
        self._used = used + count
        return results

    # --- fused ------------------------------------------------------------------------------------------------------------

    def _run_fused(
        self, stage: str, inputs: Mapping[str, Array], dims: Mapping[str, int], used: int, count: int
    ) -> dict[str, Array]:
        if used + count > self._room:
            self._grow(room_for(used + count, self._room, self._limit))
        binding = self._bindings.get(stage)
        if binding is None:
            opened = self._graphs[stage].fused
            assert opened is not None
            binding = self._bindings[stage] = Binding(opened)
            for slot in self._slots:
                binding.hold(slot, self._values[slot.input])
        return binding.run({**inputs, **feeds(used, count, self._batch)}, dims)[0]

    def _grow(self, room: int) -> None:
        for slot in self._slots:
            buffer = filled(slot, self._batch, room)
            if self._used:
                entries(buffer, 0, self._used)[...] = entries(view_of_value(self._values[slot.input]), 0, self._used)
            self._values[slot.input] = value_of(buffer)
        self._room = room
        self._bindings.clear()

    def _exchange(self, fused: bool) -> None:
        """Go on with the other graphs, from the entries alone."""
        if self._fused:
            for slot in self._slots:
                array = entries(view_of_value(self._values[slot.input]), 0, self._used)
                self._values[slot.input] = value_of(array.copy())  # the old value and its memory go
        self._fused, self._room = fused, self._used if fused else 0
        self._bindings.clear()

    # --- plain ------------------------------------------------------------------------------------------------------------

    def _run_plain(self, stage: str, inputs: Mapping[str, Array], dims: Mapping[str, int]) -> dict[str, Array]:
        binding = self._bindings.get(stage)
        if binding is None:
            binding = self._bindings[stage] = Binding(self._graphs[stage].plain)
            for slot in binding.opened.donated:
                binding.hold(slot, self._values[slot.input])
        moving = binding.opened.moving
        for slot in moving:
            binding.read(slot.input, self._values[slot.input])
        results, values = binding.run(inputs, dims, [slot.output for slot in moving])
        for slot in moving:
            self._values[slot.input] = values[slot.output]
        if moving and len(self._bindings) > 1:  # another graph may write in place what has moved
            self._bindings = {stage: binding}
        return results

    # --- entries ----------------------------------------------------------------------------------------------------------

    def read(self, start: int, stop: int) -> dict[str, Array]:
        held = {slot.name: view_of_value(self._values[slot.input]) for slot in by_token(self._slots)}
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
