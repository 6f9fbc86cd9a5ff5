"""FX graphs on a CUDA device: which one, what of a graph names a device, weights that are copied there once, and kernels."""

from __future__ import annotations

import copy
import operator
import sys
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from actgraph.errors import InputError, UnsupportedError
from actgraph.graph.graph import Graph
from actgraph.ops.registry import DOMAIN, get_op
from actgraph.runtime.claims import Claims, left
from actgraph.runtime.kernels.triton import register


def find_device(name: str) -> torch.device | None:
    """The device that ``name`` asks for; ``None`` for the CPU, where nothing is moved.

    name: ``"cpu"``, ``"cuda"`` (torch's current device) or ``"cuda:1"``. Raises InputError for other names and for a number
    that is not there, UnsupportedError where torch has no CUDA device.
    """
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not (number.isascii() and number.isdigit())) or name in ("cpu:", "cuda:"):
        raise InputError(f"there is no device {name!r}", "choose cpu, cuda, or cuda:1 for the second CUDA device")
    if kind == "cpu":
        return None
    if not torch.cuda.is_available():
        built = "was built without CUDA" if torch.version.cuda is None and torch.version.hip is None else "sees none"
        raise UnsupportedError(f"there is no CUDA device: torch {torch.__version__} {built}", "use device='cpu'")
    index = int(number) if number else torch.cuda.current_device()
    if index >= torch.cuda.device_count():
        raise InputError(f"there is no device {name!r}: torch sees {torch.cuda.device_count()}", "they are counted from 0")
    return torch.device("cuda", index)


_SAID: list[str] = []


def install_kernels(device: torch.device) -> bool:
    """Put the Triton kernels behind the ops of ``torch.ops.actgraph`` on CUDA; whether they are there.

    Where they cannot run on ``device``, one line says why, once, and the references run.
    """
    reason = register.why_not(device)
    if not reason:
        return register.install(device)
    if not _SAID:
        _SAID.append(reason)
        print(f"actgraph: no Triton kernels on {device}: {reason}; everything runs without them, slower", file=sys.stderr)
    return False


def find_triton_kernels(graph: Graph) -> Claims:
    """The kernel for each actgraph node of ``graph`` that has one. Imports Triton."""
    claims, by_op = Claims(), {kernel.op: kernel for kernel in register.triton_kernels()}
    for node in graph.nodes():
        op = node.op.removeprefix(f"{DOMAIN}.")
        if op == node.op:
            continue
        types = [None if operand is None else operand.type for operand in node.operands]
        types += [None] * (len(get_op(op).inputs) - len(types))
        kernel = by_op.get(op)
        if left(op, types) or op == "attention":
            claims.left[node.name] = left(op, types) or "torch has kernels for attention"
        elif kernel is None:
            claims.unclaimed[node.name] = f"there is no Triton kernel of {op}"
        elif not kernel.claims(types, get_op(op).complete(node.attributes)):
            claims.unclaimed[node.name] = (
                f"{op} has no Triton kernel for {', '.join('-' if t is None else str(t) for t in types)}"
            )
        else:
            claims.claimed[node.name] = f"{op} triton"
    return claims


class Placed:
    """Weights of a program on a device, each copied there once for all graphs and sessions."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._made: dict[tuple[Any, ...], torch.Tensor] = {}

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` on the device. The memory of ``weight`` must live as long as this."""
        key = (weight.data_ptr(), weight.dtype, weight.shape, weight.stride())
        if key not in self._made:
            self._made[key] = weight.detach().to(self.device)
        return self._made[key]

    def module(self, native: fx.Graph, root: torch.nn.Module) -> fx.GraphModule:
        """``native``, changed to run on the device, with what it takes of ``root``: tensors, and branches of control flow."""
        move(native, self.device)
        found: dict[str, Any] = {}
        for node in native.nodes:
            if node.op in ("get_attr", "call_module"):
                value = operator.attrgetter(str(node.target))(root)
                found[str(node.target)] = self(value) if isinstance(value, torch.Tensor) else self._branch(value)
        return fx.GraphModule(found, native)

    def _branch(self, module: torch.nn.Module) -> torch.nn.Module:
        twin = copy.deepcopy(module).to(self.device)
        for each in twin.modules():
            if isinstance(each, fx.GraphModule):
                move(each.graph, self.device)
                each.recompile()
        return twin


def move(native: fx.Graph, device: torch.device) -> None:
    """Let the nodes of a graph that name a device, or make tensors from nothing, name ``device``."""
    for node in native.nodes:
        node.args = map_aggregate(node.args, lambda arg: device if isinstance(arg, torch.device) else arg)
        node.kwargs = map_aggregate(node.kwargs, lambda arg: device if isinstance(arg, torch.device) else arg)
        if _makes(node.target):
            node.kwargs = {**node.kwargs, "device": device}


def _makes(target: Any) -> bool:
    """Whether calls make a tensor from none, on the CPU if they are not told where."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    arguments = target._schema.arguments
    return any(a.name == "device" for a in arguments) and not any("Tensor" in str(a.type) for a in arguments)
