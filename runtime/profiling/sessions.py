"""Putting a profile on sessions and taking it off again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from actgraph.errors import ActgraphError, InputError
from actgraph.graph.graph import Array
from actgraph.graph.slots import with_initial_slots
from actgraph.runtime.profiling.profile import Profile
from actgraph.runtime.profiling.record import Recorder
from actgraph.runtime.slotless import Slotless
from actgraph.runtime.state import ExplicitState, without_slots

if TYPE_CHECKING:
    from actgraph.runtime.session import Compiled, Session

#: What is undone when a profile ends.
Undo = Callable[[], None]


class Probe:
    """Profiles sessions of one ``Compiled``, and its calls. Twins of its graphs are opened when the first is attached."""

    def __init__(self, compiled: Compiled) -> None:
        self.compiled, self.recorder = compiled, Recorder()
        self._undo: list[Undo] = []
        self._held: dict[str, Any] | None = None
        self._runners: dict[str, Any] = {}
        self._sessions: Any = None  # of onnxruntime

    def close(self, *, read: bool) -> None:
        """Take the profile off everything. ``read``: what engines have written down is wanted."""
        while self._undo:
            self._undo.pop()()
        if self._sessions is not None:
            self._sessions.close(read=read)

    def attach(self, session: Session) -> None:
        """Profile ``session`` from now on. Raises InputError where it is profiled already."""
        if "feed" in vars(session):
            raise InputError("the session is being profiled already", "end that profile first")
        state: Any = session._state
        twins = self._twins()
        if isinstance(state, ExplicitState):
            self._set(state, "_runner", self._runner)
        else:
            assert twins is not None
            self._set(state, "_graphs", twins)
            if self.compiled.graph.dialect == "onnx":  # what is bound is bound to the other sessions
                state._bindings.clear()
                self._undo.append(lambda: state._bindings.clear())
            else:
                self._record(state)
        feed = session.feed

        def timed(tokens: Array, valid: Array | None = None) -> dict[str, Array]:
            count = np.shape(tokens)[-1] if np.ndim(tokens) else 0
            stage = "decode" if count == 1 and session.length else "prefill"
            self.recorder.held = lambda: session.length
            with self.recorder.step(stage, count):
                return feed(tokens, valid)

        vars(session)["feed"] = timed  # an attribute of this one session: others pay nothing
        self._undo.append(lambda: vars(session).pop("feed"))

    def _record(self, state: Any) -> None:
        """Let the steps that a session of torch records, to run them from C, be timed."""
        from actgraph.graph.fx_types import tensor_of
        from actgraph.runtime.profiling.torch_frames import TimedRecording
        from actgraph.runtime.profiling.torch_nodes import NodePlan
        from actgraph.runtime.torch_recorded import Reshaped

        held = self.compiled._held_graphs() or {}
        plans = {stage: NodePlan.of_held(stage, graph) for stage, graph in held.items() if graph.records}

        def recorded(stage: str, held: Any, inputs: Mapping[str, Array], used: int) -> Any:
            _, found = state._recordings.get(stage, (None, None))
            if found is not None and found.fits(used):
                with contextlib.suppress(Reshaped):
                    return found(inputs, state._tensors, used)
            tensors = {name: tensor_of(array) for name, array in inputs.items()}
            made = TimedRecording(plans[stage], self.recorder, held, tensors, state._tensors, used)
            state._recordings[stage] = None, made
            return made.results

        def undo() -> None:
            state.let_go()
            del vars(state)["_recorded"]

        state.let_go()
        vars(state)["_recorded"] = recorded
        self._undo.append(undo)

    def call(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """``Compiled.__call__``, profiled."""
        stage = self.compiled.program.driver.graph_at(0)
        graph = self.compiled.program.graphs[stage]
        run = self._runner(stage)
        if isinstance(run, Slotless):
            run.prepare(inputs)  # opening is no part of the call
        tokens = inputs.get("input_ids")
        with self.recorder.step("forward", tokens.shape[-1] if tokens is not None and tokens.ndim else 0):
            return without_slots(graph, run(with_initial_slots(graph, inputs)))

    def _set(self, target: Any, name: str, value: Any) -> None:
        old = getattr(target, name)
        self._undo.append(lambda: setattr(target, name, old))
        setattr(target, name, value)

    # --- twins ------------------------------------------------------------------------------------------------------------

    def _twins(self) -> dict[str, Any] | None:
        held = self.compiled._held_graphs()
        if self._held is None and held is not None:
            self._held = {stage: self._timed(stage, graph) for stage, graph in held.items()}
        return self._held

    def _timed(self, stage: str, held: Any) -> Any:
        if self.compiled.graph.dialect == "fx":
            from actgraph.runtime.profiling.torch_nodes import timed_held

            return timed_held(stage, held, self.recorder)
        return self._onnxruntime.held(stage, held, self.compiled.capacity)

    def _runner(self, stage: str) -> Any:
        if stage not in self._runners:
            graph, runner = self.compiled.program.graphs[stage], self.compiled.runner(stage)
            if isinstance(runner, Slotless):
                self._runners[stage] = runner.wrapped(lambda held: self._timed(stage, held))
            elif graph.dialect == "fx":
                from actgraph.graph.fx import FxGraph
                from actgraph.runtime.profiling.torch_nodes import timed_runner

                assert isinstance(graph, FxGraph)
                self._runners[stage] = timed_runner(stage, graph, runner, self.recorder)
            else:
                self._runners[stage] = self._onnxruntime.runner(stage, graph)
        return self._runners[stage]

    @property
    def _onnxruntime(self) -> Any:
        if self._sessions is None:
            from actgraph.runtime.profiling.ort_nodes import ProfiledSessions

            self._sessions = ProfiledSessions(self.recorder)
        return self._sessions


@contextmanager
def profiled(compiled: Compiled, session: Session | None, stream: bool | float) -> Iterator[Profile]:
    """``Session.profile`` and ``Compiled.profile``."""
    probe = Probe(compiled)
    profile = Profile(compiled.engine, threads_of(compiled))
    finished = False
    try:
        if session is not None:
            probe.attach(session)
            yield profile
        else:
            with compiled._watch(probe):
                yield profile
        finished = True
    finally:
        probe.close(read=finished)
    profile._finish(probe.recorder, stream_figure(compiled, stream, probe.recorder))


def threads_of(compiled: Compiled) -> int:
    """How many threads compute an operator at most."""
    if compiled.graph.dialect == "fx":
        import torch

        return torch.get_num_threads()
    from actgraph.runtime.threads import threads

    return threads()


def stream_figure(compiled: Compiled, stream: bool | float, recorder: Recorder | None = None) -> float | None:
    """Bytes per second of a read loop with the threads of ``compiled``; what is given, where it is a number."""
    if not isinstance(stream, bool):
        return float(stream)
    if not stream:
        return None
    try:
        if compiled.device != "cpu":
            raise InputError(f"the read loop runs on the processor, not on {compiled.device}")
        from actgraph.runtime.kernels.numba.stream import read_bandwidth

        return read_bandwidth(threads_of(compiled))
    except (ActgraphError, ImportError, MemoryError) as error:
        if recorder is not None:
            recorder.note(f"the stream figure was not measured: {getattr(error, 'message', None) or error}")
        return None
