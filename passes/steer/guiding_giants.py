"""Guiding Giants: a small controller reads the model's own activations and says how strongly each block is steered.

Source: Guiding Giants: Lightweight Controllers for Weighted Activation Steering in LLMs (WAS), 2025.
``(s, w) = MLP(concat of h[l] for l in inputs)``; ``h[l] + gate(s) sigmoid(w)[l] eta d`` at each patched block. The released
code has two traps. It trains ``s`` as a logit and multiplies by it raw: here that is the option ``gate``. And it lists all
blocks, of which only those behind every input of the controller can be patched: here the others are declined, with the input
that is in the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from actgraph.errors import InputError, OptionError, PassError
from actgraph.formats.artifacts import Artifact, load_artifact
from actgraph.graph import Graph, Node, Site, Value
from actgraph.graph.context import token_dims
from actgraph.graph.graph import Array
from actgraph.ops.dtypes import DType
from actgraph.passes.places import WHERE, Selector
from actgraph.passes.steer.edit import Edit, EditPass
from actgraph.passes.steer.runtime_inputs import INPUT, per_token, row_input
from actgraph.passes.steer.training import History
from actgraph.passes.steer.upstream import computed_from
from actgraph.pipeline.base import PassContext, PassResult

KIND = "controller"
_MADE_BY = "make one with actgraph.passes.steer.train_controller.train_controller"
Gate = Literal["raw", "sigmoid", "relu"]


@dataclass(frozen=True)
class Controller:
    """``Linear -> ReLU -> Linear`` over the activations of a token, and the direction that it doses. All arrays are float32.

    inputs: the sites that are read, in the order in which they are joined. layers: the sites that have a weight of their own.
    first ``[hidden, sum of widths]``, first_bias ``[hidden]``, second ``[1 + layers, hidden]``, second_bias ``[1 + layers]``:
    row 0 of the second gives the strength ``s``, the others the logits of weights. direction: ``[width]``, a unit vector.
    """

    inputs: tuple[str, ...]
    layers: tuple[str, ...]
    first: Array
    first_bias: Array
    second: Array
    second_bias: Array
    direction: Array
    model: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)
    history: History | None = None

    def __post_init__(self) -> None:
        hidden, outputs = self.first.shape[0], 1 + len(self.layers)
        shapes = {"first_bias": (hidden,), "second": (outputs, hidden), "second_bias": (outputs,)}
        wrong = [name for name, shape in shapes.items() if getattr(self, name).shape != shape]
        if not self.inputs or not self.layers or self.first.ndim != 2 or self.direction.ndim != 1 or wrong:
            raise InputError(f"a controller of {len(self.layers)} layers has no such {', '.join(wrong) or 'parts'}", _MADE_BY)

    def __call__(self, states: Mapping[str, Array]) -> tuple[Array, Array]:
        """The strength ``s [...]`` (raw) and the weights ``w [..., layers]`` of tokens with ``states[site] [..., width]``."""
        x = np.concatenate([np.asarray(states[name], np.float32) for name in self.inputs], axis=-1)
        out = np.maximum(x @ self.first.T + self.first_bias, 0) @ self.second.T + self.second_bias
        return out[..., 0], 1 / (1 + np.exp(-out[..., 1:]))

    def doses(self, states: Mapping[str, Array], gate: Gate = "raw") -> Array:
        """``gate(s) w [..., layers]``: how many times ``eta`` each layer is moved along the direction."""
        s, w = self(states)
        gated = {"raw": s, "sigmoid": 1 / (1 + np.exp(-s)), "relu": np.maximum(s, 0)}[gate]
        return np.asarray(gated[..., None] * w)

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file with a manifest (beside, then renamed)."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        return Artifact(
            KIND, arrays, {**self.notes, "inputs": list(self.inputs), "layers": list(self.layers)}, self.model
        ).save(path)

    @staticmethod
    def load(path: str | Path) -> Controller:
        """Read such a file. Raises InputError for one that is missing, damaged or of another kind."""
        file = load_artifact(path, KIND, _MADE_BY)
        first, first_bias, second, second_bias, direction = (file.array(name).astype(np.float32) for name in _ARRAYS)
        notes = dict(file.notes)
        try:
            inputs, layers = (tuple(str(name) for name in notes.pop(key)) for key in ("inputs", "layers"))
            return Controller(inputs, layers, first, first_bias, second, second_bias, direction, file.model, notes)
        except (KeyError, TypeError, InputError) as error:
            raise InputError(f"{path} is damaged: {error}", _MADE_BY) from error


_ARRAYS = ("first", "first_bias", "second", "second_bias", "direction")


class GuidingGiants(EditPass):
    """Steer each token as much as a controller network says, from what it reads at that token.

    ``h' = h + gate(s) w eta d``: ``s`` and the ``w`` of each block come from the controller, once for each token, in float32.
    ``gate=raw`` multiplies by ``s`` itself, as the paper's code does: where the controller says no (``s < 0``) it steers
    *against* the direction. ``relu`` leaves those tokens alone, ``sigmoid`` takes ``s`` for the logit that it was trained as.

    Where: the paper steers the last position of the sequence at each step of generation. Behind a cache that is the last token
    of the prompt and every token that follows, each steered as it enters. The default clause, ``prompt[-1] | generated``, says
    so for any way of calling: whole texts, chunks, padded batches, with and without a cache.

    A block is patched only where no input of the controller depends on it; others are declined. The block that is the last
    input is read before it is patched. ``eta=input`` makes ``eta`` an optional input of each row, 0 where nobody gives it.
    """

    name: ClassVar[str] = "guiding_giants"
    change: ClassVar[str] = "tokens are steered as a controller says"
    off: ClassVar[Mapping[str, Any]] = {"eta": 0.0}

    controller: str = Field(description=f"The controller's file: {_MADE_BY}.", json_schema_extra={"path": True})
    site: Selector = Field(
        default=(), description="Which blocks to patch, of those the controller has weights for; default: all."
    )
    eta: float | Literal["input"] = Field(
        default=4.0, description="Length of a step along the direction, or `input`; 0 is off."
    )
    gate: Gate = Field(default="raw", description="What the strength is multiplied as; see the class.")
    where: str = Field(default="prompt[-1] | generated", description=WHERE)

    @field_validator("eta")
    @classmethod
    def _finite(cls, eta: float | str) -> float | str:
        if not isinstance(eta, str) and not np.isfinite(eta):
            raise OptionError(f"guiding_giants: eta is {eta}", "give a finite number")
        return eta

    def targets(self, graph: Graph) -> Selector:
        return Controller.load(self.controller).layers

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        controller = Controller.load(self.controller)
        self.check_model(controller.model, graph, self.controller)
        inputs = [graph.site(name) for name in controller.inputs]
        result = self.run_at(graph, context, controller=controller, inputs=inputs)
        if result.declined:
            patched = sum(count for rule, count in result.counts.items() if rule != "identity")
            result.messages.insert(
                0, f"{patched} of {patched + len(result.declined)} blocks are patched: the controller reads later ones"
            )
        return result

    def apply(self, edit: Edit, site: Site, width: int) -> str:
        controller: Controller = edit.shared["controller"]
        number = next((controller.layers.index(n) for n in (site.name, *site.aliases) if n in controller.layers), None)
        if number is None:
            raise PassError(
                f"guiding_giants: the controller has no weight for {site.name}", f"it has {', '.join(controller.layers)}"
            )
        if len(controller.direction) != width:
            raise PassError(
                f"guiding_giants: the direction has {len(controller.direction)} numbers, and {site.name} is {site.type}",
                "train a controller with a direction of this site",
            )
        shape = site.type.shape
        if self.axis not in (-1, 2) or shape is None or shape[:-1] != token_dims(edit.graph):
            return edit.declined(site, f"it is {site.type}, and a controller steers tokens: [batch, seq, channels]")
        read = _read(edit)
        value = edit.editor.site_value(site)
        later = next((name for name, (_, above) in read.items() if value in above), None)
        if later is not None:
            return edit.declined(site, f"the controller reads {later}, which depends on it")
        edit.result.details.append({"site": site.name, "eta": self.eta, "gate": self.gate, "weight": number})
        if self.eta == 0:
            return "identity"
        doses, keep = self._doses(edit, [value for value, _ in read.values()])
        pick = np.eye(len(controller.layers), dtype=np.float32)[
            number
        ]  # a product drops the axis, whatever the sizes of the others
        strength = edit.editor.insert("matmul", [doses, pick], name=f"controller.dose_{number}").output
        direction = controller.direction.astype(site.type.dtype.numpy if site.type.dtype is not None else np.float32)
        scale = 1.0 if self.eta == INPUT else float(self.eta)
        edit.editor.insert_at(site, "actgraph.shift", [direction, strength, edit.mask()], {"scale": scale}, keep=keep)
        return "inserted"

    def _doses(self, edit: Edit, values: Sequence[Value]) -> tuple[Value, Sequence[Node]]:
        """``gate(s) w [batch, seq, layers]`` (times an ``eta`` that is an input), made once, and the nodes that read inputs."""
        if "doses" not in edit.shared:
            edit.shared["doses"] = self._chain(edit, values)
        doses, keep = edit.shared["doses"]
        return doses, keep

    def _chain(self, edit: Edit, values: Sequence[Value]) -> tuple[Value, Sequence[Node]]:
        controller: Controller = edit.shared["controller"]
        editor = edit.editor
        widths = [value.shape[-1] if value.shape else None for value in values]
        if any(value.shape is None or value.shape[:-1] != token_dims(edit.graph) for value in values) or None in widths:
            raise PassError(f"guiding_giants: the controller reads {values[0]!r}, which is not [batch, seq, channels]")
        if sum(width for width in widths if isinstance(width, int)) != controller.first.shape[1]:
            raise PassError(
                f"guiding_giants: the controller takes {controller.first.shape[1]} numbers, and its sites have {widths}",
                "train it on this model",
            )
        keep: list[Node] = []
        wide: list[Value] = []
        for value in values:
            node = None if value.dtype is DType.F32 else editor.insert("cast", [value], {"to": DType.F32})
            keep += [] if node is None else [node]
            wide.append(value if node is None else node.output)
        joined = wide[0]
        if len(wide) > 1:
            node = editor.insert("concat", wide, {"axis": 2})
            keep.append(node)
            joined = node.output
        names = {name: editor.add_parameter(f"guiding_giants.{name}", _stored(controller, name)) for name in _ARRAYS[:4]}
        node = editor.insert("matmul", [joined, names["first"]], name="controller.first")
        keep.append(node)
        hidden = editor.insert("relu", [editor.insert("add", [node.output, names["first_bias"]]).output]).output
        product = editor.insert("matmul", [hidden, names["second"]], name="controller.second").output
        out = editor.insert("add", [product, names["second_bias"]]).output
        s = editor.insert("slice", [out], {"axis": 2, "start": 0, "end": 1}).output
        logits = editor.insert("slice", [out], {"axis": 2, "start": 1, "end": 1 + len(controller.layers)}).output
        gated = s if self.gate == "raw" else editor.insert(self.gate, [s]).output
        doses = editor.insert("mul", [gated, editor.insert("sigmoid", [logits]).output]).output
        if self.eta == INPUT:
            given = per_token(editor, row_input(editor, edit.graph, "guiding_giants.eta"), 3)
            doses = editor.insert("mul", [doses, given]).output
        return doses, keep


def _stored(controller: Controller, name: str) -> Array:
    array: Array = getattr(controller, name)
    return np.ascontiguousarray(array.T)


def _read(edit: Edit) -> dict[str, tuple[Value, frozenset[Value]]]:
    """What the controller reads: each input's value, and all that it is computed from, as they are before any patch."""
    if "read" not in edit.shared:
        sites: Sequence[Site] = edit.shared["inputs"]
        values = {site.name: edit.editor.site_value(site) for site in sites}
        edit.shared["read"] = {name: (value, computed_from(value)) for name, value in values.items()}
    read: dict[str, tuple[Value, frozenset[Value]]] = edit.shared["read"]
    return read
