"""What a run did: one row a pass, as a table, as JSON and for notebooks."""

from __future__ import annotations

import html
import json
import math
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from actgraph.graph.diff import plural
from actgraph.pipeline.base import Declined


@dataclass
class Change:
    """How far the outputs moved over one pass, on the sample inputs.

    relative: the largest absolute difference of any output over the largest magnitude of that output before.
    output: the output that moved most. tolerance: what was allowed (None: the pass knows no bound, or this is no single pass).
    compared: how many numbers were compared; at 0 nothing is known. broken: an output with a new NaN or infinity.
    """

    relative: float
    output: str = ""
    tolerance: float | None = None
    missing: tuple[str, ...] = ()  # outputs that the pass removed or reshaped
    compared: int = 0
    broken: str = ""


@dataclass
class PassRow:
    """One pass of a run. Bytes are those of the parameters; peak_bytes is the process's memory high-water mark."""

    name: str
    text: str
    seconds: float = 0.0
    calibration_seconds: float = 0.0
    statistics: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    declined: list[Declined] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    expected_change: str = ""
    change: Change | None = None
    nodes_before: int = 0
    nodes_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    peak_bytes: int = 0

    @property
    def did(self) -> str:
        """The counts in words: ``inserted 4, folded 1``."""
        return ", ".join(f"{rule} {count}" for rule, count in self.counts.items() if count) or "nothing to do"


@dataclass
class Report:
    """What a pipeline did to a graph. ``str(report)`` is the table."""

    graph: str = ""
    dialect: str = ""
    pipeline: str = ""
    rows: list[PassRow] = field(default_factory=list)
    seed: int = 0
    corpus: str = ""
    documents: int = 0
    unit: str = "document"  # what a document of the corpus is called: document, sample (of arrays) or image
    tokens: int = 0
    forwards: int = 0  # how often the corpus was run
    seconds: float = 0.0  # everything: passes, calibration, checks
    parity: str = ""  # how parity was checked, or why it was not
    change: Change | None = None  # of the result against the input
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def followed_by(self, later: Report) -> Report:
        """One report of two runs, the second on one of the graphs that the first made (the change over both is unknown)."""
        return Report(
            later.graph, self.dialect, self.pipeline, [*self.rows, *later.rows], self.seed,
            later.corpus or self.corpus, later.documents or self.documents, later.unit if later.documents else self.unit,
            later.tokens or self.tokens, self.forwards + later.forwards, self.seconds + later.seconds,
            self.parity if self.parity == later.parity else f"{self.parity}; then {later.parity}",
            notes=later.notes, versions=self.versions,
        )  # fmt: skip

    def __getitem__(self, key: int | str) -> PassRow:
        """The row of the n-th pass, or of the first pass of that name."""
        if isinstance(key, int):
            return self.rows[key]
        for row in self.rows:
            if row.name == key:
                return row
        raise KeyError(key)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def to_json(self) -> str:
        """The report as JSON; numbers that JSON lacks (infinity, NaN) become null."""
        return json.dumps(_jsonable(self.to_dict()), indent=2, allow_nan=False)

    def __str__(self) -> str:
        head, rows = self._cells()
        lines = [*self._title(), *_align(head, rows)]
        for number, row in enumerate(self.rows, 1):
            lines += [f"  {number}. {line}" for line in _remarks(row)]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    def details(self, name: str | None = None) -> str:
        """The per-place rows of every pass (or of the passes called ``name``) as tables."""
        lines: list[str] = []
        for row in self.rows:
            if row.details and name in (None, row.name):
                head = list(dict.fromkeys(key for detail in row.details for key in detail))
                lines += [row.text, *_align(head, [[_shown(detail.get(key)) for key in head] for detail in row.details]), ""]
        return "\n".join(lines).rstrip()

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        head, rows = self._cells()
        table = Table(*head)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        remarks = [Text(f"{i}. {line}") for i, row in enumerate(self.rows, 1) for line in _remarks(row)]
        return Group(*(Text(line) for line in self._title()), table, *remarks, *(Text(f"note: {note}") for note in self.notes))

    def _repr_html_(self) -> str:
        head, rows = self._cells()
        cells = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        remarks = [f"{i}. {line}" for i, row in enumerate(self.rows, 1) for line in _remarks(row)] + self.notes
        listed = "".join(f"<li>{html.escape(remark)}</li>" for remark in remarks)
        return (
            f"<p>{'<br>'.join(html.escape(line) for line in self._title())}</p><table><thead><tr>"
            f"{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr></thead><tbody>{cells}</tbody></table>"
            + (f"<ul>{listed}</ul>" if listed else "")
        )

    def _title(self) -> list[str]:
        lines = [f"{self.graph} ({self.dialect}): {counted(len(self.rows), 'pass')} in {self.seconds:.2f} s"]
        if self.documents:
            tokens = f", {counted(self.tokens, 'token')}" if self.tokens else ""
            times = f" (run {self.forwards} times)" if self.forwards > 1 else ""
            lines.append(f"calibrated on {self.corpus}: {counted(self.documents, self.unit)}{tokens}{times}")
        if self.parity:
            lines.append(f"parity: {self.parity}")
        if self.change is not None and len(self.rows) > 1:
            lines.append(f"all passes together moved {self.change.output} by {self.change.relative:.2g} (relative)")
        return lines

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        head = ["#", "pass", "did", "declined", "nodes", "parameters", "outputs moved", "seconds"]
        return head, [_row_cells(number, row) for number, row in enumerate(self.rows, 1)]


def _row_cells(number: int, row: PassRow) -> list[str]:
    nodes = str(row.nodes_after) if row.nodes_before == row.nodes_after else f"{row.nodes_before} -> {row.nodes_after}"
    size = human(row.bytes_after)
    if row.bytes_before != row.bytes_after:
        size = f"{human(row.bytes_before)} -> {size}"
    moved = "not checked" if row.change is None or not row.change.compared else f"{row.change.relative:.2g}"
    if row.change is not None and row.change.tolerance is not None:
        moved += f" (<= {row.change.tolerance:.0e})"
    return [str(number), row.text, row.did, str(len(row.declined) or ""), nodes, size, moved, f"{row.seconds:.3f}"]


def _remarks(row: PassRow) -> list[str]:
    """What a user should read: the declared reason for change, messages, what was declined (the first of each reason)."""
    lines = []
    if row.expected_change and row.expected_change != "exact":
        lines.append(f"{row.name}: {row.expected_change}")
    if row.change is not None and row.change.missing:
        lines.append(f"{row.name}: outputs not compared: {', '.join(row.change.missing)}")
    lines += [f"{row.name}: {message}" for message in row.messages]
    reasons: dict[str, list[str]] = {}
    for declined in row.declined:
        reasons.setdefault(declined.reason, []).append(declined.site)
    for reason, sites in reasons.items():
        more = f" and {len(sites) - 1} more" if len(sites) > 1 else ""
        lines.append(f"{row.name} declined {sites[0]}{more}: {reason}")
    return lines


def _align(head: Sequence[str], rows: Sequence[Sequence[str]], widest: int = 60) -> list[str]:
    cut = [[cell if len(cell) <= widest else cell[: widest - 3] + "..." for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(head, *cut, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *cut]]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def human(size: int) -> str:
    """``1.3 MB``."""
    amount = float(size)
    for unit in ("B", "KB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    raise AssertionError


def counted(count: int, noun: str) -> str:
    """``1 pass``, ``2,000 passes``."""
    return f"{count:,} {plural(noun, count)}"


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_jsonable(item) for item in value]
    if hasattr(value, "tolist") and not isinstance(value, (str, bytes)):  # numpy arrays and scalars
        return _jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def versions() -> dict[str, str]:
    """Versions of what shapes the result, for reports and reproducers. Nothing is imported for it."""
    import importlib.metadata

    found = {
        "actgraph": str(getattr(sys.modules.get("actgraph"), "__version__", "")),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for package in ("torch", "onnx", "onnx-ir", "onnxruntime", "numpy", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
