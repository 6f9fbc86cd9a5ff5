"""The held lowering of FX graphs: slots are tensors of the session, written in place (see ``torch_lowering``)."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from weakref import finalize

import torch
from torch import fx

from actgraph.graph.fx import FxGraph
from actgraph.graph.fx_build import copy_graph
from actgraph.graph.fx_types import array_of, tensor_of
from actgraph.graph.graph import Array
from actgraph.graph.slots import Slot, slots_of
from actgraph.ops.registry import all_ops, single
from actgraph.ops.torch_library import torch_schema
from actgraph.runtime.fusing import with_kernel_ops
from actgraph.runtime.state import TOKENS, by_token, check_contents, entries, filled, room_for, to_reset
from actgraph.runtime.torch_device import Placed
from actgraph.runtime.torch_kernels import register_torch_kernels
from actgraph.runtime.torch_lowering import Lowering
from actgraph.runtime.torch_packed import Packed
from actgraph.runtime.torch_recorded import Recording, Reshaped
from actgraph.runtime.torch_recordings import Recordings, shapes_of


class HeldGraph:
    """One graph of a program, rewritten. Immutable, so that sessions in several threads may run it with their own tensors."""

    def __init__(
        self,
        graph: FxGraph,
        packed: Packed | None = None,
        *,
        compile: bool = False,
        kernels: bool = False,
        placed: Placed | None = None,
        prompts: bool = False,
        few: bool | None = None,
    ) -> None:
        """packed: of the program. compile: through ``torch.compile``; the first calls then take a while.

        kernels: run what has kernels with them. prompts: for no single tokens. few: of a graph that nothing records, whether
        its calls have few tokens. placed: the weights of the program on the device to run on, by default the CPU.
        """
        if kernels and placed is not None:  # whose own products and norms are as fast
            graph = with_kernel_ops(graph, dense=False, gates=not prompts)
        elif kernels:
            recorded = not compile and few is None  # then a kernel costs no call; torch.compile's own norms are as fast
            graph = with_kernel_ops(graph, norms=recorded, small=recorded, gates=not prompts, few=few)
        if kernels and compile and placed is None:
            register_torch_kernels()
        lowering = Lowering(graph, copy_graph(graph.graph), packed or Packed(), placed, kernels=kernels, compiled=compile)
        lowering.run()
        self.device = None if placed is None else placed.device
        self.graph = graph
        self.inputs = [value.name for value in graph.inputs()]
        #: Inputs that may have an entry for each token: the size of their last axis is not that of a vector.
        self.growing = {v.name for v in graph.inputs() if v.shape and not isinstance(v.shape[-1], int)}
        self.defaults = {name: tensor_of(array).to(self.device) for name, array in graph.defaults.items()}
        self.outputs, self.claims = lowering.outputs, lowering.claims
        self.slots = {slot.output: slot for slot in slots_of(graph).values()}
        self.weights = tuple(lowering.weights)
        root = nn_root(graph)
        module = fx.GraphModule(root, lowering.native) if placed is None else placed.module(lowering.native, root)
        self.call: Callable[..., Any] = module.forward
        self.native, self.root = lowering.native, root
        tokens = next((value for value in graph.inputs() if value.name == "input_ids"), None)
        one = tokens is not None and isinstance(tokens.shape, tuple) and tokens.shape[-1] == 1 and few is None
        #: Whether steps of one token are recorded (see ``torch_recorded``).
        self.records = one and placed is None and not compile and bool(self.claims.claimed)
        self.recordings = Recordings()
        self.compiled = compile
        if compile:
            torch.compiler.assume_constant_result(single)  # type: ignore[no-untyped-call]  # numpy would break the graph
            for weight in self.weights:
                _mark_static(weight, range(weight.dim()))
            options: dict[str, Any] = {"post_grad_custom_post_pass": op_schemas()}
            if placed is None:
                options["cpp_wrapper"] = True
            self.call = torch.compile(module.forward, dynamic=True, fullgraph=True, options=options)

    def __call__(self, inputs: Mapping[str, torch.Tensor], used: int) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            found = [inputs[name] if name in inputs else self.defaults[name] for name in self.inputs]
            results = self.call(*found, used, *self.weights)
        return dict(zip(self.outputs, results, strict=True))


def _mark_static(tensor: Any, axes: Iterable[int]) -> None:
    """What ``torch._dynamo.mark_static`` does, also while another thread compiles: that takes itself to be traced then."""
    tensor._dynamo_static_indices = {*getattr(tensor, "_dynamo_static_indices", ()), *axes}
    tensor._has_dynamo_dim_marking = True


@functools.cache
def op_schemas() -> Any:
    """A pass of torch.compile that changes nothing and belongs to the key of what it caches: the schemas of all ops.

    The code that it generates calls ops with as many operands as they had. Without this, code that was cached for another
    version of an op would be found again, and read operands that are not there.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass

    schemas = "\n".join(sorted(f"{op.name}{torch_schema(op)}" for op in all_ops()))

    class OpSchemas(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            pass

        def uuid(self) -> str:
            return hashlib.sha256(schemas.encode()).hexdigest()

    return OpSchemas()


def nn_root(graph: FxGraph) -> torch.nn.Module:
    """What call_module and get_attr nodes that are no weights (branches of control flow) refer to."""
    root: torch.nn.Module = graph.root
    return root


class TorchState:
    """The slots of one session as tensors. See ``State``."""

    def __init__(self, graphs: Mapping[str, HeldGraph], slots: Sequence[Slot], batch: int, limit: int | None) -> None:
        self._graphs, self._slots, self._batch, self._limit = graphs, slots, batch, limit
        self._tensors: dict[str, torch.Tensor] = {}
        self._own: set[int] = set()  # the memory of all slots: results in it are copied
        self._compiled = any(held.compiled for held in graphs.values())
        self._device = next((held.device for held in graphs.values()), None)
        self._grows = [slot for slot in slots if slot.update == "append"]
        self._recordings: dict[str, tuple[Any, Recording]] = {}  # by stage, with the shapes that it is for
        finalize(self, _give_back, graphs, self._recordings).atexit = False
        self.reset()

    def reset(self) -> None:
        self._room = self._used = 0
        self.let_go()
        for slot in to_reset(self._slots, self._tensors):
            self._keep(slot, tensor_of(filled(slot, self._batch)).to(self._device))

    @property
    def bytes(self) -> int:
        size = 0
        for slot in self._slots:
            tensor = self._tensors[slot.input]
            size += tensor.nbytes if slot.update != "append" else tensor.narrow(TOKENS, 0, self._used).nbytes
        return size

    def run(self, stage: str, inputs: Mapping[str, Array], used: int) -> dict[str, Array]:
        held = self._graphs[stage]
        count = inputs["input_ids"].shape[1]
        if self._grows and used + count > self._room:
            self._grow(used, count)
        if held.records and used:  # the first token looks like its mask
            results = self._recorded(stage, held, inputs, used)
        else:
            tensors = {name: tensor_of(array).to(self._device) for name, array in inputs.items()}
            results = held({**tensors, **self._tensors}, used)
        self._used = used + count
        for name, slot in held.slots.items():
            if name in results:
                self._keep(slot, results.pop(name))
        return {
            name: array_of(tensor.clone() if tensor.untyped_storage().data_ptr() in self._own else tensor)
            for name, tensor in results.items()
        }

    def _recorded(self, stage: str, held: HeldGraph, inputs: Mapping[str, Array], used: int) -> dict[str, torch.Tensor]:
        """A step of one token: recorded by the first one of its kind."""
        shapes, recording = self._recordings.get(stage, (None, None))
        if recording is None:
            shapes = shapes_of(held, inputs, self._tensors, used)
            recording = held.recordings.take(shapes)
            if recording is not None:
                recording.move(self._tensors)
        if recording is not None and recording.fits(used):
            self._recordings[stage] = shapes, recording
            with contextlib.suppress(Reshaped):
                return recording(inputs, self._tensors, used)
            shapes = shapes_of(held, inputs, self._tensors, used)  # other inputs than before may be given
        tensors = {name: tensor_of(array) for name, array in inputs.items()}
        recording = Recording(held, tensors, self._tensors, used)
        self._recordings[stage] = shapes, recording
        results, recording.results = recording.results, {}
        return results

    def let_go(self) -> None:
        """Leave what has been recorded to whoever takes the next step of its kind; buffers may move now."""
        _give_back(self._graphs, self._recordings)

    def _keep(self, slot: Slot, tensor: torch.Tensor) -> None:
        if self._compiled:
            _mark_static(tensor, [axis for axis in range(tensor.dim()) if axis not in (0, TOKENS)])
        self._tensors[slot.input] = tensor
        self._own = {tensor.untyped_storage().data_ptr() for tensor in self._tensors.values()}

    def _grow(self, used: int, count: int) -> None:
        self._room = room_for(used + count, self._room, self._limit)
        self.let_go()
        for slot in self._grows:
            old = self._tensors[slot.input]
            new = tensor_of(filled(slot, self._batch, self._room)).to(self._device)
            new.narrow(TOKENS, 0, used).copy_(old.narrow(TOKENS, 0, used))
            self._keep(slot, new)

    def read(self, start: int, stop: int) -> dict[str, Array]:
        return {slot.name: entries(array_of(self._tensors[slot.input]), start, stop).copy() for slot in by_token(self._slots)}

    def load(self, contents: Mapping[str, Array], count: int) -> None:
        check_contents(contents, self._slots, count)
        if self._grows:
            self._grow(0, count)
        for slot in by_token(self._slots):
            self._tensors[slot.input].narrow(TOKENS, 0, count).copy_(tensor_of(contents[slot.name]))
        self._used = count


def _give_back(graphs: Mapping[str, HeldGraph], recordings: dict[str, tuple[Any, Recording]]) -> None:
    """What one session has recorded is for the next one, or for the same one with other buffers."""
    while recordings:
        stage, (shapes, recording) = recordings.popitem()
        graphs[stage].recordings.give(shapes, recording)
