"""Sums over the tokens of a request, carried from call to call where a call sees the new tokens only."""

from __future__ import annotations

from actgraph.errors import PassError
from actgraph.graph import Editor, Node
from actgraph.graph.slots import Slot
from actgraph.ops.dtypes import DType

SUM = "actgraph.running_sum"


def carry_sums(editor: Editor) -> int:
    """Give every ``running_sum`` that starts at zero a slot with the sum of earlier calls. Returns how many got one."""
    found = [node for node in editor.graph.nodes() if node.op == SUM and (*node.operands, None, None)[2] is None]
    for node in found:
        carry_sum(editor, node)
    return len(found)


def carry_sum(editor: Editor, node: Node) -> Node:
    """The node anew, which starts at the slot ``state_in.<its name>`` [batch, channels]: the sum that the call before ended
    with.
    """
    shape, kind = node.output.shape, node.output.dtype
    if shape is None or not isinstance(shape[2], int):
        raise PassError(f"{node.name} sums activations of an unknown width ({node.output.type})", "give the graph its shapes")
    slot = Slot(node.name, kind or DType.F32, (shape[0], shape[2]))
    operands = [*node.operands, None][:2]
    carried = editor.insert(SUM, [*operands, editor.add_slot(slot)], like=node)
    editor.redirect(node.output, carried.output)
    last = editor.insert("slice", [carried.output], {"axis": 1, "start": -1}, like=node).output
    editor.write_slot(slot, editor.insert("reshape", [last], {"shape": (-1, shape[2])}, like=node).output)
    editor.erase(node)
    return carried
