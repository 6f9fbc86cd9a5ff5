"""Training a few numbers beside a frozen model: epochs, early stopping, the best state, progress."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from actgraph.errors import InputError

if TYPE_CHECKING:
    import torch


Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Epoch:
    """Mean losses of one pass over the data: of training, and of held-out samples (where there are none: of training again)."""

    number: int
    trained: float
    held_out: float


@dataclass(frozen=True)
class History:
    """The epochs that were run, and the number of the one whose parameters were kept."""

    epochs: tuple[Epoch, ...]
    best: int

    @property
    def loss(self) -> float:
        """The held-out loss of the parameters that were kept."""
        return self.epochs[self.best].held_out


def fit(
    parameters: Sequence[torch.Tensor],
    train: Callable[[int], float],
    evaluate: Callable[[], float] | None,
    *,
    epochs: int,
    patience: int,
    title: str,
    progress: bool,
) -> History:
    """Run epochs and leave the best ones' numbers in ``parameters``.

    train: runs the epoch of that number and returns its mean loss; evaluate: the loss on held-out samples, which decides
    (``None``: the loss of training does). It stops when ``patience`` epochs in a row brought nothing better. Raises InputError
    for options out of range and for a loss that is no number.
    """
    import torch

    if epochs < 1 or patience < 1:
        raise InputError(f"{title}: epochs is {epochs} and patience {patience}", "both are at least 1")
    done: list[Epoch] = []
    best, kept = 0, [p.detach().clone() for p in parameters]
    with _bar(title, epochs, progress) as show:
        for number in range(epochs):
            trained = train(number)
            held_out = trained if evaluate is None else evaluate()
            if not (math.isfinite(trained) and math.isfinite(held_out)):
                raise InputError(f"{title}: the loss is {trained} in epoch {number}", "use a smaller lr")
            done.append(Epoch(number, trained, held_out))
            if number == 0 or held_out < done[best].held_out:
                best, kept = number, [p.detach().clone() for p in parameters]
            show(f"loss {trained:.4g}, held out {held_out:.4g}, best {done[best].held_out:.4g}")
            if number - best >= patience:
                break
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    return History(tuple(done), best)


def split(count: int, held_out: float, seed: int) -> tuple[Array, Array]:
    """The numbers below ``count`` in two parts: to train on, and a share ``held_out`` of them that is not, drawn by ``seed``.

    Raises InputError where one of the parts that are asked for is empty.
    """
    if not 0 <= held_out < 1:
        raise InputError(f"held_out is {held_out}", "it is a share of the samples, from 0 to below 1")
    order = np.random.default_rng((seed, 1)).permutation(count)
    size = math.ceil(count * held_out)
    if count - size < 1:
        raise InputError(f"there are {count} samples, of which {size} are held out", "give more samples, or held_out=0")
    return np.sort(order[size:]), np.sort(order[:size])


Show = Callable[[str], None]


@contextmanager
def _bar(title: str, total: int, wanted: bool) -> Iterator[Show]:
    """A progress bar of epochs with their losses on standard error, if that is a terminal."""
    if not (wanted and sys.stderr.isatty()):
        yield lambda text: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=total)
        yield lambda text: bars.update(task, advance=1, description=text)
