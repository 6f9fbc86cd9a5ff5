"""Figures as people read them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from html import escape
from typing import Any


@dataclass(frozen=True)
class Table:
    """Cells as text. ``str`` aligns them, rich and notebooks show a table. right: headers of columns of numbers."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: Collection[str] = field(default=(), repr=False)

    def __str__(self) -> str:
        lines = [self.headers, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.headers))]

        def cell(place: int, text: str) -> str:
            return text.rjust(widths[place]) if self.headers[place] in self.right else text.ljust(widths[place])

        return "\n".join("  ".join(cell(place, text) for place, text in enumerate(line)).rstrip() for line in lines)

    def __rich__(self) -> Any:
        from rich.table import Table as RichTable

        made = RichTable()
        for name in self.headers:
            made.add_column(name, justify="right" if name in self.right else "left")
        for row in self.rows:
            made.add_row(*row)
        return made

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in self.headers)
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in self.rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def size(count: float) -> str:
    """Bytes with their unit."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 1000 * scale else f"{count / scale:,.0f} {unit}"
    return f"{count:.0f} B"


def rate(count: float) -> str:
    """Bytes per second as GB/s."""
    return f"{count / 1e9:.3g}"


def percent(share: float) -> str:
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}"
