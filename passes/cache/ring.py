"""Rings: caches of a sliding window, which keep exactly the tokens that can still be seen.

A call attends over what the ring held and its own new tokens behind it, and writes afterwards: a chunk may be longer than the
ring. A call of one token may write first, because the place that it overwrites is the one that has just left the window.

Source: *Mistral 7B*, 2023 (rolling buffer cache).
"""

from __future__ import annotations

from actgraph.errors import PassError
from actgraph.graph import Editor, Node, Value
from actgraph.graph.slots import slots_of


def extend(editor: Editor, old: Value, new: Value, like: Node | None = None) -> Value:
    """What a call reads: the entries of the ring ``old`` as it was, and behind them those of the ``new`` tokens."""
    return editor.insert("actgraph.cache_append", [old, new], like=like).output


def positions(editor: Editor, tokens: Value, start: Value, size: int) -> Value:
    """The positions of the entries that ``extend`` gives: [size + tokens]; ``tokens`` [batch, tokens] gives their number."""
    attributes = {"axis": 1, "size": size}
    return editor.insert("actgraph.ring_positions", [tokens, start], attributes, name=f"ring_positions.{size}").output


def attend_after_write(editor: Editor) -> int:
    """Let the attentions of a graph for single tokens read their rings after the write: W entries, and no copy of them.

    Exact for one new token: the entry that it overwrites is W positions back, and a window of W does not see it. Returns the
    number of rings that are read so now (one for each stored tensor). Raises PassError when a call can have more tokens.
    """
    graph = editor.graph
    order = {node.name: place for place, node in enumerate(graph.nodes())}
    rings = {slot.input for slot in slots_of(graph).values() if slot.update == "ring"}
    readers: list[Node] = []
    count = 0
    for joined in [node for node in graph.nodes() if node.op == "actgraph.cache_append"]:
        old, new = joined.operands
        if old is None or new is None or old.name not in rings:
            continue
        if new.shape is None or new.shape[joined.attributes.get("axis", 2)] != 1:
            raise PassError(
                f"{new.name} ({new.type}) may be several tokens", "a ring is read after the write of one token only"
            )
        write = _write_of(old, new)
        if order[write.name] > order[joined.name]:  # what reads ``joined`` may stand before the write
            again = editor.insert("actgraph.cache_write", write.operands, write.attributes, before=joined, like=write)
            editor.redirect(write.output, again.output)
            write = again
        readers += _move(editor, joined.output, write.output)
        count += 1
    for counted in [node for node in graph.nodes() if count and node.op == "actgraph.ring_positions"]:
        attributes = {**counted.attributes, "written": True}
        after = editor.insert(counted.op, counted.operands, attributes, before=counted, like=counted)
        readers += _move(editor, counted.output, after.output)
    editor.retype(dict.fromkeys(readers))
    editor.erase_dead()
    return count


def _move(editor: Editor, old: Value, new: Value) -> list[Node]:
    """Let the readers of ``old`` read ``new``; returns them."""
    readers = [use.node for use in old.uses if use.node is not None]
    editor.redirect(old, new)
    return readers


def _write_of(old: Value, new: Value) -> Node:
    for use in old.uses:
        if use.node is not None and use.node.op == "actgraph.cache_write" and use.node.operands[1] == new:
            return use.node
    raise PassError(f"the ring {old.name} is read with {new.name}, which is not written into it")
