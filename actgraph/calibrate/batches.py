"""Batches: samples put together, padded on the right where an attention mask lets the model know.

Without a mask for a dimension (or with ``pad=False``) only samples of equal shape share a batch. Nothing that is measured may
depend on how samples are grouped; grouping by length within a window only saves padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from actgraph.calibrate.encode import PROMPT_LENGTH, SPAN, Sample, Signature
from actgraph.errors import InputError
from actgraph.ops.shapes import Dim

Array = np.ndarray[Any, Any]

#: Samples are grouped by length within windows of this many batches.
_WINDOW = 32


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward.

    indices: the place in the corpus of each leading row's sample (further rows only fill a fixed batch size).
    masks: dimension -> ``[rows, length]`` bool, where each sample's positions are real.
    prompt_lengths: ``[rows]``, the number of prompt tokens of documents with a prompt and a response (others: all are prompt;
    ``None``: nobody has a response). spans: ``[rows, length]`` bool, the marked tokens of documents with a span.
    """

    inputs: dict[str, Array]
    indices: tuple[int, ...]
    masks: dict[Dim, Array]
    prompt_lengths: Array | None = None
    spans: Array | None = None

    @property
    def rows(self) -> int:
        """How many samples there are."""
        return len(self.indices)

    def told(self, known: Array | None, what: str, needs: str) -> Array:
        """``known``. Raises InputError where documents do not tell it."""
        if known is None:
            line = '{"text": ..., "span": ...}' if "span" in needs else '{"prompt": ..., "response": ...}'
            raise InputError(f"{what} needs documents with {needs}", f"a line of .jsonl is {line}")
        return known

    @property
    def padded(self) -> bool:
        return any(not mask.all() for mask in self.masks.values())

    @property
    def tokens(self) -> int:
        """Valid positions of the first sequence dimension; 0 where inputs are no sequences."""
        return int(next(iter(self.masks.values())).sum()) if self.masks else 0


def batches(signature: Signature, samples: Iterable[Sample], *, batch_size: int, pad: bool = True) -> Iterator[Batch]:
    """``samples`` in batches of at most ``batch_size``.

    A graph with a fixed batch size gets exactly that (short batches are filled with copies beyond ``Batch.rows``); a graph
    without a batch axis gets one sample at a time; a fixed length takes samples up to that length, padded, if it has a mask.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}", "it is at least 1")
    fixed = signature.batch if isinstance(signature.batch, int) else None
    size = 1 if signature.batch is None else fixed or batch_size
    source = enumerate(samples)
    while window := list(islice(source, size * _WINDOW)):
        groups: dict[Any, list[tuple[int, Sample]]] = {}
        for item in sorted(window, key=lambda item: _length(item[1])):
            groups.setdefault(_key(signature, item[1], pad), []).append(item)
        for group in groups.values():
            for start in range(0, len(group), size):
                part = group[start : start + size]
                yield assemble(signature, [sample for _, sample in part], tuple(index for index, _ in part), fixed)


def _length(sample: Sample) -> int:
    return max((array.size for array in sample.values()), default=0)


def _paddable(signature: Signature, pad: bool) -> set[Dim]:
    return {size for size in signature.maskable() if pad or isinstance(size, int)}


def _key(signature: Signature, sample: Sample, pad: bool) -> Any:
    """Samples with equal keys may share a batch: the sizes that padding cannot make equal."""
    paddable = _paddable(signature, pad)
    key: list[Any] = []
    for value in signature.inputs:
        if value.name not in sample:
            key.append((value.name, None))
            continue
        array = sample[value.name]
        if not signature.has_batch(value):
            key.append((value.name, array.shape, array.tobytes()))
            continue
        sizes = (value.shape or ())[1:]
        fixed = tuple(None if size in paddable else actual for size, actual in zip(sizes, array.shape, strict=True))
        key.append((value.name, fixed))
    return tuple(key)


def assemble(signature: Signature, samples: list[Sample], indices: tuple[int, ...], fixed: int | None = None) -> Batch:
    """One batch of ``samples``. Raises InputError for a sample longer than a fixed length, or that cannot be padded to it."""
    maskable = signature.maskable()
    lengths: dict[Dim, list[int]] = {}
    for value in signature.inputs:
        if signature.has_batch(value) and value.name in samples[0]:
            for axis, size in enumerate((value.shape or ())[1:]):
                if size in maskable or isinstance(size, str):
                    lengths.setdefault(size, [sample[value.name].shape[axis] for sample in samples])
    targets = {size: size if isinstance(size, int) else max(found) for size, found in lengths.items()}
    for size, found in lengths.items():
        if max(found) > targets[size]:
            raise InputError(f"a sample has {max(found)} positions, and the graph takes {size}", f"use max_length={size}")
    inputs: dict[str, Array] = {}
    filler = [samples[-1]] * ((fixed or len(samples)) - len(samples))
    for value in signature.inputs:
        if value.name not in samples[0]:
            continue
        if not signature.has_batch(value):
            inputs[value.name] = samples[0][value.name]
            continue
        wanted = [targets.get(size) for size in (value.shape or ())[1:]]
        inputs[value.name] = np.stack([_padded(sample[value.name], wanted) for sample in samples + filler])
    masks = {size: np.arange(targets[size])[None, :] < np.asarray(found)[:, None] for size, found in lengths.items()}
    told: Array | None = None
    if any(PROMPT_LENGTH in sample for sample in samples):
        told = np.array([int(sample.get(PROMPT_LENGTH, np.asarray(2**31 - 1))) for sample in samples])
    spans: Array | None = None
    if any(SPAN in sample for sample in samples):
        length = max(len(sample[SPAN]) if SPAN in sample else 0 for sample in samples)
        length = max([length, *(mask.shape[1] for mask in list(masks.values())[:1])])
        spans = np.stack([_padded(sample.get(SPAN, np.zeros(0, bool)), [length]) for sample in samples])
    return Batch(inputs, indices, masks, told, spans)


def _padded(array: Array, sizes: list[int | None]) -> Array:
    """``array`` with zeros added at the end of each axis up to ``sizes``."""
    widths = [(0, (size or actual) - actual) for size, actual in zip(sizes, array.shape, strict=True)]
    return np.pad(array, widths) if any(after for _, after in widths) else array
