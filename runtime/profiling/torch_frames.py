"""Profiling steps that torch sessions run as lists of kernel frames: the list in pieces of one, with a clock between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from actgraph.graph.graph import Array
from actgraph.runtime.profiling.record import PROFILER, RECORDING, Call, Executed, Recorder, clock
from actgraph.runtime.profiling.torch_nodes import NodePlan, Reads
from actgraph.runtime.torch_frames import now
from actgraph.runtime.torch_recorded import Recording


class TimedRecording(Recording):
    """A recording whose steps tell how long each frame takes. The step that is recorded is one row of its own."""

    def __init__(self, plan: NodePlan, recorder: Recorder, held: Any, inputs: Any, slots: Any, used: int) -> None:
        self._plan, self._recorder = plan, recorder
        self._node_of: dict[Any, fx.Node] = {}
        begin = clock()
        super().__init__(held, inputs, slots, used)
        if recorder.now is not None:
            recorder.now.add(RECORDING, clock() - begin)
        self._running: tuple[fx.Node, int] | None = None
        self.portable = False  # it belongs to this profile
        self._about = {node: self._named(node) for node in self._node_of.values()}
        self._split()

    def _named(self, node: fx.Node) -> Executed:
        """What a frame runs, where it stands for a function of torch."""
        about = self._plan.nodes[node.name][0]
        return replace(about, kernel="plain") if about.kernel == "torch" else about

    def _frames_of(self, node: fx.Node, args: Any, options: Any) -> Any:
        frames = super()._frames_of(node, args, options)
        self._node_of |= dict.fromkeys(frames, node)
        return frames

    def _code(self, nodes: Any) -> Any:
        code = super()._code(nodes)
        module: fx.GraphModule = code.run.__self__  # type: ignore[attr-defined]
        self._plan.put_clocks(module.graph, self._recorder, None)
        module.recompile()
        code.run = module.forward
        return code

    def _split(self) -> None:
        """Let every frame be a stretch of its own, in front of which Python looks at the clock."""
        own: Any = self
        python: list[Any] = []
        ranges: list[tuple[int, int]] = []
        for code, (start, stop) in zip(own._python, own._ranges, strict=True):
            python.append(code)
            ranges.append((start, start))
            for place in range(start, stop):
                python.append(_Mark(self, self._node_of[self._frames[place]]))
                ranges.append((place, place + 1))
            python.append(_Mark(self, None))
            ranges.append((stop, stop))
        own._python, own._ranges = python, ranges

    def _mark(self, node: fx.Node | None) -> None:
        """A frame has ended, and that of ``node`` begins."""
        time, step = clock(), self._recorder.now
        if self._running is not None and step is not None:
            done, begin = self._running
            about, reads = self._about[done], self._plan.nodes[done.name][1]
            step.calls.append(Call(about, begin, time - begin, self._bytes(done, reads)))
        after = clock()
        if step is not None:
            step.add(PROFILER, after - time)
        self._running = None if node is None else (node, after)

    def _bytes(self, node: fx.Node, reads: Reads) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: now(self._env[source], self._used))
        return reads(args, kwargs, now(self._env[node], self._used))

    def __call__(self, inputs: Mapping[str, Array], moved: Mapping[str, torch.Tensor], used: int) -> dict[str, torch.Tensor]:
        self._running = None
        return super().__call__(inputs, moved, used)


class _Mark:
    """Python code of a stretch that reads and writes nothing."""

    reads: tuple[Any, ...] = ()
    writes: tuple[Any, ...] = ()

    def __init__(self, recording: TimedRecording, node: fx.Node | None) -> None:
        self._recording, self._node = recording, node

    def run(self) -> tuple[Any, ...]:
        self._recording._mark(self._node)
        return ()
