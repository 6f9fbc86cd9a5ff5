"""The difference of means: the direction of Contrastive Activation Addition.

Source: Steering Llama 2 via Contrastive Activation Addition (CAA, 2023): ``v = mean h(positive) - mean h(negative)``. The same
difference is the "MD" baseline of Adversarial Robustness of Activation Steering in Large Language Models (2026).
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def mean_difference(positive: Array, negative: Array) -> Array:
    """``[width]`` float64 of the rows ``positive [n, width]`` and ``negative [m, width]``."""
    return np.asarray(positive.mean(0, dtype=np.float64) - negative.mean(0, dtype=np.float64))
