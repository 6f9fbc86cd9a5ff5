"""Training the controllers of Guiding Giants on cached activations.

Source: Guiding Giants: Lightweight Controllers for Weighted Activation Steering in LLMs (WAS), 2025.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from actgraph.calibrate.encode import token_ids
from actgraph.errors import InputError
from actgraph.formats.vectors import model_fingerprint
from actgraph.graph import Graph
from actgraph.graph.graph import Array
from actgraph.passes.steer.guiding_giants import Controller
from actgraph.passes.steer.training import fit, split

if TYPE_CHECKING:
    import torch

_WEIGHT_SPREAD, _WEIGHT_SIZE = 0.1, 0.01  # of the penalty on the weights of positive samples


def train_controller(
    positive: Mapping[str, Array],
    negative: Mapping[str, Array],
    direction: Array,
    *,
    layers: Sequence[str],
    graph: Graph | None = None,
    hidden: int = 1024,
    epochs: int = 20,
    lr: float = 5e-5,
    batch_size: int = 8,
    clip: float = 1.0,
    held_out: float = 0.1,
    patience: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> Controller:
    """Train a controller to tell ``positive`` prompts (to be steered) from ``negative`` ones by their last token's activations.

    positive, negative: ``[prompts, width]`` for each site that the controller reads, in the order in which it joins them; what
    ``actgraph.calibrate.document_rows.collect_rows(graph, sites, prompts)`` gives. direction: ``[width]`` of the patched sites,
    made a unit vector (see ``embedding_direction``; a difference of means will do as well). layers: the sites to patch, with a
    weight each; they must come behind all sites that are read. graph: the model, whose fingerprint goes into the file.

    The loss is the binary cross entropy of ``s`` and, on positive batches, ``0.1 (mean |w - 1/2| + 0.01 mean w)``, by AdamW;
    gradients are clipped to the norm ``clip``. Each epoch goes through the positive batches, then the negative ones. The epoch
    with the best loss on held-out samples is kept; ``patience`` epochs without a better one end the training. progress: a bar,
    on a terminal. Equal arguments give equal controllers. Raises InputError for activations that do not fit together.
    """
    import torch

    if not layers or hidden < 1 or batch_size < 1 or not lr > 0 or not clip > 0:
        raise InputError("train_controller: name layers to patch, and give positive hidden, batch_size, lr and clip")
    unit = _unit(np.asarray(direction))
    samples = [
        (torch.from_numpy(_joined(states, tuple(positive))), label) for states, label in ((positive, 1.0), (negative, 0.0))
    ]
    if samples[0][0].shape[1] != samples[1][0].shape[1]:
        raise InputError(
            "train_controller: positive and negative activations have different widths", "collect them at one model"
        )
    parts = [split(len(x), held_out, seed) for x, _ in samples]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = torch.nn.Linear(samples[0][0].shape[1], hidden)
        second = torch.nn.Linear(hidden, 1 + len(layers))
    parameters = [*first.parameters(), *second.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr)

    def loss(x: torch.Tensor, label: float) -> torch.Tensor:
        out = second(first(x).relu())
        result = torch.nn.functional.binary_cross_entropy_with_logits(out[:, 0], torch.full_like(out[:, 0], label))
        if label:
            w = out[:, 1:].sigmoid()
            result = result + _WEIGHT_SPREAD * ((w - 0.5).abs().mean() + _WEIGHT_SIZE * w.mean())
        return result

    def train(epoch: int) -> float:
        total, count = 0.0, 0
        for (x, label), (own, _) in zip(samples, parts, strict=True):
            order = torch.from_numpy(np.random.default_rng((seed, 2, epoch, int(label))).permutation(own))
            for start in range(0, len(order), batch_size):
                numbers = order[start : start + batch_size]
                optimizer.zero_grad()
                result = loss(x[numbers], label)
                result.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(parameters, clip)
                optimizer.step()
                total, count = total + float(result.detach()) * len(numbers), count + len(numbers)
        return total / count

    def evaluate() -> float:
        with torch.no_grad():
            losses = [
                (float(loss(x[torch.from_numpy(aside)], label)), len(aside))
                for (x, label), (_, aside) in zip(samples, parts, strict=True)
            ]
        return sum(each * count for each, count in losses) / sum(count for _, count in losses)

    watched = evaluate if held_out else None
    history = fit(parameters, train, watched, epochs=epochs, patience=patience, title="train_controller", progress=progress)
    first_weight, first_bias, second_weight, second_bias = (p.detach().numpy().copy() for p in parameters)
    notes = {"positive": str(len(samples[0][0])), "negative": str(len(samples[1][0])), "seed": str(seed)}
    model = model_fingerprint(graph) if graph is not None else ""
    return Controller(
        tuple(positive), tuple(layers), first_weight, first_bias, second_weight, second_bias, unit, model, notes, history
    )


def _joined(states: Mapping[str, Array], sites: Sequence[str]) -> Array:
    """The activations of all sites side by side, ``[prompts, sum of widths]`` float32."""
    if not sites or set(states) != set(sites):
        raise InputError(
            f"train_controller: one set has {', '.join(states) or 'nothing'}, the other {', '.join(sites) or 'nothing'}"
        )
    arrays = [np.asarray(states[site], np.float32) for site in sites]
    if any(array.ndim != 2 or len(array) != len(arrays[0]) for array in arrays) or not len(arrays[0]):
        shapes = ", ".join(str(list(array.shape)) for array in arrays)
        raise InputError(
            f"train_controller: activations are {shapes}", "give [prompts, width] for each site, as many prompts for all"
        )
    joined = np.concatenate(arrays, axis=1)
    if not np.isfinite(joined).all():
        raise InputError("train_controller: activations hold NaN or infinite values")
    return joined


def embedding_direction(graph: Graph, positive: Sequence[str], negative: Sequence[str]) -> Array:
    """The direction from phrases to others in the model's token embeddings: a unit vector ``[width]`` float32.

    The difference of the mean input embeddings of the tokens of ``positive`` phrases (refusals) and ``negative`` ones
    (answers), special tokens left out: the paper's direction. Raises InputError without a tokenizer, for a model without a
    table of embeddings, and where the two means agree.
    """
    from actgraph.graph.evaluate import evaluate

    ids = next((value for value in graph.inputs() if value.name == "input_ids"), None)
    prims = [use.node.prim for use in ids.uses if use.node is not None] if ids is not None else []
    tables = [prim.operands[0] for prim in prims if prim is not None and prim.op == "gather"]
    if not tables or isinstance(tables[0], (int, float)) or tables[0] is None:
        raise InputError(f"{graph.name} does not look input_ids up in a table of embeddings", "give a direction of your own")
    table = evaluate(graph, tables[0]).astype(np.float64)
    means = [table[[i for phrase in phrases for i in _plain_ids(graph, phrase)]].mean(0) for phrases in (positive, negative)]
    return _unit(means[0] - means[1])


def _plain_ids(graph: Graph, phrase: str) -> list[int]:
    """The token ids of a phrase without special tokens. Raises InputError where there are none."""
    token_ids(graph, phrase)  # raises where the graph has no tokenizer
    ids = list(graph.companions.tokenizer.encode(phrase, add_special_tokens=False).ids)
    if not ids:
        raise InputError(f"the phrase {phrase!r} has no tokens", "give words")
    return ids


def _unit(direction: Array) -> Array:
    wide = direction.astype(np.float64)
    norm = float(np.linalg.norm(wide)) if wide.ndim == 1 else 0.0
    if not (np.isfinite(norm) and norm > 0):
        raise InputError("train_controller: the direction is no vector of a length above 0", "use sets that differ")
    return (wide / norm).astype(np.float32)
