"""A graph with growing caches in the fused operators of onnxruntime, for sessions without padding.

``cache_append`` and the attention over it become ``GroupQueryAttention``, which writes new keys and values behind the old ones
in one buffer, bound as past and present; rotary embeddings and RMS norms written out become one operator each. Nothing of
this is ever saved: the files that actgraph writes hold standard operators. Masks are understood, not guessed: only those that
the pass ``kv_cache`` wrote itself (causal, windows) are replaced, and rotary tables are evaluated and checked by value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from actgraph.errors import UnsupportedError
from actgraph.graph.graph import Node, Value
from actgraph.graph.onnx import OnnxGraph
from actgraph.graph.slots import Slot, slots_of
from actgraph.ops.dtypes import DType
from actgraph.runtime.ort_native import CONTRIB, Writer, flat_heads
from actgraph.runtime.ort_norms import fuse_norms
from actgraph.runtime.ort_rotary import Rotary, Table, rotary_of, tables_of

#: Inputs of the fused graph beside its own: the number of tokens before this call [1], all tokens less one [batch], all [].
USED, LAST, TOTAL = "used_tokens", "seqlens_k", "total_sequence_length"


def fuse(graph: OnnxGraph, limit: int | None) -> OnnxGraph:
    """A rewritten copy of ``graph``. limit: the tokens that a session can hold.

    Raises UnsupportedError with the reason where the caches are not of the kind that can be fused.
    """
    twin = graph.clone()
    attentions = _attentions(twin)  # everything is read before anything is written
    norms = twin.views.norms()
    tables = tables_of(twin, [rotary for each in attentions for rotary in each.turned if rotary is not None], limit)
    public, roles, optional = [name for name, _ in twin.outputs()], dict(twin._roles), twin.optional
    write = Writer(twin.model.graph)
    used = write.input(USED, DType.I64, [1])
    last, total = write.input(LAST, DType.I32, [None]), write.input(TOTAL, DType.I32, [])
    for attention in attentions:
        attention.write(write, tables, last, total)
    fuse_norms(write, norms)
    for node in twin.model.graph:  # slots are buffers now: their lengths are the tokens used
        if node.domain == "actgraph" and node.op_type == "Length":
            write.replace(node.outputs[0], used)
    write.finish(twin.model)
    return OnnxGraph(twin.model, twin.name, outputs=public, roles=roles, optional=optional, typed=True)


@dataclass
class _Attention:
    """One attention over a growing cache."""

    node: Node
    query: Value
    key: Node  # cache_append
    value: Node
    window: int
    slots: tuple[Slot, Slot]

    @property
    def turned(self) -> tuple[Rotary | None, Rotary | None]:
        """How query and new keys are turned."""
        new = self.key.operands[1]
        assert new is not None
        return rotary_of(self.query), rotary_of(new)

    def write(self, write: Writer, tables: Mapping[tuple[str, str], Table], last: ir.Value, total: ir.Value) -> None:
        new_key, new_value = self.key.operands[1], self.value.operands[1]
        assert new_key is not None and new_value is not None and self.query.shape is not None and new_key.shape is not None
        heads, kv_heads, head = self.query.shape[1], new_key.shape[1], self.query.shape[3]
        assert isinstance(heads, int) and isinstance(kv_heads, int) and isinstance(head, int)
        at: ir.Node = self.node.key
        attributes = self.node.attributes
        options: dict[str, Any] = {
            "num_heads": heads, "kv_num_heads": kv_heads, "scale": float(attributes["scale"]),
            "softcap": float(attributes.get("softcap", 0.0)), "local_window_size": self.window or -1,
        }  # fmt: skip
        found = [(rotary, tables.get((rotary.cos.name, rotary.sin.name))) if rotary else (None, None) for rotary in self.turned]
        caches: list[ir.Value] = []
        table = found[0][1]
        if table is not None and found[1][1] is table and head % 16 == 0:  # the attention turns both
            caches = [write.table(f"{table.name}.cos", table.cos), write.table(f"{table.name}.sin", table.sin)]
            options["do_rotary"] = 1
        q, k = (
            _turned(write, value, rotary, each, at, apply=not caches)
            for value, (rotary, each) in zip((self.query, new_key), found, strict=True)
        )
        past = [append.operands[0].key for append in (self.key, self.value) if append.operands[0] is not None]
        inputs = [q, k, flat_heads(write, new_value, at), *past, last, total, *caches]
        out, *present = write.node("GroupQueryAttention", inputs, at, outputs=3, domain=CONTRIB, **options)
        for append, fused in zip((self.key, self.value), present, strict=True):
            write.replace(append.output.key, fused)
        old = at.outputs[0]
        write.replace(old, write.by_head(out, heads, head, old, at))
        out.meta["stands_for"] = old.name


def _turned(write: Writer, value: Value, rotary: Rotary | None, table: Table | None, at: ir.Node, *, apply: bool) -> ir.Value:
    """``value`` flat; where its table is known, from before it was turned, and turned again unless the attention does it."""
    if rotary is None or table is None:
        return flat_heads(write, value, at)
    flat = flat_heads(write, rotary.source, at)
    if not apply:
        return flat
    caches = [write.table(f"{table.name}.cos", table.cos), write.table(f"{table.name}.sin", table.sin)]
    return write.node("RotaryEmbedding", [flat, write.existing(USED), *caches], at, domain=CONTRIB)[0]


def _attentions(graph: OnnxGraph) -> list[_Attention]:
    slots = {slot.input: slot for slot in slots_of(graph).values()}
    odd = next((slot for slot in slots.values() if slot.update != "append" or slot.dtype is not DType.F32), None)
    if odd is not None or not slots:
        raise UnsupportedError(f"slot {odd.name} is no growing cache of float32" if odd else "the graph has no slots")
    found = []
    fused: set[str] = set()
    for node in graph.nodes():
        if node.op != "actgraph.attention":
            continue
        query, key, value, mask = (*node.operands, None)[:4]
        appends = [operand.producer if operand is not None else None for operand in (key, value)]
        if query is None or any(append is None or append.op != "actgraph.cache_append" for append in appends):
            continue
        first, second = appends
        assert first is not None and second is not None
        pair = [append.operands[0].name for append in (first, second) if append.operands[0] is not None]
        if any(name not in slots for name in pair):
            raise UnsupportedError(f"{node.name} reads a cache that is no slot")
        shape = first.output.shape
        if shape is None or not isinstance(shape[3], int) or shape[3] % 8 or shape != second.output.shape:
            raise UnsupportedError(f"the heads of {node.name} have {shape[3] if shape else '?'} features, no multiple of 8")
        window = _window(graph, node, mask)
        found.append(_Attention(node, query, first, second, window, (slots[pair[0]], slots[pair[1]])))
        fused.update(pair)
    for name in slots:
        if name not in fused:
            raise UnsupportedError(f"slot {slots[name].name} is read by no attention that can be fused")
        others = [use.node for use in graph.value(name).uses if use.node is None or use.node.op not in _MEASURES]
        if len(others) != 1:
            raise UnsupportedError(f"slot {slots[name].name} is read by more than its attention")
    for attention in found:
        for append in (attention.key, attention.value):
            readers = [use.node for use in append.output.uses if use.node is not None and use.node.op != "actgraph.positions"]
            shown = [name for name, value in graph.outputs() if value == append.output]
            if readers != [attention.node] or len(shown) != 1:
                raise UnsupportedError(f"{append.name} is read by more than its attention")
    return found


#: What reads the size of a cache only.
_MEASURES = ("actgraph.length", "actgraph.positions")


def _window(graph: OnnxGraph, node: Node, mask: Value | None) -> int:
    """The sliding window of a mask that is causal when nothing is padding, 0 for none. Raises UnsupportedError for others."""
    tokens = graph.value("input_ids").shape
    single = tokens is not None and tokens[1] == 1  # sees every key, as causal attention lets it
    if mask is None:
        if not single:
            raise UnsupportedError(f"{node.name} has no mask")
        return 0
    maker = mask.producer
    if maker is not None and maker.op == "actgraph.position_mask":
        if maker.attributes.get("chunk"):
            raise UnsupportedError(f"the mask of {node.name} has chunks")
        queries, keys, valid = (*maker.operands, None)[:3]
        if _starts_at(queries) and _counts_keys(keys) and (valid is None or _is_padding(valid)):
            return int(maker.attributes.get("window", 0))
    elif single and _is_padding(mask):
        return 0
    raise UnsupportedError(f"the mask of {node.name} was not made by kv_cache")


def _starts_at(value: Value | None) -> bool:
    """Whether positions count on from the length of a slot."""
    node = value.producer if value is not None else None
    start = node.operands[1] if node is not None and node.op == "actgraph.positions" and len(node.operands) > 1 else None
    return start is not None and start.producer is not None and start.producer.op == "actgraph.length"


def _counts_keys(value: Value | None) -> bool:
    node = value.producer if value is not None else None
    return node is not None and node.op == "actgraph.positions" and (len(node.operands) < 2 or node.operands[1] is None)


def _is_padding(value: Value) -> bool:
    """Whether a mask is the attention mask in another shape: true everywhere when nothing is padding."""
    while value.name != "attention_mask":
        prim = value.producer.prim if value.producer is not None else None
        if value.producer is None or prim is None or prim.op not in ("cast", "reshape", "identity"):
            return False
        source = value.producer.operands[0]
        if source is None:
            return False
        value = source
    return True


def feeds(used: int, count: int, batch: int) -> Mapping[str, np.ndarray[Any, Any]]:
    """The inputs that ``fuse`` adds, for a call of ``count`` tokens after ``used``."""
    return {
        USED: np.array([used], np.int64),
        LAST: np.full(batch, used + count - 1, np.int32),
        TOTAL: np.array(used + count, np.int32),
    }
