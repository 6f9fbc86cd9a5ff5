"""The reference pages of passes and ops, written from the registries (``make reference``; a test compares them)."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from actgraph.cli.output import write_text

_NOTICE = "<!-- Written by `make reference` from the source; edit the docstrings and descriptions there. -->"


def passes_page() -> str:
    """docs/passes.md: every pass with its options, by family."""
    from actgraph.cli.passes import option_rows
    from actgraph.pipeline.registry import all_passes

    lines = [_NOTICE, "", "# Passes", "", "Every pass that takes places calls them `site` and `ignore`; see [sites](sites.md)."]
    passes = all_passes()
    for family in sorted({cls.family for cls in passes.values()}):
        lines += ["", f"## {family}"]
        for name, cls in passes.items():
            if cls.family != family:
                continue
            lines += ["", f"### `{name}`", "", inspect.getdoc(cls) or "", ""]
            lines.append(f"Dialects: {', '.join(sorted(cls.dialects))}.")
            rows = option_rows(cls)
            if rows:
                lines += ["", *_table(["option", "type", "default", "what it means"], [(f"`{r[0]}`", *r[1:]) for r in rows])]
    return "\n".join(lines) + "\n"


def ops_page() -> str:
    """docs/ops.md: every op with its operands, attributes and traits."""
    from actgraph.ops import all_ops

    lines = [
        _NOTICE,
        "",
        "# Ops",
        "",
        "The dialect that actgraph adds to ATen and ONNX. Each op has a torch reference and a body in",
    ]
    lines.append("standard ONNX ops, which exported files carry as a model-local function.")
    for op in all_ops():
        lines += ["", f"## `{op.qualified_name}`", "", inspect.cleandoc(op.doc), ""]
        lines.append(f"ONNX: `actgraph::{op.onnx_name}`, from opset {op.min_opset}. Outputs: {', '.join(op.outputs)}.")
        if op.traits:
            lines[-1] += f" Traits: {', '.join(sorted(trait.value for trait in op.traits))}."
        rows = []
        for operand in op.inputs:
            kind = " ".join(word for word, on in (("optional", operand.optional), ("variadic", operand.variadic)) if on)
            types = f"as `{operand.same_as}`" if operand.same_as else ", ".join(sorted(operand.dtypes))
            rows.append((f"`{operand.name}`", types, kind, operand.doc))
        lines += ["", *_table(["operand", "types", "", "what it is"], rows)]
        rows = []
        for attribute in op.attributes:
            default = "required" if repr(attribute.default) == "required" else f"`{attribute.default}`"
            kind = ", ".join(attribute.choices) or attribute.kind
            rows.append((f"`{attribute.name}`", kind, default, attribute.doc))
        if rows:
            lines += ["", *_table(["attribute", "type", "default", "what it means"], rows)]
    return "\n".join(lines) + "\n"


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    return [line(headers), "|" + "---|" * len(headers), *(line(row) for row in rows)]


PAGES = {"passes.md": passes_page, "ops.md": ops_page}


def main(folder: str) -> None:
    """Write every page into ``folder``."""
    for name, page in PAGES.items():
        write_text(Path(folder) / name, page())


if __name__ == "__main__":
    main(*sys.argv[1:])
