"""Steps of single tokens as lists of kernel frames: recorded by the first step, run from C by those that follow.

Between two tokens nothing changes but the token, its position and how many entries growing slots hold. So the first step is
executed node by node, each kernel's frame is kept, results stay where they are, and a later step writes what has changed into
the frames and runs them all in one call. What has no frame stays Python, before frames or between them; where such a result is
read by frames, its address is written into them. A recording outlives its session: the next one gives it other buffers.
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

from actgraph.graph.fx_types import array_of, tensor_of
from actgraph.graph.graph import Array
from actgraph.runtime.kernels.numba import linear
from actgraph.runtime.native.library import HEAD, ROOM, TENSOR, library
from actgraph.runtime.state import TOKENS
from actgraph.runtime.torch_frames import (
    CONTIGUOUS,
    MAKERS,
    MOVING,
    SIZES,
    Changing,
    Count,
    Frame,
    Front,
    Growing,
    Moving,
    OfSlot,
    frames_of,
    known,
    now,
)
from actgraph.runtime.torch_kernels import KernelCall
from actgraph.runtime.torch_lowering import append, front, write, write_front

if TYPE_CHECKING:
    from actgraph.runtime.torch_held import HeldGraph

#: The operands of kernels that may be the front of a larger buffer: the op and the places.
_READS_FRONTS = {"attention": (1, 2, 4, 5)}
#: The operands of attention whose sizes the result does not depend on.
_MAY_GROW = (1, 2, 3, 4, 5)
#: What products in the layout "out_in" look at before they look at weights, beside x and attributes.
_PREPARED = (linear.ZERO, linear.THRESHOLDS, linear.INDICES)
#: How many copies of a result are kept.
_KEPT = 4
#: Inputs that grow have room for this many tokens at least.
_LEAST_ROOM = 256


class Reshaped(Exception):
    """An input or a result of Python has a shape that its readers were not recorded for: the step is to be recorded anew.

    It has changed nothing that doing it again would not: entries of tokens are written to the same places.
    """


@dataclass(eq=False)
class _Stretch:
    """Python code, then frames."""

    nodes: list[fx.Node] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)


class Recording:
    """The steps for single tokens of sessions with the same shapes. Not for several threads at once.

    results: of the step that was recorded.
    """

    def __init__(
        self, held: HeldGraph, inputs: Mapping[str, torch.Tensor], slots: Mapping[str, torch.Tensor], used: int
    ) -> None:
        """Record a step with ``used`` tokens held. slots: the tensors of all slots, by the name of their input."""
        self._held, self._used, self._names_given = held, used, frozenset(inputs)
        self._env: dict[fx.Node, Any] = {}
        self._level: dict[fx.Node, int] = {}
        self._stretches: list[_Stretch] = []
        self._native: set[fx.Node] = set()  # what frames compute, and views of that
        self._constant: set[fx.Node] = set()  # weights, and what is made of weights alone
        self._copies: dict[fx.Node, list[Array]] = {}
        self._written: set[int] = set()  # the memory of results of frames
        self._frames_by: dict[fx.Node, int] = {}  # how many frames write the result of a node
        self._touched: dict[int, list[fx.Node]] = {}  # who reads or writes the memory of a slot, in order
        self._room = max(_LEAST_ROOM, 2 * (used + 1))
        moving = moving_slots(held)
        self._own: dict[str, torch.Tensor] = {}  # inputs whose shape never changes, at addresses that never change
        self._growing: dict[str, torch.Tensor] = {}  # the memory of inputs with an entry for each token
        self._given: dict[str, fx.Node] = {}
        self._slots: dict[str, fx.Node] = {}  # whose buffers stay where they are
        self._views: list[fx.Node] = []  # of them
        #: Whether other sessions can go on with it: nothing but frames that know it reads slots.
        self.portable = True
        self._slot_memory = {t.untyped_storage().data_ptr(): name for name, t in slots.items() if name not in moving}
        placeholders = [node for node in held.native.nodes if node.op == "placeholder"]
        names = [*held.inputs, None, *[""] * len(held.weights)]
        weights = iter(held.weights)
        for node, name in zip(placeholders, names, strict=True):
            self._level[node] = 0
            if name is None:
                self._env[node] = Count()
            elif name == "":
                self._env[node] = next(weights)
                self._constant.add(node)
            elif name in slots and name not in moving:
                self._env[node] = slots[name]
                self._slots[name] = node
            elif name in slots:
                self._env[node] = Changing(slots[name])
                self._given[name] = node
            elif name not in inputs:
                self._env[node] = held.defaults[name]
                self._constant.add(node)
            elif name in held.growing and grows(inputs[name], used):
                self._env[node] = self._grow(name, inputs[name])
            else:
                self._env[node] = self._own[name] = inputs[name].clone()
        with torch.no_grad():
            for node in held.native.nodes:
                if node.op not in ("placeholder", "output"):
                    self._record(node)
        self._names = held.outputs
        self._finish(held.native.output_node())
        del self._held  # which keeps recordings for sessions to come

    def _grow(self, name: str, tensor: torch.Tensor) -> Growing:
        """An input with an entry for each token: in memory of our own, with room for more."""
        found = Growing(torch.empty(0, dtype=tensor.dtype), tuple(tensor.shape), tensor.dim() - 1)
        found = Growing(torch.zeros(found.each * self._room, dtype=tensor.dtype), found.shape, found.axis)
        found.now(self._used).copy_(tensor)
        self._growing[name] = found.memory
        return found

    # --- recording --------------------------------------------------------------------------------------------------------

    def _record(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            self._level[node] = 0
            self._constant.add(node)
            self._env[node] = operator.attrgetter(str(node.target))(self._held.root)
            return
        args, options = fx.node.map_arg((node.args, node.kwargs), lambda source: self._env[source])
        sources = node.all_input_nodes
        stays = self._known(node, args)
        if stays is None and sources and all(source in self._constant for source in sources):
            stays = self._compute(node)
        if stays is not None:
            return self._keep(node, stays)
        frames = self._frames_of(node, args, options)
        if frames:
            level = max((self._level[source] for source in sources), default=0)
            level = max([level, *(self._level[other] for other in self._earlier(node))])
            self._at(level).frames.extend(frames)
            self._level[node] = level
            self._note(node)
            return None
        result = self._compute(node)
        if not any(isinstance(self._env[source], MOVING) for source in sources) and self._stays(node, result):
            return self._keep(node, result)
        level = max((self._level[source] + (source in self._native) for source in sources), default=0)
        if node.target in (write, write_front, append):
            level = max([level, *(self._level[other] + (other in self._native) for other in self._earlier(node))])
        grown = any(isinstance(self._env[source], Growing) for source in sources)  # whose shape may have been ambiguous
        self.portable = self.portable and not grown and not self._slots_of(node)
        self._at(level).nodes.append(node)
        self._env[node], self._level[node] = Changing(result), level
        self._note(node)
        return None

    def _keep(self, node: fx.Node, value: Any) -> None:
        """A node that later steps need not compute."""
        if self._memory_of(value) in self._slot_memory:
            self._views.append(node)
        self._env[node] = value
        self._level[node] = max((self._level[source] for source in node.all_input_nodes), default=0)
        if any(source in self._native for source in node.all_input_nodes):
            self._native.add(node)
        if all(source in self._constant for source in node.all_input_nodes):
            self._constant.add(node)

    def _known(self, node: fx.Node, args: Sequence[Any]) -> Any:
        """What a node gives where that needs no computing; ``None`` for others."""
        first = args[0] if args else None
        if node.target is operator.getitem and isinstance(first, (tuple, list)):
            return first[args[1]]
        if node.target is torch.ops.aten.clone.default and isinstance(first, torch.Tensor) and first.is_contiguous():
            return None if first.untyped_storage().data_ptr() in self._slot_memory else first  # nobody writes over it
        return known(node.target, args, self._used)

    def _stays(self, node: fx.Node, result: Any) -> bool:
        """Whether ``result``, of operands that never change their places, never changes its own."""
        sources = [self._env[source] for source in node.all_input_nodes]
        memory = {source.untyped_storage().data_ptr() for source in sources if isinstance(source, torch.Tensor)}
        if node.target is write:
            return False
        if isinstance(result, (tuple, list)):  # of a split
            return all(isinstance(part, torch.Tensor) and part.untyped_storage().data_ptr() in memory for part in result)
        if isinstance(result, torch.Tensor):
            return result.untyped_storage().data_ptr() in memory or (not memory and node.target in MAKERS)
        return node.target in SIZES or not memory

    def _compute(self, node: fx.Node) -> Any:
        """What a node gives for the step that is recorded."""
        if node.op == "call_module":
            target: Any = self._held.root.get_submodule(str(node.target))
        elif node.op == "call_method":
            target = getattr(torch.Tensor, str(node.target))
        else:
            target = node.target
        arguments, options = fx.node.map_arg((node.args, node.kwargs), lambda source: now(self._env[source], self._used))
        return target(*arguments, **options)

    def _at(self, level: int) -> _Stretch:
        while len(self._stretches) <= level:
            self._stretches.append(_Stretch())
        return self._stretches[level]

    def _slots_of(self, node: fx.Node) -> set[int]:
        """The slots whose memory a node reads or writes."""
        found = set()
        for source in node.all_input_nodes:
            memory = self._memory_of(self._env[source])
            if memory in self._slot_memory:
                found.add(memory)
        return found

    def _memories_of(self, value: Any) -> list[int]:
        """What a value that stays where it is lies in."""
        if isinstance(value, Growing):
            return [self._memory_of(value.memory)]
        parts = value if isinstance(value, (tuple, list)) else [value]
        return [self._memory_of(part) for part in parts if isinstance(part, torch.Tensor)]

    def _memory_of(self, value: Any) -> int:
        tensor = value.buffer if isinstance(value, Front) else value.value if isinstance(value, Changing) else value
        return tensor.untyped_storage().data_ptr() if isinstance(tensor, torch.Tensor) else 0

    def _note(self, node: fx.Node) -> None:
        for memory in self._slots_of(node):
            self._touched.setdefault(memory, []).append(node)

    def _earlier(self, node: fx.Node) -> list[fx.Node]:
        """Who has read or written the slots of a node before it: they come before it, whatever its operands say."""
        return [other for memory in self._slots_of(node) for other in self._touched.get(memory, ())]

    # --- frames -----------------------------------------------------------------------------------------------------------

    def _frames_of(self, node: fx.Node, args: Sequence[Any], options: Mapping[str, Any]) -> list[Frame]:
        """The frames of a node, which have run; none where Python has to compute it."""
        call = getattr(node.target, "kernel_call", None)
        copies: list[Frame] = []
        if isinstance(call, KernelCall) or node.target in CONTIGUOUS:
            args, copies = self._contiguous(args)
        if isinstance(call, KernelCall):
            constant = all(not isinstance(a, fx.Node) or a in self._constant for a in node.args[1:])
            made = self._kernel(call, args, constant)
        else:
            made = frames_of(node.target, args, options, self._used)
        if made is None:
            return []
        frames, result = [*copies, *made[0]], made[1]
        self._frames_by[node] = len(made[0])
        writes = node.target in (append, write, write_front)
        if writes and self._memory_of(args[1]) in self._slot_memory:
            self.portable = False  # from one slot to another
        if not all(frame.of_slots for frame in made[0]) and self._slots_of(node):
            self.portable = False
        if isinstance(result, torch.Tensor):
            self._written.add(result.untyped_storage().data_ptr())
        for frame in frames:
            frame.failed(library().ag_run(ctypes.byref(frame.variant), frame.words.ctypes.data, torch.get_num_threads()))
        self._env[node] = result
        self._native.add(node)
        return frames

    def _may_grow(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and any(size in (self._used, self._used + 1) for size in value.shape)

    def _contiguous(self, operands: Sequence[Any]) -> tuple[list[Any], list[Frame]]:
        """Operands of which those that are views with gaps are copied, and the frames that copy."""
        found, frames = list(operands), []
        for place, operand in enumerate(operands):
            if isinstance(operand, torch.Tensor) and not operand.is_contiguous():
                made = frames_of(torch.ops.aten.clone.default, [operand], {}, self._used)
                if made is not None and self._memory_of(operand) not in self._slot_memory:
                    frames += made[0]
                    found[place] = made[1]
        return found, frames

    def _kernel(self, call: KernelCall, operands: Sequence[Any], constant: bool) -> tuple[list[Frame], torch.Tensor] | None:
        """constant: all operands but the first are the same in each step."""
        fronts = _READS_FRONTS.get(call.op, ())
        if any(isinstance(operand, Front) and place not in fronts for place, operand in enumerate(operands)):
            return None
        tensors = [
            front(operand.buffer, operand.count.now(self._used)) if isinstance(operand, Front) else now(operand, self._used)
            for operand in operands
        ]
        for operand, tensor in zip(operands, tensors, strict=True):
            contiguous = tensor is None or (isinstance(tensor, torch.Tensor) and tensor.is_contiguous())
            if not contiguous and not isinstance(operand, Front):
                return None
        for place, operand in enumerate(operands):
            grown = isinstance(operand, Changing) and self._may_grow(operand.value)
            if (grown or isinstance(operand, Growing)) and not (call.op == "attention" and place in _MAY_GROW):
                return None  # the result would grow, too
        bound = call.bind(tensors)
        if bound is None:
            return None
        variant, words, result = bound
        frame = Frame(variant, words, call.check, kept=(result,))
        if call.op == "linear" and constant and isinstance(operands[0], torch.Tensor):
            frame.product = tuple(words[HEAD : HEAD + TENSOR].tolist())
            rest = words[HEAD + TENSOR * (linear.TENSORS) :].tolist()
            others = [words[HEAD + TENSOR * place : HEAD + TENSOR * (place + 1)].tolist() for place in _PREPARED]
            if words[HEAD + TENSOR * linear.KEPT] == 0 and rest[linear.LAYOUT] == 0:
                frame.prepares = (frame.product, rest, others, variant.stage[0])
        for place, operand in enumerate(operands):
            at = HEAD + TENSOR * place
            if isinstance(operand, Front):
                words[at + ROOM] = operand.buffer.shape[TOKENS]
                frame.of_slots += [OfSlot(at, operand.buffer), OfSlot(at + ROOM, operand.buffer, room=1)]
                frame.moving.append(Moving(at + 3 + TOKENS, 1))
            elif isinstance(operand, Growing):
                frame.moving.append(Moving(at + 3 + operand.axis, 1))
            elif isinstance(operand, Changing):
                frame.changing.append((at, operand))
                operand.sized &= call.op == "attention" and place in _MAY_GROW
            elif self._memory_of(operand) in self._slot_memory:
                frame.of_slots.append(OfSlot(at, operand))
        return [frame], result

    # --- running ----------------------------------------------------------------------------------------------------------

    def _finish(self, output: fx.Node) -> None:
        for stretch in self._stretches:
            stretch.frames = _neighbours(stretch.frames)
        frames = [frame for stretch in self._stretches for frame in stretch.frames]
        starts = np.cumsum([0, *(len(frame.words) for frame in frames)]).tolist()
        self._words = np.concatenate([frame.words for frame in frames]) if frames else np.zeros(0, np.int64)
        base = self._words.ctypes.data
        self._frames = frames
        groups = [group for stretch in self._stretches for group in _groups(stretch.frames)]
        placed = list(zip(starts, frames, strict=False))
        steps = [
            (ctypes.addressof(frame.variant), base + 8 * start, *groups[place]) for place, (start, frame) in enumerate(placed)
        ]
        self._steps = np.array(steps, np.int64).reshape(-1, 4)
        moving = [(start + word.word, word.step, word.cycle) for start, frame in placed for word in frame.moving]
        self._moving, self._step, self._cycle = np.array(moving, np.int64).reshape(-1, 3).T.copy()
        self._first = self._words[self._moving] - self._step * (self._used % self._cycle)
        where = {word: place for place, word in enumerate(self._moving.tolist())}
        self._of_slots = [self._of_slot(start + word.word, where, word) for start, frame in placed for word in frame.of_slots]
        for start, frame in placed:
            frame.of_slots.clear()  # they would keep the buffers
            for word, changing in frame.changing:
                changing.words.append(start + word)
        for frame in frames:
            for _, changing in frame.changing:
                changing.index = np.array(changing.words, np.int64)
        self._kept = self._written | {memory for value in self._env.values() for memory in self._memories_of(value)}
        self._place = np.zeros(1, np.int64)
        self._failed_at = self._place.ctypes.data
        self._steps_at, self._step_bytes = self._steps.ctypes.data, self._steps.strides[0]
        self._run = library().ag_replay
        results = output.args[0]
        assert isinstance(results, (tuple, list))
        self._outputs = [node for node in results if isinstance(node, fx.Node)]
        self.portable = self.portable and not any(
            self._memory_of(self._env[node]) in self._slot_memory for node in self._outputs
        )
        self.results = dict(zip(self._names, [self._result(node) for node in self._outputs], strict=True))
        self._python = [self._code(stretch.nodes) if stretch.nodes else None for stretch in self._stretches]
        self._given_away = self._direct()
        counts = np.cumsum([0, *(len(stretch.frames) for stretch in self._stretches)])
        self._ranges = list(zip(counts[:-1].tolist(), counts[1:].tolist(), strict=True))
        self._array = {name: tensor.numpy() for name, tensor in self._own.items()}
        self._memory = {name: tensor.numpy() for name, tensor in self._growing.items()}

    def _of_slot(self, word: int, moving: Mapping[int, int], of: OfSlot) -> tuple[int, int, str, int, int]:
        """For ``move``: the word, its place among the moving ones or -1, the slot, what is added, and for how much room."""
        place = moving.get(word, -1)
        value = int(self._first[place] if place >= 0 else self._words[word])
        start = of.buffer.untyped_storage().data_ptr()
        behind = value - of.room * of.buffer.shape[TOKENS] if of.room else value - start
        return word, place, self._slot_memory[start], behind, of.room

    def _result(self, node: fx.Node) -> torch.Tensor:
        """An output: a copy where the next step writes over it, or where it is a weight."""
        value: torch.Tensor = now(self._env[node], self._used)
        return self._copied(node, value) if value.untyped_storage().data_ptr() in self._kept else value

    def _copied(self, node: fx.Node, value: torch.Tensor) -> torch.Tensor:
        array = self._unread(node, value)
        np.copyto(array, array_of(value))
        return tensor_of(array)

    def _unread(self, node: fx.Node, like: torch.Tensor) -> Array:
        """Memory for a result that nobody else reads: that of an earlier step where its reader has let go of it.

        Fresh memory would be given back and cleared again in each step, which costs ten times a copy.
        """
        known, shape = self._copies.setdefault(node, []), tuple(like.shape)
        for array in known:
            if array.shape == shape and sys.getrefcount(array) == _UNREAD:
                return array
        made = np.empty(shape, array_of(like).dtype)
        known[:] = [array for array in known if array.shape == shape]
        if len(known) < _KEPT:
            known.append(made)
        return made

    def _direct(self) -> list[tuple[str, fx.Node, int]]:
        """Outputs that one frame writes and nothing else reads, and its word that says where: the caller's memory may be."""
        found, read = [], {node for code in self._python if code is not None for node in code.reads}
        for name, node in zip(self._names, self._outputs, strict=True):
            value = self._env[node]
            if isinstance(value, torch.Tensor) and self._outputs.count(node) == 1 and self._has_one_frame(node, read):
                words = np.flatnonzero(self._words == value.data_ptr())
                whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
                if whole and len(words) == 1 and words[0] not in self._moving:
                    found.append((name, node, int(words[0])))
        return found

    def _has_one_frame(self, node: fx.Node, read: set[fx.Node]) -> bool:
        """Whether one frame writes a result, or what it is a view of, and nothing else reads that."""
        while len(node.users) == 1 and node not in read:
            if node in self._frames_by:
                return self._frames_by[node] == 1
            sources = [source for source in node.all_input_nodes if self._memory_of(self._env[source])]
            if len(sources) != 1 or self._memory_of(self._env[sources[0]]) != self._memory_of(self._env[node]):
                return False
            (node,) = sources
        return False

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

    def fits(self, used: int) -> bool:
        """Whether inputs with an entry for each token have room for one more."""
        return not self._growing or used < self._room

    def __call__(self, inputs: Mapping[str, Array], moved: Mapping[str, torch.Tensor], used: int) -> dict[str, torch.Tensor]:
        """A step with ``used`` tokens held. moved: slots that are not written in place. Raises InputError."""
        if inputs.keys() != self._names_given:
            raise Reshaped
        self._used = used
        for name, array in self._array.items():
            if array.shape != inputs[name].shape:
                raise Reshaped
            np.copyto(array, inputs[name])
        for name, memory in self._memory.items():
            memory[: inputs[name].size] = inputs[name].reshape(-1)
        for name, node in self._given.items():
            self._update(self._env[node], moved[name])
        self._words[self._moving] = self._first + self._step * (used % self._cycle)
        results: dict[str, torch.Tensor] = {}
        for name, node, word in self._given_away:
            array = self._unread(node, self._env[node])
            self._words[word] = array.ctypes.data
            results[name] = tensor_of(array)
        run, threads, steps, size = self._run, torch.get_num_threads(), self._steps_at, self._step_bytes
        with torch.no_grad():
            for code, (start, stop) in zip(self._python, self._ranges, strict=True):
                if code is not None:
                    found = code.run(*[now(self._env[node], used) for node in code.reads])
                    for value, result in zip(code.writes, found, strict=True):
                        self._update(value, result)
                error = run(steps + size * start, stop - start, threads, self._failed_at)
                if error:
                    self._frames[start + int(self._place[0])].failed(error)
            for name, node in zip(self._names, self._outputs, strict=True):
                if name not in results:
                    results[name] = self._result(node)
        return results

    # --- other sessions ---------------------------------------------------------------------------------------------------

    def move(self, slots: Mapping[str, torch.Tensor]) -> None:
        """Go on with other buffers, of the same shapes but for the tokens that growing ones have room for."""
        for name, node in self._slots.items():
            self._env[node] = slots[name]
        for word, moving, name, behind, room in self._of_slots:
            buffer = slots[name]
            value = behind + room * buffer.shape[TOKENS] if room else behind + buffer.data_ptr()
            if moving >= 0:
                self._first[moving] = value
            else:
                self._words[word] = value

    def let_go(self) -> None:
        """Forget the buffers, until ``move``."""
        self._env |= dict.fromkeys(self._slots.values())
        self._env |= {node: None for node, value in self._env.items() if isinstance(value, Front)}
        self._env |= dict.fromkeys(self._views)
        for node in self._given.values():
            self._env[node].value = torch.empty_like(self._env[node].value, device="meta")

    def _update(self, changing: Changing, value: Any) -> None:
        """Put a new value, and where it is, into the place of the old one."""
        if changing.words:
            if not value.is_contiguous():
                value = value.contiguous()
            self._words[changing.index] = value.data_ptr() or 1
            if value.shape != changing.value.shape:
                if not changing.sized or value.dim() != changing.value.dim():
                    raise Reshaped
                assert changing.index is not None
                for axis, size in enumerate(value.shape):
                    if size != changing.value.shape[axis]:
                        self._words[changing.index + 3 + axis] = size
        changing.value = value


@dataclass(eq=False)
class _Code:
    run: Callable[..., Any]
    reads: list[fx.Node]
    writes: list[Changing]


def _neighbours(frames: Sequence[Frame]) -> list[Frame]:
    """``frames`` with products of the same x side by side: they need nothing that comes after the first of them."""
    ordered: list[Frame] = []
    for frame in frames:
        place = len(ordered)
        if frame.product is not None:
            alike = [at for at, other in enumerate(ordered) if other.product == frame.product]
            place = alike[-1] + 1 if alike else place
        ordered.insert(place, frame)
    return ordered


def _groups(frames: Sequence[Frame]) -> list[tuple[int, int]]:
    """For each frame its group (see ``ag_step``), and whether it shares what was prepared for the frame before it.

    Products of the same x, as of queries, keys and values, are a group, numbered by the address of its first frame.
    """
    groups: list[tuple[int, int]] = []
    before: Frame | None = None
    for frame in frames:
        group = shares = 0
        if before is not None and frame.product is not None and frame.product == before.product:
            group = groups[-1][0] or before.words.ctypes.data
            groups[-1] = (group, groups[-1][1])
            shares = int(frame.prepares is not None and frame.prepares == before.prepares)
        groups.append((group, shares))
        before = frame
    return groups


def _references() -> int:
    """How many references an array has that only a list of kept ones holds, while it is looked at."""
    known = [np.zeros(1)]
    for array in known:
        return sys.getrefcount(array)
    raise AssertionError


_UNREAD = min(_references(), 3)  # a debugger may hold one more


def moving_slots(held: HeldGraph) -> set[str]:
    """The inputs of slots that are not written in place: each step gives them anew."""
    return {slot.input for output, slot in held.slots.items() if output in held.outputs}


def grows(tensor: torch.Tensor, used: int) -> bool:
    """Whether the input has an entry for each token, the new one too: the shape of all others is the same in each step."""
    return tensor.dim() > 1 and tensor.shape[-1] == used + 1
