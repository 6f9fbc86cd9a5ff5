"""Principal components as directions, with signs and lengths that do not depend on the solver.

Sources: Representation Engineering (2023); Adversarial Robustness of Activation Steering in Large Language Models (2026), which
takes the first component of both classes together, turned towards the difference of means and as long as that.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from actgraph.errors import InputError
from actgraph.passes.steer.caa import mean_difference

Array = np.ndarray[Any, Any]


def first_component(rows: Array, *, centre: bool = True) -> Array:
    """The unit vector ``[width]`` of the largest variance of ``rows [n, width]``, its largest entry (the first of several)
    positive. Raises InputError for rows without variance."""
    wide = rows.astype(np.float64)
    if centre:
        wide = wide - wide.mean(0)
    _, sizes, components = np.linalg.svd(wide, full_matrices=False)
    if not len(sizes) or sizes[0] <= np.finfo(np.float64).eps * max(wide.shape) * (1 + np.abs(rows).max(initial=0)):
        raise InputError("the activations do not vary: there is no principal component", "use texts that differ")
    return fixed_sign(components[0])


def fixed_sign(direction: Array) -> Array:
    """``direction`` or its negative, whichever has its largest entry (the first of several) positive."""
    largest = direction[np.argmax(np.abs(direction))]
    return np.asarray(-direction if largest < 0 else direction)


def towards(direction: Array, goal: Array) -> Array:
    """The unit ``direction``, turned to the side of ``goal`` and as long as that."""
    side = -1.0 if direction @ goal < 0 else 1.0
    return np.asarray(side * np.linalg.norm(goal) / np.linalg.norm(direction) * direction)


def pca(positive: Array, negative: Array) -> Array:
    """The first component of both sets together, centred on their common mean."""
    return towards(first_component(np.concatenate([positive, negative])), mean_difference(positive, negative))


def pca_of_differences(positive: Array, negative: Array) -> Array:
    """The first component of the differences of pairs, about zero, as control vectors take it.

    Raises InputError where the sets are no pairs.
    """
    if len(positive) != len(negative):
        raise InputError(f"there are {len(positive)} positive and {len(negative)} negative texts", "give pairs, line by line")
    differences = positive.astype(np.float64) - negative.astype(np.float64)
    return towards(first_component(differences, centre=False), mean_difference(positive, negative))
