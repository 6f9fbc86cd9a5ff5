"""What an attention's mask is, found out by its values.

Models write the same mask in many ways (tables, triangles, index arithmetic, a comparison of position ids). So the part of
the graph that makes the mask is run for a few lengths and paddings, and what it gives is compared with what ``position_mask``
gives: keys up to the query, a window of them, a chunk of them, without padding. A mask that is none of these is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from actgraph.errors import PassError
from actgraph.graph import Graph, Value
from actgraph.graph.executor import executor_for
from actgraph.graph.graph import Array
from actgraph.graph.parity import sample_inputs
from actgraph.graph.views import Attention

#: Lengths that a mask is looked at; the last is replaced by a longer one where the model can take it.
LENGTHS = (5, 12)
#: The longest sequence that masks are proven for, and that where the graph compares positions with a larger number.
LONGEST, FARTHEST = 1024, 4608
#: Added to a score, this or less hides the key.
_HIDING = -1e3
#: What a bound of a window takes part in.
_COMPARES = frozenset({"add", "sub", "lt", "le", "gt", "ge", "mul", "min", "max", "clip"})


@dataclass(frozen=True)
class Mask:
    """``position_mask`` with these attributes. padded: whether keys that the attention mask excludes are hidden."""

    window: int = 0
    chunk: int = 0
    padded: bool = False

    def __str__(self) -> str:
        bounds = [f"window {self.window}"] if self.window else []
        bounds += [f"chunks of {self.chunk}"] if self.chunk else []
        return f"causal{', ' if bounds else ''}{', '.join(bounds)}{', without padding' if self.padded else ''}"

    def allowed(self, length: int, valid: Array) -> Array:
        """What the mask lets be seen: [batch, length, length], of keys that ``valid`` [batch, length] has."""
        query, key = np.arange(length)[:, None], np.arange(length)[None]
        seen = key <= query
        if self.window:
            seen &= query - key < self.window
        if self.chunk:
            seen &= query // self.chunk == key // self.chunk
        return seen[None] & (valid[:, None] if self.padded else np.ones_like(valid[:, None]))


def reach(graph: Graph, attentions: list[Attention], limit: int | None = None) -> tuple[int, int]:
    """``(longest, beyond)``: the length at which the masks of ``graph`` are to be looked at, of ``limit`` tokens that it takes.

    A window wider than what is looked at would pass for none, so where masks are made with a number of that size, the length
    is larger than it. beyond: the first such number that is out of reach, 0 where there is none.
    """
    values = list(dict.fromkeys(a.mask for a in attentions if a.mask is not None))
    longest = min(limit or LONGEST, LONGEST)
    numbers = sorted(n for n in _numbers(_only(graph, values)) if longest <= n < (limit or 2**24)) if values else []
    near = [number for number in numbers if number < FARTHEST]
    return max([longest, *(number + 1 for number in near)]), min((n for n in numbers if n >= FARTHEST), default=0)


def _numbers(maker: Graph) -> set[int]:
    """The whole numbers that a graph computes with, without their signs."""
    found: set[float] = set()
    for node in maker.nodes():
        prim = node.prim
        if prim is None or prim.op not in _COMPARES:
            continue
        for operand in prim.operands:
            if isinstance(operand, (int, float)):
                found.add(operand)
            elif isinstance(operand, Value) and operand.is_parameter and all(n == 1 for n in operand.shape or (0,)):
                found.add(float(maker.read(operand).reshape(-1)[0]))
    return {abs(int(number)) for number in found if np.isfinite(number) and number == int(number)}


def recognise(graph: Graph, attentions: list[Attention], longest: int) -> list[Mask]:
    """The mask of each attention, proven for lengths up to ``longest``. Raises PassError for one that is none of ours."""
    listed = {a.mask: a for a in attentions if a.mask is not None}
    if not listed:
        return [_of(attention, {}) for attention in attentions]
    maker = _only(graph, list(listed))
    found: dict[Value, Mask] = {}
    # without an attention mask nothing is padding, and positions that start anew are taken for packed sequences
    paddings = ("none", "left", "right") if any(v.name == "attention_mask" for v in graph.inputs()) else ("none",)
    trials = [(length, padding) for length in dict.fromkeys((*LENGTHS, longest)) for padding in paddings]
    seen = [(_inputs(maker, length, padding), length) for length, padding in trials if length <= longest]
    runner = executor_for(maker).open(maker, optimize=False)
    results = [(inputs, length, runner(inputs)) for inputs, length in seen]
    for number, (value, attention) in enumerate(listed.items()):
        looks = [(_allowed(outputs[f"mask.{number}"], attention), _valid(inputs, length), length)
                 for inputs, length, outputs in results]  # fmt: skip
        found[value] = _explain(attention, looks)
    return [_of(attention, found) for attention in attentions]


def _of(attention: Attention, found: Mapping[Value, Mask]) -> Mask:
    if attention.mask is not None:
        return found[attention.mask]
    if attention.is_causal:
        return Mask()
    raise PassError(
        f"the attention {attention.output.name} has no mask: every token sees all others",
        "only decoders that look back can have a cache",
    )


def _only(graph: Graph, values: list[Value]) -> Graph:
    """A copy of the graph that computes ``values`` and nothing else, as outputs ``mask.0``, ``mask.1`` ..."""
    maker = graph.clone()
    with maker.edit(by="kv_cache") as editor:
        for name, _ in maker.outputs():
            editor.remove_output(name)
        for number, value in enumerate(values):
            editor.add_output(maker.value(value.name), f"mask.{number}")
        editor.erase_dead()
    return maker


def _inputs(graph: Graph, length: int, padding: str) -> dict[str, Array]:
    return sample_inputs(graph, batch=2, seq=length, padding=padding)


def _valid(inputs: Mapping[str, Array], length: int) -> Array:
    mask = inputs.get("attention_mask")
    return np.ones((2, length), bool) if mask is None else np.asarray(mask).astype(bool)


def _allowed(mask: Array, attention: Attention) -> Array:
    """[batch, queries, keys], true where a key may be seen. Raises PassError where heads differ or numbers are added."""
    if mask.dtype == np.bool_:
        seen = ~mask if attention.mask_excludes else mask
    else:
        numbers = mask.astype(np.float64)
        seen = numbers > _HIDING
        if np.any(numbers[seen] != 0):
            where = f"the mask of {attention.output.name}"
            raise PassError(f"{where} adds numbers to the scores", "a bias by position has no cache form")
    seen = seen.reshape((1,) * (4 - seen.ndim) + seen.shape)
    if seen.shape[1] != 1:
        if not (seen == seen[:, :1]).all():
            raise PassError(f"the mask of {attention.output.name} differs between heads")
        seen = seen[:, :1]
    return np.asarray(np.broadcast_to(seen[:, 0], (2, *seen.shape[2:])))


def _explain(attention: Attention, looks: list[tuple[Array, Array, int]]) -> Mask:
    where = f"the mask of {attention.output.name}"
    plain = max(((seen, length) for seen, valid, length in looks if valid.all()), key=lambda look: look[1])
    seen, length = plain[0][0], plain[1]
    if np.triu(seen, 1).any():
        raise PassError(f"{where} lets tokens see later ones", "only decoders that look back can have a cache")
    row = int(seen[-1].sum())
    starts = seen.argmax(axis=1)  # the first key that each query sees
    candidates = [Mask()]
    if row < length:
        chunk = next((i for i in range(1, length) if starts[i] == i), 0)
        candidates = [Mask(window=row), *([Mask(chunk=chunk)] if chunk else [])]
    for mask in [each for c in candidates for each in (c, Mask(c.window, c.chunk, padded=True))]:
        if all(_agrees(mask, *look) for look in looks):
            return mask
    raise PassError(f"{where} is neither causal nor a window nor in chunks", "the pass replaces masks that it can prove only")


def _agrees(mask: Mask, seen: Array, valid: Array, length: int) -> bool:
    """Whether rows of real tokens are as ``mask`` has them; what padding sees is nobody's business."""
    if seen.shape[1:] != (length, length):
        return False
    return bool((seen == mask.allowed(length, valid))[valid].all())
