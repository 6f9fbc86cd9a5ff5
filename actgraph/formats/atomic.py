"""Files that appear whole or not at all, alone or several together."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from actgraph.errors import InputError


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A new file beside ``path`` that takes its name when the block ends, and vanishes when the block raises.

    The former file is replaced, not changed: whoever has it open or mapped keeps reading the old content. A symbolic link
    is written through. Raises InputError when the directory is missing or read-only, or the disk is full.
    """
    with StagedFiles() as files, files.file(Path(path)) as staged:
        yield staged.stream


@dataclass
class Staged:
    """A file being written: what goes to ``stream`` takes the name ``target``, which may still change, later."""

    stream: BinaryIO
    target: Path
    temporary: Path


class StagedFiles:
    """The files of one model, written beside their targets and renamed together, in the order they were written.

    Use as a context manager. When its block ends every file takes its name; when it raises, none does: old files keep their
    content, and folders that were made are removed. Write the file that refers to the others last: should the machine stop
    between two renames, it does not name what is not there.
    """

    def __init__(self) -> None:
        self._files: list[Staged] = []
        self._folders: list[Path] = []

    def __enter__(self) -> StagedFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        done = False
        try:
            if kind is None:
                for file in self._files:
                    with clear_errors(file.target):
                        os.replace(file.temporary, file.target)
                done = True
        finally:
            for file in self._files:
                file.temporary.unlink(missing_ok=True)
            if not done:
                for folder in reversed(self._folders):
                    with contextlib.suppress(OSError):  # not empty: somebody else uses it by now
                        folder.rmdir()

    def folder(self, path: Path) -> None:
        """Make ``path`` where it is missing. Raises InputError where that is not possible."""
        missing = [place for place in (path, *path.parents) if not place.exists()]
        with clear_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        self._folders += reversed(missing)

    @contextlib.contextmanager
    def file(self, path: Path) -> Iterator[Staged]:
        """A new file that will replace ``path`` (a symbolic link is written through). Raises InputError as ``atomic_file``."""
        target = Path(os.path.realpath(path))
        with clear_errors(target):
            stream, temporary = _open_beside(target)
            staged = Staged(stream, target, temporary)
            self._files.append(staged)
            with stream:
                os.chmod(temporary, _mode(target))
                yield staged

    def content(self, path: Path) -> bytes | None:
        """What ``path`` will hold when all is renamed, ``None`` where there will be nothing that can be read."""
        target = Path(os.path.realpath(path))
        for file in reversed(self._files):
            if file.target == target:
                return file.temporary.read_bytes()
        return target.read_bytes() if target.is_file() else None

    def exists(self, path: Path) -> bool:
        """Whether there will be something at ``path``."""
        return path.exists() or any(file.target == Path(os.path.realpath(path)) for file in self._files)


def _open_beside(target: Path) -> tuple[BinaryIO, Path]:
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a directory", str(target))
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "the file is read-only", str(target))
    number, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    return os.fdopen(number, "wb"), Path(name)


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
