"""Profiling onnxruntime: twins of its sessions with its own profiler on, whose events are read when the profile ends."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actgraph.graph.graph import Node, Value, parameter_bytes
from actgraph.graph.onnx import OnnxGraph
from actgraph.ops.registry import DOMAIN
from actgraph.runtime.claims import Claims
from actgraph.runtime.ort_engine import OrtRunner
from actgraph.runtime.ort_fused import fuse
from actgraph.runtime.ort_held import HeldOnnx, Opened
from actgraph.runtime.profiling.places import SiteNames, Wiring, from_neighbours, place, reads_sizes
from actgraph.runtime.profiling.record import BETWEEN, PROFILER, Bytes, Call, Executed, Recorder, Step, clock

#: Nodes that hold others, whose events lie within theirs.
_HOLDERS = frozenset({"If", "Loop", "Scan"})
#: Nodes that change what a tensor is called, or read its sizes alone.
_VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Size", "MemcpyToHost"})
_TABLES = frozenset({"Gather", "GatherND", "GatherElements"})
_NO_KERNELS = "it runs by its body: only sessions with held slots have kernels"
_SUFFIX = "_kernel_time"


@dataclass
class _Run:
    """One run of a session. tokens: that it holds afterwards. ok: whether it came to its end."""

    step: Step
    begin: int
    time: int
    tokens: int
    ok: bool


class Watched:
    """A session of onnxruntime that notes when it runs. All else is the session's."""

    def __init__(self, native: Any, recorder: Recorder) -> None:
        self._native, self._recorder = native, recorder
        self.runs: list[_Run] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._native, name)
        if name not in ("run", "run_with_iobinding", "run_with_ort_values"):
            return found

        def run(*args: Any, **kwargs: Any) -> Any:
            begin, ok = clock(), False
            try:
                result = found(*args, **kwargs)
                ok = True
                return result
            finally:
                step = self._recorder.now or Step("", 0, begin)  # not one of the profile: its events are passed over
                self.runs.append(_Run(step, begin, clock() - begin, self._recorder.held(), ok))

        return run


class ProfiledSessions:
    """The twins of one profile. Use as a context manager: at the end their events are read and their files removed."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._folder = tempfile.TemporaryDirectory(prefix="actgraph-profile-")
        self._watched: list[tuple[Watched, Naming]] = []

    def held(self, stage: str, held: HeldOnnx, limit: int | None) -> ProfiledOnnx:
        return ProfiledOnnx(self, stage, held, limit)

    def runner(self, stage: str, graph: OnnxGraph) -> OrtRunner:
        """A runner for ``graph`` as ``OrtExecutor`` opens it, profiled."""
        made = OrtRunner(graph, profile=self.prefix)
        ours = [node.name for node in graph.nodes() if node.op.startswith(f"{DOMAIN}.")]
        claims = Claims(unclaimed=dict.fromkeys(ours, _NO_KERNELS))
        made.session = self.watch(made.session, Naming(stage, graph, graph, claims))
        return made

    @property
    def prefix(self) -> str:
        """Where the profiler of the next session writes."""
        return str(Path(self._folder.name) / f"{len(self._watched)}")

    def watch(self, native: Any, naming: Naming) -> Any:
        watched = Watched(native, self.recorder)
        self._watched.append((watched, naming))
        return watched

    def close(self, *, read: bool) -> None:
        """End the profilers; ``read``: what they have written goes into the steps."""
        try:
            for watched, naming in self._watched:
                path = Path(watched.end_profiling())
                if read:
                    _take(json.loads(path.read_text(encoding="utf-8")), watched.runs, naming, self.recorder)
                path.unlink(missing_ok=True)
        finally:
            self._watched.clear()
            self._folder.cleanup()


class ProfiledOnnx:
    """Stands for a ``HeldOnnx``: its graphs, opened again with the profiler on."""

    def __init__(self, sessions: ProfiledSessions, stage: str, held: HeldOnnx, limit: int | None) -> None:
        self._sessions, self._stage, self._held = sessions, stage, held
        self.sizes = held.sizes
        self.fused: Opened | None = None
        self._plain: Opened | None = None
        if held.fused is not None:
            self.fused = self._open(fuse(held.graph, limit))
        else:
            self._plain = self._open(held.graph)

    @property
    def plain(self) -> Opened:
        if self._plain is None:  # from the first padding on
            begin = clock()
            self._plain = self._open(self._held.graph)
            if self._sessions.recorder.now is not None:
                self._sessions.recorder.now.add(PROFILER, clock() - begin)
        return self._plain

    def _open(self, graph: OnnxGraph) -> Opened:
        held = self._held
        opened = Opened(graph, held.graph, kernels=held._kernels, profile=self._sessions.prefix, steps=held._steps)
        naming = Naming(self._stage, opened.graph or graph, held.graph, opened.claims)
        opened.session = self._sessions.watch(opened.session, naming)
        return opened


class Naming:
    """What the events of one session are about. graph: what onnxruntime was given, source: the graph with the sites."""

    def __init__(self, stage: str, graph: OnnxGraph, source: OnnxGraph, claims: Claims) -> None:
        self.stage, self.claims = stage, claims
        self.nodes = {node.name: node for node in graph.nodes()}
        sites = SiteNames.of(source)
        known = {node.name: node for node in source.nodes()}
        self.sites = place([_wiring(node, known) for node in graph.nodes()], sites)
        self._made: dict[str, tuple[Executed, _Counts]] = {}

    def find(self, name: str) -> str | None:
        """The node that an event is about: of its name, or the one whose name an optimization has made longer."""
        while name and name not in self.nodes:
            name = name.rpartition("/")[0]
        return name or None

    def executed(self, name: str, op: str, site: str) -> tuple[Executed, _Counts]:
        """The node of this name as onnxruntime calls it, and how its bytes are counted."""
        if name not in self._made:
            node = self.nodes.get(self.find(name) or "")
            own = node is not None and node.name == name
            kernel = self.claims.claimed.get(name, "onnxruntime")
            body = name.partition("/")[0] if node is None or not own or node.origin.inlined else name
            why = self.claims.unclaimed.get(body) or self.claims.left.get(body, "")
            about = Executed(name, _op(node, op) if own else op, site, kernel, self.stage, why, at_most=own and _skips(node))
            weights = sum(_constant_bytes(operand) for operand in node.operands) if node is not None else 0
            self._made[name] = about, _Counts(op, node if own else None, weights)
        return self._made[name]


def _wiring(node: Node, known: Mapping[str, Node]) -> Wiring:
    outputs = [value.key.meta.get("stands_for", value.name) for value in node.outputs]
    read = () if reads_sizes(node.op) else node.operands
    operands = [value.key.meta.get("stands_for", value.name) for value in read if value is not None]
    names = dict.fromkeys([*outputs, *(value.name for value in node.outputs)])
    return Wiring(node.name, tuple(names), tuple(operands), node.origin.scope)


def _op(node: Node | None, op: str) -> str:
    """The op with its domain, unless onnxruntime made another of it."""
    return node.op if node is not None and node.op.startswith(f"{DOMAIN}.") else op


def _constant_bytes(value: Value | None, depth: int = 4) -> int:
    """Bytes of the weights that a value is, or is made of and nothing else."""
    if value is None:
        return 0
    if value.is_parameter:
        return parameter_bytes(value)
    maker = value.producer
    if maker is None or not depth:
        return 0
    found = [_constant_bytes(operand, depth - 1) for operand in maker.operands if operand is not None]
    return sum(found) if found and all(found) else 0


def _skips(node: Node | None) -> bool:
    if node is None or node.op != f"{DOMAIN}.linear":
        return False
    masked = len(node.operands) > 7 and node.operands[7] is not None
    return masked or node.attributes.get("keep", "none") != "none"


@dataclass
class _Counts:
    """How the bytes that a node must read follow from its event.

    weights: what the graph says. Events do not count weights that onnxruntime has packed in a way of its own.
    """

    op: str
    node: Node | None
    weights: int

    def __call__(self, about: Mapping[str, Any], tokens: int) -> Bytes:
        weights, activations = max(int(about["parameter_size"]), self.weights), int(about["activation_size"])
        if self.op in _VIEWS:
            return Bytes()
        if self.op in _TABLES:
            return Bytes(int(about["output_size"]) if weights else 0, 0, activations if weights else int(about["output_size"]))
        inputs = [_tensor(each) for each in about.get("input_type_shape", ())]
        if self.op == "GroupQueryAttention" and len(inputs) > 4:
            return self._attention(inputs, tokens)
        if self.op == "RotaryEmbedding" and len(inputs) == 4:
            (_, shape), (_, table) = inputs[0], inputs[2]
            rows = min(shape[-2], table[0]) if shape and table else 0
            return Bytes(weights * rows // max(table[0], 1), 0, activations)
        if self.op == "Attention" and self.node is not None and len(inputs) >= 3:  # ours: query, keys, values, mask
            caches = sum(count for count, _ in inputs[1:3])
            return Bytes(weights, caches, activations - caches)
        return Bytes(weights, 0, activations)

    def _attention(self, inputs: list[tuple[int, tuple[int, ...]]], tokens: int) -> Bytes:
        """Of the buffers the entries that are written, or of the window, with those that come."""
        window = int(self.node.attributes.get("local_window_size", -1)) if self.node is not None else -1
        new = inputs[0][1][1]
        seen = min(tokens, window + new) if window > 0 else tokens
        caches = sum(count * min(seen, shape[2]) // max(shape[2], 1) for count, shape in inputs[3:5])
        return Bytes(0, caches, sum(count for count, _ in inputs[:3]))


def _tensor(described: Mapping[str, Any]) -> tuple[int, tuple[int, ...]]:
    """Bytes and shape of an input as events describe it: ``{"float": [1, 1, 64]}``."""
    ((kind, shape),) = described.items()
    return math.ceil(math.prod(shape) * _BITS.get(kind, 32) / 8), tuple(shape)


_BITS = {
    "float": 32, "float16": 16, "bfloat16": 16, "double": 64, "int8": 8, "uint8": 8, "int16": 16, "uint16": 16, "int32": 32,
    "uint32": 32, "int64": 64, "uint64": 64, "bool": 8,
}  # fmt: skip


def _take(events: list[dict[str, Any]], runs: list[_Run], naming: Naming, recorder: Recorder) -> None:
    """Put the nodes of each run into its step."""
    found = list(_by_run(events))
    if len(found) != len(runs):  # a run that failed may or may not have left events
        runs = [run for run in runs if run.ok]
    if len(found) < len(runs):
        recorder.note(
            f"onnxruntime has kept the events of {len(found)} of {len(runs)} runs of the graph {naming.stage!r} (it keeps a "
            "million): profile fewer tokens"
        )
    for run, (whole, nodes) in zip(runs, found, strict=False):
        end = run.begin + run.time
        start = end - 1000 * int(whole["dur"])  # the clocks differ; both saw the end
        names = [event["name"].removesuffix(_SUFFIX) for event in nodes]
        ours = [naming.find(name) for name in names]
        sites = from_neighbours([None if name is None else naming.sites[name] for name in ours])
        spent = 0
        for event, name, site in zip(nodes, names, sites, strict=True):
            about = event["args"]
            node, counts = naming.executed(name, about["op_name"], site)
            begin, time = start + 1000 * (int(event["ts"]) - int(whole["ts"])), 1000 * int(event["dur"])
            run.step.calls.append(Call(node, begin, time, counts(about, run.tokens)))
            spent += time
        run.step.add(BETWEEN, 1000 * int(whole["dur"]) - spent)


def _by_run(events: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each run with the events of its nodes, in the order of execution. Nodes within others are left to those."""
    nodes: list[dict[str, Any]] = []
    for event in events:
        if event.get("name") == "model_run":
            yield event, sorted(nodes, key=lambda each: int(each["ts"]))
            nodes = []
        elif event.get("cat") == "Node" and str(event.get("name")).endswith(_SUFFIX):
            if event["args"]["op_name"] in _HOLDERS:
                begin = int(event["ts"])
                nodes = [each for each in nodes if int(each["ts"]) < begin]
            nodes.append(event)
