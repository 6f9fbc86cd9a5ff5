"""Do two models agree when tokens are fed one by one, as generation does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from actgraph.cli.verify import Check

if TYPE_CHECKING:
    from actgraph.graph import Graph
    from actgraph.graph.program import Program


def takes_tokens(program: Program) -> bool:
    """Whether a session can feed tokens to ``program`` one by one and read logits."""
    from actgraph.errors import InputError
    from actgraph.graph.context import logits_output

    try:
        logits_output(_prompt_graph(program))
    except InputError:
        return False
    return True


def check_sessions(what: str, left: Program, right: Program, inputs: Mapping[str, Any], tolerance: float) -> Check:
    """Half of the tokens of ``inputs`` as a prompt and then one by one, in a session each: are the last logits equal?

    ``input_ids`` [batch, n] are fed, with the ``attention_mask`` where it pads on the left (else every token counts). Slots go
    in and come out of each call, as in any other runtime. A model without slots computes all tokens again at each call.
    """
    import numpy as np

    from actgraph.errors import ActgraphError
    from actgraph.graph.parity import difference

    tokens = np.asarray(inputs["input_ids"])
    valid = _left_padding(inputs, left, right)
    length = tokens.shape[1]
    if length < 2:
        return Check(what, False, None, "a single token leaves none to feed after the prompt", checked=False)
    begun = length - int(valid.sum(axis=1).min()) + 1 if valid is not None else 1  # every row has a token then
    prompt = min(max(length // 2, begun), length - 1)
    try:
        logits = [_logits(side, tokens, valid, prompt) for side in (left, right)]
    except ActgraphError as error:
        return Check(what, False, None, str(error), checked=False)
    found = difference("logits", *logits)
    ok = found.within(tolerance, 0.0)
    return Check(what, ok, found.max_rel if found.compared else None, "" if ok else str(found))


def _prompt_graph(program: Program) -> Graph:
    return program.graphs[program.driver.graph_at(0)]


def _left_padding(inputs: Mapping[str, Any], left: Program, right: Program) -> Any:
    """The mask of ``inputs`` where both models take one and padding is on the left; ``None`` otherwise."""
    import numpy as np

    for side in (left, right):
        if "attention_mask" not in {value.name for value in _prompt_graph(side).inputs()}:
            return None
    mask = inputs.get("attention_mask")
    if mask is None or np.shape(mask) != np.shape(inputs["input_ids"]):
        return None
    valid = np.asarray(mask).astype(np.int64)
    return valid if (np.diff(valid, axis=1) >= 0).all() and valid[:, -1].all() else None


def _logits(program: Program, tokens: Any, valid: Any, prompt: int) -> Any:
    """The logits of the last token of each call, [batch, calls, vocabulary]."""
    import numpy as np

    import actgraph as ag
    from actgraph.graph.context import logits_output

    name = logits_output(_prompt_graph(program))
    session = ag.compile(program, lowering="explicit").session(len(tokens))
    pieces = [slice(0, prompt), *(slice(at, at + 1) for at in range(prompt, tokens.shape[1]))]
    found = [session.feed(tokens[:, piece], None if valid is None else valid[:, piece])[name][:, -1:] for piece in pieces]
    return np.concatenate([np.asarray(each) for each in found], axis=1)
