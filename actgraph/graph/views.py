"""Views: typed readings of a graph as it is now, the same for both dialects.

Each view is a small record of values plus the nodes it was read from; ``Views`` computes them on demand through
``actgraph.graph.recognize``. Weights are read and written through the view, which knows how its dialect stores them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from actgraph.graph.graph import Array, Graph, Node, Use, Value

if TYPE_CHECKING:
    from actgraph.graph.editor import Editor
    from actgraph.graph.recognize.semantic import Semantics


@dataclass(frozen=True)
class Linear:
    """``output = input @ weight.T + bias``.

    nodes: everything that belongs to it: transposes and casts of the weight, flattening of rows, product, bias.
    input: the operand edge that reads the input (``Use``); output: the value after the bias.
    weight: the stored parameter (or the value that dequantizes it); ``out_axis`` is its output axis as stored.
    matrix: the operand edge that reads the weight at the product. ``None`` for a product of integers, where ``integer``
    holds the scale and zero point of the stored integers.
    """

    nodes: tuple[Node, ...]
    input: Use
    output: Value
    weight: Value
    out_axis: int
    bias: Value | None
    in_features: int
    out_features: int
    matrix: Use | None = None
    integer: tuple[Value | None, Value | None] = (None, None)

    def read_weight(self) -> Array:
        """The weight as ``[out_features, in_features]`` (a view where possible; a computed one is evaluated)."""
        from actgraph.graph.evaluate import evaluate

        graph = self.weight.graph
        stored = evaluate(graph, self.weight)
        scale, zero = self.integer
        if scale is not None:
            offset = evaluate(graph, zero).astype(np.float32) if zero is not None else np.float32(0)
            stored = (stored.astype(np.float32) - offset) * evaluate(graph, scale)
        return stored if self.out_axis == 0 else stored.T

    def write_weight(self, editor: Editor, weight: Array) -> None:
        """Replace the weight, given as ``[out_features, in_features]``, for this linear only (a shared one is untied).

        The element type stays. A weight that is computed (dequantized) is replaced by a plain one, and a message says so.
        Raises PassError for a product of integers.
        """
        from actgraph.errors import PassError

        if self.matrix is None:
            raise PassError(f"the weight {self.weight.name} is read as integers, not numbers", "edit it before quantizing")
        stored = self.weight
        uses = self._own_uses(stored) if stored.is_parameter else []
        if uses and stored.dtype is not None:
            data = np.ascontiguousarray(weight if self.out_axis == 0 else weight.T)
            editor.set_parameter(stored, data.astype(stored.dtype.numpy, copy=False), uses=uses)
            return
        node, index = self.matrix
        assert node is not None
        operand = node.operands[index]
        assert operand is not None
        dtype = operand.dtype.numpy if operand.dtype is not None else weight.dtype
        transposed = self._matrix_out_axis() == 1
        data = np.ascontiguousarray(weight.T if transposed else weight).astype(dtype, copy=False)
        editor.set_operand(node, index, editor.add_parameter(f"{stored.name}_plain", data))
        if not stored.is_parameter:
            editor.messages.append(f"{self.output.name}: the computed weight {stored.name} was replaced by a stored one")

    def read_bias(self) -> Array | None:
        """The bias as ``[out_features]``."""
        from actgraph.graph.evaluate import evaluate

        return evaluate(self.bias.graph, self.bias).reshape(-1) if self.bias is not None else None

    def write_bias(self, editor: Editor, bias: Array) -> None:
        """Replace or create the bias, ``[out_features]``, for this linear only."""
        dtype = self.output.dtype.numpy if self.output.dtype is not None else bias.dtype
        data = np.ascontiguousarray(np.asarray(bias).reshape(-1)).astype(dtype, copy=False)
        old = self.bias
        if old is not None:
            uses = [use for use in old.uses if use.node in self.nodes and use != self.matrix]
            if old.is_parameter:
                leading = (1,) * (len(old.shape or (0,)) - 1)  # the width may change, the rank does not
                editor.set_parameter(old, data.reshape(*leading, -1), uses=uses)
                return
            stored = editor.add_parameter(f"{self.weight.name}_bias", data)
            for use in uses:
                assert use.node is not None
                editor.set_operand(use.node, use.index, stored)
            return
        stored = editor.add_parameter(_bias_name(self.weight.name), data)
        product = self.matrix.node if self.matrix is not None else None
        prim = product.prim if product is not None else None
        if product is not None and prim is not None and prim.op == "linear":
            editor.set_operand(product, 2, stored)
            return
        added = editor.insert("add", [self.output, stored], after=self.output.producer, like=product)
        editor.redirect(self.output, added.output)

    def _own_uses(self, stored: Value) -> list[Use]:
        """The uses of the stored weight through which nobody but this linear reads it; empty when others share the way."""
        readers = set(self.nodes)
        own = [use for use in stored.uses if use.node in readers]
        path = {use.node for use in own if use.node is not None and (self.matrix is None or use.node != self.matrix.node)}
        while path:
            node = path.pop()
            for output in node.outputs:
                if any(use.node not in readers for use in output.uses):
                    return []
                path |= {use.node for use in output.uses if use.node is not None and use.node != self.matrix_node}
        return own

    @property
    def matrix_node(self) -> Node | None:
        """The node of the product."""
        return self.matrix.node if self.matrix is not None else None

    def _matrix_out_axis(self) -> int:
        prim = self.matrix_node.prim if self.matrix_node is not None else None
        return int(prim.attributes["out_axis"]) if prim is not None and prim.op == "linear" else 1


def _bias_name(weight: str) -> str:
    stem, _, leaf = weight.rpartition(".")
    return f"{stem}.bias" if leaf == "weight" and stem else f"{weight}_bias"


@dataclass(frozen=True)
class Convolution:
    """``aten.convolution`` / ``Conv``; weight ``[out, in / groups, *kernel]``."""

    nodes: tuple[Node, ...]
    input: Use
    output: Value
    weight: Value
    bias: Value | None
    groups: int
    transposed: bool


@dataclass(frozen=True)
class Norm:
    """A normalisation. kind: ``layer_norm``, ``rms_norm``, ``batch_norm``, ``group_norm``."""

    nodes: tuple[Node, ...]
    kind: str
    input: Value
    output: Value
    weight: Value | None
    bias: Value | None
    eps: float
    weight_offset: float = 0.0  # 1.0 where the model multiplies by (1 + weight), as Gemma does

    @property
    def over_last_axis(self) -> bool:
        """Whether each row of the last axis is normalised by numbers of its own, as the fused operators do it."""
        rank = len(self.input.shape) if self.input.shape is not None else 0
        reduced = [prim.attributes for node in self.nodes if (prim := node.prim) is not None and "axes" in prim.attributes]
        return all(
            tuple(each["axes"]) in ((-1,), (rank - 1,)) and each.get("keepdims", True)  # else rows meet numbers of others
            for each in reduced
        )


@dataclass(frozen=True)
class Activation:
    """A pointwise nonlinearity on a feature axis. function: ``relu``, ``gelu``, ``gelu_tanh``, ``silu`` ..."""

    nodes: tuple[Node, ...]
    function: str
    input: Value
    output: Value


@dataclass(frozen=True)
class Attention:
    """One attention: ``softmax(scale * query @ key.T + mask) @ value``.

    query/key/value: what the attention itself reads (after rotary, norms and head expansion), ``[batch, heads, seq, head]``
    (``key_by_token``: the key is ``[batch, seq, heads, head]``, where a file merged its transposes; onnxruntime's fused ops
    read all three as ``[batch, seq, heads * head]``).
    mask: boolean (true: allowed; with ``mask_excludes``, true: not allowed) or numbers that are added to the scores.
    softcap: scores are ``softcap * tanh(scores / softcap)`` before the mask.
    biases: further numbers added to the scores where a file adds them one by one (a bias by relative position).
    q/k/v: the projections' outputs these come from (a fused projection's slice), which role sites denote.
    pattern: the softmax result, ``None`` inside a fused op. output: the result per head, ``[batch, heads, seq, head]``.
    out_projection: the linear that reads the result; its input is ``head_out``, ``[batch, seq, heads * head]``.
    """

    nodes: tuple[Node, ...]
    query: Value
    key: Value
    value: Value
    mask: Value | None
    scale: float
    is_causal: bool
    heads: int
    kv_heads: int
    head_dim: int
    q: Value | None
    k: Value | None
    v: Value | None
    pattern: Value | None
    output: Value
    out_projection: Linear | None
    softcap: float | None = None
    mask_excludes: bool = False
    key_by_token: bool = False
    biases: tuple[Value, ...] = ()


@dataclass(frozen=True)
class FeedForward:
    """``down(act(gate(x)) * up(x))`` or ``down(act(up(x)))``. Fused gate-up projections are one linear in both fields.

    pre_act/act/hidden: input and output of the activation; the input of the down projection.
    up_value: what the activation is multiplied by: the up projection's output, or its half of a fused one.
    """

    gate: Linear | None
    up: Linear
    activation: Activation
    down: Linear
    pre_act: Value
    act: Value
    hidden: Value
    fused_gate_up: bool = False
    gate_first: bool = True  # order of the halves of a fused projection
    up_value: Value | None = None


@dataclass(frozen=True)
class MixtureOfExperts:
    """A router and its experts.

    hidden: rows of all experts, ``[rows, features]``, the input of the (grouped) down projection; expert_index: the expert
    of each row, ``[rows]``; gates: the weights by which expert outputs are mixed, ``[tokens, experts per token]``.
    """

    router: Linear
    router_logits: Value
    gates: Value | None
    hidden: Value | None
    expert_index: Value | None
    output: Value
    experts: int


@dataclass(frozen=True)
class Unit:
    """One residual add: ``output = skip + branch``.

    source: the stream value that the branch reads; ``skip`` is it, up to plumbing and a scale. branches: what is added, which
    is two values in a parallel block that adds twice (``branch`` is the last).
    """

    kind: str  # "attn", "cross_attn", "mlp", "moe", "mixer", "conv", "parallel"
    skip: Value
    branch: Value
    output: Value
    node: Node
    source: Value | None = None
    branches: tuple[Value, ...] = ()


@dataclass(frozen=True)
class Block:
    """One repeated residual unit of the model (attention + feed-forward, a Mamba mixer, a ResNet bottleneck)."""

    index: int
    prefix: str  # "" | "encoder." | "decoder." ; "stages.{i}." for nets with stages
    units: tuple[Unit, ...]
    resid_pre: Value
    resid_mid: Value | None
    resid_post: Value
    attention: Attention | None
    cross_attention: Attention | None
    feed_forward: FeedForward | None
    moe: MixtureOfExperts | None


class Views:
    """All views of one graph at one moment (computed once for this object)."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    @functools.cached_property
    def semantics(self) -> Semantics:
        """The graph in the shared vocabulary, which all views are read from."""
        from actgraph.graph.recognize.semantic import Semantics

        return Semantics(self.graph)

    @functools.cached_property
    def _linears(self) -> list[Linear]:
        from actgraph.graph.recognize.linear import linears

        return linears(self.semantics)

    @functools.cached_property
    def _convs(self) -> list[Convolution]:
        from actgraph.graph.recognize.conv import convolutions

        return convolutions(self.semantics)

    @functools.cached_property
    def _norms(self) -> list[Norm]:
        from actgraph.graph.recognize.norm import norms

        return norms(self.semantics)

    @functools.cached_property
    def _activations(self) -> list[Activation]:
        from actgraph.graph.recognize.activation import activations

        return activations(self.semantics)

    @functools.cached_property
    def _attentions(self) -> list[Attention]:
        from actgraph.graph.recognize.attention import attentions

        return attentions(self.semantics, self._linears)

    @functools.cached_property
    def _feed_forwards(self) -> list[FeedForward]:
        from actgraph.graph.recognize.feed_forward import feed_forwards

        return feed_forwards(self.semantics, self._linears, self._activations, self._attentions)

    @functools.cached_property
    def _moe(self) -> list[MixtureOfExperts]:
        from actgraph.graph.recognize.moe import mixtures

        return mixtures(self.semantics, self._linears)

    @functools.cached_property
    def _blocks(self) -> list[Block]:
        from actgraph.graph.recognize.blocks import blocks

        return blocks(self)

    def linears(self) -> list[Linear]:
        """Linear layers, by the order of the nodes that produce their outputs (as all views)."""
        return list(self._linears)

    def convs(self) -> list[Convolution]:
        """Convolutions with a stored weight."""
        return list(self._convs)

    def norms(self) -> list[Norm]:
        """Normalisations, whole or written out."""
        return list(self._norms)

    def activations(self) -> list[Activation]:
        """Pointwise nonlinearities, whole or written out; parts of larger ones are not listed."""
        return list(self._activations)

    def attentions(self) -> list[Attention]:
        """Attentions, fused or written out."""
        return list(self._attentions)

    def feed_forwards(self) -> list[FeedForward]:
        """Pairs of linears around an activation, with or without a gate."""
        return list(self._feed_forwards)

    def moe(self) -> list[MixtureOfExperts]:
        """Mixtures of experts."""
        return list(self._moe)

    def blocks(self) -> list[Block]:
        """The repeated residual units."""
        return list(self._blocks)
