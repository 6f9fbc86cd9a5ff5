"""How much a feed-forward neuron matters, from weights and calibration.

Neuron j is row j of gate and up and column j of down; its contribution to the output is ``h_j * W_down[:, j]``.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from actgraph.graph.graph import Array

Importance = Literal["activation", "wanda", "magnitude"]

DOCS: dict[str, str] = {
    "activation": "sqrt(mean h_j^2) * ||W_down[:, j]||_2: the RMS of the neuron's contribution (activation-aware)",
    "wanda": "sqrt(mean h_j^2) * mean_i |W_down[i, j]| (Wanda-SP, as in CFSP, 2024)",
    "magnitude": "||W_down[:, j]||_2: weights alone",
}


def neuron_importance(kind: Importance, down: Array, mean_square: Array | None) -> Array:
    """Scores ``[neurons]`` in float64 for ``down`` of shape ``[hidden, neurons]``.

    mean_square: ``[neurons]`` mean of ``h_j ** 2`` over calibration tokens; not needed for ``magnitude``.
    """
    wide = down.astype(np.float64)
    norm = np.sqrt((wide * wide).sum(axis=0))
    if kind == "magnitude":
        return np.asarray(norm)
    assert mean_square is not None
    rms = np.sqrt(np.maximum(mean_square.astype(np.float64), 0.0))
    return np.asarray(rms * (norm if kind == "activation" else np.abs(wide).mean(axis=0)))


def keep_indices(scores: Array, ratio: float, round_to: int) -> Array:
    """Sorted indices of the neurons that stay: ``1 - ratio`` of them, rounded to a multiple of ``round_to``.

    At least ``round_to`` stay (and at most all); ties go to the lower index.
    """
    total = len(scores)
    wanted = round((1.0 - ratio) * total / round_to) * round_to
    count = min(total, max(round_to, wanted))
    order = np.argsort(-scores, kind="stable")
    return np.sort(order[:count])
