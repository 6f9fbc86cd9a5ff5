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
from pydantic import Field

from actgraph.errors import PassError
from actgraph.graph import Editor, Graph, Node, Use, Value
from actgraph.graph.context import context_length, logits_output, token_dims
from actgraph.graph.graph import Role
from actgraph.graph.recognize.materialise import PATTERN
from actgraph.graph.slots import Slot, slots_of
from actgraph.graph.views import Attention
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import TensorType
from actgraph.passes.cache import masks, proof
from actgraph.passes.cache.cut import cut
from actgraph.passes.cache.masks import Mask
from actgraph.pipeline.base import Pass, PassContext, PassResult

PAST = "past"
POSITION = "cache_position"


class KeyValueCache(Pass):
    """Keep keys and values of earlier tokens, so that a call computes only the new ones.

    The result is one graph for prompts, chunks of prompts and single tokens: ``input_ids`` [batch, seq] are the new tokens,
    ``attention_mask`` [batch, past + seq] covers all, ``position_ids`` are those of the new ones, and each attention has the
    slots ``past_key_values.{i}.key`` and ``.value`` (outputs ``present.{i}.key`` ...), [batch, key heads, tokens, head], cut
    off after rotary and norms and before heads are repeated. ``form=growing`` appends to them; ``form=static`` writes into a
    fixed number of places (``max_length``) from ``cache_position`` on, which an engine can do in place.

    Masks are replaced by ``position_mask`` after their values were shown to be causal, a window or chunks, with or without
    padding; positions that the graph counts go on where the cache ends. A model that looks ahead, mixes rows of a batch, or
    mixes tokens outside its attentions is refused, and before the pass returns the new graph has reproduced the old one, token
    by token. What the graph takes as separate sequences packed into one row (positions that start anew) is one sequence with
    the cache. Masks are proven for up to 1024 tokens (or the model's limit); longer ones are taken to go on in the same way.
    """

    name: ClassVar[str] = "kv_cache"
    family: ClassVar[str] = "cache"

    form: Literal["growing", "static"] = Field(
        default="growing", description="A cache that is appended to, or one of fixed size that is written into."
    )
    max_length: int | None = Field(
        default=None, ge=2, description="Tokens that a static cache holds; default: the model's limit."
    )
    graphs: Literal["program", "combined"] = Field(
        default="combined", description="A program of a prefill and a decode graph, or one graph for both."
    )

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        attentions = decoder_attentions(graph)
        limit = context_length(graph)
        if self.form == "static" and self.max_length is None and limit is None:
            raise PassError("kv_cache: the model names no limit of its length", "give max_length=2048")
        shown = proof.refuse_what_looks_ahead(graph)
        found = masks.recognise(graph, attentions, min(limit or masks.LONGEST, masks.LONGEST))
        before = graph.clone()
        result = PassResult()
        with context.edit(graph) as editor:
            rewrite = _Rewrite(graph, editor, self.form, self.max_length or limit or 0)
            for index, (attention, mask) in enumerate(zip(attentions, found, strict=True)):
                rewrite.attention(index, attention, mask)
                result.details.append({"site": f"attention {index}", "mask": str(mask), "heads": attention.kv_heads})
            rewrite.positions()
            rewrite.attention_mask()
            error = proof.reproduces(before, graph, self.max_length or limit)
        result.counts["attentions cached"] = len(attentions)
        result.messages += [*shown, f"{error:.1e} relative from the graph without a cache, over chunks and single tokens"]
        return result


def decoder_attentions(graph: Graph) -> list[Attention]:
    """All attentions of ``graph``. Raises PassError where it is no decoder, or has a cache already."""
    if slots_of(graph):
        raise PassError(f"kv_cache: {graph.name} has state already", "start from the graph without a cache")
    logits_output(graph)
    if any(value.name == "decoder_input_ids" for value in graph.inputs()):
        raise PassError("kv_cache: encoder-decoders are not supported", "use a decoder-only model")
    attentions = graph.views.attentions()
    if not attentions:
        raise PassError(f"kv_cache: {graph.name} has no attention that could have a cache", "see `actgraph sites`")
    dims = token_dims(graph)
    if dims is None or not isinstance(dims[1], str):
        fixed = dims[1] if dims else "unknown"
        raise PassError(f"kv_cache: the length of {graph.name} is fixed ({fixed})", "capture it with a dynamic length")
    return attentions


@dataclass
class _Rewrite:
    """The edits of one graph."""

    graph: Graph
    editor: Editor
    form: str
    size: int

    def __post_init__(self) -> None:
        dims = token_dims(self.graph)
        assert dims is not None
        self.batch, self.seq = dims
        self.inputs = {value.name: value for value in self.graph.inputs()}
        self.tokens = self.inputs["input_ids"]
        self.padding = self.inputs.get("attention_mask")
        self.start: Value | None = None
        self.made: dict[Mask, Value] = {}

    def attention(self, index: int, attention: Attention, mask: Mask) -> None:
        """Give one attention its slots, and make it read them."""
        present = []
        for part, operand in (("key", attention.key), ("value", attention.value)):
            new = cut(self.graph, attention, operand).by_head(self.editor)
            slot = self._slot(f"{index}.{part}", new)
            old = self.editor.add_slot(slot)
            start = self._start(old)
            growing = self.form == "growing"
            op, operands = ("cache_append", [old, new]) if growing else ("cache_write", [old, new, start])
            like = attention.output.producer
            node = self.editor.insert(f"actgraph.{op}", operands, name=f"present.{index}.{part}", like=like)
            self.editor.write_slot(slot, node.output)
            present.append(node.output)
        key, value = present
        self._compute(attention, key, value, self._mask(mask, key))

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

    def _slot(self, name: str, new: Value) -> Slot:
        assert new.shape is not None and new.dtype is not None
        batch, heads, _, head = new.shape
        length = PAST if self.form == "growing" else self.size
        index, _, part = name.partition(".")
        update = "append" if self.form == "growing" else "scatter"
        return Slot(
            f"past_key_values.{name}", new.dtype, (batch, heads, length, head), update=update,
            input=f"past_key_values.{name}", output=f"present.{index}.{part}",
        )  # fmt: skip

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

    def _mask(self, mask: Mask, key: Value) -> Value:
        if mask not in self.made:
            queries = self._counted(self.tokens, 1, self.start, "query_positions")
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
            if use.node is None or use.node.op == "actgraph.position_mask":
                continue
            prim = use.node.prim
            if prim is None or prim.op != "shape_of":
                raise PassError(
                    f"{use.node.name} ({use.node.op}) reads the attention mask outside of attentions", "it has no cache form"
                )
            self.editor.set_operand(use.node, use.index, self.tokens)
        if mask.uses:
            whole = f"{PAST} + {self.seq}" if self.form == "growing" else "total"
            self.editor.set_input_type(mask, TensorType(mask.dtype, (self.batch, whole)))
