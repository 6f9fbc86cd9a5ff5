"""What verbs print: tables and JSON on standard output, progress and remarks on standard error."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], *, file: Any = None) -> None:
    """Print aligned columns. On a terminal the last column is cut to the width of the window."""
    cells = [[str(cell) for cell in row] for row in rows]
    lines = [list(headers), *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    limit = os.get_terminal_size().columns if sys.stdout.isatty() and file is None else None
    for line in lines:
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        print(text if limit is None or len(text) <= limit else text[: limit - 1] + "…", file=file)


def dump_json(data: Any, *, file: Any = None) -> None:
    """Print ``data`` as JSON. Numpy numbers become plain ones."""
    print(json.dumps(data, indent=2, default=_plain, ensure_ascii=False), file=file)


def _plain(value: Any) -> Any:
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return str(value)


def remark(text: str, *, quiet: bool = False) -> None:
    """A line for people, on standard error so that standard output stays clean."""
    if not quiet:
        print(text, file=sys.stderr)


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing: beside it first, then renamed."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def waiting(text: str, *, quiet: bool = False) -> Iterator[None]:
    """A spinner with ``text`` while something runs that cannot say how far it is; on a terminal only."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextmanager
def counting(text: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar for ``progress(done, total)``; on a terminal only."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
