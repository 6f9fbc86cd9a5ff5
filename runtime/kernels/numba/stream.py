"""The physical limit of kernels that read weights once: the fastest read loop there is here."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import numpy as np
from numba import njit

from actgraph.graph.graph import Array
from actgraph.runtime.kernels.numba import simd
from actgraph.runtime.kernels.numba.memory import OPTIONS, i32s, i64s
from actgraph.runtime.kernels.numba.objects import loaded
from actgraph.runtime.native.library import library


def _reader(streams: int, ahead: int) -> Any:
    """Reads ``words[1]`` bytes from ``words[0]`` on, each part as several streams; one sum for each part to words[2]."""

    @njit(**OPTIONS)
    def read(frame, part, nparts):
        words = i64s(frame)
        length = words[1] // nparts // (256 * streams) * 256
        start = words[0] + part * length * streams
        a = b = c = d = simd.splat_i32(np.int32(0))
        for offset in range(0, length, 256):
            for stream in range(streams):
                at = start + stream * length + offset
                if ahead:
                    simd.prefetch_far(at + ahead)
                    simd.prefetch_far(at + ahead + 64)
                    simd.prefetch_far(at + ahead + 128)
                    simd.prefetch_far(at + ahead + 192)
                a, b = simd.add(a, simd.load_i32(at)), simd.add(b, simd.load_i32(at + 64))
                c, d = simd.add(c, simd.load_i32(at + 128)), simd.add(d, simd.load_i32(at + 192))
        i32s(words[2])[16 * part] = simd.sum_i32(simd.add(simd.add(a, b), simd.add(c, d)))
        return 0

    return read


READERS = {(streams, ahead): _reader(streams, ahead) for streams in (1, 2, 4) for ahead in (0, 4096, 8192)}


def _row_reader(ahead: int) -> Any:
    """Reads rows of words[2] bytes at the addresses words[0], words[1] of them for each part; one sum for each to words[3].

    Four rows at once, as their lines come fastest so; the rows ``ahead`` bytes ahead are prefetched.
    """

    @njit(**OPTIONS)
    def read(frame, part, nparts):
        words = i64s(frame)
        count, length = words[1], words[2]
        rows, further = i64s(words[0] + 8 * part * count), max(ahead // (4 * length), 1) * 4
        a = b = c = d = simd.splat_i32(np.int32(0))
        for row in range(0, count - 3, 4):
            n = min(row + further, count - 4)
            for offset in range(0, length, 64):
                simd.prefetch_far(rows[n] + offset)
                simd.prefetch_far(rows[n + 1] + offset)
                simd.prefetch_far(rows[n + 2] + offset)
                simd.prefetch_far(rows[n + 3] + offset)
                a, b = simd.add(a, simd.load_i32(rows[row] + offset)), simd.add(b, simd.load_i32(rows[row + 1] + offset))
                c, d = simd.add(c, simd.load_i32(rows[row + 2] + offset)), simd.add(d, simd.load_i32(rows[row + 3] + offset))
        i32s(words[3])[16 * part] = simd.sum_i32(simd.add(simd.add(a, b), simd.add(c, d)))
        return 0

    return read


ROW_READERS = {ahead: _row_reader(ahead) for ahead in (4096, 12288, 24576)}


class Stream:
    """Memory to read, and how fast it is read. size: bytes, many times the caches."""

    def __init__(self, threads: int, size: int = 1 << 30) -> None:
        self._data = np.ones(size // 4, np.int32)
        self._sums = np.zeros(16 * threads, np.int32)
        self._frame = np.array([self._data.ctypes.data, self._data.nbytes, self._sums.ctypes.data], np.int64)
        self._threads = threads
        addresses = [loaded(f"read_{streams}_{ahead}", reader) for (streams, ahead), reader in READERS.items()]
        seconds = {address: sorted(self._seconds(address) for _ in range(3))[1] for address in addresses}
        self._fastest = min(addresses, key=seconds.__getitem__)

    def _seconds(self, address: int) -> float:
        start = time.perf_counter()
        library().ag_parallel(ctypes.c_void_p(address), self._frame.ctypes.data, self._threads)
        return time.perf_counter() - start

    def measure(self) -> float:
        """Bytes per second of one reading by the loop that was fastest when this was made."""
        return self._data.nbytes / self._seconds(self._fastest)


class RowStream:
    """Rows apart from each other in memory, and how fast they are read: what is left of the stream where others are skipped.

    rows: their addresses, of at least four rows for each thread; they must stay. length: bytes of each.
    """

    def __init__(self, rows: Array, length: int, threads: int) -> None:
        self._rows = np.ascontiguousarray(rows[: len(rows) // (4 * threads) * 4 * threads], np.int64)
        self.nbytes, self._threads = len(self._rows) * length, threads
        self._sums = np.zeros(16 * threads, np.int32)
        count = len(self._rows) // threads
        self._frame = np.array([self._rows.ctypes.data, count, length, self._sums.ctypes.data], np.int64)
        addresses = [loaded(f"read_rows_{ahead}", reader) for ahead, reader in ROW_READERS.items()]
        seconds = {address: sorted(self._seconds(address) for _ in range(3))[1] for address in addresses}
        self._fastest = min(addresses, key=seconds.__getitem__)

    def _seconds(self, address: int) -> float:
        start = time.perf_counter()
        library().ag_parallel(ctypes.c_void_p(address), self._frame.ctypes.data, self._threads)
        return time.perf_counter() - start

    def measure(self) -> float:
        """Bytes per second of one reading by the loop that was fastest when this was made."""
        return self.nbytes / self._seconds(self._fastest)


def read_bandwidth(threads: int, rounds: int = 5) -> float:
    """Bytes per second that ``threads`` threads read from memory at most, over 1 GB."""
    stream = Stream(threads)
    return max(stream.measure() for _ in range(rounds))
