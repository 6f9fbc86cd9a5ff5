"""Steps of single tokens as lists of kernel frames: recorded by the first step of a session, run from C by those that follow.

Between two tokens nothing changes but the token, its position and how many entries growing slots hold. So the first step is
executed node by node, each kernel's frame is kept, results stay where they are, and a later step writes what has changed into
the frames and runs them all in one call. What has no kernel (positions, cosines, masks) stays Python, before frames or between
them; where such a result is read by frames, its address is written into them.
"""

from __future__ import annotations

import ctypes
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx
from torch.nn import functional

from actgraph.graph.fx_types import array_of, tensor_of
from actgraph.graph.graph import Array
from actgraph.runtime.kernels.numba import activations, linear
from actgraph.runtime.kernels.numba.objects import loaded
from actgraph.runtime.kernels.numba.plain import PLAIN
from actgraph.runtime.native.library import HEAD, TENSOR, Variant, library
from actgraph.runtime.state import TOKENS
from actgraph.runtime.torch_kernels import KernelCall
from actgraph.runtime.torch_lowering import append, front, write, write_front

if TYPE_CHECKING:
    from actgraph.runtime.torch_held import HeldGraph

#: The operands of kernels that may be the front of a larger buffer: the op and the places.
_READS_FRONTS = {"attention": (1, 2, 4, 5)}
_ARITHMETIC: dict[Any, str] = {torch.add: "add", torch.sub: "subtract", torch.mul: "multiply"}
_ACTIVATIONS: dict[Any, int] = {functional.silu: activations.SILU, torch.ops.aten.relu.default: activations.RELU}
_GELUS = {"none": activations.GELU, "tanh": activations.GELU_TANH}
#: What depends on shapes alone.
_SIZES = (torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default, torch.ops.aten.sym_stride.int)
#: What products in the layout "out_in" look at before they look at weights, beside x and attributes.
_PREPARED = (linear.ZERO, linear.THRESHOLDS, linear.INDICES)
_ROOM = 11
#: References to an array that only the list of kept ones has, while it is looked at: list, loop, argument. How many are kept.
_UNREAD, _KEPT = 3, 4


@dataclass(eq=False)
class _Front:
    """The first entries of a slot's buffer, as many as there are tokens."""

    buffer: torch.Tensor


@dataclass(eq=False)
class _Changing:
    """What Python computes anew in each step. words: where its address stands in the frames."""

    value: Any
    words: list[int] = field(default_factory=list)
    index: Array | None = None  # the same, as an index


@dataclass(eq=False)
class _Frame:
    """A frame to be: its variant, its words, and the texts of its errors."""

    variant: Variant
    words: Array
    failed: Callable[[int], None]
    fronts: list[int] = field(default_factory=list)  # words with the number of tokens that are held
    rows: list[tuple[int, int]] = field(default_factory=list)  # words with the place of the next entry, bytes of an entry
    changing: list[tuple[int, _Changing]] = field(default_factory=list)
    product: Any = None  # of products: equal for those that can be computed together
    prepares: Any = None  # equal for those that prepare x in the same way


@dataclass(eq=False)
class _Stretch:
    """Python code, then frames."""

    nodes: list[fx.Node] = field(default_factory=list)
    frames: list[_Frame] = field(default_factory=list)


class Recording:
    """The steps of one session for single tokens, as long as its buffers stay where they are. Not for several threads at once.

    results: of the step that was recorded.
    """

    def __init__(
        self, held: HeldGraph, inputs: Mapping[str, torch.Tensor], slots: Mapping[str, torch.Tensor], used: int
    ) -> None:
        """Record a step with ``used`` tokens held. slots: the tensors of all slots, by the name of their input."""
        self._held, self._used = held, used
        self._env: dict[fx.Node, Any] = {}
        self._level: dict[fx.Node, int] = {}
        self._stretches: list[_Stretch] = []
        self._native: set[fx.Node] = set()  # what frames compute, and views of that
        self._constant: set[fx.Node] = set()  # weights, and what is made of weights alone
        self._copies: dict[fx.Node, list[Array]] = {}
        self._written: set[int] = set()  # the memory of results of frames
        self._touched: dict[int, list[fx.Node]] = {}  # who reads or writes the memory of a slot, in order
        moving = {slot.input for output, slot in held.slots.items() if output in held.outputs}
        self._own: dict[str, torch.Tensor] = {}  # inputs whose shape never changes, at addresses that never change
        self._given: dict[str, fx.Node] = {}
        self._slot_memory = {t.untyped_storage().data_ptr() for name, t in slots.items() if name not in moving}
        placeholders = [node for node in held.native.nodes if node.op == "placeholder"]
        names = [*held.inputs, None, *[""] * len(held.weights)]
        weights = iter(held.weights)
        for node, name in zip(placeholders, names, strict=True):
            self._level[node] = 0
            if name is None:
                self._env[node] = _Changing(used)
                self._used_node = node
            elif name == "":
                self._env[node] = next(weights)
                self._constant.add(node)
            elif name in slots and name not in moving:
                self._env[node] = slots[name]
            elif name in slots:
                self._env[node] = _Changing(slots[name])
                self._given[name] = node
            elif name not in inputs:
                self._env[node] = held.defaults[name]
                self._constant.add(node)
            elif _grows(inputs[name], used):
                self._env[node] = _Changing(inputs[name])
                self._given[name] = node
            else:
                self._env[node] = self._own[name] = inputs[name].clone()
        with torch.no_grad():
            for node in held.native.nodes:
                if node.op not in ("placeholder", "output"):
                    self._record(node)
        self._finish(held.native.output_node())

    # --- recording --------------------------------------------------------------------------------------------------------

    def _record(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            self._level[node] = 0
            self._constant.add(node)
            self._env[node] = operator.attrgetter(str(node.target))(self._held.root)
            return
        frame = self._frame_of(node)
        if frame is not None:
            level = max((self._level[source] for source in node.all_input_nodes), default=0)
            level = max([level, *(self._level[other] for other in self._earlier(node))])
            self._at(level).frames.append(frame)
            self._level[node] = level
            self._note(node)
            return
        operands = [self._env[source] for source in node.all_input_nodes]
        result = self._compute(node)
        fixed = not any(isinstance(operand, (_Changing, _Front)) for operand in operands)
        sizes = node.target in _SIZES or not any(isinstance(operand, torch.Tensor) for operand in operands)
        if fixed and (self._is_view(node, result) if isinstance(result, torch.Tensor) else sizes):
            self._env[node] = result  # of what never changes its place: neither does it
            self._level[node] = max((self._level[source] for source in node.all_input_nodes), default=0)
            if any(source in self._native for source in node.all_input_nodes):
                self._native.add(node)
            if all(source in self._constant for source in node.all_input_nodes):
                self._constant.add(node)
            return
        if fixed and all(source in self._constant for source in node.all_input_nodes):
            self._env[node], self._level[node] = result, 0
            self._constant.add(node)
            return
        level = max((self._level[source] + (source in self._native) for source in node.all_input_nodes), default=0)
        if node.target in (write, write_front, append):
            level = max([level, *(self._level[other] + (other in self._native) for other in self._earlier(node))])
        self._at(level).nodes.append(node)
        self._env[node], self._level[node] = _Changing(result), level
        self._note(node)

    def _compute(self, node: fx.Node) -> Any:
        """What a node gives for the step that is recorded."""
        if node.op == "call_module":
            target: Any = self._held.root.get_submodule(str(node.target))
        elif node.op == "call_method":
            target = getattr(torch.Tensor, str(node.target))
        else:
            target = node.target
        arguments, options = fx.node.map_arg((node.args, node.kwargs), lambda source: self._value(source))
        return target(*arguments, **options)

    def _value(self, node: fx.Node) -> Any:
        found = self._env[node]
        if isinstance(found, _Front):
            return front(found.buffer, self._used + 1)
        return found.value if isinstance(found, _Changing) else found

    def _is_view(self, node: fx.Node, result: torch.Tensor) -> bool:
        memory = result.untyped_storage().data_ptr()
        sources = [self._env[source] for source in node.all_input_nodes]
        return node.target is not write and any(
            isinstance(source, torch.Tensor) and source.untyped_storage().data_ptr() == memory for source in sources
        )

    def _at(self, level: int) -> _Stretch:
        while len(self._stretches) <= level:
            self._stretches.append(_Stretch())
        return self._stretches[level]

    def _slots_of(self, node: fx.Node) -> set[int]:
        """The slots whose memory a node reads or writes."""
        found = set()
        for source in node.all_input_nodes:
            value = self._env[source]
            tensor = value.buffer if isinstance(value, _Front) else value.value if isinstance(value, _Changing) else value
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() in self._slot_memory:
                found.add(tensor.untyped_storage().data_ptr())
        return found

    def _note(self, node: fx.Node) -> None:
        for memory in self._slots_of(node):
            self._touched.setdefault(memory, []).append(node)

    def _earlier(self, node: fx.Node) -> list[fx.Node]:
        """Who has read or written the slots of a node before it: they come before it, whatever its operands say."""
        return [other for memory in self._slots_of(node) for other in self._touched.get(memory, ())]

    # --- frames -----------------------------------------------------------------------------------------------------------

    def _frame_of(self, node: fx.Node) -> _Frame | None:
        """The frame of a node, which has run; ``None`` where Python has to compute it."""
        call = getattr(node.target, "kernel_call", None)
        operands = [self._env[a] if isinstance(a, fx.Node) else a for a in node.args]
        made: tuple[_Frame, Any] | None = None
        if isinstance(call, KernelCall):
            constant = all(not isinstance(a, fx.Node) or a in self._constant for a in node.args[1:])
            made = self._kernel(call, operands, constant)
        elif node.target in (append, write_front):
            made = self._write(operands)
        elif node.target in _ARITHMETIC and not node.kwargs and len(operands) == 2:
            made = _arithmetic(_ARITHMETIC[node.target], operands)
        elif node.target in _ACTIVATIONS and len(operands) == 1 and not any(node.kwargs.values()):
            made = _activation(_ACTIVATIONS[node.target], operands[0])
        elif node.target is torch.ops.aten.gelu.default and len(operands) == 1:
            made = _activation(_GELUS[str(node.kwargs.get("approximate", "none"))], operands[0])
        elif node.target is torch.embedding and len(operands) == 2 and not node.kwargs:
            made = _look_up(*operands)
        if made is None:
            return None
        frame, result = made
        if isinstance(result, torch.Tensor):
            self._written.add(result.untyped_storage().data_ptr())
        frame.failed(library().ag_run(ctypes.byref(frame.variant), frame.words.ctypes.data, torch.get_num_threads()))
        self._env[node] = result
        self._native.add(node)
        return frame

    def _kernel(self, call: KernelCall, operands: Sequence[Any], constant: bool) -> tuple[_Frame, torch.Tensor] | None:
        """constant: all operands but the first are the same in each step."""
        fronts = _READS_FRONTS.get(call.op, ())
        tensors: list[torch.Tensor | None] = []
        for place, operand in enumerate(operands):
            if isinstance(operand, _Front):
                if place not in fronts:
                    return None
                tensors.append(front(operand.buffer, self._used + 1))
                continue
            tensor = operand.value if isinstance(operand, _Changing) else operand
            if tensor is not None and not (isinstance(tensor, torch.Tensor) and tensor.is_contiguous()):
                return None
            tensors.append(tensor)
        bound = call.bind(tensors)
        if bound is None:
            return None
        variant, words, result = bound
        frame = _Frame(variant, words, call.check)
        if call.op == "linear" and constant and isinstance(operands[0], torch.Tensor):
            frame.product = tuple(words[HEAD : HEAD + TENSOR].tolist())
            rest = words[HEAD + TENSOR * (linear.TENSORS) :].tolist()
            others = [words[HEAD + TENSOR * place : HEAD + TENSOR * (place + 1)].tolist() for place in _PREPARED]
            if words[HEAD + TENSOR * linear.KEPT] == 0 and rest[linear.LAYOUT] == 0:
                frame.prepares = (frame.product, rest, others, variant.stage[0])
        for place, operand in enumerate(operands):
            at = HEAD + TENSOR * place
            if isinstance(operand, _Front):
                words[at + _ROOM] = operand.buffer.shape[TOKENS]
                frame.fronts.append(at + 3 + TOKENS)
            elif isinstance(operand, _Changing):
                frame.changing.append((at, operand))
        return frame, result

    def _write(self, operands: Sequence[Any]) -> tuple[_Frame, _Front] | None:
        """The entries of new tokens behind those that a slot holds."""
        buffer, new = operands[0], operands[1]
        if not isinstance(buffer, torch.Tensor) or not isinstance(new, torch.Tensor) or not new.is_contiguous():
            return None
        if not buffer.is_contiguous() or new.dtype != buffer.dtype or new.shape[TOKENS] != 1:
            return None
        if new.shape[:TOKENS] != buffer.shape[:TOKENS] or new.shape[TOKENS + 1 :] != buffer.shape[TOKENS + 1 :]:
            return None
        entry = buffer.stride(TOKENS) * buffer.element_size()
        rows = new.numel() * new.element_size() // entry
        frame = _plain(
            "copy_rows", new.data_ptr(), buffer.data_ptr() + self._used * entry, rows, entry, entry,
            entry * buffer.shape[TOKENS],
        )  # fmt: skip
        frame.rows.append((5, entry))
        return frame, _Front(buffer)

    # --- running ----------------------------------------------------------------------------------------------------------

    def _finish(self, output: fx.Node) -> None:
        for stretch in self._stretches:
            stretch.frames = _neighbours(stretch.frames)
        frames = [frame for stretch in self._stretches for frame in stretch.frames]
        starts = np.cumsum([0, *(len(frame.words) for frame in frames)])
        self._words = np.concatenate([frame.words for frame in frames]) if frames else np.zeros(0, np.int64)
        base = self._words.ctypes.data
        self._frames = frames
        groups = [group for stretch in self._stretches for group in _groups(stretch.frames)]
        steps = [
            (ctypes.addressof(frame.variant), base + 8 * int(start), *groups[place])
            for place, (frame, start) in enumerate(zip(frames, starts, strict=False))
        ]
        self._steps = np.array(steps, np.int64).reshape(-1, 4)
        self._fronts = np.array([start + word for start, f in zip(starts, frames, strict=False) for word in f.fronts], np.int64)
        rows = [(start + word, size) for start, f in zip(starts, frames, strict=False) for word, size in f.rows]
        self._rows = np.array([word for word, _ in rows], np.int64)
        self._entry = np.array([size for _, size in rows], np.int64)
        self._first = self._words[self._rows] - self._used * self._entry
        for start, frame in zip(starts, frames, strict=False):
            for word, changing in frame.changing:
                changing.words.append(int(start) + word)
        for frame in frames:
            for _, changing in frame.changing:
                changing.index = np.array(changing.words, np.int64)
        self._place = np.zeros(1, np.int64)
        self._failed_at = self._place.ctypes.data
        self._steps_at, self._step_bytes = self._steps.ctypes.data, self._steps.strides[0]
        self._run = library().ag_replay
        results = output.args[0]
        assert isinstance(results, (tuple, list))
        self._outputs = [node for node in results if isinstance(node, fx.Node)]
        self.results = dict(zip(self._held.outputs, [self._result(node) for node in self._outputs], strict=True))
        self._python = [self._code(stretch.nodes) if stretch.nodes else None for stretch in self._stretches]
        counts = np.cumsum([0, *(len(stretch.frames) for stretch in self._stretches)])
        self._ranges = list(zip(counts[:-1].tolist(), counts[1:].tolist(), strict=True))
        self._array = {name: tensor.numpy() for name, tensor in self._own.items()}

    def _result(self, node: fx.Node) -> torch.Tensor:
        """An output: a copy where the next step writes over it."""
        value: torch.Tensor = self._value(node)
        return self._copied(node, value) if value.untyped_storage().data_ptr() in self._written else value

    def _copied(self, node: fx.Node, value: torch.Tensor) -> torch.Tensor:
        """``value`` in memory that nobody else reads: that of an earlier step where its reader has let go of it.

        Fresh memory would be given back and cleared again in each step, which costs ten times the copy.
        """
        known = self._copies.setdefault(node, [])
        shape, source = tuple(value.shape), array_of(value)
        for array in known:
            if array.shape == shape and sys.getrefcount(array) == _UNREAD:
                np.copyto(array, source)
                return tensor_of(array)
        array = source.copy()
        if len(known) < _KEPT:
            known.append(array)
        return tensor_of(array)

    def _code(self, nodes: Sequence[fx.Node]) -> _Code:
        """Python code for nodes of one stretch."""
        made, inside = fx.Graph(), set(nodes)
        env: dict[fx.Node, fx.Node] = {}
        outside: list[fx.Node] = []
        for node in nodes:
            for source in node.all_input_nodes:
                if source not in inside and source not in env:
                    env[source] = made.placeholder(f"v{len(outside)}")
                    outside.append(source)
        for node in nodes:
            env[node] = made.node_copy(node, lambda source: env[source])
        used_later = [n for n in nodes if any(user not in inside for user in n.users) or self._env[n].words]
        made.output(tuple(env[node] for node in used_later))
        return _Code(fx.GraphModule(self._held.root, made).forward, outside, [self._env[node] for node in used_later])

    def __call__(self, inputs: Mapping[str, Array], moved: Mapping[str, torch.Tensor], used: int) -> dict[str, torch.Tensor]:
        """A step with ``used`` tokens held. moved: slots that are not written in place. Raises InputError."""
        self._used = used
        for name, array in self._array.items():
            np.copyto(array, inputs[name])
        for name, node in self._given.items():
            self._update(self._env[node], moved[name] if name in moved else torch.from_numpy(inputs[name]))
        self._env[self._used_node].value = used
        words = self._words
        words[self._fronts] = used + 1
        words[self._rows] = self._first + used * self._entry
        run, threads, steps, size = self._run, torch.get_num_threads(), self._steps_at, self._step_bytes
        with torch.no_grad():
            for code, (start, stop) in zip(self._python, self._ranges, strict=True):
                if code is not None:
                    found = code.run(*[self._value(node) for node in code.reads])
                    for value, result in zip(code.writes, found, strict=True):
                        self._update(value, result)
                error = run(steps + size * start, stop - start, threads, self._failed_at)
                if error:
                    self._frames[start + int(self._place[0])].failed(error)
            return {name: self._result(node) for name, node in zip(self._held.outputs, self._outputs, strict=True)}

    def _update(self, changing: _Changing, value: Any) -> None:
        """Put a new value, and where it is, into the place of the old one."""
        if changing.words:
            if not value.is_contiguous():
                value = value.contiguous()
            self._words[changing.index] = value.data_ptr() or 1
            if value.shape != changing.value.shape:
                assert changing.index is not None
                for axis, size in enumerate(value.shape):
                    if size != changing.value.shape[axis]:
                        self._words[changing.index + 3 + axis] = size
        changing.value = value


@dataclass(eq=False)
class _Code:
    run: Callable[..., Any]
    reads: list[fx.Node]
    writes: list[_Changing]


def _neighbours(frames: Sequence[_Frame]) -> list[_Frame]:
    """``frames`` with products of the same x side by side: they need nothing that comes after the first of them."""
    ordered: list[_Frame] = []
    for frame in frames:
        place = len(ordered)
        if frame.product is not None:
            alike = [at for at, other in enumerate(ordered) if other.product == frame.product]
            place = alike[-1] + 1 if alike else place
        ordered.insert(place, frame)
    return ordered


def _groups(frames: Sequence[_Frame]) -> list[tuple[int, int]]:
    """For each frame its group (see ``ag_step``), and whether it shares what was prepared for the frame before it.

    Products of the same x, as of queries, keys and values, are a group, numbered by the address of its first frame.
    """
    groups: list[tuple[int, int]] = []
    before: _Frame | None = None
    for frame in frames:
        group = shares = 0
        if before is not None and frame.product is not None and frame.product == before.product:
            group = groups[-1][0] or before.words.ctypes.data
            groups[-1] = (group, groups[-1][1])
            shares = int(frame.prepares is not None and frame.prepares == before.prepares)
        groups.append((group, shares))
        before = frame
    return groups


def _grows(tensor: torch.Tensor, used: int) -> bool:
    """Whether the input has an entry for each token that is held: the shape of all others is the same in each step."""
    return tensor.dim() > 1 and tensor.shape[-1] == used + 1


def _plain(name: str, *words: int) -> _Frame:
    """A frame of one of the functions of ``plain``."""
    variant = Variant()
    variant.stages = 1
    variant.stage[0] = loaded(f"plain_{name}", PLAIN[name])
    return _Frame(variant, np.array([0, 0, 0, 0, *words], np.int64), _never)


def _never(error: int) -> None:
    assert not error


def _arithmetic(name: str, operands: Sequence[Any]) -> tuple[_Frame, torch.Tensor] | None:
    a, b = operands
    if not all(isinstance(t, torch.Tensor) and t.dtype is torch.float32 and t.is_contiguous() for t in operands):
        return None
    if a.shape != b.shape:
        return None
    result = torch.empty_like(a)
    return _plain(name, a.data_ptr(), b.data_ptr(), result.data_ptr(), a.numel()), result


def _activation(which: int, x: Any) -> tuple[_Frame, torch.Tensor] | None:
    if not isinstance(x, torch.Tensor) or x.dtype is not torch.float32 or not x.is_contiguous():
        return None
    result = torch.empty_like(x)
    return _plain("activation", x.data_ptr(), result.data_ptr(), x.numel(), which), result


def _look_up(table: Any, places: Any) -> tuple[_Frame, torch.Tensor] | None:
    if not isinstance(table, torch.Tensor) or not isinstance(places, torch.Tensor) or places.dtype is not torch.int64:
        return None
    if not table.is_contiguous() or not places.is_contiguous() or table.dim() != 2:
        return None
    result = torch.empty((*places.shape, table.shape[1]), dtype=table.dtype)
    width = table.shape[1] * table.element_size()
    return _plain("look_up", table.data_ptr(), places.data_ptr(), result.data_ptr(), places.numel(), width), result
