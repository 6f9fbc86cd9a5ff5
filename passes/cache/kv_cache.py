"""A key-value cache for a decoder that was captured without one.

Sources: incremental decoding with cached keys and values is standard practice; inserting it into a graph that lacks it has its
precedent in SparseML's key-value injection for ONNX files, which rewrites masks and positions for each architecture by hand.
Here both are found by what they compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from actgraph.errors import OptionError, PassError
from actgraph.graph import Editor, Graph, Node, Use, Value
from actgraph.graph.context import context_length, logits_output, token_dims
from actgraph.graph.graph import Role
from actgraph.graph.program import Program
from actgraph.graph.recognize.materialise import PATTERN
from actgraph.graph.slots import Slot, slots_of
from actgraph.graph.views import Attention
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import TensorType
from actgraph.passes.cache import masks, proof, ring, storage
from actgraph.passes.cache.carried import carry_sums
from actgraph.passes.cache.cut import cut
from actgraph.passes.cache.masks import Mask
from actgraph.passes.cache.precision import GATES, HALF, in_float32, with_open_gates
from actgraph.passes.cache.program import split
from actgraph.passes.cache.recurrence import unrolled_steps
from actgraph.passes.cache.storage import Storage
from actgraph.pipeline.base import Pass, PassContext, PassResult

PAST = "past"
POSITION = "cache_position"
#: What takes the attention mask of old and new tokens as it is.
_COVER_ALL = ("actgraph.position_mask", "actgraph.valid_positions", "actgraph.recent")
#: How far logits may move, relative: far more than what a sound model loses, far less than a wrong scale or axis costs.
_SIZES, _HALF_SIZE = {"float16": 0.05, "int8": 0.5}, 0.1


class KeyValueCache(Pass):
    """Keep keys and values of earlier tokens, so that a call computes only the new ones.

    The result is a program of two graphs with the same slots: ``prefill`` for prompts and chunks of prompts, and ``decode`` for
    one token of each row, without what one token makes needless. ``graphs=combined`` gives one graph for both. With
    ``last_logits`` prefill computes the logits of the last position only, [batch, 1, vocabulary]. ``input_ids`` [batch, seq]
    (``[batch, 1]`` in decode) are the new tokens,
    ``attention_mask`` [batch, past + seq] covers all, ``position_ids`` are those of the new ones, and each attention has the
    slots ``past_key_values.{i}.key`` and ``.value`` (outputs ``present.{i}.key`` ...), [batch, key heads, tokens, head], cut
    off after rotary and norms and before heads are repeated. ``form=growing`` appends to them; ``form=static`` writes into a
    fixed number of places (``max_length``) from ``cache_position`` on, which an engine can do in place. ``form=ring`` is the
    same, but attentions that see a window of W tokens keep the last W only.

    ``storage=float16`` and ``int8`` keep keys and values in fewer bytes; int8 has a scale per token and key head, in the slots
    ``past_key_values.{i}.key_scale`` and ``.value_scale`` [batch, key heads, tokens, 1]. The cache is first shown to be right
    in full precision (as is that of a graph in half precision), and then the error of the rounding is measured and reported.

    Masks are replaced by ``position_mask`` after their values were shown to be causal, a window or chunks, with or without
    padding; positions that the graph counts go on where the cache ends. A model that looks ahead, mixes rows of a batch, or
    mixes tokens outside its attentions is refused, and before the pass returns the new graph has reproduced the old one, token
    by token. A gate that sums activations over a request (``running_sum``) carries its sum in a slot. What the graph takes as
    separate sequences packed into one row (positions that start anew) is one sequence with the cache. Masks are proven for up
    to 1024 tokens (or the model's limit), and up to 4608 where they are made with a number of that size, such as a window;
    longer ones are taken to go on in the same way.
    """

    name: ClassVar[str] = "kv_cache"
    family: ClassVar[str] = "cache"

    form: Literal["growing", "static", "ring"] = Field(
        default="growing",
        description="A cache that is appended to, one of fixed size that is written into, or that with rings for windows.",
    )
    max_length: int | None = Field(
        default=None, ge=2, description="Tokens that a static cache holds; default: the model's limit."
    )
    storage: Storage = Field(default="same", description="In which numbers the cache is stored; same: as they are computed.")
    graphs: Literal["program", "combined"] = Field(
        default="program", description="A program of a prefill and a decode graph, or one graph for both."
    )
    last_logits: bool = Field(default=False, description="The prefill graph gives the logits of the last position only.")

    @model_validator(mode="after")
    def _of_prefill(self) -> KeyValueCache:
        if self.last_logits and self.graphs == "combined":
            raise OptionError("kv_cache: last_logits is for the prefill graph of a program", "leave graphs=combined out")
        return self

    @model_validator(mode="after")
    def _of_fixed_size(self) -> KeyValueCache:
        if self.max_length is not None and self.form == "growing":
            raise OptionError("kv_cache: max_length is for caches of fixed size, and this one grows", "add form=static")
        return self

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        attentions = decoder_attentions(graph)
        limit = context_length(graph)
        shown = proof.refuse_what_looks_ahead(graph)
        longest, beyond = masks.reach(graph, attentions, limit)
        found = masks.recognise(graph, attentions, longest)
        size = self._size(found, limit)
        before, result = graph.clone(), PassResult()
        limit = self.max_length or limit
        kind = attentions[0].key.dtype
        half = kind in HALF
        exact = self.storage == "same" and not half
        with context.edit(graph) as editor:
            caches = _insert(_Rewrite(graph, editor, self.form, size, self.storage), attentions, found)
            windows = [cache.ring for cache in caches if cache.ring]
            if exact:
                try:
                    error = proof.reproduces(before, graph, limit, windows)
                except PassError:
                    exact = not any(node.op in GATES for node in before.nodes())
                    if exact:
                        raise
            if not exact:
                error = self._rehearse(before, found, size, limit, windows, half)
                loss = proof.measure(before, graph, limit, windows)
                rounded = f"keys and values are stored in {self.storage}"
                result.expected_change = rounded if self.storage != "same" else f"{graph.name} rounds in another order"
                result.expected_size = max(_SIZES.get(self.storage, 0), _HALF_SIZE if half else 0)
        for index, (attention, mask, cache) in enumerate(zip(attentions, found, caches, strict=True)):
            row = {"site": f"attention {index}", "mask": str(mask), "heads": attention.kv_heads, "cache": str(cache)}
            result.details.append(row)
        result.counts["attentions cached"] = len(attentions)
        result.messages += [*shown, f"{error:.1e} relative from the graph without a cache, over chunks and single tokens"]
        if beyond:
            result.messages.append(f"masks are made with the number {beyond}, and were looked at for {longest} tokens only")
        if not exact:
            rounds = f"computed in {kind}" if half else "with gates that rounding opens and closes"
            what = rounds if self.storage == "same" else f"stored in {self.storage}"
            result.messages.append(f"{what}: {loss}")
        return result

    def _rehearse(
        self, before: Graph, found: Sequence[Mask], size: int, limit: int | None, windows: Sequence[int], half: bool
    ) -> float:
        """The same edits on a copy that loses nothing: stored as computed, in float32, with open gates. Returns its error."""
        plain = with_open_gates(in_float32(before, self.name) if half else before, self.name)
        trial = plain.clone()
        with trial.edit(by=self.name) as editor:
            _insert(_Rewrite(trial, editor, self.form, size, "same"), decoder_attentions(trial), found)
            return proof.reproduces(plain, trial, limit, windows)

    @property
    def makes_program(self) -> bool:
        return self.graphs == "program"

    @property
    def token_limit(self) -> int | None:
        return self.max_length if self.form != "growing" else None

    def program(self, graph: Graph, result: PassResult) -> Program | None:
        if not self.makes_program:
            return None
        program, difference = split(graph, last_logits=self.last_logits, options=str(self))
        sizes = ", ".join(f"{name} of {len(member.nodes())} nodes" for name, member in program.graphs.items())
        result.messages.append(f"{sizes}: {difference:.1e} relative from one graph for both")
        return program

    def _size(self, found: Sequence[Mask], limit: int | None) -> int:
        """Places of a cache of fixed size; 0 where none is needed. Raises PassError where the size cannot be known."""
        if self.form == "ring" and not any(mask.window for mask in found):
            raise PassError("kv_cache: no attention has a sliding window, which a ring is for", "use form=static")
        whole = self.form == "static" or (self.form == "ring" and not all(mask.window for mask in found))
        if whole and self.max_length is None and limit is None:
            raise PassError("kv_cache: the model names no limit of its length", "give max_length=2048")
        return self.max_length or limit or 0


def decoder_attentions(graph: Graph) -> list[Attention]:
    """All attentions of ``graph``. Raises PassError where it is no decoder, or has a cache already."""
    if slots_of(graph):
        raise PassError(f"kv_cache: {graph.name} has state already", "start from the graph without a cache")
    logits_output(graph)
    if any(value.name == "decoder_input_ids" for value in graph.inputs()):
        raise PassError("kv_cache: encoder-decoders are not supported", "use a decoder-only model")
    if any(value.name == "step" and graph.role(value.name) is Role.CONTEXT for value in graph.inputs()):
        raise PassError(
            f"kv_cache: {graph.name} asks for the number of the step, which without a cache is that of earlier tokens too",
            "ask for positions and prompt_lengths",
        )
    attentions = graph.views.attentions()
    if not attentions:
        steps = unrolled_steps(graph)
        why = f"; the recurrence of a state-space model is unrolled in the graph ({steps} steps)"
        hint = "its state is no cache of keys and values, and the graph has one length" if steps else "see `actgraph sites`"
        raise PassError(f"kv_cache: {graph.name} has no attention that could have a cache{why if steps else ''}", hint)
    dims = token_dims(graph)
    if dims is None or not isinstance(dims[1], str):
        fixed = dims[1] if dims else "unknown"
        raise PassError(f"kv_cache: the length of {graph.name} is fixed ({fixed})", "capture it with a dynamic length")
    if not isinstance(dims[0], str):
        raise PassError(f"kv_cache: the batch of {graph.name} is fixed to {dims[0]}", "insert the cache before fixing it")
    return attentions


@dataclass(frozen=True)
class _Cache:
    """What one attention keeps. ring: its places, 0 where it keeps every token; size: places of one that does, 0: it grows."""

    size: int
    ring: int = 0

    def __str__(self) -> str:
        return f"ring of {self.ring}" if self.ring else f"static, {self.size}" if self.size else "growing"


def _insert(rewrite: _Rewrite, attentions: Sequence[Attention], found: Sequence[Mask]) -> list[_Cache]:
    caches = [rewrite.attention(n, attention, mask) for n, (attention, mask) in enumerate(zip(attentions, found, strict=True))]
    rewrite.positions()
    rewrite.attention_mask()
    carry_sums(rewrite.editor)
    return caches


@dataclass
class _Rewrite:
    """The edits of one graph."""

    graph: Graph
    editor: Editor
    form: str
    size: int
    storage: Storage

    def __post_init__(self) -> None:
        dims = token_dims(self.graph)
        assert dims is not None
        self.batch, self.seq = dims
        self.inputs = {value.name: value for value in self.graph.inputs()}
        self.tokens = self.inputs["input_ids"]
        self.padding = self.inputs.get("attention_mask")
        self.start: Value | None = None
        self.made: dict[Mask, Value] = {}

    def attention(self, index: int, attention: Attention, mask: Mask) -> _Cache:
        """Give one attention its slots, and make it read them."""
        cache = self._cache(mask)
        every = []
        for part, operand in (("key", attention.key), ("value", attention.value)):
            new = cut(self.graph, attention, operand).by_head(self.editor)
            assert new.dtype is not None
            parts = zip(storage.PARTS[self.storage], storage.stored(self.editor, new, self.storage), strict=True)
            kept = [self._keep(f"{index}.{part}{ending}", tensor, cache, attention) for ending, tensor in parts]
            every.append(storage.read(self.editor, kept, self.storage, new.dtype))
        key, value = every
        self._compute(attention, key, value, self._mask(mask, key, cache))
        return cache

    def _cache(self, mask: Mask) -> _Cache:
        if self.form == "growing":
            return _Cache(0)
        ring = self.form == "ring" and mask.window and (not self.size or mask.window < self.size)
        return _Cache(0, mask.window) if ring else _Cache(self.size)

    def _keep(self, name: str, new: Value, cache: _Cache, attention: Attention) -> Value:
        """Keep ``new`` in a slot; returns the entries of all tokens that the attention may see."""
        slot = self._slot(name, new, cache)
        old = self.editor.add_slot(slot)
        start = self._start(old)
        like, node_name = attention.output.producer, f"present.{name}"
        if slot.update == "append":
            written = self.editor.insert("actgraph.cache_append", [old, new], name=node_name, like=like).output
        else:
            mode = {"mode": "ring"} if cache.ring else {}
            written = self.editor.insert("actgraph.cache_write", [old, new, start], mode, name=node_name, like=like).output
        self.editor.write_slot(slot, written)
        return ring.extend(self.editor, old, new, like) if cache.ring else written

    def _compute(self, attention: Attention, key: Value, value: Value, seen: Value) -> None:
        """The attention anew over all keys; as its two halves where somebody reads the pattern."""
        if attention.biases:
            raise PassError(f"the scores of {attention.output.name} have a bias by position, which has no cache form")
        like = attention.output.producer
        attributes: dict[str, Any] = {"scale": attention.scale}
        pattern = attention.pattern
        readers = [use for use in pattern.uses if use.node not in attention.nodes] if pattern is not None else []
        if pattern is not None and readers:
            if attention.softcap:
                raise PassError(f"the pattern of {attention.output.name} is read, and its scores are capped")
            first = self.editor.insert("actgraph.attention_pattern", [attention.query, key, seen], attributes, like=like)
            self.editor.redirect(pattern, first.output, readers)
            self.editor.move_sites(pattern, first.output)
            last = self.editor.insert("actgraph.attention_mix", [first.output, value], like=like)
            self._move_edges(attention, ((first, 0), (first, 1), (last, 1), (first, 2)))
        else:
            attributes["softcap"] = attention.softcap or 0.0
            last = self.editor.insert("actgraph.attention", [attention.query, key, value, seen], attributes, like=like)
            self._move_edges(attention, tuple((last, index) for index in range(4)))
            if not attention.softcap and attention.query.shape is not None and key.shape is not None:
                kind = TensorType(attention.query.dtype, (*attention.query.shape[:3], key.shape[2]))
                for node in attention.nodes:
                    self.editor.make_virtual(node, PATTERN, last, kind)
                if pattern is not None:
                    self.editor.make_virtual(pattern, PATTERN, last, kind)
        if last.output.shape != attention.output.shape:
            raise PassError(f"the attention {attention.output.name} gives {attention.output.type}, not {last.output.type}")
        self.editor.redirect(attention.output, last.output)

    def _move_edges(self, attention: Attention, places: Sequence[tuple[Node, int]]) -> None:
        """The edges at which the attention read query, key, value and mask are where the new ops read them."""
        operands = (attention.query, attention.key, attention.value, attention.mask)
        for old, (new, place) in zip(operands, places, strict=True):
            for use in old.uses if old is not None else ():
                if use.node in attention.nodes:
                    self.editor.move_edges(use, Use(new, place))

    def _slot(self, name: str, new: Value, cache: _Cache) -> Slot:
        assert new.shape is not None and new.dtype is not None
        batch, heads, _, head = new.shape
        update = "ring" if cache.ring else "scatter" if cache.size else "append"
        shape = (batch, heads, cache.ring or cache.size or PAST, head)
        past, present = f"past_key_values.{name}", f"present.{name}"
        return Slot(past, new.dtype, shape, update=update, input=past, output=present)

    def _start(self, past: Value) -> Value:
        """The position of the first new token, [1]."""
        if self.start is None and self.form == "growing":
            self.start = self.editor.insert("actgraph.length", [past], {"axis": 2}, name="cache_length").output
        elif self.start is None:
            kind, zero = TensorType(DType.I64, (1,)), np.zeros(1, np.int64)
            self.start = self.editor.add_input(POSITION, kind, role=Role.CONTEXT, default=zero)
        return self.start

    def _counted(self, like: Value, axis: int, start: Value | None, name: str) -> Value:
        operands = [like, start] if start is not None else [like]
        return self.editor.insert("actgraph.positions", operands, {"axis": axis}, name=name).output

    def _mask(self, mask: Mask, key: Value, cache: _Cache) -> Value:
        if mask not in self.made:
            assert self.start is not None
            queries = self._counted(self.tokens, 1, self.start, "query_positions")
            if cache.ring:
                keys = ring.positions(self.editor, self.tokens, self.start, cache.ring)
            else:
                keys = self._counted(key, 2, None, "key_positions")
            operands = [queries, keys, *([self.padding] if mask.padded and self.padding is not None else [])]
            attributes = {"window": mask.window, "chunk": mask.chunk}
            node = self.editor.insert("actgraph.position_mask", operands, attributes, name="position_mask")
            self.made[mask] = node.output
        return self.made[mask]

    def positions(self) -> None:
        """Make every ``0, 1, 2 ...`` as long as the new tokens go on where the cache ends."""
        self.editor.erase_dead()
        assert self.start is not None
        for node in list(self.graph.nodes()):
            prim = node.prim
            if prim is None or prim.op != "arange" or prim.output.shape != (self.seq,) or prim.output.dtype is not DType.I64:
                continue
            counted = self._counted(self.tokens, 1, self.start, "positions")
            self.editor.redirect(prim.output, counted)
        self.editor.erase_dead()

    def attention_mask(self) -> None:
        """Let ``attention_mask`` cover the cached tokens as well; sizes that were read off it are read off the tokens."""
        mask = self.padding
        if mask is None:
            return
        for use in mask.uses:
            if use.node is None or use.node.op in _COVER_ALL:
                continue
            prim = use.node.prim
            if prim is not None and prim.op == "cast":  # which tokens are real: each reader's own, the new ones
                recent = self.editor.insert("actgraph.recent", [mask, self.tokens], {"axis": 1}, name="new_attention_mask")
                self.editor.set_operand(use.node, use.index, recent.output)
                continue
            if prim is None or prim.op != "shape_of":
                raise PassError(
                    f"{use.node.name} ({use.node.op}) reads the attention mask outside of attentions", "it has no cache form"
                )
            self.editor.set_operand(use.node, use.index, self.tokens)
        if mask.uses:
            whole = f"{PAST} + {self.seq}" if self.form == "growing" else "total"
            self.editor.set_input_type(mask, TensorType(mask.dtype, (self.batch, whole)))
