"""Running a decoder with its state: a ``Compiled`` graph, and the ``Session`` that owns the slots of one request.

A ``Compiled`` is opened once and never changes, so that several threads may use it. Everything that one request leaves behind
(the slots, how many tokens they hold, which of these are padding) is in its ``Session``: two sessions cannot disturb each
other, and a new one starts clean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from actgraph.errors import InputError, UnsupportedError
from actgraph.graph.context import KINDS, context_length
from actgraph.graph.executor import Runner, executor_for
from actgraph.graph.graph import Array, Graph, Role
from actgraph.graph.slots import Slot, initial, slots_of, with_initial_slots

ENGINES = ("auto", "torch", "onnxruntime")
_DIALECTS = {"torch": "fx", "onnxruntime": "onnx"}
#: Tokens of a prompt that are computed at once.
CHUNK = 512


def compile(graph: Graph, engine: str = "auto", *, chunk: int = CHUNK) -> Compiled:
    """Make ``graph`` ready to run many times.

    engine: ``"torch"``, ``"onnxruntime"`` (a torch graph is exported first), or ``"auto"``: the engine of the graph's dialect.
    chunk: tokens of a prompt that are computed at once; longer prompts are fed in pieces.
    Raises UnsupportedError for an engine that cannot run the graph.
    """
    if engine not in ENGINES:
        raise InputError(f"there is no engine {engine!r}", f"choose {', '.join(ENGINES)}")
    if chunk < 1:
        raise InputError(f"chunk is {chunk}", "give at least 1")
    wanted = _DIALECTS.get(engine, graph.dialect)
    if wanted == "onnx" and graph.dialect == "fx":
        from actgraph.formats.onnx_export import to_onnx
        from actgraph.graph.fx import FxGraph

        assert isinstance(graph, FxGraph)
        graph = to_onnx(graph)
    elif wanted != graph.dialect:
        raise UnsupportedError(f"{graph.name} is an ONNX graph, which torch does not run", "use engine='onnxruntime'")
    return Compiled(graph, chunk)


class Compiled:
    """An opened graph. Make one with ``compile``; calls are thread-safe."""

    def __init__(self, graph: Graph, chunk: int = CHUNK) -> None:
        self.graph = graph.clone()
        self.chunk = chunk
        self.slots: tuple[Slot, ...] = tuple(slots_of(self.graph).values())
        self.runner: Runner = executor_for(self.graph).open(self.graph)
        self.inputs = {value.name: value for value in self.graph.inputs()}
        self.capacity = _capacity(self.graph, self.slots)

    def __repr__(self) -> str:
        kept = f", {len(self.slots)} slots" if self.slots else ""
        return f"<Compiled {self.graph.name}{kept}>"

    def session(self, batch: int = 1) -> Session:
        """A new session for ``batch`` rows, whose slots are empty."""
        return Session(self, batch)

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """One call with empty slots: outputs by name, without the slots'."""
        results = self.runner(with_initial_slots(self.graph, inputs))
        return {name: array for name, array in results.items() if self.graph.role(name) is not Role.SLOT}


class Session:
    """The state of one request of ``batch`` rows. Not for several threads at once; open one for each."""

    def __init__(self, compiled: Compiled, batch: int = 1) -> None:
        if batch < 1:
            raise InputError(f"batch is {batch}", "give at least 1")
        if "input_ids" not in compiled.inputs:
            raise InputError(f"{compiled.graph.name} takes no input_ids: it is no language model", "call it with its inputs")
        self.compiled = compiled
        self.batch = batch
        self.reset()

    def reset(self) -> None:
        """Forget every token."""
        self._state = {slot.input: initial(slot, self.batch) for slot in self.compiled.slots}
        self._tokens: Array = np.zeros((self.batch, 0), np.int64)
        self._valid: Array = np.zeros((self.batch, 0), np.int64)
        self._prompt: Array | None = None

    @property
    def length(self) -> int:
        """Places used so far, padding included."""
        return int(self._valid.shape[1])

    @property
    def bytes(self) -> int:
        """Bytes of all slots now."""
        return sum(array.nbytes for array in self._state.values())

    def feed(self, tokens: Array, valid: Array | None = None) -> dict[str, Array]:
        """Compute new ``tokens`` [batch, n]; returns the outputs for the last chunk of them.

        valid: [batch, n], 0 for padding (which stands on the left of a row's first token). Tokens of the first call are the
        prompt. Longer inputs than ``chunk`` are computed in pieces. Raises InputError when the context is full.
        """
        tokens = np.asarray(tokens, np.int64)
        valid = np.ones_like(tokens) if valid is None else np.asarray(valid, np.int64)
        if tokens.ndim != 2 or len(tokens) != self.batch or tokens.shape != valid.shape or tokens.shape[1] == 0:
            raise InputError(
                f"tokens are {list(tokens.shape)}, valid {list(valid.shape)}", f"both are [{self.batch}, n], n > 0"
            )
        capacity = self.compiled.capacity
        if capacity is not None and self.length + tokens.shape[1] > capacity:
            raise InputError(
                f"the context is full: {self.length} of {capacity} tokens are used, and {tokens.shape[1]} are to come",
                "start a new session, or shorten the prompt",
            )
        if self._prompt is None:
            self._prompt = valid.sum(axis=1)
        results: dict[str, Array] = {}
        if not self.compiled.slots:
            return self._recompute(tokens, valid)
        for start in range(0, tokens.shape[1], self.compiled.chunk):
            piece = slice(start, start + self.compiled.chunk)
            results = self._step(tokens[:, piece], valid[:, piece])
        return results

    def _step(self, tokens: Array, valid: Array) -> dict[str, Array]:
        done = self.length
        whole = np.concatenate([self._valid, valid], axis=1)
        results = self.compiled.runner({**self._fill(tokens, whole, done), **self._state})
        self._state = {slot.input: results[slot.output] for slot in self.compiled.slots}
        self._remember(tokens, whole)
        return self._without_state(results)

    def _recompute(self, tokens: Array, valid: Array) -> dict[str, Array]:
        """A graph without slots sees all tokens again."""
        every, whole = np.concatenate([self._tokens, tokens], axis=1), np.concatenate([self._valid, valid], axis=1)
        results = self._without_state(self.compiled.runner(self._fill(every, whole, 0)))
        self._remember(tokens, whole)
        return results

    def _remember(self, tokens: Array, valid: Array) -> None:
        self._tokens = np.concatenate([self._tokens, tokens], axis=1)
        self._valid = valid

    def _without_state(self, results: Mapping[str, Array]) -> dict[str, Array]:
        return {name: array for name, array in results.items() if self.compiled.graph.role(name) is not Role.SLOT}

    def _fill(self, tokens: Array, valid: Array, done: int) -> dict[str, Array]:
        """Everything that the graph takes beside its state. ``valid`` covers all tokens, ``tokens`` those from ``done`` on."""
        places = np.maximum(np.cumsum(valid, axis=1) - 1, 0)[:, done:]
        prompt = self._prompt if self._prompt is not None else valid.sum(axis=1)
        known: dict[str, Array] = {
            "input_ids": tokens,
            "attention_mask": valid,
            "position_ids": places,
            "token_type_ids": np.zeros_like(tokens),
            "cache_position": np.asarray([done]),
            "positions": places,
            "valid_tokens": valid[:, done:],
            "prompt_lengths": prompt,
            "row_index": np.arange(self.batch),
            "step": np.asarray([max(0, done + tokens.shape[1] - int(prompt.max()))]),
        }
        feed: dict[str, Array] = {}
        for name, value in self.compiled.inputs.items():
            if name in known and value.dtype is not None:
                feed[name] = known[name].astype(value.dtype.numpy)
        return feed


def _capacity(graph: Graph, slots: Sequence[Slot]) -> int | None:
    """How many tokens a session can hold: the size of fixed slots, or what the model says of itself."""
    limits = [limit for limit in (context_length(graph),) if limit is not None]
    limits += [size for slot in slots if slot.update == "scatter" and isinstance(size := slot.shape[2], int)]
    return min(limits, default=None)


def unknown_inputs(graph: Graph) -> Iterator[str]:
    """Inputs that a session cannot fill in."""
    known = {"input_ids", "attention_mask", "position_ids", "token_type_ids", "cache_position", *KINDS}
    slots = {slot.input for slot in slots_of(graph).values()}
    for value in graph.inputs():
        ours = value.name in known or value.name in slots or graph.role(value.name) is not Role.USER
        if not ours and graph.default(value.name) is None:
            yield value.name
