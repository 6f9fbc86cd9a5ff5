"""The ladder of correctness that an edited language model has to stand on, rung by rung.

Each rung runs the same model in two ways that must agree: with Python functions at sites in place of nodes, a row alone and
in a padded batch, padding on the left and on the right, with and without a cache, a prompt at once and in chunks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from actgraph.cli.verify import Check, compared

if TYPE_CHECKING:
    import numpy as np

    from actgraph.graph import Graph
    from actgraph.pipeline import Pass

    Array = np.ndarray[Any, Any]

_LENGTHS = (9, 6, 3)  # tokens of the rows, the prompt of each being a third shorter


def timed(check: Callable[[], Check]) -> Check:
    """The check with the seconds that it took."""
    begun = time.perf_counter()
    found = check()
    return replace(found, seconds=time.perf_counter() - begun)


def check_hooks(step: Pass, before: Graph, after: Graph, tolerance: float, seed: int = 0) -> Iterator[Check]:
    """The pass against a run of the graph before it with the method's formula as Python functions at the sites."""
    from actgraph.passes.steer.edit import EditPass

    if isinstance(step, EditPass):
        yield timed(lambda: _hooked(step, before, after, tolerance, seed))


def _hooked(step: Any, before: Graph, after: Graph, tolerance: float, seed: int) -> Check:
    from actgraph.errors import ActgraphError
    from actgraph.graph.hooks import run_with_hooks
    from actgraph.graph.parity import difference
    from actgraph.graph.slots import slots_of
    from actgraph.passes.steer.edit import EditPass

    what = f"{step.name}: graph = hooks at its sites"
    no_formula = Check(what, True, None, "no formula in Python: does not apply", checked=False)
    if type(step).hook is EditPass.hook:
        return no_formula
    if slots_of(before):
        return replace(no_formula, detail="behind a cache: does not apply")
    inputs = ladder_inputs(after, seed)
    try:
        hooks = {site.name: step.hook(before, site, inputs) for site in step.select(before)}
        if any(hook is None for hook in hooks.values()):
            return no_formula
        given = {value.name for value in before.inputs()}
        wanted = run_with_hooks(before, {name: array for name, array in inputs.items() if name in given}, hooks)
    except ActgraphError as error:
        return Check(what, False, None, str(error), checked=False)
    made = after.run({name: inputs[name] for name in inputs if name in {v.name for v in after.inputs()}})
    found = [difference(name, wanted[name], made[name]) for name, _ in before.outputs() if name in made]
    worst = max((each.max_rel for each in found), default=0.0)
    plain = before.run({name: array for name, array in inputs.items() if name in given})
    moved = max((difference(name, plain[name], made[name]).max_rel for name in wanted if name in made), default=0.0)
    return Check(what, all(each.within(tolerance, 0.0) for each in found), worst, f"the edit moves outputs by {moved:.2g}")


def check_defaults(
    step: Pass, before: Graph, after: Graph, reference: Callable[[dict[str, Any]], Graph], inputs: Sequence[dict[str, Any]]
) -> Iterator[Check]:
    """Where the pass adds inputs that the host may give: the graph without them, against the graph before it, bit for bit.

    reference: makes the graph of other options, for a pass that says to which ones its defaults are equal.
    """
    from actgraph.graph import Role
    from actgraph.graph.context import KINDS

    known = {value.name for value in before.inputs()} | set(KINDS)  # positions, lengths of prompts: what sessions tell
    given = [value.name for value in after.inputs() if value.name not in known and after.default(value.name) is not None]
    roles = (Role.USER, Role.CONTEXT) if step.family == "steer" else (Role.USER,)
    if any(after.role(name) in roles for name in given):
        options = dict(step.at_defaults)
        other = " ".join(f"{name}={value}" for name, value in options.items()) or "the graph before"
        what = f"{step.name}: defaults of its inputs = {other}"
        yield timed(lambda: compared(what, reference(options) if options else before, after, inputs, 0.0))


def check_ladder(graph: Graph, tolerance: float, seed: int = 0) -> Iterator[Check]:
    """Rows, padding, cache and chunks; nothing for a graph that is no causal language model without slots."""
    from actgraph.errors import ActgraphError
    from actgraph.graph.context import logits_output
    from actgraph.graph.slots import slots_of

    try:
        output = logits_output(graph)
    except ActgraphError:
        return
    taken = {value.name for value in graph.inputs()}
    if slots_of(graph):
        what = "rows, padding, cache and chunks"
        yield Check(what, True, None, "the model has state: verify the passes before kv_cache alone", checked=False)
        return
    if "attention_mask" in taken:
        yield timed(lambda: _rows_alone(graph, output, tolerance, seed))
        yield timed(lambda: _paddings(graph, output, tolerance, seed))
    yield from _cached(graph, output, tolerance, seed)


def ladder_inputs(graph: Graph, seed: int = 0, padding: str = "left") -> dict[str, Array]:
    """Rows of 9, 6 and 3 tokens, with padding on one side, and all that the graph may be told of them."""
    import numpy as np

    import actgraph as ag

    count, longest = len(_LENGTHS), max(_LENGTHS)
    drawn = ag.sample_inputs(graph, batch=count, seq=longest, seed=seed)
    if "input_ids" not in drawn:
        return drawn
    real = np.array([[n < length for n in range(longest)] for length in _LENGTHS])
    real = real[:, ::-1] if padding == "left" else real
    if not {"attention_mask", "position_ids"} & {value.name for value in graph.inputs()}:
        real = np.ones_like(real)  # nothing tells the graph of padding
    ids = np.zeros_like(drawn["input_ids"])
    for row in range(count):
        ids[row, real[row]] = drawn["input_ids"][row, : real[row].sum()]
    told = {
        "input_ids": ids, "attention_mask": real.astype(np.int64), "position_ids": np.maximum(real.cumsum(1) - 1, 0),
        "prompt_lengths": np.array([length - length // 3 for length in _LENGTHS]), "row_index": np.arange(count),
    }  # fmt: skip
    return {
        **drawn,
        **{name: array for name, array in told.items() if name in {v.name for v in graph.inputs()} | {"position_ids"}},
    }


def _known(graph: Graph, inputs: dict[str, Array]) -> dict[str, Array]:
    names = {value.name for value in graph.inputs()}
    return {name: array for name, array in inputs.items() if name in names}


def _alone(graph: Graph, output: str, seed: int) -> list[Array]:
    """The logits of each row, computed alone and without padding."""
    import numpy as np

    inputs = ladder_inputs(graph, seed, "right")
    found = []
    for row, length in enumerate(_LENGTHS):
        one = {}
        for name, array in _known(graph, inputs).items():
            part = array[row : row + 1]
            one[name] = part[:, :length] if part.ndim > 1 and part.shape[1] == max(_LENGTHS) else part
        found.append(np.asarray(graph.run(one)[output][0]))
    return found


def _compared(what: str, left: list[Array], right: list[Array], tolerance: float) -> Check:
    import numpy as np

    from actgraph.graph.parity import difference

    found = difference("logits", np.concatenate(left), np.concatenate(right))
    return Check(what, found.within(tolerance, 0.0), found.max_rel if found.compared else None)


def _real_rows(graph: Graph, output: str, seed: int, padding: str) -> list[Array]:
    inputs = ladder_inputs(graph, seed, padding)
    logits = graph.run(_known(graph, inputs))[output]
    return [logits[row][inputs["attention_mask"][row] == 1] for row in range(len(_LENGTHS))]


def _rows_alone(graph: Graph, output: str, tolerance: float, seed: int) -> Check:
    what = "a row of a padded batch = the row alone"
    return _compared(what, _real_rows(graph, output, seed, "left"), _alone(graph, output, seed), tolerance)


def _paddings(graph: Graph, output: str, tolerance: float, seed: int) -> Check:
    left, right = (_real_rows(graph, output, seed, side) for side in ("left", "right"))
    return _compared("padding on the left = on the right", left, right, tolerance)


def _cached(graph: Graph, output: str, tolerance: float, seed: int) -> Iterator[Check]:
    """A prompt and tokens one by one behind a cache, against all at once without one; and a prompt in chunks."""
    import numpy as np

    import actgraph as ag
    from actgraph.errors import ActgraphError

    what = "with a cache = without"
    try:
        cached = ag.run(graph, "kv_cache{graphs=combined}", parity="none", reproducer=False).graph
    except ActgraphError as error:
        yield Check(what, True, None, f"{error.message}: does not apply", checked=False)
        return
    ids = ladder_inputs(graph, seed)["input_ids"][:1]
    prompt = 2 * ids.shape[1] // 3

    def feed(model: Graph, chunk: int) -> list[Array]:
        session = ag.compile(model, lowering="explicit", chunk=chunk).session(1)
        pieces = [ids[:, :prompt], *(ids[:, at : at + 1] for at in range(prompt, ids.shape[1]))]
        return [np.asarray(session.feed(piece)[output][:, -1]) for piece in pieces]

    plain = feed(graph, 512)
    yield timed(lambda: _compared(what, feed(cached, 512), plain, tolerance))
    yield timed(lambda: _compared("a prompt in chunks of 2 = at once", feed(cached, 2), plain, tolerance))


def cost(before: Graph, after: Graph, seed: int = 0, rounds: int = 15) -> str:
    """What the passes cost: the median time of a forward before and after, measured in turn.

    The forward is of 16 tokens, or of as many as the slots of a cache hold.
    """
    import statistics

    import actgraph as ag
    from actgraph.graph.executor import executor_for
    from actgraph.graph.slots import places, with_initial_slots

    tokens = min([16, *(size for graph in (before, after) if (size := places(graph)) is not None)])
    runners, inputs = [], []
    for graph in (before, after):
        runners.append(executor_for(graph).open(graph))
        inputs.append(with_initial_slots(graph, ag.sample_inputs(graph, batch=1, seq=tokens, seed=seed)))
    times: list[list[float]] = [[], []]
    for number in range(rounds + 2):
        for side in (0, 1):
            begun = time.perf_counter()
            runners[side](inputs[side])
            if number > 1:
                times[side].append(time.perf_counter() - begun)
    base, made = (statistics.median(each) for each in times)
    change = f"{100 * (made / base - 1):+.1f} %"
    return f"a forward of {tokens} tokens: {1e3 * base:.2f} ms before, {1e3 * made:.2f} ms after ({change})"
