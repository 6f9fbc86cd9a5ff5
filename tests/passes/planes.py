"""What the tests of passes that turn activations in a plane share: planes as files, the formulas, hooks on many modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actgraph.graph import Graph
from actgraph.graph.executor import executor_for
from actgraph.graph.graph import Array
from actgraph.passes.steer.plane import PlaneSite, SteeringPlane, plane_basis
from tests.passes.conftest import hf_stories, token_inputs

NORMS = tuple(f"blocks.{i}.{part}.norm" for i in range(5) for part in ("attn", "mlp"))


def a_plane(
    path: Path, sites: Sequence[str] = (), selected: Iterable[str] = (), width: int = 64, seed: int = 5
) -> tuple[str, Array]:
    """A file with a random plane, and its basis ``[width, 2]``."""
    rng = np.random.default_rng(seed)
    basis = plane_basis(rng.normal(size=width), rng.normal(size=width))
    chosen = set(selected)
    rows = tuple(PlaneSite(name, 1.0, 0.5, 0.1, -0.1, True, name in chosen) for name in sites)
    return str(SteeringPlane(basis, rows, method="selective").save(path / f"plane{seed}.safetensors")), basis


def turned(h: torch.Tensor, basis: Array, degrees: float) -> torch.Tensor:
    """The paper's formula with its two matrices of width by width, in float64."""
    b1, b2 = torch.from_numpy(basis.astype(np.float64)).unbind(1)
    angle = np.deg2rad(degrees)
    projection = torch.outer(b1, b1) + torch.outer(b2, b2)
    turning = np.cos(angle) * projection + np.sin(angle) * (torch.outer(b2, b1) - torch.outer(b1, b2))
    wide = h.double()
    return (wide - wide @ projection.T + wide @ turning.T).to(h.dtype)


def sent(h: torch.Tensor, basis: Array, degrees: float, threshold: float | None = None) -> torch.Tensor:
    """Angular Steering's formula, in float64; only where ``h . b1`` exceeds the threshold, if there is one."""
    b1, b2 = torch.from_numpy(basis.astype(np.float64)).unbind(1)
    angle, wide = np.deg2rad(degrees), h.double()
    part = (wide @ b1)[..., None] * b1 + (wide @ b2)[..., None] * b2
    moved = wide - part + part.norm(dim=-1, keepdim=True) * (np.cos(angle) * b1 + np.sin(angle) * b2)
    gated = moved if threshold is None else torch.where((wide @ b1)[..., None] > threshold, moved, wide)
    return gated.to(h.dtype)


def module_of(site: str) -> str:
    """The module of transformers whose output a norm site of stories260k is."""
    _, block, part, _ = site.split(".")
    return f"model.layers.{block}.{'input_layernorm' if part == 'attn' else 'post_attention_layernorm'}"


def hooked(
    modules: Sequence[str], edit: Callable[[torch.Tensor], torch.Tensor], inputs: dict[str, Array] | None = None
) -> Array:
    """Logits of the transformers model with ``edit`` applied to the outputs of several modules by forward hooks."""
    model = hf_stories()

    def hook(_: Any, __: Any, output: Any) -> Any:
        return edit(output)

    with ExitStack() as stack:
        for module in modules:
            stack.callback(model.get_submodule(module).register_forward_hook(hook).remove)
        with torch.no_grad():
            tensors = {k: torch.from_numpy(v) for k, v in (inputs or token_inputs()).items()}
            return model(**tensors, use_cache=False).logits.numpy()  # type: ignore[no-any-return]


def seen(graph: Graph, sites: Sequence[str], inputs: dict[str, Array] | None = None) -> dict[str, Array]:
    """What the readers of sites see."""
    values = {name: graph.site(name).value for name in sites}
    outputs = executor_for(graph).open(graph, list(dict.fromkeys(values.values())))(inputs or token_inputs())
    return {name: outputs[value.name] for name, value in values.items()}


def last_tokens(graph: Graph, sites: Sequence[str], texts: Sequence[str]) -> dict[str, Array]:
    """``[texts, width]`` for each site: what is seen at the last token, one text at a time, so that nothing is padded."""
    tokenizer = graph.companions.tokenizer
    assert tokenizer is not None
    rows: dict[str, list[Array]] = {name: [] for name in sites}
    for text in texts:
        ids = np.array([tokenizer.encode(text).ids])
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
        for name, value in seen(graph, sites, inputs).items():
            rows[name].append(value[0, -1])
    return {name: np.stack(each) for name, each in rows.items()}


def angle_of(h: Array, basis: Array) -> Array:
    """The angle of each token in the plane, in degrees."""
    c = h.astype(np.float64) @ basis
    return np.rad2deg(np.arctan2(c[..., 1], c[..., 0]))


def apart(a: Array, b: Array | float) -> float:
    """The largest difference of two angles in degrees, around the circle."""
    return float(np.abs((a - b + 180) % 360 - 180).max())
