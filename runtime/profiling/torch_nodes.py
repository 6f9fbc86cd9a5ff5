"""Profiling the torch engine: the same graph with a clock around each node."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from actgraph.graph.fx import FxGraph
from actgraph.graph.fx_build import copy_graph
from actgraph.graph.graph import Node, Role
from actgraph.ops.linear import torch_gate
from actgraph.ops.registry import DOMAIN
from actgraph.runtime.claims import Claims
from actgraph.runtime.profiling.floor import weight_bytes
from actgraph.runtime.profiling.places import SiteNames, Wiring, place, reads_sizes
from actgraph.runtime.profiling.record import PROFILER, Bytes, Call, Executed, Recorder, clock
from actgraph.runtime.torch_held import HeldGraph
from actgraph.runtime.torch_lowering import append, front, write, write_front

aten = torch.ops.aten
#: What writes slots: of these only what is new is read.
_WRITES = (append, write, write_front)
_TABLES = (aten.embedding.default, torch.embedding)
#: What gives numbers, not tensors: a clock around it would take longer than it does.
_NUMBERS = (aten.sym_size.int, aten.sym_numel.default)
WEIGHTS, CACHES, ACTIVATIONS = range(3)
_NO_KERNELS = "it runs by its reference: only sessions with held slots have kernels"


@dataclass
class NodePlan:
    """What each node of an FX graph is, and how the bytes that its calls read are counted."""

    nodes: dict[str, tuple[Executed, Reads]]

    @staticmethod
    def of(
        stage: str, graph: FxGraph, native: fx.Graph, claims: Claims, caches: Collection[int], weights: Collection[int]
    ) -> NodePlan:
        """native: what is executed of ``graph``. caches, weights: places among its inputs."""
        known = {node.name: node for node in graph.nodes()}
        sites = place([_wiring(node, known) for node in native.nodes if node.op != "output"], SiteNames.of(graph))
        kinds: dict[fx.Node, int] = {}
        for number, node in enumerate(node for node in native.nodes if node.op == "placeholder"):
            kinds[node] = CACHES if number in caches else WEIGHTS if number in weights else ACTIVATIONS
        nodes = {}
        for node in native.nodes:
            if node.op == "placeholder":
                continue
            kinds[node] = CACHES if node.target in (*_WRITES, front) else WEIGHTS if node.op == "get_attr" else ACTIVATIONS
            if node.op != "call_function" or node.target in _NUMBERS or _is_operator(node.target):
                continue
            origin = known.get(node.name)
            reads = Reads(
                tuple(_kinds(arg, kinds) for arg in node.args), {key: _kinds(arg, kinds) for key, arg in node.kwargs.items()},
                table=node.target in _TABLES, writes=node.target in _WRITES, gate=_gate(origin, node.name in claims.claimed),
            )  # fmt: skip
            about = Executed(
                node.name, origin.op if origin is not None else getattr(node.target, "__name__", str(node.target)),
                sites[node.name], claims.claimed.get(node.name, "torch"), stage,
                claims.unclaimed.get(node.name) or claims.left.get(node.name, ""), at_most=_skips(origin) and not reads.gate,
            )  # fmt: skip
            nodes[node.name] = about, reads
        return NodePlan(nodes)

    @staticmethod
    def of_held(stage: str, held: HeldGraph) -> NodePlan:
        slots = {slot.input for slot in held.slots.values()}
        count = len(held.inputs) + 1  # with the number of tokens held
        caches = [place for place, name in enumerate(held.inputs) if name in slots]
        return NodePlan.of(stage, held.graph, _module(held).graph, held.claims, caches, range(count, count + len(held.weights)))

    def put_clocks(self, native: fx.Graph, recorder: Recorder, device: torch.device | None) -> None:
        """Time each node of ``native`` that is in the plan."""
        for node in native.nodes:
            if node.name in self.nodes:
                node.target = _timed(node.target, *self.nodes[node.name], recorder, device)


def timed_held(stage: str, held: HeldGraph, recorder: Recorder) -> HeldGraph:
    """``held`` with every node timed; where torch has compiled it, the whole of it."""
    twin, device = copy.copy(held), held.device
    if held.compiled:
        node = Executed(
            f"{stage} (compiled graph)", "torch.compile", "(compiled graph)", "torch.compile", stage,
            "one piece of generated code: its nodes cannot be told apart",
        )  # fmt: skip
        slots = {slot.input for slot in held.slots.values()}
        kinds = tuple(CACHES if name in slots else ACTIVATIONS for name in held.inputs)
        twin.call = _timed(held.call, node, Reads(kinds, fixed=weight_bytes(held.graph)), recorder, device)
        return twin
    twin.call = _with_clocks(_module(held), NodePlan.of_held(stage, held), recorder, device)
    return twin


def timed_runner(stage: str, graph: FxGraph, runner: Any, recorder: Recorder) -> Any:
    """A runner of ``TorchExecutor`` for ``graph`` with every node timed."""
    twin, device = copy.copy(runner), getattr(runner, "device", None)
    caches = [place for place, value in enumerate(graph.inputs()) if graph.role(value.name) is Role.SLOT]
    claims = getattr(runner, "claims", None)
    if claims is None:
        ours = [node.name for node in graph.nodes() if node.op.startswith(f"{DOMAIN}.")]
        claims = Claims(unclaimed=dict.fromkeys(ours, _NO_KERNELS))
    plan = NodePlan.of(stage, graph, runner.run.graph, claims, caches, ())
    twin.run = _with_clocks(runner.run, plan, recorder, device)
    return twin


def _module(held: HeldGraph) -> fx.GraphModule:
    found: fx.GraphModule = held.call.__self__  # type: ignore[attr-defined]
    return found


def _with_clocks(module: fx.GraphModule, plan: NodePlan, recorder: Recorder, device: torch.device | None) -> Callable[..., Any]:
    native = copy_graph(module.graph)
    plan.put_clocks(native, recorder, device)
    made: Callable[..., Any] = fx.GraphModule(module, native).forward
    return made


def _wiring(node: fx.Node, known: Mapping[str, Node]) -> Wiring:
    origin = known.get(node.name)
    scope, op = (origin.origin.scope, origin.op) if origin is not None else ("", "")
    operands = () if reads_sizes(op) else tuple(source.name for source in node.all_input_nodes)
    return Wiring(node.name, (node.name,), operands, scope)


def _is_operator(target: Any) -> bool:
    return getattr(target, "__module__", "") == "_operator"


def _kinds(argument: Any, kinds: Mapping[fx.Node, int]) -> Any:
    """What an argument is, or what is in it."""
    if isinstance(argument, fx.Node):
        return kinds.get(argument, ACTIVATIONS)
    return tuple(_kinds(each, kinds) for each in argument) if isinstance(argument, (list, tuple)) else None


def _skips(node: Node | None) -> bool:
    """Whether weights may be skipped."""
    if node is None or node.op != f"{DOMAIN}.linear":
        return False
    masked = len(node.operands) > 7 and node.operands[7] is not None
    return masked or node.attributes.get("keep", "none") != "none"


def _gate(node: Node | None, claimed: bool) -> dict[str, Any]:
    """The gate of a linear whose kernel reads the weights of kept inputs and no others."""
    if node is None or not claimed or not _skips(node) or node.attributes.get("layout") != "in_out":
        return {}
    if len(node.operands) > 7 and node.operands[7] is not None:
        return {}
    given = {"keep": "none", "threshold": 0.0, "k": 0} | dict(node.attributes)
    return {name: given[name] for name in ("keep", "threshold", "k")}


@dataclass
class Reads:
    """How the bytes that a call must read are counted.

    args, kwargs: what each operand is, ``None`` for what is no tensor. table: rows of the weight are looked up. writes: a slot,
    whose old content is not read. gate: attributes of the input gate of a linear. fixed: weights that are no operands.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    table: bool = False
    writes: bool = False
    gate: dict[str, Any] = field(default_factory=dict)
    fixed: int = 0

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Bytes:
        if self.writes:
            return Bytes(activations=_size(args[1]))
        found = [self.fixed, 0, 0]
        memory = result.untyped_storage().data_ptr() if isinstance(result, torch.Tensor) else 0
        pairs = [*zip(args, self.args, strict=False), *((kwargs[name], kind) for name, kind in self.kwargs.items())]
        while pairs:
            value, kind = pairs.pop()
            if isinstance(kind, tuple):
                pairs += zip(value, kind, strict=True)
            elif isinstance(value, torch.Tensor) and kind is not None:
                if memory and value.untyped_storage().data_ptr() == memory:
                    return Bytes()  # a view
                found[kind] += _size(value)
        if self.table:
            found[WEIGHTS] = _size(result)
        if self.gate:
            dropped = _size(args[1]) * (1 - _kept_share(args, self.gate))
            found[WEIGHTS] -= round(dropped)
        return Bytes(*found)


def _kept_share(args: tuple[Any, ...], gate: dict[str, Any]) -> float:
    """The share of inputs that some token keeps."""
    x, thresholds, indices = args[0], *(args[i] if len(args) > i else None for i in (5, 6))
    kept = torch_gate(x, thresholds, indices, **gate) != 0
    return kept.reshape(-1, kept.shape[-1]).any(0).float().mean().item()


def _size(tensor: torch.Tensor) -> int:
    """Bytes of memory, of what is expanded once."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def _timed(
    call: Callable[..., Any], node: Executed, reads: Reads, recorder: Recorder, device: torch.device | None
) -> Callable[..., Any]:
    wait = torch.cuda.synchronize if device is not None and device.type == "cuda" else None

    def timed(*args: Any, **kwargs: Any) -> Any:
        if wait is not None:
            wait()
        begin = clock()
        result = call(*args, **kwargs)
        if wait is not None:
            wait()
        end = clock()
        step = recorder.now
        if step is not None:
            step.calls.append(Call(node, begin, end - begin, reads(args, kwargs, result)))
            step.add(PROFILER, clock() - end)
        return result

    timed.__name__ = timed.__qualname__ = f"timed_{getattr(call, '__name__', 'call')}".replace(".", "_")
    return timed
