"""What the views of a graph say, as rows of text, and the same numbers computed from the views alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from actgraph.graph.evaluate import evaluate
from actgraph.graph.executor import executor_for
from actgraph.graph.graph import Graph, Value
from actgraph.graph.views import Attention, Linear, Norm

Array = np.ndarray[Any, Any]


def view_table(graph: Graph) -> list[str]:
    """One line for each view of each kind, by position, with shapes, numbers and the linears that it refers to."""
    views = graph.views
    linears = views.linears()
    index = {linear.output: number for number, linear in enumerate(linears)}

    def linear_name(linear: Linear | None) -> str:
        return "none" if linear is None else f"linear.{index[linear.output]}"

    lines = [
        f"linear.{i} {kind(input_value(v))} -> {kind(v.output)} {v.in_features}->{v.out_features} "
        f"weight~{fingerprint(v.read_weight())} bias~{fingerprint(v.read_bias())}"
        for i, v in enumerate(linears)
    ]
    lines += [
        f"conv.{i} {kind(conv_input(v))} -> {kind(v.output)} {kind(v.weight)} groups={v.groups} bias={v.bias is not None}"
        for i, v in enumerate(views.convs())
    ]
    lines += [
        f"norm.{i} {v.kind} {kind(v.input)} -> {kind(v.output)} eps={v.eps:g} "
        f"scale~{fingerprint(stored(v.weight), v.weight_offset)} bias~{fingerprint(stored(v.bias))}"
        for i, v in enumerate(views.norms())
    ]
    lines += [f"activation.{i} {v.function} {kind(v.input)} -> {kind(v.output)}" for i, v in enumerate(views.activations())]
    for i, a in enumerate(views.attentions()):
        lines.append(
            f"attention.{i} query {kind(a.query)} key {kind(a.key)} value {kind(a.value)} mask {kind(a.mask)} "
            f"biases {[kind(bias) for bias in a.biases]} scale={a.scale:g} "
            f"causal={a.is_causal} softcap={a.softcap} heads={a.heads}/{a.kv_heads}x{a.head_dim} "
            f"-> {kind(a.output)}"
        )
        lines.append(f"attention.{i} q {kind(a.q)} k {kind(a.k)} v {kind(a.v)} out {linear_name(a.out_projection)}")
    lines += [
        f"feed_forward.{i} gate {linear_name(f.gate)} up {linear_name(f.up)} {f.activation.function} "
        f"down {linear_name(f.down)} pre_act {kind(f.pre_act)} act {kind(f.act)} hidden {kind(f.hidden)} "
        f"fused={f.fused_gate_up} gate_first={f.gate_first}"
        for i, f in enumerate(views.feed_forwards())
    ]
    lines += [
        f"moe.{i} router {linear_name(m.router)} logits {kind(m.router_logits)} gates {kind(m.gates)} hidden {kind(m.hidden)} "
        f"index {kind(m.expert_index)} experts={m.experts} -> {kind(m.output)}"
        for i, m in enumerate(views.moe())
    ]
    lines.append("order " + " ".join(name for _, name in sorted(_positions(graph))))
    return lines


def stored(value: Value | None) -> Array | None:
    return None if value is None else evaluate(value.graph, value)


def fingerprint(array: Array | None, offset: float = 0.0) -> str:
    """What a weight amounts to: its mean size to three digits, an absent one and one of zeros alike.

    Stock export drops biases of zeros and stores ``1 + weight`` for norms that scale so: presence alone would not compare.
    """
    size = 0.0 if array is None else float(np.abs(array.astype(np.float64) + offset).mean())
    return f"{size:.3g}"


def _positions(graph: Graph) -> list[tuple[int, str]]:
    views = graph.views
    position = views.semantics.position
    groups: dict[str, list[Any]] = {
        "linear": views.linears(), "conv": views.convs(), "norm": views.norms(), "activation": views.activations(),
        "attention": views.attentions(),
    }  # fmt: skip
    return [(position(view.output), name) for name, found in groups.items() for view in found]


def kind(value: Value | None) -> str:
    """The type of a value as text."""
    return "none" if value is None else str(value.type)


def input_value(linear: Linear) -> Value:
    node, index = linear.input
    assert node is not None
    value = node.operands[index]
    assert value is not None
    return value


def conv_input(conv: Any) -> Value:
    value = conv.input.node.operands[conv.input.index]
    assert isinstance(value, Value)
    return value


# --- numbers ------------------------------------------------------------------------------------------------------------


class Numbers:
    """The values of one run, and the largest differences to what views say they are."""

    def __init__(self, graph: Graph, inputs: dict[str, Array]) -> None:
        self.graph = graph
        wanted: dict[str, Value] = {}
        for value in _wanted(graph):
            if not value.is_parameter:
                wanted[value.name] = value
        names = {value.name for value in graph.inputs()}
        outputs = dict(graph.outputs())
        wanted = {name: value for name, value in wanted.items() if outputs.get(name) != value}
        extra = [value for name, value in wanted.items() if name not in names]
        self.run = executor_for(graph).open(graph, extra)({name: inputs[name] for name in names})
        self.run |= {name: inputs[name] for name in names}

    def __call__(self, value: Value) -> Array:
        array = self.graph.read(value) if value.is_parameter else self.run[value.name]
        return np.asarray(array, dtype=np.float64) if array.dtype.kind == "f" else np.asarray(array)

    def check(self) -> dict[str, float]:
        """The relative error of each view's output, recomputed from its inputs and parameters; keys as in sites."""
        views = self.graph.views
        errors: dict[str, float] = {}
        for i, linear in enumerate(views.linears()):
            errors[f"linear.{i}"] = self.error(linear.output, self.linear(linear))
        for i, norm in enumerate(views.norms()):
            errors[f"norm.{i}"] = self.error(norm.output, self.norm(norm))
        for i, activation in enumerate(views.activations()):
            errors[f"activation.{i}"] = self.error(activation.output, FUNCTIONS[activation.function](self(activation.input)))
        for i, attention in enumerate(views.attentions()):
            errors[f"attention.{i}"] = self.error(attention.output, self.attention(attention))
        for i, f in enumerate(views.feed_forwards()):
            hidden = self(f.act) * self(f.up_value) if f.up_value is not None else self(f.act)
            errors[f"feed_forward.{i}"] = self.error(f.hidden, hidden)
        return errors

    def error(self, value: Value, expected: Array) -> float:
        actual = self(value)
        if actual.shape != expected.shape:
            assert actual.size == expected.size, (value, actual.shape, expected.shape)
            expected = expected.reshape(actual.shape)
        return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-6))

    def linear(self, linear: Linear) -> Array:
        result = self(input_value(linear)) @ linear.read_weight().T.astype(np.float64)
        bias = linear.read_bias()
        return np.asarray(result if bias is None else result + bias)

    def norm(self, norm: Norm) -> Array:
        x = self(norm.input)
        if norm.kind == "batch_norm":
            prim = norm.nodes[-1].prim
            assert prim is not None
            mean, variance = (self(v) for v in prim.operands[3:5] if isinstance(v, Value))
            shape = (1, -1, *[1] * (x.ndim - 2))
            x = (x - mean.reshape(shape)) / np.sqrt(variance.reshape(shape) + norm.eps)
            weight, bias = (self(v).reshape(shape) if v is not None else None for v in (norm.weight, norm.bias))
        else:
            if norm.kind == "layer_norm":
                x = x - x.mean(-1, keepdims=True)
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.eps)
            weight, bias = (self(v) if v is not None else None for v in (norm.weight, norm.bias))
        x = x if weight is None else x * (weight + norm.weight_offset)
        return np.asarray(x if bias is None else x + bias)

    def attention(self, a: Attention) -> Array:
        query, key, value = self(a.query), self(a.key), self(a.value)
        key = np.swapaxes(key, 1, 2) if a.key_by_token else key
        if key.shape[1] != query.shape[1]:
            key, value = (np.repeat(x, query.shape[1] // x.shape[1], axis=1) for x in (key, value))
        scores = a.scale * query @ np.swapaxes(key, -1, -2)
        if a.softcap is not None:
            scores = a.softcap * np.tanh(scores / a.softcap)
        for bias in a.biases:
            scores = scores + self(bias)
        if a.mask is not None:
            mask = self(a.mask)
            allowed = mask != a.mask_excludes
            scores = np.where(allowed, scores, -np.inf) if mask.dtype == bool else scores + mask
        if a.is_causal:
            scores = np.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        if a.pattern is not None:
            assert np.allclose(self(a.pattern).reshape(weights.shape), weights, atol=1e-5)
        return np.asarray(weights @ value)


def _wanted(graph: Graph) -> list[Value]:
    views = graph.views
    found: list[Value | None] = []
    for linear in views.linears():
        found += [input_value(linear), linear.output]
    for norm in views.norms():
        found += [norm.input, norm.output]
    for activation in views.activations():
        found += [activation.input, activation.output]
    for a in views.attentions():
        found += [a.query, a.key, a.value, a.mask, a.pattern, a.output, a.q, a.k, a.v, *a.biases]
    for f in views.feed_forwards():
        found += [f.act, f.up_value, f.hidden]
    for m in views.moe():
        found += [m.router_logits, m.gates, m.hidden, m.expert_index, m.output, input_value(m.router)]
    return [value for value in found if value is not None]


_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: np.asarray(x * 0.5 * (1 + _erf(x / np.sqrt(2)))),
    "gelu_tanh": lambda x: np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))),
    "silu": lambda x: np.asarray(x * _sigmoid(x)),
    "quick_gelu": lambda x: np.asarray(x * _sigmoid(1.702 * x)),
    "relu6": lambda x: np.clip(x, 0, 6),
    "softplus": lambda x: np.logaddexp(x, 0),
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
}
