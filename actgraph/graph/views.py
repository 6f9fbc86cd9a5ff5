"""Views: typed readings of a graph as it is now, the same for both dialects.

Each view is a small record of values plus the nodes it was read from; ``Views`` computes them on demand through
``actgraph.graph.recognize``. Weights are read and written through the view, which knows how its dialect stores them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from actgraph.graph.graph import Array, Graph, Node, Use, Value

if TYPE_CHECKING:
    from actgraph.graph.editor import Editor


@dataclass(frozen=True)
class Linear:
    """``output = input @ weight.T + bias``.

    input: the operand edge that reads the input (``Use``); output: the value after the bias.
    weight: the stored parameter (or the value that dequantizes it); ``out_axis`` is its output axis as stored.
    """

    nodes: tuple[Node, ...]
    input: Use
    output: Value
    weight: Value
    out_axis: int
    bias: Value | None
    in_features: int
    out_features: int

    def read_weight(self) -> Array:
        """The weight as ``[out_features, in_features]`` (a view where possible)."""
        ...

    def write_weight(self, editor: Editor, weight: Array) -> None:
        """Replace the weight, given as ``[out_features, in_features]``, for this linear only (a shared one is untied)."""
        ...

    def read_bias(self) -> Array | None: ...

    def write_bias(self, editor: Editor, bias: Array) -> None:
        """Replace or create the bias, ``[out_features]``, for this linear only."""
        ...


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


@dataclass(frozen=True)
class Activation:
    """A pointwise nonlinearity on a feature axis. function: ``relu``, ``gelu``, ``gelu_tanh``, ``silu`` ..."""

    nodes: tuple[Node, ...]
    function: str
    input: Value
    output: Value


@dataclass(frozen=True)
class Attention:
    """One attention: ``softmax(scale * q @ k.T + mask) @ v``.

    query/key/value: what the attention itself reads (after rotary, norms and head expansion), ``[batch, heads, seq, head]``.
    q/k/v: the projections' outputs these come from (a fused projection's slice), which role sites denote.
    pattern: the softmax result, ``None`` inside a fused op. output: the result per head; head_out: what the output
    projection reads, ``[batch, seq, heads * head]``.
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


@dataclass(frozen=True)
class FeedForward:
    """``down(act(gate(x)) * up(x))`` or ``down(act(up(x)))``. Fused gate-up projections are one linear in both fields.

    pre_act/act/hidden: input and output of the activation; the input of the down projection.
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


@dataclass(frozen=True)
class MixtureOfExperts:
    """A router and its experts."""

    router: Linear
    router_logits: Value
    gates: Value | None  # the weights by which expert outputs are mixed
    hidden: Value | None  # rows of all experts, input of the (grouped) down projection
    expert_index: Value | None  # the expert of each row of ``hidden``
    output: Value
    experts: int


@dataclass(frozen=True)
class Unit:
    """One residual add: ``output = skip + branch``."""

    kind: str  # "attn", "cross_attn", "mlp", "moe", "mixer", "conv", "parallel"
    skip: Value
    branch: Value
    output: Value
    node: Node


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

    def linears(self) -> list[Linear]: ...
    def convs(self) -> list[Convolution]: ...
    def norms(self) -> list[Norm]: ...
    def activations(self) -> list[Activation]: ...
    def attentions(self) -> list[Attention]: ...
    def feed_forwards(self) -> list[FeedForward]: ...
    def moe(self) -> list[MixtureOfExperts]: ...
    def blocks(self) -> list[Block]: ...
