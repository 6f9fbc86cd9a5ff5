"""Giving a value to what is inside a fused operator, so that a pass can read or edit it there.

A fused attention becomes its pattern and the product with the values: ``actgraph.attention_pattern`` keeps the fused
operator's zeros for rows that may see no key, and a matmul (or ``actgraph.attention_mix`` for grouped queries) mixes the
values. One expert's rows are cut out of those of all experts and put back after the edit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from actgraph.errors import SiteError
from actgraph.graph.graph import Node, Use, Value
from actgraph.graph.prims import Prim

if TYPE_CHECKING:
    from actgraph.graph.editor import Editor

PATTERN = "attention_pattern"


def expert_recipe(expert: int, hidden: Value, index: Value) -> str:
    """How the rows of one expert are found; names cannot hold ``|``."""
    return f"expert|{expert}|{hidden.name}|{index.name}"


def materialise(editor: Editor, node: Node, recipe: str) -> None:
    """Change the graph so that the virtual sites of ``node`` made by ``recipe`` have a value, and tell the site table.

    Raises SiteError when the operator cannot be taken apart.
    """
    if recipe == PATTERN:
        _attention(editor, node)
    elif recipe.startswith("expert|"):
        _, expert, hidden, index = recipe.split("|")
        _expert(editor, node, recipe, int(expert), hidden, index)
    else:
        raise SiteError(f"cannot materialise {recipe!r} of {node.name}", "the file was written by another version of actgraph")


def _attention(editor: Editor, node: Node) -> None:
    prim = node.prim
    if prim is None or prim.op != "sdpa":
        raise SiteError(f"{node.name} is no fused attention any more", "a former pass replaced it: read its own output")
    query, key, value, mask = _operands(prim)
    scale = prim.attributes["scale"]
    if prim.attributes.get("softcap"):
        raise SiteError(f"the scores of {node.name} are capped, and its pattern cannot be taken out", "tap before kv_cache")
    if key.dtype is not query.dtype or value.dtype is not query.dtype:
        raise SiteError(f"{node.name} reads keys and values as {key.dtype}, and cannot be taken apart", "tap before fuse")
    if scale is None:
        raise SiteError(f"the scale of {node.name} is not known", "its head size is dynamic")
    attributes = {"scale": float(scale), "is_causal": bool(prim.attributes["is_causal"])}
    pattern = editor.insert(f"actgraph.{PATTERN}", [query, key, mask], attributes, after=node.output.producer, like=node)
    grouped = _heads(query) is None or _heads(query) != _heads(value)
    mixed = editor.insert("actgraph.attention_mix" if grouped else "matmul", [pattern.output, value], like=node)
    table = editor.graph.site_table
    for index, (new, place) in enumerate(((pattern, 0), (pattern, 1), (mixed, 1), (pattern, 2))):
        table.move_edge((node, index), [(new, place)])
    editor.redirect(node.output, mixed.output)
    table.resolve(node, PATTERN, pattern.output)
    editor.erase_later()


def _operands(prim: Prim) -> tuple[Value, Value, Value, Value | None]:
    query, key, value, *rest = prim.operands
    mask = rest[0] if rest else None
    if not all(isinstance(o, Value) for o in (query, key, value)) or not (mask is None or isinstance(mask, Value)):
        raise SiteError(f"{prim.node.name} has operands that are no tensors", "choose another site")
    return query, key, value, mask  # type: ignore[return-value]


def _heads(value: Value) -> int | None:
    heads = value.shape[1] if value.shape is not None and len(value.shape) == 4 else None
    return heads if isinstance(heads, int) else None


def _expert(editor: Editor, node: Node, recipe: str, expert: int, hidden_name: str, index_name: str) -> None:
    graph = editor.graph
    table = graph.site_table
    hidden = table.one(graph, f"%{hidden_name}").value
    index = graph.value(index_name)
    uses: Sequence[Use] = hidden.uses
    rows = editor.insert("actgraph.select_rows", [hidden, index, None], {"expert": expert}, after=hidden.producer)
    merged = editor.insert("actgraph.select_rows", [rows.output, index, hidden], {"expert": expert}, after=rows)
    editor.redirect(hidden, merged.output, uses)
    table.move(hidden, merged.output)
    table.resolve(node, recipe, rows.output)
