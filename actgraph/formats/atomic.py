"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from actgraph.errors import InputError


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A new file beside ``path`` that takes its name when the block ends, and vanishes when the block raises.

    The former file is replaced, not changed: whoever has it open or mapped keeps reading the old content. A symbolic link
    is written through. Raises InputError when the directory is missing or read-only, or the disk is full.
    """
    target = Path(os.path.realpath(path))
    with temporary_file(target) as (stream, temporary):
        yield stream
        stream.close()
        os.replace(temporary, target)


@contextlib.contextmanager
def temporary_file(target: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A file beside ``target``, removed at the end of the block unless it was renamed."""
    with clear_errors(target):
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a directory", str(target))
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, "the file is read-only", str(target))
        number, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        temporary = Path(name)
        try:
            with os.fdopen(number, "wb") as stream:
                os.chmod(temporary, _mode(target))
                yield stream, temporary
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def clear_errors(path: str | Path) -> Iterator[None]:
    """Operating system errors while writing ``path`` as one clear line."""
    try:
        yield
    except OSError as error:
        hints = {
            errno.ENOSPC: "free some space, or save to another disk",
            errno.EACCES: "choose a place you may write to",
            errno.EROFS: "choose a place you may write to",
            errno.ENOENT: "create the directory first",
        }
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"cannot write {path}: {reason}", hints.get(error.errno or 0, "")) from error


def _mode(target: Path) -> int:
    """The permissions of the file that is replaced, else those that a new file gets."""
    if target.exists():
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
