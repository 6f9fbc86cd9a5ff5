"""Training the thresholds and gains of TauGate beside a frozen model.

Source: Dopamine: Brain Modes, Not Brains (Activation-Gated PEFT via Threshold-and-Gain Tuning), 2026.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from actgraph.calibrate import encode
from actgraph.calibrate.batches import assemble
from actgraph.calibrate.corpora import Corpus
from actgraph.calibrate.engine import collect
from actgraph.calibrate.statistics import Request
from actgraph.errors import InputError, PassError
from actgraph.formats.vectors import model_fingerprint
from actgraph.graph import Graph, Role
from actgraph.graph.context import logits_output
from actgraph.graph.graph import Array
from actgraph.passes.steer.taugate import Layer, NeuronGates, TauGates, layer_of
from actgraph.passes.steer.training import fit, split

if TYPE_CHECKING:
    import torch

_GATE = "actgraph.threshold_gate"

#: ``(outputs by name, the batch by name) -> a number``, in torch.
Loss = Callable[[Mapping[str, "torch.Tensor"], Mapping[str, "torch.Tensor"]], "torch.Tensor"]


def train_taugate(
    graph: Graph,
    data: Any,
    *,
    loss: Literal["cross_entropy", "next_token"] | Loss = "cross_entropy",
    site: str | Sequence[str] = (),
    sharpness: float = 4.0,
    gate_penalty: float = 0.0,
    epochs: int = 30,
    lr: float = 0.02,
    batch_size: int = 32,
    held_out: float = 0.1,
    patience: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> TauGates:
    """Train a threshold and a gain for each neuron of the chosen layers of a graph captured from torch; nothing else changes.

    data: a dict of arrays with samples on the leading axis (the graph's inputs by name, and what else the loss wants), or a
    corpus of texts, for ``next_token``.
    loss: ``cross_entropy`` of the first output ``[samples, classes]`` against ``labels``, the mean ``next_token`` loss of a
    language model, or a function of outputs and batch, both ``{name: tensor}`` (of texts, with ``valid [rows, tokens]``).
    site: activations or pre-activations (default: all activations).
    sharpness: slope of the soft gate, per unit of z. gate_penalty: weight of the penalty ``mean(g)``, which closes gates.
    lr: of Adam, for thresholds and gains. held_out: share of the samples whose loss decides which epoch is kept (0: the loss of
    training does); patience: how many epochs without a better one end the training. progress: a bar, on a terminal.

    Gates start open: gain 1, and each threshold 4 / sharpness below the first percentile of its neuron's z over ``data``. Equal
    arguments give equal gates. Raises UnsupportedError for an ONNX graph, InputError for data that the graph cannot take.
    """
    import torch

    if not 0 < sharpness < np.inf or not lr > 0 or not gate_penalty >= 0 or batch_size < 1:
        raise InputError("train_taugate: sharpness, lr and batch_size are positive, gate_penalty is not negative")
    graph.to_torch()  # an ONNX graph says that it has no torch form
    work, samples = graph.clone(), _Samples.of(graph, data)
    layers = dict(_named_layers(work, site))
    starts = _starts(work, layers, samples, sharpness)
    values: dict[str, torch.Tensor] = {}
    with work.edit("taugate") as editor:
        for name, layer in layers.items():
            tau, gamma = (
                editor.add_parameter(f"taugate.{key}", start) for key, start in zip(("tau", "gamma"), starts[name], strict=True)
            )
            form = {"mode": "soft", "sharpness": sharpness}
            gate = editor.insert(_GATE, [layer.x, tau, layer.z], {**form, "result": "gate"}).output
            node = editor.insert(_GATE, [layer.x, tau, layer.z, gamma], form)
            editor.redirect(layer.x, node.output, [use for use in layer.x.uses if use.node not in (gate.producer, node)])
            editor.add_output(gate, f"taugate.{name}", role=Role.TAP)
            values |= {value.name: torch.from_numpy(start) for value, start in zip((tau, gamma), starts[name], strict=True)}
    forward = _Frozen(work, values)
    compute = _LOSSES[loss](graph) if isinstance(loss, str) else loss
    taps = [f"taugate.{name}" for name in layers]

    def step(numbers: Array) -> torch.Tensor:
        batch = samples.batch(numbers)
        outputs = forward(batch)
        gates = [_mean(outputs.pop(tap), batch.get("valid")) for tap in taps]
        return compute(outputs, batch) + gate_penalty * torch.stack(gates).mean()

    trained, watched = split(samples.count, held_out, seed)
    optimizer = torch.optim.Adam(list(values.values()), lr=lr)

    def train(epoch: int) -> float:
        order, total = np.random.default_rng((seed, 2, epoch)).permutation(trained), 0.0
        for numbers in _parts(order, batch_size):
            optimizer.zero_grad()
            result = step(numbers)
            result.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += float(result.detach()) * len(numbers)
        return total / len(trained)

    def evaluate() -> float:
        with torch.no_grad():
            return sum(float(step(part)) * len(part) for part in _parts(watched, batch_size)) / len(watched)

    history = fit(
        list(values.values()), train, evaluate if len(watched) else None,
        epochs=epochs, patience=patience, title="train_taugate", progress=progress,
    )  # fmt: skip
    numbers = [value.detach().numpy() for value in values.values()]
    gates = {name: NeuronGates(*numbers[2 * i : 2 * i + 2]) for i, name in enumerate(layers)}
    notes = {
        "samples": str(samples.count),
        "gate_penalty": str(gate_penalty),
        "seed": str(seed),
        "epochs": str(len(history.epochs)),
    }
    return TauGates(gates, sharpness, model_fingerprint(graph), notes, history)


class _Frozen:
    """A graph as a function of torch tensors in which only ``values`` (by parameter name) are trained.

    The parameters of the model are read through detached copies of themselves, so that neither they nor their flags change.
    """

    def __init__(self, graph: Graph, values: Mapping[str, torch.Tensor]) -> None:
        self.module = graph.to_torch()
        self.names = [name for name, _ in graph.outputs()]
        self.inputs = [value.name for value in graph.inputs()]
        self.tensors = {name: tensor.detach() for name, tensor in self.module.named_parameters()}
        for name, value in values.items():
            self.tensors[name] = value.requires_grad_()

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        given = {name: batch[name] for name in self.inputs if name in batch}
        results = torch.func.functional_call(self.module, self.tensors, (), given)
        return dict(results)


@dataclass(frozen=True)
class _Samples:
    """What is trained on: arrays with samples on the leading axis, or encoded texts."""

    graph: Graph
    source: Any  # what calibration reads
    arrays: Mapping[str, Array]
    texts: Sequence[Mapping[str, Array]]

    @staticmethod
    def of(graph: Graph, data: Any) -> _Samples:
        """Raises InputError for arrays of different lengths, or that lack an input."""
        if not isinstance(data, Mapping):
            corpus = Corpus.of(data)
            return _Samples(graph, corpus, {}, list(encode.samples(graph, corpus)))
        arrays = {name: np.asarray(array) for name, array in data.items()}
        counts = {array.shape[0] if array.ndim else 0 for array in arrays.values()}
        needed = [value.name for value in graph.inputs() if graph.default(value.name) is None]
        missing = [name for name in needed if name not in arrays]
        if missing or len(counts) != 1 or counts == {0}:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
            raise InputError(
                f"train_taugate: the data are {shapes or 'empty'}", f"give {', '.join(needed)}, a row for each sample"
            )
        inputs = {value.name for value in graph.inputs()}
        return _Samples(graph, {name: array for name, array in arrays.items() if name in inputs}, arrays, ())

    @property
    def count(self) -> int:
        return len(self.texts) or len(next(iter(self.arrays.values())))

    def batch(self, numbers: Array) -> dict[str, torch.Tensor]:
        """The samples of these numbers together; texts are padded on the right, and ``valid`` says where they are not."""
        import torch

        if not self.texts:
            return {name: torch.from_numpy(array[numbers]) for name, array in self.arrays.items()}
        signature = encode.Signature.of(self.graph)
        made = assemble(signature, [dict(self.texts[n]) for n in numbers], tuple(range(len(numbers))))
        valid = {"valid": next(iter(made.masks.values()))} if made.masks else {}
        return {name: torch.from_numpy(array) for name, array in {**made.inputs, **valid}.items()}


def _named_layers(graph: Graph, selector: str | Sequence[str]) -> Iterator[tuple[str, Layer]]:
    """The layers to gate, by the name of their activation. Raises PassError for sites that are no activations."""
    found = [Layer.of(activation) for activation in graph.views.activations()]
    layers = found
    if selector:
        pairs = [(site, layer_of(site, found)) for site in graph.sites(selector)]
        wrong = [site.name for site, layer in pairs if layer is None]
        if wrong:
            raise PassError(f"train_taugate: {wrong[0]} is no activation", "list them with `actgraph sites MODEL '*act*'`")
        layers = [layer for _, layer in pairs if layer is not None]
    for layer in {layer.output: layer for layer in layers}.values():
        shape, names = layer.x.shape, graph.site_table.names_of(layer.x)
        name = graph.site_table.role_name_of(layer.x) or (names[0] if names else "")
        if name and shape and isinstance(shape[-1], int):
            yield name, layer
        elif selector:
            raise PassError(f"train_taugate: {layer.x!r} has no channels of a fixed number", "choose other sites")


def _starts(graph: Graph, layers: Mapping[str, Layer], samples: _Samples, sharpness: float) -> dict[str, tuple[Array, Array]]:
    """Thresholds and gains near the identity: ``tau`` 4 / sharpness below the first percentile of z, ``gamma`` 1."""
    requests = {name: Request(f"%{layer.z.name}", "quantile", axis=-1) for name, layer in layers.items()}
    if not requests:
        raise PassError("train_taugate: the graph has no activation to gate", "choose another model")
    found = collect(graph, requests.values(), samples.source, batch_size=64, cache=False, progress=False)
    result = {}
    for name, request in requests.items():
        low = np.asarray(found.sketch(request).quantile(0.01), np.float64)
        result[name] = ((low - 4 / sharpness).astype(np.float32), np.ones(low.shape, np.float32))
    return result


def _parts(numbers: Array, size: int) -> Iterator[Array]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]


def _mean(gate: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """How open the gates are on average, padding left out."""
    return gate.mean() if valid is None or gate.shape[:2] != valid.shape else gate[valid].mean()


def _cross_entropy(graph: Graph) -> Loss:
    import torch

    (name, _), *_ = graph.outputs()

    def loss(outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if "labels" not in batch:
            raise InputError("train_taugate: cross_entropy needs labels", "give data={..., 'labels': [samples]}")
        return torch.nn.functional.cross_entropy(outputs[name], batch["labels"])

    return loss


def _next_token(graph: Graph) -> Loss:
    import torch

    name = logits_output(graph)

    def loss(outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        follows = batch["input_ids"][:, 1:]
        valid = batch["valid"][:, 1:] if "valid" in batch else torch.ones_like(follows, dtype=torch.bool)
        return torch.nn.functional.cross_entropy(outputs[name][:, :-1][valid], follows[valid])

    return loss


_LOSSES: dict[str, Callable[[Graph], Loss]] = {"cross_entropy": _cross_entropy, "next_token": _next_token}
