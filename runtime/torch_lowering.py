"""An FX graph with slots, rewritten so that its slots are written in place and nothing is copied.

A slot that grows is the front of a larger buffer: new entries are written behind the old ones, which nobody can notice, and
what the graph reads is a view. A slot of fixed size is written in place where nothing reads the old content afterwards (the
donation that makes it exact); where something does, its new content is an output like any other. Attentions over such a slot
read its front alone, as far as it is written: behind it the mask hides everything.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from actgraph.errors import UnsupportedError
from actgraph.graph.fx import FxGraph
from actgraph.graph.slots import Slot, slots_of
from actgraph.ops.registry import OpDef
from actgraph.ops.torch_library import op_of
from actgraph.runtime.claims import Claims, find_kernels
from actgraph.runtime.kernels.registry import all_kernels
from actgraph.runtime.state import TOKENS
from actgraph.runtime.torch_device import Placed, find_triton_kernels
from actgraph.runtime.torch_kernels import KernelCall, kernel_call
from actgraph.runtime.torch_packed import Packed, linear_packed, packs

aten = torch.ops.aten
#: The name of the input that says how many tokens the slots hold.
USED = "used_tokens"
#: What an attention may read of a slot of fixed size so that its front is enough, and what counts its keys.
_READS_FRONT = ("attention", "positions")


def front(buffer: torch.Tensor, count: int) -> torch.Tensor:
    """The entries of the first ``count`` tokens, a view."""
    return buffer.narrow(TOKENS, 0, count)


def append(buffer: torch.Tensor, new: torch.Tensor, used: int) -> torch.Tensor:
    """Write ``new`` behind the first ``used`` entries; returns a view of them all."""
    count = new.shape[TOKENS]
    buffer.narrow(TOKENS, used, count).copy_(new)
    return buffer.narrow(TOKENS, 0, used + count)


def write(buffer: torch.Tensor, new: torch.Tensor, used: int, mode: str = "linear") -> torch.Tensor:
    """``cache_write`` in place: at positions ``used`` and on, in a ring modulo its size."""
    count, size = new.shape[TOKENS], buffer.shape[TOKENS]
    if mode == "linear" or count == 1:
        buffer.narrow(TOKENS, used % size if mode == "ring" else used, count).copy_(new)
        return buffer
    if count > size:
        new, used = new.narrow(TOKENS, count - size, size), used + count - size
    place = (used + torch.arange(new.shape[TOKENS], device=buffer.device)) % size
    return buffer.index_copy_(TOKENS, place, new)


def write_front(buffer: torch.Tensor, new: torch.Tensor, used: int) -> torch.Tensor:
    """As ``write``; returns a view of what is written so far."""
    count = new.shape[TOKENS]
    buffer.narrow(TOKENS, used, count).copy_(new)
    return buffer.narrow(TOKENS, 0, used + count)


@dataclass
class Lowering:
    """The rewriting of one graph. placed: for the device of these weights instead of the CPU."""

    graph: FxGraph
    native: fx.Graph
    packed: Packed
    placed: Placed | None = None
    kernels: bool = False
    compiled: bool = False  # by torch.compile, which calls kernels through the dispatcher
    claims: Claims = field(default_factory=Claims)
    weights: list[torch.Tensor] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    def run(self) -> None:
        if self.kernels:
            self.claims = find_kernels(self.graph)[0] if self.placed is None else find_triton_kernels(self.graph)
        self.order = {node: place for place, node in enumerate(self.native.nodes)}
        placeholders = [node for node in self.native.nodes if node.op == "placeholder"]
        self.by_name = dict(zip([value.name for value in self.graph.inputs()], placeholders, strict=True))
        self._after = placeholders[-1]
        self.used = self._placeholder(USED)
        self.results = dict(zip(self.graph.output_names, self.native.output_node().args[0], strict=True))  # type: ignore[arg-type]
        slots = list(slots_of(self.graph).values())
        for slot in slots:
            if slot.update == "append":
                self._append(slot)
        self._writes([slot for slot in slots if slot.update in ("scatter", "ring")])
        self.native.output_node().args = (tuple(self.results.values()),)
        self.outputs = list(self.results)
        self._lift_weights()
        for node in self.native.nodes:
            if node.op != "call_function":
                continue
            op = op_of(node.target)
            if op is None:
                node.target = _QUICK.get(node.target, node.target)
            elif self.placed is not None:
                if node.name not in self.claims.claimed:  # else the dispatcher finds the device's
                    node.target = _plain(op)
            elif not self.compiled:
                self._call_kernel(node, op)
            elif not self.kernels or op.name not in all_kernels():  # else torch.compile calls it through the dispatcher
                node.target = _plain(op)
        self.native.eliminate_dead_code(_keep)
        self.claims = self.claims.only(node.name for node in self.native.nodes)
        self.native.lint()

    def _call_kernel(self, node: fx.Node, op: OpDef) -> None:
        """The op as a function: its kernel, where it has one."""
        call = kernel_call(op, node.kwargs) if node.name in self.claims.claimed else None
        if call is None:
            node.target = _plain(op)
        else:
            node.target, node.kwargs = _named(call, op.name), {}

    def _placeholder(self, name: str) -> fx.Node:
        with self.native.inserting_after(self._after):
            made: fx.Node = self.native.placeholder(name)
        self._after = made
        return made

    def _append(self, slot: Slot) -> None:
        """``cache_append(slot, new)`` writes behind; whatever else reads the old content reads a view, which stays as it is."""
        old, new = self.by_name[slot.input], self.results[slot.output]
        if _op(new) != "cache_append" or new.args[0] is not old or _axis(new) != TOKENS:
            raise UnsupportedError(f"slot {slot.name} grows by {new.name}, which is not cache_append along axis {TOKENS}")
        others = [user for user in old.users if user is not new and user.op != "output"]
        if others or any(node is old for node in self.results.values()):
            self._view(old, others)
        with self.native.inserting_before(new):
            written = self.native.call_function(append, (old, new.args[1], self.used))
        new.replace_all_uses_with(written)
        self.native.erase_node(new)
        del self.results[slot.output]
        self.results = {name: written if node is new else node for name, node in self.results.items()}

    def _view(self, old: fx.Node, users: Sequence[fx.Node]) -> fx.Node:
        before = min(users, key=lambda user: self.order.get(user, 0), default=self.native.output_node())
        with self.native.inserting_before(before):
            view = self.native.call_function(front, (old, self.used))
        for user in users:
            user.replace_input_with(old, view)
        self.results = {name: view if node is old else node for name, node in self.results.items()}
        return view

    def _writes(self, slots: Sequence[Slot]) -> None:
        """Write in place what nobody reads afterwards; and read fronts, where every slot of fixed size can be read so."""
        writes: dict[Slot, fx.Node] = {slot: self.results[slot.output] for slot in slots}
        possible = {slot: node for slot, node in writes.items() if self._donates(slot, node)}
        linear = [node for slot, node in writes.items() if slot.update == "scatter"]
        short = all(slot in possible for slot in slots if slot.update == "scatter") and all(map(self._reads_front, linear))
        for slot, node in possible.items():
            old, new = node.args[0], node.args[1]
            users = [user for user in node.users if user.op != "output"]
            with self.native.inserting_before(node if users else self.native.output_node()):  # after all readers of the old
                if slot.update == "scatter" and short:
                    written = self.native.call_function(write_front, (old, new, self.used))
                else:
                    written = self.native.call_function(write, (old, new, self.used, _mode(node)))
            node.replace_all_uses_with(written)
            self.native.erase_node(node)
            del self.results[slot.output]
            self.results = {name: written if result is node else result for name, result in self.results.items()}

    def _donates(self, slot: Slot, node: fx.Node) -> bool:
        """Whether ``node`` may write over the slot: nothing else reads the old content, or nothing reads the new."""
        old: fx.Node = self.by_name[slot.input]
        if _op(node) != "cache_write" or node.args[0] is not old or _axis(node) != TOKENS:
            return False
        if sum(self.results[slot.output] is node for slot in slots_of(self.graph).values() if slot.output in self.results) > 1:
            return False  # two slots would be one buffer
        return set(old.users) == {node} or (all(user.op == "output" for user in node.users) and not _is_shown(old))

    def _reads_front(self, node: fx.Node) -> bool:
        """Whether the front of what ``node`` writes is enough: attentions alone read it, and no output but the slot's is it."""
        shown = sum(result is node for result in self.results.values())
        return shown == 1 and all(user.op == "output" or _op(user) in _READS_FRONT for user in node.users)

    def _lift_weights(self) -> None:
        """Weights are arguments of the call: reading them from modules costs more than a small op."""
        for node in [node for node in self.native.nodes if node.op == "get_attr"]:
            tensor = operator.attrgetter(str(node.target))(self.graph.root)
            if not isinstance(tensor, torch.Tensor):
                continue
            linears = [user for user in node.users if user.target is aten.linear.default and user.args[0] is not node]
            if linears and self.placed is None and not self.kernels and packs(tensor):  # which serves single tokens
                packed = self._weight(self.packed(tensor))
                for linear in linears:
                    linear.target = linear_packed
                    linear.replace_input_with(node, packed)
            if node.users:
                node.replace_all_uses_with(self._weight(tensor.detach() if self.placed is None else self.placed(tensor)))
            self.native.erase_node(node)

    def _weight(self, tensor: torch.Tensor) -> fx.Node:
        self.weights.append(tensor)
        return self._placeholder(f"weight_{len(self.weights) - 1}")


def _op(node: Any) -> str:
    op = op_of(node.target) if isinstance(node, fx.Node) and node.op == "call_function" else None
    return op.name if op is not None else ""


def _axis(node: fx.Node) -> int:
    return int(node.kwargs.get("axis", TOKENS))  # type: ignore[arg-type]


def _mode(node: fx.Node) -> str:
    return str(node.kwargs.get("mode", "linear"))


def _is_shown(node: fx.Node) -> bool:
    """Whether ``node`` or a view of it is an output."""
    return any(user.op == "output" or (_may_view(user) and _is_shown(user)) for user in node.users)


def _may_view(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    name = str(node.target)
    return "view" in name or any(value.alias_info is not None for value in node.target._schema.returns)


def _named(call: KernelCall, name: str) -> Callable[..., Any]:
    """``call`` as a function, which is what generated code can name."""

    def kernel(*operands: torch.Tensor | None) -> Any:
        return call(*operands)

    kernel.__name__ = kernel.__qualname__ = f"{name}_kernel"
    kernel.kernel_call = call  # type: ignore[attr-defined]  # for recorded steps
    return kernel


def _plain(op: OpDef) -> Callable[..., Any]:
    """The op as a function: what torch's dispatcher adds (checks of types, autograd) costs more than a small op."""
    return op.eager or op.reference


#: ATen calls as the functions of torch's Python API: the same kernels, of which the call costs half as much.
_QUICK: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: torch.add, aten.sub.Tensor: torch.sub, aten.mul.Tensor: torch.mul, aten.div.Tensor: torch.div,
    aten.neg.default: torch.neg, aten.rsqrt.default: torch.rsqrt, aten.pow.Tensor_Scalar: torch.pow,
    aten.cos.default: torch.cos, aten.sin.default: torch.sin, aten.tanh.default: torch.tanh, aten.mean.dim: torch.mean,
    aten.silu.default: functional.silu, aten.cat.default: torch.cat, aten.reshape.default: torch.reshape,
    aten.transpose.int: torch.transpose, aten.permute.default: torch.permute, aten.unsqueeze.default: torch.unsqueeze,
    aten.linear.default: functional.linear, aten.matmul.default: torch.matmul, aten.embedding.default: torch.embedding,
    aten.layer_norm.default: torch.layer_norm,
}  # fmt: skip


def _keep(node: fx.Node) -> bool:
    """Whether a node has an effect."""
    return node.op in ("placeholder", "output") or node.target in (append, write, write_front)
