"""From a site's value to the rows that count: which axes are batch and sequence, what is padding, where the channels are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from actgraph.calibrate.batches import Batch
from actgraph.calibrate.encode import Signature
from actgraph.calibrate.pooled import pooled
from actgraph.calibrate.statistics import Request, Tokens
from actgraph.errors import InputError
from actgraph.graph.where import Where
from actgraph.ops.shapes import Dim, TensorType, canonical_dim

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Axes:
    """The axes of one value. batch: rows of the batch; tokens: (axis, dimension) of each sequence axis.

    flat: the axis that holds rows times positions, with the dimension of the positions.
    known: whether that is all there is to know; otherwise only batches without padding can be read.
    """

    batch: int | None = None
    tokens: tuple[tuple[int, Dim], ...] = ()
    flat: tuple[int, Dim] | None = None
    known: bool = False

    @staticmethod
    def of(name: str, kind: TensorType, signature: Signature) -> Axes:
        """Read off a symbolic shape. Raises InputError for a value that is the same for every row of a batch."""
        shape = kind.shape
        if shape is None:
            return Axes()
        batch = signature.batch
        lengths = {size for value in signature.inputs if signature.has_batch(value) for size in (value.shape or ())[1:]}
        lengths = {size for size in lengths if isinstance(size, str)}
        if not isinstance(batch, str):
            first = 0 if shape and isinstance(batch, int) and shape[0] == batch else None
            return Axes(first, tuple((i, size) for i, size in enumerate(shape) if size in lengths), None, first is not None)
        rows, tokens, flat, known = None, [], None, True
        flattened = {canonical_dim(f"({batch})*({size})"): size for size in lengths}
        for axis, size in enumerate(shape):
            if size == batch and rows is None:
                rows = axis
            elif size in lengths:
                tokens.append((axis, size))
            elif size in flattened and flat is None:
                flat = (axis, flattened[size])
            elif not isinstance(size, int):
                known = known and size is not None and not set(re.findall(r"[A-Za-z_]\w*", size)) & {batch, *lengths}
                if isinstance(size, str) and size.isidentifier():
                    known = False  # a name of its own, as files without shape inference have
        if known and rows is None and flat is None:
            raise InputError(f"{name} ({kind}) is the same for every row of a batch", "calibrate at another site")
        return Axes(rows, tuple(tokens), flat, known and (rows is None or flat is None))


def select(request: Request, array: Array, axes: Axes, batch: Batch) -> tuple[Array, Array | None]:
    """What a request counts of one batch: ``x [rows, channels]``, and the position of each row where it is asked for.

    Of a pooled request there is one row for each document, and its place in the corpus in place of a position.
    Raises InputError for NaN, naming the site, for positions where there is no sequence axis, and for a document of which no
    token counts.
    """
    if array.dtype.kind not in "fiub":
        array = array.astype(np.float32)  # bfloat16 and float8
    if axes.batch is not None and array.shape[axes.batch] != batch.rows:
        array = np.take(array, np.arange(batch.rows), axis=axes.batch)
    needs_position = request.positions or request.tokens is not Tokens.ALL or request.where != "all"
    if needs_position and not (axes.tokens or axes.flat):
        raise InputError(f"{request.site} has no sequence axis: the {request} is not defined", "leave out positions and tokens")
    channel = request.channel_axis
    if channel is not None and not -array.ndim <= channel < array.ndim:
        raise InputError(f"{request.site} has {array.ndim} axes: there is no axis {channel}", "choose another axis")
    axis = (channel if channel is not None else -1) % max(1, array.ndim)
    if array.ndim == 0:
        array = array[None]
    valid, where = None, None
    if batch.padded or needs_position or request.pool:
        elementwise = channel is None and any(a == axis for a, _ in axes.tokens)
        if elementwise:
            array, axis = array[..., None], array.ndim
        valid, where = _valid(request, array.shape, axes, batch, axis)
    rows = np.moveaxis(array, axis, -1)
    x = rows.reshape(-1, rows.shape[-1]) if valid is None else rows[valid]
    if x.dtype.kind == "f" and np.isnan(x).any():
        raise InputError(
            f"the activations at {request.site} are NaN ({int(np.isnan(x).sum())} of {x.size} in one batch)",
            "find the pass or layer that makes them with `actgraph bisect`",
        )
    if request.pool:
        return pooled(request.site, x, _documents(array.shape, valid, axes, batch, axis), batch.indices)
    return x, where if request.positions else None


def _documents(shape: tuple[int, ...], valid: Array | None, axes: Axes, batch: Batch, channel: int) -> Array:
    """The row of the batch that each row of ``x`` belongs to."""
    if axes.flat is not None and axes.batch is None:
        place, width = axes.flat[0], batch.masks[axes.flat[1]].shape[1]
        index = np.arange(shape[place]) // width
    elif axes.batch is not None:
        place, index = axes.batch, np.arange(shape[axes.batch])
    else:
        place, index = 0, np.zeros(shape[0], np.int64)
    view = [-1 if axis == place else 1 for axis in range(len(shape))]
    of_all = np.broadcast_to(index.reshape(view), [1 if axis == channel else size for axis, size in enumerate(shape)])
    rows = np.moveaxis(of_all, channel, -1)[..., 0]
    return np.asarray(rows.reshape(-1) if valid is None else rows[valid])


def _valid(request: Request, shape: tuple[int, ...], axes: Axes, batch: Batch, channel: int) -> tuple[Array, Array | None]:
    """Which rows count, ``[*shape without channel]`` bool, and the positions of those (of the first sequence axis)."""
    if batch.padded and not axes.known:
        raise InputError(f"which axes of {request.site} are batch and sequence is not known", "calibrate without padding")
    valid = np.ones([1 if axis == channel else size for axis, size in enumerate(shape)], bool)
    positions: Array | None = None
    pairs: list[tuple[int | None, int, Dim]] = [(axes.batch, axis, size) for axis, size in axes.tokens]
    if axes.flat is not None:
        pairs.append((None, *axes.flat))
    for number, (rows, axis, size) in enumerate(pairs):
        if axis == channel:
            continue
        mask = batch.masks[size]
        index = np.broadcast_to(np.arange(mask.shape[1]), mask.shape)
        if number == 0:
            mask = mask & _counting(request, batch, mask, index)
        if rows is None and axes.flat is not None and axis == axes.flat[0]:
            mask, index = mask.reshape(-1), index.reshape(-1)
            view = [-1 if a == axis else 1 for a in range(len(shape))]
        elif rows is None:
            mask, index = mask[:1], index[:1]
            view = [mask.shape[1] if a == axis else 1 for a in range(len(shape))]
        else:
            view = [mask.shape[0] if a == rows else mask.shape[1] if a == axis else 1 for a in range(len(shape))]
            if rows > axis:
                mask, index = mask.T, index.T
        valid = valid & mask.reshape(view)
        if number == 0:
            positions = np.broadcast_to(index.reshape(view), valid.shape)
    chosen = np.moveaxis(valid, channel, -1)[..., 0]
    return chosen, None if positions is None else np.moveaxis(positions, channel, -1)[..., 0][chosen]


def _counting(request: Request, batch: Batch, mask: Array, index: Array) -> Array:
    """Which tokens of the first sequence axis count, by ``tokens`` and ``where``: [rows, length] or broadcastable to it."""
    last = mask.sum(1, keepdims=True) - 1
    tokens = Tokens(request.tokens)
    if tokens is Tokens.RESPONSE:
        begins = batch.told(batch.prompt_lengths, f"the {request}", "a prompt and a response")[:, None]
        kept = (index >= begins - 1) & (index < last)
    elif tokens is Tokens.SPAN:
        kept = batch.told(batch.spans, f"the {request}", "a marked span")
    else:
        kept = {
            Tokens.ALL: np.ones_like(mask), Tokens.FIRST: index == 0, Tokens.LAST: index == last, Tokens.NOT_FIRST: index > 0,
        }[tokens]  # fmt: skip
    if request.where != "all":
        where = Where.parse(request.where)
        ids = batch.inputs.get("input_ids", batch.inputs.get("decoder_input_ids"))
        ids = ids[: batch.rows] if ids is not None and ids.shape[-1:] == mask.shape[-1:] else None
        lengths = batch.prompt_lengths
        if where.reads_prompt_lengths and lengths is None:
            lengths = last[:, 0] + 1  # a text without a response is all prompt
        kept = kept & where.mask(index, lengths, ids, np.asarray(batch.indices))
    return np.asarray(kept)
