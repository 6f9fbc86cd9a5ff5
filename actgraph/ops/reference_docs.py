"""The reference page of the ops, as Markdown, from the registry."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence

from actgraph.ops.registry import Attribute, OpDef, Operand, all_ops, kernels

_EXACT = {
    "bits": "Every engine gives the same bits.",
    "values": "Every engine gives equal numbers (the sign of a zero is free).",
    "": "Engines agree up to rounding.",
}


def ops_markdown() -> str:
    """Every op: what it computes, its operands, attributes, traits and kernels."""
    ops = all_ops()
    lines = [
        "# Ops",
        "",
        "The dialect that actgraph adds to ATen and ONNX. Every op has a torch reference and a body in standard ONNX ops,",
        "which exported files carry as a model-local function; kernels, where there are any, compute the same faster.",
        "",
        *(f"- [`{op.qualified_name}`](#{op.qualified_name.replace('.', '')}): {_first_line(op)}" for op in ops),
    ]
    for op in ops:
        lines += ["", *_op(op)]
    return "\n".join(lines) + "\n"


def _first_line(op: OpDef) -> str:
    text = " ".join(inspect.cleandoc(op.doc).split("\n\n")[0].split())
    return text.split(": ``")[0].split(", ``")[0].rstrip(".") + "."


def _op(op: OpDef) -> list[str]:
    lines = [f"## `{op.qualified_name}`", "", inspect.cleandoc(op.doc), ""]
    facts = [f"ONNX: `actgraph::{op.onnx_name}`, from opset {op.min_opset}.", _EXACT[op.exact]]
    if op.traits:
        facts.append(f"Traits: {', '.join(sorted(trait.value for trait in op.traits))}.")
    if not op.differentiable:
        facts.append("No gradient.")
    claimed = sorted({f"{k.name} ({k.engine}, {k.device})" for k in kernels(op.name)})
    if claimed:
        facts.append(f"Kernels: {', '.join(claimed)}.")
    lines.append(" ".join(facts))
    lines += ["", *_table(("operand", "element types", "meaning"), map(_operand_row, op.inputs))]
    if op.attributes:
        lines += ["", *_table(("attribute", "type", "default", "meaning"), map(_attribute_row, op.attributes))]
    return lines


def _operand_row(operand: Operand) -> Sequence[str]:
    types = f"as `{operand.same_as}`" if operand.same_as else ", ".join(sorted(operand.dtypes))
    kind = "optional; " if operand.optional else "any number; " if operand.variadic else ""
    return f"`{operand.name}`", types, kind + operand.doc


def _attribute_row(attribute: Attribute) -> Sequence[str]:
    default = "required" if repr(attribute.default) == "required" else f"`{attribute.default!r}`"
    choices = ", ".join(f"`{c!r}`" for c in attribute.choices)
    return f"`{attribute.name}`", choices or attribute.kind, default, attribute.doc


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(' '.join(cell.split()).replace('|', '&#124;') for cell in cells)} |"

    return [line(head), line(["---"] * len(head)), *map(line, rows)]
