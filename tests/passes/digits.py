"""Small pictures of digits, drawn by code: seven-segment figures, shifted, blurred and noisy, upright or turned."""

from __future__ import annotations

import numpy as np
import torch

from actgraph.graph.graph import Array

SIZE = 12
#: The strokes of a seven-segment display, as (row, column) ends on a grid of 2 x 1, and which of them each digit has.
_STROKES = [((0, 0), (0, 1)), ((0, 0), (1, 0)), ((0, 1), (1, 1)), ((1, 0), (1, 1)), ((1, 0), (2, 0)), ((1, 1), (2, 1)),
            ((2, 0), (2, 1))]  # fmt: skip
_DIGITS = ["1110111", "0010010", "1011101", "1011011", "0111010", "1101011", "1101111", "1010010", "1111111", "1111011"]


def pictures(count: int, degrees: float, seed: int, noise: float = 0.45) -> tuple[Array, Array]:
    """``count`` pictures ``[count, SIZE * SIZE]`` float32, turned by ``degrees``, and their digits ``[count]``."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count)
    rows, columns = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    angle = np.deg2rad(degrees)
    y, x = np.cos(angle) * rows - np.sin(angle) * columns, np.sin(angle) * rows + np.cos(angle) * columns
    shift = rng.uniform(-1, 1, (2, count, 1, 1))
    result = np.zeros((count, SIZE, SIZE))
    for number, ((top, left), (bottom, right)) in enumerate(_STROKES):
        a, b = (np.array([(r - 1) * 3.5, (c - 0.5) * 4.5]) for r, c in ((top, left), (bottom, right)))
        along = b - a
        py, px = y - a[0] - shift[0], x - a[1] - shift[1]
        t = np.clip((py * along[0] + px * along[1]) / (along @ along), 0, 1)
        distance = (py - t * along[0]) ** 2 + (px - t * along[1]) ** 2
        has = np.array([digit[number] == "1" for digit in _DIGITS])[labels]
        result = np.maximum(result, np.exp(-distance / 0.8) * has[:, None, None])
    result += rng.normal(0, noise, result.shape)
    return result.reshape(count, -1).astype(np.float32), labels


def classifier(seed: int, function: torch.nn.Module | None = None, width: int = 32) -> torch.nn.Sequential:
    """A small MLP, trained on as many upright pictures as ones turned by 45 degrees."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        act = function or torch.nn.ReLU()
        model = torch.nn.Sequential(
            torch.nn.Linear(SIZE * SIZE, width), act, torch.nn.Linear(width, width), act, torch.nn.Linear(width, 10)
        )
        upright, turned = pictures(600, 0, seed), pictures(600, 45, seed + 1)
        x, labels = (torch.from_numpy(np.concatenate(pair)) for pair in zip(upright, turned, strict=True))
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(12):
            for part in torch.randperm(len(x)).split(50):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x[part]), labels[part]).backward()
                optimizer.step()
    return model.eval()
