"""Prefix reuse: keys and values of beginnings that prompts have in common are computed once.

They are kept in blocks of tokens. A block is known by its tokens, by all tokens before it and by everything else that changes
what a cache holds: the graph with its weights and edits (a steered prefix is another prefix), and what the graph is told
beside the tokens, such as how long the prompt is and how strongly to steer. Sessions copy blocks; nothing writes into one.

Source: hash blocks with reference counts: *Efficient Memory Management for Large Language Model Serving with PagedAttention*,
2023 (vLLM).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from actgraph.errors import InputError, UnsupportedError
from actgraph.graph.graph import Array
from actgraph.runtime.state import BY_TOKEN, TOKENS

if TYPE_CHECKING:
    from actgraph.runtime.session import Compiled, Session


@dataclass(frozen=True)
class PrefixStatistics:
    """hits, misses: full blocks of prompts that were found, or not. tokens: how many were not computed for it.

    blocks, bytes: what is kept now. evictions: blocks that gave way to others.
    """

    hits: int = 0
    misses: int = 0
    tokens: int = 0
    blocks: int = 0
    bytes: int = 0
    evictions: int = 0


@dataclass(eq=False)
class _Block:
    """Entries of ``size`` tokens by slot, read-only. users: prefixes that hold it; only a block that none holds may go."""

    key: bytes
    arrays: dict[str, Array]
    users: int = 0

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


class Prefix:
    """The beginning of a prompt as far as it is known. Its blocks stay until ``release``, or the end of a ``with``."""

    def __init__(self, cache: PrefixCache, blocks: list[_Block]) -> None:
        self._cache, self._blocks = cache, blocks
        self.length = len(blocks) * cache.block

    def contents(self) -> dict[str, Array]:
        """The entries of all its tokens, by slot; for ``Session.load``."""
        names = self._blocks[0].arrays if self._blocks else ()
        return {name: np.concatenate([block.arrays[name] for block in self._blocks], axis=TOKENS) for name in names}

    def release(self) -> None:
        """Let the cache drop the blocks when it needs the space."""
        blocks, self._blocks = self._blocks, []
        self._cache._release(blocks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


class PrefixCache:
    """Keys and values of prompts, for ``compile(graph, prefixes=...)``. Any number of graphs and threads may share one.

    max_bytes: what the blocks may take together. Beyond, the least recently used ones that no request is reading go, the
    longest prefix first. block: tokens of a block: only whole blocks are kept and found.
    """

    def __init__(self, max_bytes: int = 256 << 20, block: int = 16) -> None:
        if max_bytes < 0:
            raise InputError(f"max_bytes is {max_bytes}", "give at least 0")
        if block < 1:
            raise InputError(f"block is {block}", "give at least 1 token")
        self.max_bytes, self.block = max_bytes, block
        self._lock = threading.Lock()
        self._blocks: dict[bytes, _Block] = {}
        # What nobody holds, in the order in which it goes. A holder of a block holds all blocks before it, and lets go of the
        # last first, so that no block ever outlives the one that it continues.
        self._free: dict[bytes, _Block] = {}
        self._counts = PrefixStatistics()

    def __repr__(self) -> str:
        now = self.statistics
        return f"<PrefixCache {now.blocks} blocks of {self.block} tokens, {now.bytes} of {self.max_bytes} bytes>"

    @property
    def statistics(self) -> PrefixStatistics:
        """The counts since the beginning."""
        with self._lock:
            return self._counts

    def clear(self) -> None:
        """Drop every block that no request is reading."""
        with self._lock:
            while self._free:
                self._drop()

    def feed(self, session: Session, tokens: Array) -> dict[str, Array]:
        """Feed the prompt ``tokens`` [1, n] to an empty session of one row: what is known of it is not computed.

        Returns the outputs for the last chunk that was computed; there is one, as the last token is never looked up. The
        blocks of the prompt are known afterwards. Raises UnsupportedError where ``why_not`` has a reason.
        """
        reason = why_not(session.compiled)
        if reason:
            raise UnsupportedError(f"{session.compiled!r} cannot reuse prefixes: {reason}", "compile it without prefixes")
        if session.length or np.ndim(tokens) != 2 or len(tokens) != 1:
            raise InputError("prefixes are those of one prompt in a new session", "use a session of batch 1, and feed others")
        root, ids = root_key(session, np.shape(tokens)[1]), [int(token) for token in tokens[0]]
        with self.lookup(root, ids) as known:
            if known.length:
                session.load(known.contents(), tokens[:, : known.length])
            results = session.feed(tokens[:, known.length :])
            self.store(root, ids, session.read)
        return results

    def lookup(self, root: bytes, tokens: Sequence[int]) -> Prefix:
        """The known beginning of a prompt, without its last token. root: see ``root_key``."""
        found: list[_Block] = []
        whole = (len(tokens) - 1) // self.block
        with self._lock:
            for key in self._keys(root, tokens[: whole * self.block]):
                if key not in self._blocks:
                    break
                found.append(self._hold(self._blocks[key]))
            counts = self._counts
            self._counts = replace(
                counts, hits=counts.hits + len(found), misses=counts.misses + whole - len(found),
                tokens=counts.tokens + len(found) * self.block,
            )  # fmt: skip
        return Prefix(self, found)

    def store(self, root: bytes, tokens: Sequence[int], read: Callable[[int, int], Mapping[str, Array]]) -> None:
        """Keep the whole blocks of ``tokens``, as far as there is room. read: copies entries from start to stop, by slot."""
        held: list[_Block] = []
        try:
            for index, key in enumerate(self._keys(root, tokens)):
                with self._lock:
                    if key in self._blocks:
                        held.append(self._hold(self._blocks[key]))
                        continue
                new = _Block(
                    key, {name: _sealed(part) for name, part in read(index * self.block, (index + 1) * self.block).items()}
                )
                with self._lock:
                    if key not in self._blocks and not self._add(new):  # another thread may have added it
                        return
                    held.append(self._hold(self._blocks[key]))
        finally:
            self._release(held)

    def _keys(self, root: bytes, tokens: Sequence[int]) -> Iterator[bytes]:
        """The keys of the whole blocks of ``tokens``: each stands for all tokens up to its end."""
        key = root
        for start in range(0, len(tokens) - self.block + 1, self.block):
            key = hashlib.sha256(key + np.asarray(tokens[start : start + self.block], "<i8").tobytes()).digest()
            yield key

    def _hold(self, block: _Block) -> _Block:
        self._free.pop(block.key, None)
        block.users += 1
        return block

    def _release(self, blocks: Sequence[_Block]) -> None:
        with self._lock:
            for block in reversed(blocks):
                block.users -= 1
                if not block.users:
                    self._free[block.key] = block

    def _add(self, block: _Block) -> bool:
        """Keep a block that is not there, if there is room for it."""
        size = block.bytes
        if size > self.max_bytes:
            return False
        while self._counts.bytes + size > self.max_bytes:
            if not self._free:
                return False
            self._drop()
        self._blocks[block.key] = block
        self._counts = replace(self._counts, blocks=self._counts.blocks + 1, bytes=self._counts.bytes + size)
        return True

    def _drop(self) -> None:
        block = self._free.pop(next(iter(self._free)))
        del self._blocks[block.key]
        counts = self._counts
        self._counts = replace(
            counts, blocks=counts.blocks - 1, bytes=counts.bytes - block.bytes, evictions=counts.evictions + 1
        )


def why_not(compiled: Compiled) -> str | None:
    """Why ``compiled`` cannot reuse prefixes; ``None`` where it can: all its state has one entry for each token."""
    if not compiled.slots:
        return "it has no cache of keys and values (run the pass kv_cache)"
    for slot in compiled.slots:
        if slot.update not in BY_TOKEN:
            return f"its slot {slot.name} ({slot.update}) does not keep one entry for each token"
    return None


def root_key(session: Session, length: int) -> bytes:
    """What the key of a prompt's first block starts from: all that its keys and values depend on beside the tokens.

    length: of the prompt. A graph that is told how long the prompt is may treat the same token otherwise in a longer one; and
    what the session's ``inputs`` say, such as the strength of an edit, is in all keys and values.
    """
    told = {"prompt_lengths": length} if "prompt_lengths" in session.compiled.inputs else {}
    return hashlib.sha256(repr((session.compiled.key, sorted(told.items()), session.inputs.digest())).encode()).digest()


def _sealed(array: Array) -> Array:
    """``array``, or a copy where others own its memory, that cannot be written to."""
    own = array if array.flags.owndata else array.copy()
    own.setflags(write=False)
    return own
