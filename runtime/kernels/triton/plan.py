"""Which kernel runs a product, and in which tiles: the one place where shapes decide.

The numbers here come from counting bytes and registers, not from measurement: no CUDA device has been at hand.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

#: Up to so many tokens the weight is streamed once through sums (memory-bound); above, tiles go through ``tl.dot``.
#: NOT MEASURED YET: 8 is where the sums of all tokens still fit in registers beside a tile of the weight.
FEW_TOKENS = 8
#: Programs that the streaming kernels start for each multiprocessor, by splitting the inputs. Not measured yet.
PROGRAMS_PER_PROCESSOR = 4
#: float32 sums that one streaming program (128 threads) holds: 64 registers of each thread.
SUMS = 8192
#: Blocks of inputs that a part of a split holds at least: shorter parts cost more in the second sum than they win.
BLOCKS_PER_PART = 4


@dataclass(frozen=True)
class Stream:
    """Few tokens: ``tokens`` (a power of two) by ``outputs`` by ``inputs`` in a program, the inputs cut into ``parts``."""

    tokens: int
    outputs: int
    inputs: int
    parts: int
    warps: int = 4


@dataclass(frozen=True)
class Tiles:
    """Many tokens: tiles of a matrix product."""

    tokens: int
    outputs: int
    inputs: int
    warps: int = 4


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n`` (and 1)."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 4 where Triton's interpreter runs, so that splits happen there, too."""
    if device.type != "cuda":
        return 4
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def few(tokens: int) -> bool:
    return tokens <= FEW_TOKENS


def stream(tokens: int, outputs: int, inputs: int, *, out_in: bool, device: torch.device, split: bool = True) -> Stream:
    """The plan of a streamed product. Contiguous weights along the longer side of a tile: inputs for [N, K], else outputs."""
    rows = power_of_two(tokens)
    area = SUMS // rows
    long = min(512 if rows == 1 else 128, max(power_of_two(inputs if out_in else outputs), 16))
    short = max(min(area // long, power_of_two(outputs if out_in else inputs)), 1)
    block_outputs, block_inputs = (short, long) if out_in else (long, short)
    parts = 1
    if split:
        wanted = ceil_div(PROGRAMS_PER_PROCESSOR * processors(device), max(ceil_div(outputs, block_outputs), 1))
        parts = max(min(wanted, inputs // (BLOCKS_PER_PART * block_inputs)), 1)
    return Stream(rows, block_outputs, block_inputs, parts)


def tiles(tokens: int, *, narrow: bool) -> Tiles:
    """The plan of a product in tiles. No side is below the least that ``tl.dot`` takes anywhere (16).

    narrow: in a half type, on tensor cores. float32 goes through multiply-adds, which need more registers: eight warps and
    shorter tiles keep them from spilling (seen in what ptxas reports, for compute capabilities 8.0 and 9.0).
    """
    rows = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    return Tiles(rows, 64, 64, 4) if narrow else Tiles(rows, 64, 32, 8)
