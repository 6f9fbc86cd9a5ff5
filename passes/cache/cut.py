"""Where keys and values are cut off for the cache: the last tensor before heads are repeated, after rotary and norms."""

from __future__ import annotations

from dataclasses import dataclass

from actgraph.errors import PassError
from actgraph.graph import Editor, Graph, Value
from actgraph.graph.context import token_dims
from actgraph.graph.views import Attention

#: What only moves numbers about: between the cut and the attention there is nothing else.
_LAYOUT = frozenset({"identity", "reshape", "expand", "transpose", "slice", "repeat", "cast", "concat", "unbind", "stack"})


@dataclass(frozen=True)
class Cut:
    """``value`` is what the cache stores, [batch, kv_heads, seq, head], or [batch, seq, kv_heads, head] with ``by_token``."""

    value: Value
    by_token: bool = False

    def by_head(self, editor: Editor) -> Value:
        """The value as [batch, kv_heads, seq, head]."""
        if not self.by_token:
            return self.value
        return editor.insert("transpose", [self.value], {"perm": [0, 2, 1, 3]}).output


def cut(graph: Graph, attention: Attention, operand: Value) -> Cut:
    """The cut above ``operand``, the key or the value of ``attention``. Raises PassError where there is none."""
    dims = token_dims(graph)
    value: Value | None = operand
    while value is not None:
        shape = value.shape
        if dims is not None and shape is not None and len(shape) == 4:
            if shape[:3] == (dims[0], attention.kv_heads, dims[1]):
                return Cut(value)
            if shape[:3] == (dims[0], dims[1], attention.kv_heads):
                return Cut(value, by_token=True)
        prim = value.producer.prim if value.producer is not None else None
        first = prim.operands[0] if prim is not None and prim.op in _LAYOUT and prim.operands else None
        value = first if isinstance(first, Value) else None
    raise PassError(
        f"cannot tell where {operand.name} ({operand.type}) has one row per token and head",
        f"a cache of {attention.kv_heads} heads is cut off before heads are repeated",
    )
