"""Running a decoder with its state: a ``Compiled`` model, and the ``Session`` that owns the slots of one request.

A ``Compiled`` is opened once and never changes, so that several threads may use it. Everything that one request leaves behind
(the slots, how many tokens they hold, which of these are padding) is in its ``Session``: two sessions cannot disturb each
other, and a new one starts clean.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actgraph.errors import InputError, UnsupportedError
from actgraph.graph.context import KINDS, context_length
from actgraph.graph.executor import Executor, Runner, executor_for
from actgraph.graph.graph import Array, Graph, Role, Value
from actgraph.graph.input_values import InputValue
from actgraph.graph.program import Program
from actgraph.graph.slots import Slot, slots_of, with_initial_slots
from actgraph.runtime.given import Givable, GivenInputs, with_adapter
from actgraph.runtime.native.library import available
from actgraph.runtime.slotless import Slotless, slotless
from actgraph.runtime.state import TOKENS, ExplicitState, State, without_slots
from actgraph.runtime.tokens import FILLED, Tokens

if TYPE_CHECKING:
    from actgraph.runtime.claims import Claims
    from actgraph.runtime.prefix import PrefixCache
    from actgraph.runtime.profiling.profile import Profile
    from actgraph.runtime.profiling.sessions import Probe
    from actgraph.runtime.torch_device import Placed

#: Each engine and the dialect of the graphs that it runs.
ENGINES = {"torch": "fx", "torch.compile": "fx", "onnxruntime": "onnx"}
LOWERINGS = ("held", "explicit")
#: Tokens of a prompt that are computed at once.
CHUNK = 512


def compile(
    model: Graph | Program,
    engine: str = "auto",
    *,
    chunk: int = CHUNK,
    lowering: str = "held",
    prefixes: PrefixCache | None = None,
    kernels: bool = True,
    require_kernels: bool = False,
    device: str = "cpu",
) -> Compiled:
    """Make a graph, or a program of a prefill and a decode graph, ready to run many times.

    engine: ``"torch"``; ``"torch.compile"``, which generates code for the graph of single tokens (of a model that is one graph,
    for that) when it is first called: that takes up to minutes, and needs a C++ compiler on the CPU; ``"onnxruntime"`` (a torch
    graph is exported first); or ``"auto"``: torch for a torch graph, onnxruntime for an ONNX one.
    chunk: tokens of a prompt that are computed at once; longer prompts are fed in pieces.
    lowering: how sessions keep slots: ``"held"`` in buffers of the engine, written in place; ``"explicit"`` as arrays that go
    in and come out of each call.
    prefixes: where prompts leave their keys and values for others that begin in the same way.
    kernels: what has kernels of ours runs with them, where their library was built; else one line says so. With slots that are
    explicit it runs without. require_kernels: an op of ours without a kernel is an
    error, and so is a model that runs without them.
    device: where the torch engines run: ``"cpu"``, ``"cuda"``, ``"cuda:1"``. Weights are copied there once; inputs and results
    are numpy arrays as ever. There the kernels are those written in Triton.
    Raises InputError for a device that does not exist, UnsupportedError where there is no CUDA, for an engine that cannot run
    the model (torch.compile: one without slots, or whose slots are explicit), for slots that outlive sessions, and for prefixes
    of a model whose state does not have one entry for each token.
    """
    if not isinstance(model, (Graph, Program)):
        raise InputError(f"compile takes a graph or a program, not {type(model).__name__}", "ag.load opens a model by its name")
    if engine not in ("auto", *ENGINES):
        raise InputError(f"there is no engine {engine!r}", f"choose auto, {', '.join(ENGINES)}")
    if lowering not in LOWERINGS:
        raise InputError(f"there is no lowering {lowering!r}", f"choose {', '.join(LOWERINGS)}")
    if chunk < 1:
        raise InputError(f"chunk is {chunk}", "give at least 1")
    program = model if isinstance(model, Program) else Program.of(model)
    dialect = next(iter(program)).dialect
    if engine == "auto":
        engine = "onnxruntime" if dialect == "onnx" else "torch"
    if ENGINES[engine] != dialect:
        if dialect == "onnx":
            raise UnsupportedError(f"{program.name} is an ONNX graph, which torch does not run", "use engine='onnxruntime'")
        program = program.map(_exported)
    if device != "cpu" and ENGINES[engine] != "fx":
        raise UnsupportedError(f"{engine} runs on the CPU here, not on {device}", "use engine='torch' for a graph of torch")
    lasting = next((slot for slot in program.slots.values() if slot.reset == "never"), None)
    if lasting is not None:
        raise UnsupportedError(f"slot {lasting.name} outlives sessions (reset = never)", "feed it yourself: call the graph")
    compiled = Compiled(program, engine, chunk=chunk, lowering=lowering, prefixes=prefixes, kernels=kernels, device=device)
    if prefixes is not None:
        from actgraph.runtime.prefix import why_not

        reason = why_not(compiled)
        if reason:
            raise UnsupportedError(f"{program.name} cannot reuse prefixes: {reason}", "compile it without prefixes")
    compiled.open()
    if engine == "torch.compile" and compiled.why_explicit:
        raise UnsupportedError(
            f"engine='torch.compile' generates code for graphs that hold their slots, and {program.name} does not: "
            f"{compiled.why_explicit}",
            "give it a cache (the pass kv_cache), or use engine='torch'",
        )
    if require_kernels:
        _require_kernels(compiled, kernels)
    return compiled


def _place(device: str) -> Placed | None:
    from actgraph.runtime.torch_device import Placed, find_device

    found = find_device(device)
    return None if found is None else Placed(found)


def _installed(placed: Placed) -> bool:
    from actgraph.runtime.torch_device import install_kernels

    return install_kernels(placed.device)


def _require_kernels(compiled: Compiled, asked: bool) -> None:
    """Raise UnsupportedError for a node of ours that runs without a kernel, or where there are none at all."""
    if not compiled.kernels and compiled._placed is not None:
        raise UnsupportedError(f"there are no Triton kernels on {compiled.device}", "a line on standard error has said why")
    if not asked:
        raise InputError("kernels=False and require_kernels=True exclude each other", "give one of them")
    if not compiled.kernels:
        raise UnsupportedError("the kernels' library was not built", "install actgraph where there is a C compiler")
    if compiled.claims is None:
        raise UnsupportedError(
            f"{compiled.program.name} runs without kernels: its slots are explicit ({compiled.why_explicit})",
            "sessions that hold a cache have them",
        )
    every = list(compiled.claims.items())
    for stage, runner in compiled._runners.items():
        if isinstance(runner, Slotless):
            every += [(stage, runner.claims_of(few)) for few in runner.kinds]
    for stage, claims in every:
        for node, reason in claims.unclaimed.items():
            hint = "kernels compute in float32: cast the model first (cast{dtype=f32})" if any(
                name in reason for name in ("f16[", "bf16[", "f64[")
            ) else ""  # fmt: skip
            raise UnsupportedError(f"{node} of the graph {stage!r} has no kernel: {reason}", hint)


def _exported(graph: Graph) -> Graph:
    from actgraph.formats.onnx_export import to_onnx
    from actgraph.graph.fx import FxGraph

    assert isinstance(graph, FxGraph)
    return to_onnx(graph)


class Compiled:
    """An opened model. Make one with ``compile``; calls are thread-safe.

    graph: the graph that takes prompts (of a program, the driver's at step 0). inputs: its inputs by name. capacity: the tokens
    that a session can hold, ``None`` where nothing limits them. key: a hash of the program with its weights and edits. device:
    where it runs. givable: the inputs that sessions do not fill in.
    """

    def __init__(
        self,
        program: Program,
        engine: str,
        *,
        chunk: int = CHUNK,
        lowering: str = "held",
        prefixes: PrefixCache | None = None,
        kernels: bool = True,
        device: str = "cpu",
    ) -> None:
        self._placed = None if device == "cpu" else _place(device)
        self.device = "cpu" if self._placed is None else str(self._placed.device)
        self.kernels = kernels and (available(asked=True) if self._placed is None else _installed(self._placed))
        self.program = program.clone()
        self.engine, self.chunk, self.lowering, self.prefixes = engine, chunk, lowering, prefixes
        driver = self.program.driver
        self.graph = self.program.graphs[driver.graph_at(0)]
        self.slots: tuple[Slot, ...] = tuple(self.program.slots.values())
        self.inputs = {value.name: value for value in self.graph.inputs()}
        self.givable = Givable(self.program)
        self.capacity = self._capacity()
        self._lock = threading.Lock()
        self._watched = threading.local()  # by whom, in this thread
        self._runners: dict[str, Runner] = {}
        self._held: dict[str, Any] | None = None
        self._key = ""
        self.why_explicit = "" if lowering == "held" and self.slots else "asked for" if self.slots else "no slots"

    def __repr__(self) -> str:
        kept = f", {len(self.slots)} slots {self.lowering}" if self.slots else ""
        return f"<Compiled {self.program.name} for {self.engine}{kept}>"

    @property
    def key(self) -> str:
        with self._lock:
            self._key = self._key or self.program.content_hash()
            return self._key

    def profile(self, *, stream: bool | float = True) -> AbstractContextManager[Profile]:
        """As ``Session.profile``, of everything that this thread runs with the model: new sessions, ``generate``, and calls."""
        from actgraph.runtime.profiling.sessions import profiled

        return profiled(self, None, stream)

    @contextmanager
    def _watch(self, probe: Probe) -> Iterator[None]:
        """Let ``probe`` profile what this thread opens and calls."""
        if getattr(self._watched, "probe", None) is not None:
            raise InputError("the model is being profiled already", "end that profile first")
        self._watched.probe = probe
        try:
            yield
        finally:
            self._watched.probe = None

    def session(
        self,
        batch: int = 1,
        *,
        inputs: Mapping[str, InputValue] | None = None,
        adapter: str | Path | None = None,
    ) -> Session:
        """A new session for ``batch`` rows, whose slots are empty.

        inputs: values for inputs that the session does not fill in, such as ``{"steer.scale": 2}``: numbers, lists or arrays,
        for all rows (``[1]``) or one for each (``[batch]``); ``session.inputs`` changes them later. adapter: a file with such
        values (see ``save_adapter``). Raises InputError for a name, type or shape that does not fit.
        """
        return Session(self, batch, with_adapter(inputs, adapter))

    def __call__(self, inputs: Mapping[str, Array], *, adapter: str | Path | None = None) -> dict[str, Array]:
        """One call with empty slots: outputs by name, without the slots'. adapter: a file with more inputs."""
        if adapter is not None:
            inputs = with_adapter(inputs, adapter)  # type: ignore[assignment]
        probe = getattr(self._watched, "probe", None)
        if probe is not None:
            return probe.call(inputs)  # type: ignore[no-any-return]
        results = self.runner(self.program.driver.graph_at(0))(with_initial_slots(self.graph, inputs))
        return without_slots(self.graph, results)

    def runner(self, stage: str) -> Runner:
        """A graph of the program, opened when it is first asked for."""
        with self._lock:
            if stage not in self._runners:
                graph = self.program.graphs[stage]
                self._runners[stage] = slotless(graph) if self._calls_kernels else self._executor(graph).open(graph)
            return self._runners[stage]

    @property
    def _calls_kernels(self) -> bool:
        """Whether calls without slots have kernels of the processor."""
        return self.kernels and self._placed is None and not self.slots

    def _executor(self, graph: Graph) -> Executor:
        if self._placed is None:
            return executor_for(graph)
        from actgraph.runtime.torch_engine import TorchExecutor

        return TorchExecutor(self._placed, kernels=self.kernels)

    def open(self) -> None:
        """Open what sessions run; ``compile`` has done that. Afterwards ``lowering`` and ``why_explicit`` are final."""
        if self._held_graphs() is None:
            for stage in self.program.graphs:
                runner = self.runner(stage)
                if isinstance(runner, Slotless):
                    runner.open()

    @property
    def claims(self) -> dict[str, Claims] | None:
        """The kernels of each graph's nodes; ``None`` where the engine runs the graphs as they are."""
        held = self._held_graphs()
        if held is not None:
            return {name: graph.claims for name, graph in held.items()}
        if not self.kernels or (self._placed is None and self.slots):
            return None
        return {name: self.runner(name).claims for name in self.program.graphs}  # type: ignore[attr-defined]

    def state(self, batch: int) -> State:
        """New slots for ``batch`` rows."""
        held = self._held_graphs()
        if held is None:
            return ExplicitState(self.program.graphs, self.runner, self.slots, batch)
        if self.graph.dialect == "fx":
            from actgraph.runtime.torch_held import TorchState

            return TorchState(held, self.slots, batch, self.capacity)
        from actgraph.runtime.ort_held import OrtState

        return OrtState(held, self.slots, batch, self.capacity)

    def _held_graphs(self) -> dict[str, Any] | None:
        """The graphs of the program with slots that are written in place; ``None`` where it is not asked for or not possible.

        Then ``lowering`` is explicit, and ``why_explicit`` says why.
        """
        with self._lock:
            if self.lowering == "held" and self._held is None and self.slots:
                try:
                    self._held = self._hold()
                except UnsupportedError as error:
                    self.lowering, self.why_explicit = "explicit", error.message
            return self._held

    def _hold(self) -> dict[str, Any]:
        graphs, single = self.program.graphs.items(), self.program.driver.graph_at(1)
        if self.graph.dialect == "fx":
            from actgraph.graph.fx import FxGraph
            from actgraph.runtime.torch_held import HeldGraph
            from actgraph.runtime.torch_packed import Packed

            held, packed = {}, Packed()
            for name, graph in graphs:
                assert isinstance(graph, FxGraph)
                # prompts have every length, and are long enough for the overhead of eager calls not to count
                fixed = len(graphs) == 1 or isinstance(graph.value("input_ids").shape[1], int)  # type: ignore[index]
                compile = self.engine == "torch.compile" and fixed
                held[name] = HeldGraph(
                    graph, packed, compile=compile, kernels=self.kernels, placed=self._placed, prompts=name != single
                )
            return held
        from actgraph.runtime.ort_held import HeldOnnx

        return {name: HeldOnnx(graph, self.capacity, kernels=self.kernels, prompts=name != single) for name, graph in graphs}

    def _capacity(self) -> int | None:
        """How many tokens a session can hold: the size of fixed slots, or what the model says of itself."""
        limits = [limit for limit in (context_length(self.graph),) if limit is not None]
        limits += [size for slot in self.slots if slot.update == "scatter" and isinstance(size := slot.shape[TOKENS], int)]
        return min(limits, default=None)


class Session:
    """The state of one request of ``batch`` rows. Not for several threads at once; open one for each.

    inputs: what is fed beside tokens, such as the strength of an edit: ``session.inputs["steer.scale"] = 2`` is checked at
    once and holds from the next call on.
    """

    def __init__(self, compiled: Compiled, batch: int = 1, inputs: Mapping[str, InputValue] | None = None) -> None:
        if batch < 1:
            raise InputError(f"batch is {batch}", "give at least 1")
        if "input_ids" not in compiled.inputs:
            raise InputError(f"{compiled.graph.name} takes no input_ids: it is no language model", "call it with its inputs")
        self.compiled = compiled
        self.batch = batch
        self.inputs = GivenInputs(compiled.givable, batch)
        self.inputs.update(inputs or {})
        self._driver = compiled.program.driver
        self._wanted = {
            name: {
                value.name: value.dtype.numpy for value in graph.inputs() if value.name in FILLED and value.dtype is not None
            }
            for name, graph in compiled.program.graphs.items()
        }
        self._masked = all("attention_mask" in wanted for wanted in self._wanted.values())
        self._vocabulary = _vocabulary(compiled.graph)
        self._cached = any(slot.update != "replace" for slot in compiled.slots)
        self._state = compiled.state(batch)
        self._tokens = Tokens(batch)
        self._failed = False
        probe = getattr(compiled._watched, "probe", None)
        if probe is not None:
            probe.attach(self)

    def profile(self, *, stream: bool | float = True) -> AbstractContextManager[Profile]:
        """Record which node takes how long, by site and kernel, and how fast it reads: ``with session.profile() as profile:``.

        What the session is fed in the block is recorded; behind it ``profile`` has rows, tables and a Chrome trace. Results are
        those of an unprofiled session. A session of onnxruntime runs on twins of its graphs meanwhile, with onnxruntime's own
        profiler on; opening them takes a while, before the block begins.
        stream: measure how fast memory can be read at all when the block ends, which takes seconds and 1 GB of memory; a number
        is taken as that figure (bytes per second). Raises InputError where the session is being profiled.
        """
        from actgraph.runtime.profiling.sessions import profiled

        return profiled(self.compiled, self, stream)

    def reset(self) -> None:
        """Forget every token; ``inputs`` stay as they are given."""
        self._state.reset()
        self._tokens = Tokens(self.batch)
        self._failed = False

    @property
    def length(self) -> int:
        """Places used so far, padding included."""
        return self._tokens.length

    @property
    def bytes(self) -> int:
        """Bytes of all slots now."""
        return self._state.bytes

    def feed(self, tokens: Array, valid: Array | None = None) -> dict[str, Array]:
        """Compute new ``tokens`` [batch, n]; returns the outputs for the last chunk of them.

        valid: [batch, n], 0 for padding (which stands on the left of a row's first token). Tokens of the first call are the
        prompt. Longer inputs than ``chunk`` are computed in pieces. A program computes the prompt, and later calls of several
        tokens, by its driver's graph of step 0, and single tokens by that of later steps. Raises InputError when the context
        is full.
        """
        if self._failed:
            raise InputError("an earlier call of the session failed while it wrote its slots", "reset the session")
        tokens = np.asarray(tokens)
        if tokens.dtype.kind not in "iu":
            raise InputError(f"tokens are of type {tokens.dtype}", "give integers")
        tokens = tokens.astype(np.int64, copy=False)
        if valid is not None:
            valid = np.asarray(valid, np.int64)
        shape = tokens.shape
        if len(shape) != 2 or shape[0] != self.batch or shape[1] == 0 or (valid is not None and valid.shape != shape):
            given = f", valid {list(valid.shape)}" if valid is not None else ""
            raise InputError(f"tokens are {list(shape)}{given}", f"both are [{self.batch}, n], n > 0")
        capacity, count = self.compiled.capacity, shape[1]
        if capacity is not None and self._tokens.length + count > capacity:
            raise InputError(
                f"the context is full: {self._tokens.length} of {capacity} tokens are used, and {count} are to come",
                "start a new session, or shorten the prompt",
            )
        if valid is not None and not valid.all() and not self._masked:
            raise InputError(
                f"{self.compiled.program.name} takes no attention_mask, so that padding cannot be told from tokens",
                "feed each row in a session of its own",
            )
        low, high = (int(tokens.min()), int(tokens.max())) if tokens.size > 1 else (int(tokens.item()),) * 2
        if low < 0 or (self._vocabulary is not None and high >= self._vocabulary):
            odd = low if low < 0 else high
            raise InputError(f"there is no token {odd}", f"tokens are 0 to {(self._vocabulary or 0) - 1}")
        first = self._tokens.prompt is None
        if first:
            self._tokens.end_prompt(count, valid)
        stage = self._driver.graph_at(0 if first or count > 1 else 1)
        if not self._cached:
            return self._step(stage, tokens, valid, 0)
        chunk = self.compiled.chunk
        if count <= chunk:
            return self._step(stage, tokens, valid, self._tokens.length)
        results: dict[str, Array] = {}
        for start in range(0, count, chunk):
            piece = slice(start, start + chunk)
            part = None if valid is None else valid[:, piece]
            results = self._step(stage, tokens[:, piece], part, self._tokens.length)
        return results

    def _step(self, stage: str, tokens: Array, valid: Array | None, first: int) -> dict[str, Array]:
        """Add the tokens, and compute those from ``first`` on: the new ones, or all where there are no slots."""
        used, given = self._tokens.length, self.inputs.feed(stage)
        self._tokens.add(tokens, valid)
        try:
            return self._state.run(stage, {**self._tokens.feed(first, self._wanted[stage]), **given}, used)
        except BaseException:
            self._tokens.length = used
            if not used:
                self._tokens.prompt = None
            self._failed = bool(self.compiled.slots)  # which of them the call has written is not known
            raise

    def read(self, start: int, stop: int) -> dict[str, Array]:
        """Copies of what the slots with an entry for each token hold of tokens ``start`` to ``stop``, by slot name."""
        if not 0 <= start <= stop <= self.length:
            raise InputError(f"the session holds {self.length} tokens, not {start} to {stop}")
        return self._state.read(start, stop)

    def load(self, contents: Mapping[str, Array], tokens: Array) -> None:
        """Begin an empty session of one row with ``tokens`` [1, n] whose entries are known, as ``read`` gives them.

        They are copied, and are the beginning of the prompt that is fed next. Raises InputError where they do not fit.
        """
        tokens = np.asarray(tokens, np.int64)
        if self.length or self.batch != 1 or tokens.ndim != 2 or len(tokens) != 1:
            raise InputError("entries are loaded into an empty session of one row", "use a session of batch 1, before feeding")
        capacity, count = self.compiled.capacity, tokens.shape[1]
        if capacity is not None and count > capacity:
            raise InputError(f"the context holds {capacity} tokens, and {count} are to be loaded", "load fewer")
        self._state.load(contents, tokens.shape[1])
        self._tokens.add(tokens, None)


def _vocabulary(graph: Graph) -> int | None:
    """How many tokens there are: the rows of the table that token ids are looked up in."""
    for use in graph.value("input_ids").uses:
        prim = use.node.prim if use.node is not None else None
        table = prim.operands[0] if prim is not None and prim.op == "gather" else None
        if isinstance(table, Value) and table.shape is not None and isinstance(table.shape[0], int):
            return table.shape[0]
    return None


def unknown_inputs(graph: Graph, given: Collection[str] = ()) -> Iterator[str]:
    """Inputs that a session cannot fill in, and that are not ``given``."""
    known = FILLED | set(KINDS) | {slot.input for slot in slots_of(graph).values()} | set(given)
    for value in graph.inputs():
        if value.name not in known and graph.role(value.name) is Role.USER and graph.default(value.name) is None:
            yield value.name
