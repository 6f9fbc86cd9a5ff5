"""Sums and multiples of steering vectors: ``0.8 * happy - 0.2 * loud``.

Numbers are computed in float64 and stored as float32. What is combined must be about the same thing: the same sites and
widths, models that may be one, the same meaning of a scale and the same tokens. A result recommends no scale, since that of
its parts is no longer right.
"""

from __future__ import annotations

import math
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, TypeGuard

import numpy as np

from actgraph.errors import InputError
from actgraph.formats.fingerprints import surely_differ

if TYPE_CHECKING:
    from actgraph.formats.vectors import Array, Scale, SteeringVector


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a real number: Python's or numpy's, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def combined(one: SteeringVector, other: SteeringVector, factor: float) -> SteeringVector:
    """``one + factor * other``. Raises InputError where the two are not about the same thing."""
    _directions_only(one)
    _directions_only(other)
    _same_places(one, other)
    for what, a, b in (("models", one.model, other.model), ("tokenizers", one.tokenizer, other.tokenizer)):
        if surely_differ(a, b):
            raise InputError(f"the steering vectors are of different {what}: {a} and {b}", "extract both from one model")
    if one.where != other.where:
        raise InputError(
            f"the steering vectors are meant for different tokens: {one.where} and {other.where}",
            'say for which the result is, with dataclasses.replace(vector, where="all")',
        )
    if (one.scale == "relative") != (other.scale == "relative"):
        raise InputError(
            f"the steering vectors are in different units: {one.scale} and {other.scale}",
            "a relative vector is a fraction of the activation's norm, the others are in its own unit",
        )
    directions = {name: _float32(_wide(v) + factor * _wide(other.directions[name])) for name, v in one.directions.items()}
    return replace(
        one,
        directions=directions,
        model=one.model or other.model,
        tokenizer=one.tokenizer or other.tokenizer,
        model_type=one.model_type or other.model_type,
        method=_joined(one.method, other.method),
        position=_joined(one.position, other.position),
        notes={key: value for key, value in one.notes.items() if other.notes.get(key) == value},
        scale=_no_longer_unit(one.scale),
        recommended_scale=None,
    )


def scaled(vector: SteeringVector, factor: float) -> SteeringVector:
    """``factor * vector``. Raises InputError for NaN and infinity, and where the result overflows."""
    _directions_only(vector)
    if not math.isfinite(factor):
        raise InputError(f"a steering vector cannot be multiplied by {factor}", "give a finite number")
    directions = {name: _float32(_wide(v) * float(factor)) for name, v in vector.directions.items()}
    scale = vector.scale if abs(factor) == 1.0 else _no_longer_unit(vector.scale)
    return replace(vector, directions=directions, scale=scale, recommended_scale=None)


def divided(vector: SteeringVector, divisor: float) -> SteeringVector:
    """``vector / divisor``. Raises InputError as ``scaled``, and for zero."""
    if divisor == 0 or not math.isfinite(divisor):
        raise InputError(f"a steering vector cannot be divided by {divisor}", "give a finite number other than 0")
    return scaled(vector, 1.0 / float(divisor))


def normalized(vector: SteeringVector) -> SteeringVector:
    """Every direction at length 1. Raises InputError for a direction of zeros."""
    _directions_only(vector)
    directions = {}
    for name, direction in vector.directions.items():
        wide = _wide(direction)
        largest = float(np.abs(wide).max(initial=0.0))
        if largest == 0.0:
            raise InputError(f"the direction of {name or '(any site)'} is zero", "extract it from sets that differ")
        directions[name] = _float32(wide / largest / np.linalg.norm(wide / largest))  # no square leaves the range
    return replace(vector, directions=directions, scale="unit", recommended_scale=None)


def _directions_only(vector: SteeringVector) -> None:
    if vector.bases:
        raise InputError(
            f"the steering vector holds bases ({', '.join(vector.bases)}), which are not added or scaled",
            "combine the directions that span them instead",
        )


def _same_places(one: SteeringVector, other: SteeringVector) -> None:
    alone = [name or "(any site)" for name in sorted(set(one.directions) ^ set(other.directions))]
    if alone:
        raise InputError(
            f"the steering vectors are not for the same sites: only one of them is for {', '.join(alone)}",
            'keep the common ones with vector.select(["blocks.2.resid_post"])',
        )
    for name, direction in one.directions.items():
        widths = len(direction), len(other.directions[name])
        if widths[0] != widths[1]:
            raise InputError(
                f"the steering vectors have {widths[0]} and {widths[1]} numbers for {name or '(any site)'}",
                "combine vectors of one model",
            )


def _no_longer_unit(scale: Scale) -> Scale:
    return "raw" if scale == "unit" else scale


def _joined(one: str, other: str) -> str:
    return one if one == other else " + ".join(part for part in (one, other) if part)


def _wide(direction: Array) -> Array:
    return np.asarray(direction, np.float64)


def _float32(wide: Array) -> Array:
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise InputError("the result holds numbers beyond the range of float32", "use a smaller factor")
    return narrow
