"""What adds vectors to the outputs of blocks in transformers: forward hooks, repeng, and nnsight.

Each gives a context: within it, or by the function that it gives, ``generate`` is the steered one, so that one model serves any
number of configurations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Generate = Callable[..., Any]


@dataclass(frozen=True)
class Shifts:
    """vectors: each [width], all added to the outputs of ``blocks``; by_row: row n of the batch gets the nth alone."""

    blocks: Sequence[int]
    vectors: Sequence[torch.Tensor]
    by_row: bool = False

    @property
    def added(self) -> list[torch.Tensor]:
        """What is added, one after the other."""
        return [torch.stack(list(self.vectors))[:, None]] if self.by_row else list(self.vectors)

    @property
    def total(self) -> torch.Tensor:
        """Their sum: how those apply them who add once."""
        return sum(self.added[1:], self.added[0])


def read_vectors(files: Sequence[str], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """The one vector of each safetensors file."""
    from safetensors.torch import load_file

    return [next(iter(load_file(file).values())).to(dtype) for file in files]


@contextlib.contextmanager
def by_hooks(model: Any, shifts: Shifts) -> Iterator[Generate]:
    """A forward hook for each vector and block."""

    def adds(vector: torch.Tensor) -> Callable[..., Any]:
        def add(module: Any, inputs: Any, output: Any) -> Any:
            return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

        return add

    layers = model.model.layers
    handles = [layers[number].register_forward_hook(adds(v)) for v in shifts.added for number in shifts.blocks]
    try:
        yield model.generate
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def by_repeng(model: Any, shifts: Shifts) -> Iterator[Generate]:
    """repeng's wrapped blocks: it has one vector for each, and so several are their sum."""
    from repeng import ControlModel

    control = ControlModel(model, list(shifts.blocks))  # wraps the blocks of the model itself
    width = shifts.total.shape[-1]
    control.set_raw_control({number: shifts.total.reshape(-1, 1, width) for number in shifts.blocks})
    try:
        yield control.generate
    finally:
        control.unwrap()


@contextlib.contextmanager
def by_nnsight(model: Any, shifts: Shifts) -> Iterator[Generate]:
    """Edits as nnsight asks for them: in the order in which the blocks run, at each step. model: nnsight's."""

    def generate(ids: torch.Tensor, **options: Any) -> torch.Tensor:
        steps = options["generation_config"].max_new_tokens
        added, blocks = shifts.added, list(shifts.blocks)
        with model.generate(ids, **options) as tracer:
            for _ in tracer.iter[:steps]:
                for number in blocks:
                    for vector in added:
                        model.model.layers[number].output[:] += vector
            made = tracer.result.save()
        return made

    yield generate


WAYS: dict[str, Callable[[Any, Shifts], contextlib.AbstractContextManager[Generate]]] = {
    "hooks": by_hooks, "repeng": by_repeng, "nnsight": by_nnsight,
}  # fmt: skip
