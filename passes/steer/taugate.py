"""TauGate: neurons are gated by trained thresholds on their pre-activations, with trained gains.

Source: Dopamine: Brain Modes, Not Brains (Activation-Gated PEFT via Threshold-and-Gain Tuning), 2026.
``y = gamma * g * phi(z)`` with ``g = sigmoid(s (z - tau))`` in training and ``g = 1[z > tau]`` at inference: two numbers for
each neuron, trained by ``train_taugate`` beside a frozen model. Where the gain stands, and the start near the identity, is our
reading of the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from actgraph.errors import InputError, OptionError, PassError, SiteError
from actgraph.formats.artifacts import Artifact, load_artifact
from actgraph.graph import Editor, Graph, Node, Role, Site, SiteKind, Use, Value
from actgraph.graph.graph import Array
from actgraph.graph.views import Activation
from actgraph.ops import get_op
from actgraph.ops.dtypes import DType
from actgraph.passes.places import Selector
from actgraph.passes.steer.edit import Edit, EditPass
from actgraph.passes.steer.gains import fold_gains
from actgraph.passes.steer.training import History
from actgraph.pipeline.base import UNBOUNDED, PassContext, PassResult

KIND = "taugate"
_MADE_BY = "make one with actgraph.passes.steer.train_taugate.train_taugate"
_GATE = "actgraph.threshold_gate"
_FOLDED = "taugate (its gains were folded into the weights of the linears behind)"


@dataclass(frozen=True)
class NeuronGates:
    """Thresholds and gains of one layer: ``tau`` and ``gamma``, each ``[width]`` float32. A ``tau`` of -inf never closes."""

    tau: Array
    gamma: Array

    @property
    def identity(self) -> bool:
        """Whether nothing is gated and nothing scaled."""
        return bool((self.tau == -np.inf).all() and (self.gamma == 1).all())


@dataclass(frozen=True)
class TauGates:
    """Trained gates by site (the name of an activation, such as ``blocks.2.mlp.act`` or ``activation.0``).

    sharpness: the slope ``s`` of the soft gate that they were trained with. model: fingerprint of the model they belong to.
    history: how training went (not part of the file).
    """

    gates: Mapping[str, NeuronGates]
    sharpness: float
    model: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)
    history: History | None = None

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file with a manifest (beside, then renamed)."""
        arrays = {f"{site}.{key}": getattr(each, key) for site, each in self.gates.items() for key in ("tau", "gamma")}
        notes = {**self.notes, "sites": list(self.gates), "sharpness": self.sharpness}
        return Artifact(KIND, arrays, notes, self.model).save(path)

    @staticmethod
    def load(path: str | Path) -> TauGates:
        """Read such a file. Raises InputError for one that is missing, damaged or of another kind."""
        file = load_artifact(path, KIND, _MADE_BY)
        try:
            notes = dict(file.notes)
            sites, sharpness = notes.pop("sites"), float(notes.pop("sharpness"))
            gates = {site: _checked(file.arrays[f"{site}.tau"], file.arrays[f"{site}.gamma"]) for site in sites}
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is damaged: {error}", _MADE_BY) from error
        if not gates or not 0 < sharpness < np.inf:
            raise InputError(f"{path} holds no neuron gates", _MADE_BY)
        return TauGates(gates, sharpness, file.model, notes)


def _checked(tau: Array, gamma: Array) -> NeuronGates:
    if tau.ndim != 1 or tau.shape != gamma.shape:
        raise ValueError(f"thresholds are {list(tau.shape)} and gains {list(gamma.shape)}")
    if np.isnan(tau).any() or not np.isfinite(gamma).all():
        raise ValueError("a threshold is NaN or a gain not finite")
    return NeuronGates(tau.astype(np.float32), gamma.astype(np.float32))


class TauGate(EditPass):
    """Gate the neurons of hidden layers by trained thresholds ``tau`` on their pre-activations, with gains ``gamma``.

    ``gates`` is a file that ``train_taugate`` wrote; without one, soft gates that are in the graph already are hardened. With
    ``mode=hard`` a neuron takes part where ``z > tau``. Behind a ReLU that is JumpReLU with ``max(tau, 0)``, an op that `fuse`
    builds into the linear behind it: thresholds that are not positive do nothing there. Gains move into the columns of the next
    linears where these alone read the neurons (also behind the product of a gated feed-forward), in float32; `unfold` takes
    them out again. The sites between are then gone, for their values lack the gains. Thresholds of -inf with gains of 1 are the
    identity. No option turns the gates off, since the file alone says which neurons are gated: leave the pass out.
    """

    name: ClassVar[str] = "taugate"
    change: ClassVar[str] = "neurons are gated by trained thresholds"
    oracle: ClassVar[Mapping[str, Any]] = {"fold": False}

    site: Selector = Field(default=(), description="Activations or pre-activations to gate; default: all that the file names.")
    gates: str = Field(default="", description="The file of thresholds and gains.", json_schema_extra={"path": True})
    mode: Literal["hard", "soft"] = Field(
        default="hard", description="hard: a compare. soft: the sigmoid that was trained with."
    )
    sharpness: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Slope of the soft gate; default: the file's."
    )
    fold: bool = Field(default=True, description="Move gains into the weights of the linears behind, where that is exact.")
    expose: bool = Field(default=False, description="Make which neurons are open an output, taugate.<site>, of booleans.")

    def targets(self, graph: Graph) -> Selector:
        return tuple(TauGates.load(self.gates).gates) if self.gates else ()

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        if not self.gates:
            return self._harden(graph, context)
        trained = TauGates.load(self.gates)
        self.check_model(trained.model, graph, self.gates)
        layers = [Layer.of(activation) for activation in graph.views.activations()]
        return self.run_at(graph, context, trained=trained, layers=layers, done=set())

    def apply(self, edit: Edit, site: Site, width: int) -> str:
        trained, done = edit.shared["trained"], edit.shared["done"]
        try:
            layer = layer_of(site, edit.shared["layers"])
        except SiteError:  # the site was there when it was selected: folding gains at another name of its layer removed it
            return edit.declined(site, "its activation is gated already")
        if layer is None:
            return edit.declined(site, "it is neither the output of an activation function nor read by one")
        if layer.output in done:
            return edit.declined(site, "its activation is gated already")
        names = [site.name, *site.aliases, *edit.graph.site_table.names_of(layer.x)]
        names += [alias for name in names for alias in edit.graph.site(name).aliases]
        found = next((trained.gates[name] for name in names if name in trained.gates), None)
        if found is None:
            raise PassError(f"taugate: {self.gates} has no thresholds for {site.name}", f"it has {', '.join(trained.gates)}")
        if len(found.tau) != width:
            raise PassError(
                f"taugate: there are {len(found.tau)} thresholds, and {site.name} is {site.type}", "train them here"
            )
        done.add(layer.output)
        sharpness = self.sharpness if self.sharpness is not None else trained.sharpness
        closed = float((found.tau == np.inf).mean())
        edit.result.details.append({"site": site.name, "mean gain": float(found.gamma.mean()), "never open": closed})
        if self.expose:
            self._expose(edit, site, layer, found)
        if found.identity:
            return "identity"
        return self._gate(edit, layer, found, sharpness)

    def _gate(self, edit: Edit, layer: Layer, gates: NeuronGates, sharpness: float) -> str:
        """Insert the gate behind one activation, and its gains there or in the weights behind."""
        mask, x = edit.mask(), layer.x
        gains: Array | None = gates.gamma if (gates.gamma != 1).any() else None
        may_fold = gains is not None and mask is None and self.fold and self.axis == -1
        if may_fold and (done := fold_gains(edit.graph, edit.editor, x, gates.gamma, _FOLDED)):
            edit.result.counts[done] += 1
            gains = None
        jumps = layer.function == "relu" and layer.x == layer.output and mask is None and self.mode == "hard"
        if jumps:
            return _insert_jump(edit.editor, x, gates.tau, gains, self.attributes)
        form = {"mode": self.mode, **({"sharpness": sharpness} if self.mode == "soft" else {}), **self.attributes}
        node = edit.editor.insert(_GATE, [x, gates.tau, layer.z, gains, mask], form)
        edit.editor.redirect(x, node.output)
        return self.mode

    def _expose(self, edit: Edit, site: Site, layer: Layer, gates: NeuronGates) -> None:
        """An output with true for the neurons that are open."""
        form = {"result": "gate", **self.attributes}
        number = edit.editor.insert(_GATE, [layer.z, gates.tau, None, None, edit.mask()], form).output
        opened = edit.editor.insert("cast", [number], {"to": DType.BOOL}).output
        edit.editor.add_output(opened, f"taugate.{site.name}", role=Role.TAP)

    def _harden(self, graph: Graph, context: PassContext) -> PassResult:
        """Soft gates in the graph become hard ones."""
        if self.mode == "soft" or self.expose or self.where != "all":
            raise OptionError(
                "taugate: without a file soft gates of the graph are hardened, and nothing else", "give gates=FILE"
            )
        result = PassResult(expected_change=self.change, expected_size=UNBOUNDED)
        chosen = {site.value for site in self.select(graph) if site.kind is not SiteKind.VIRTUAL} if self.site else None
        with context.edit(graph) as editor:
            for node in list(graph.nodes()):
                if _is_soft(node) and (chosen is None or node.output in chosen):
                    result.counts[_harden(graph, editor, node, self.fold)] += 1
            editor.erase_later()
        if not result.counts:
            raise PassError("taugate: there is no soft gate to harden", "give a file of thresholds: gates=FILE")
        return result


# --- where gates go -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """An activation function in a graph that is being edited.

    output: what it computes; x: what is gated, the same with the edits made behind it. reads: where it reads ``z``.
    """

    function: str
    output: Value
    x: Value
    reads: Use | None
    input: Value

    @staticmethod
    def of(activation: Activation) -> Layer:
        places = (Use(node, i) for node in activation.nodes for i, o in enumerate(node.operands) if o == activation.input)
        return Layer(activation.function, activation.output, activation.output, next(places, None), activation.input)

    @property
    def z(self) -> Value:
        """What the activation reads now: an edit may have moved it since the layer was found."""
        node = self.reads.node if self.reads is not None else None
        operand = node.operands[self.reads.index] if node is not None and self.reads is not None else None
        return operand if operand is not None else self.input


def layer_of(site: Site, layers: Sequence[Layer]) -> Layer | None:
    """The activation that makes the site's value, directly or through edits of ours, or that reads it."""
    if site.kind is SiteKind.VIRTUAL:
        return None
    here = site.value
    if site.kind is SiteKind.VALUE:
        value: Value | None = here
        while value is not None:
            for layer in layers:
                if layer.output == value:
                    return replace(layer, x=here)
            node = value.producer
            x = node.operands[0] if node is not None and node.op.startswith("actgraph.") else None
            value = x if x is not None and x.shape == value.shape else None
        return next((layer for layer in layers if layer.z == here), None)
    uses = site.uses(site.graph)
    return next((layer for layer in layers if layer.reads in uses), None)


def _insert_jump(editor: Editor, x: Value, tau: Array, gains: Array | None, attributes: Mapping[str, int]) -> str:
    """JumpReLU behind a ReLU: ``x`` where it is above ``max(tau, 0)``. ``x > t`` is ``x >= next number after t``."""
    kind = np.float64 if x.dtype is DType.F64 else np.float32
    limit = np.maximum(tau.astype(kind), kind(0))
    if not limit.any() and gains is None:
        return "identity"
    if limit.any():
        above = np.where(limit == 0, kind(0), np.nextafter(limit, kind(np.inf)))
        node = editor.insert("actgraph.gate", [x, above], {"keep": "x>=", **attributes})
        editor.redirect(x, node.output)
        x = node.output
    if gains is not None:
        node = editor.insert("actgraph.channel_scale", [x, gains], attributes)
        editor.redirect(x, node.output)
    return "jumprelu"


def _is_soft(node: Node) -> bool:
    if node.op != _GATE:
        return False
    form = get_op(_GATE).complete(node.attributes)
    return form["mode"] == "soft" and form["result"] == "gated"


def _harden(graph: Graph, editor: Editor, node: Node, fold: bool) -> str:
    """Replace one soft gate by the compare, and move its gains where that is possible."""
    x, tau, z, gamma, mask = (*node.operands, None, None, None)[:5]
    assert x is not None and tau is not None
    axis = node.attributes.get("axis", -1)
    stored = graph.read(gamma) if gamma is not None and gamma.is_parameter else None
    if fold and mask is None and axis == -1 and stored is not None and stored.ndim == 1:
        gamma = None if fold_gains(graph, editor, node.output, stored, _FOLDED) else gamma
    hard = editor.insert(_GATE, [x, tau, z, gamma, mask], {"mode": "hard", "axis": axis})
    editor.redirect(node.output, hard.output)
    return "hard"
