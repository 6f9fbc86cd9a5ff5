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
    from actgraph.ops.reference_docs import ops_markdown

    return f"{_NOTICE}\n\n{ops_markdown()}"


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
