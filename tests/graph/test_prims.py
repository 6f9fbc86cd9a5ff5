"""The shared vocabulary: both dialects map their nodes to it faithfully, and mean what the engines compute."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from actgraph.graph.executor import executor_for
from actgraph.graph.graph import Value
from actgraph.graph.onnx import OnnxGraph
from actgraph.graph.prims import VOCABULARY, Prim, as_scalar
from tests import zoo
from tests.graph import onnx_models
from tests.graph.readings import view_table
from tests.graph.test_views import STOCK, graph_of

Array = np.ndarray[Any, Any]

#: What the vocabulary does not name in the zoo: sorting rows by expert, and sizes computed from sizes.
UNNAMED = {"aten.sort", "aten.floor_divide", "aten.histc", "sym.mul", "sym.add", "sym.floordiv"}


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize("name", zoo.TINY)
def test_every_node_has_a_name_in_the_vocabulary(name: str, dialect: str) -> None:
    graph = graph_of(name, dialect)
    for node in graph.nodes():
        prim = node.prim
        if prim is None:
            assert node.op in UNNAMED
            continue
        assert prim.op in VOCABULARY
        assert prim.outputs == node.outputs and prim.node == node
        assert {o for o in prim.operands if isinstance(o, Value)} <= set(node.operands)


# --- meaning: a small interpreter of the vocabulary agrees with the engines -------------------------------------------


def _axes(prim: Prim) -> tuple[int, ...]:
    return tuple(prim.attributes["axes"])


def _layer_norm(p: Prim, x: Array, weight: Array | None = None, bias: Array | None = None) -> Array:
    axes = _axes(p)
    centred = x - x.mean(axes, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(axes, keepdims=True) + p.attributes["eps"])
    y = y if weight is None else y * weight
    return np.asarray(y if bias is None else y + bias)


def _linear(p: Prim, x: Array, weight: Array, bias: Array | None) -> Array:
    y = x @ (weight if p.attributes["out_axis"] == 1 else weight.T)
    return np.asarray(y if bias is None else y + bias)


def _softmax(p: Prim, x: Array) -> Array:
    e = np.exp(x - x.max(p.attributes["axis"], keepdims=True))
    return np.asarray(e / e.sum(p.attributes["axis"], keepdims=True))


def _slice(p: Prim, x: Array) -> Array | None:
    a = p.attributes
    if a["axis"] is None or a["start"] is None or a["end"] is None:
        return None
    index = [slice(None)] * x.ndim
    index[a["axis"]] = slice(a["start"], a["end"], a["step"])
    return x[tuple(index)]


def _sdpa(p: Prim, q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    scores = p.attributes["scale"] * q @ np.swapaxes(k, -1, -2)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True) @ v)


_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def _gelu(p: Prim, x: Array) -> Array:
    if p.attributes["approximate"] == "tanh":
        return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))
    return np.asarray(0.5 * x * (1 + _erf(x / np.sqrt(2))))


MEANING: dict[str, Callable[..., Any]] = {
    "identity": lambda p, x: x, "cast": lambda p, x: x.astype(p.attributes["to"].numpy),
    "add": lambda p, a, b: a + b, "sub": lambda p, a, b: a - b, "mul": lambda p, a, b: a * b,
    "div": lambda p, a, b: None if np.asarray(a).dtype.kind in "iu" else a / b,
    "pow": lambda p, a, b: a**b, "neg": lambda p, x: -x, "abs": lambda p, x: np.abs(x), "sqrt": lambda p, x: np.sqrt(x),
    "rsqrt": lambda p, x: 1 / np.sqrt(x), "reciprocal": lambda p, x: 1 / x, "exp": lambda p, x: np.exp(x),
    "erf": lambda p, x: _erf(x), "cos": lambda p, x: np.cos(x), "sin": lambda p, x: np.sin(x),
    "where": lambda p, c, a, b: np.where(c, a, b), "min": lambda p, a, b: np.minimum(a, b),
    "max": lambda p, a, b: np.maximum(a, b),
    "isnan": lambda p, x: np.isnan(x), "and": lambda p, a, b: np.logical_and(a, b), "not": lambda p, x: np.logical_not(x),
    "eq": lambda p, a, b: a == b, "gt": lambda p, a, b: a > b, "ge": lambda p, a, b: a >= b, "lt": lambda p, a, b: a < b,
    "le": lambda p, a, b: a <= b, "relu": lambda p, x: np.maximum(x, 0), "gelu": _gelu, "silu": lambda p, x: x * _sigmoid(x),
    "sigmoid": lambda p, x: _sigmoid(x), "tanh": lambda p, x: np.tanh(x), "softplus": lambda p, x: np.logaddexp(x, 0),
    "softmax": _softmax, "mean": lambda p, x: x.mean(_axes(p), keepdims=p.attributes["keepdims"]),
    "sum": lambda p, x: x.sum(_axes(p), keepdims=p.attributes["keepdims"]),
    "transpose": lambda p, x: x.transpose(p.attributes["perm"]), "slice": _slice,
    "concat": lambda p, *xs: np.concatenate(xs, p.attributes["axis"]),
    "stack": lambda p, *xs: np.stack(xs, p.attributes["axis"]),
    "gather": lambda p, table, i: np.take(table, i, p.attributes["axis"]),
    "gather_elements": lambda p, x, i: np.take_along_axis(x, i, p.attributes["axis"]),
    "matmul": lambda p, a, b: a @ b, "linear": _linear, "sdpa": _sdpa, "layer_norm": _layer_norm,
}  # fmt: skip


def _is_size(value: Value) -> bool:
    return value.producer is not None and value.producer.op.startswith(("sym.", "aten.sym"))


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize("name", ["gemma3", "gpt2", "gpt_neox", "opt", "mixtral", "mamba", "t5", "vit"])
def test_operands_and_attributes_mean_what_the_vocabulary_says(name: str, dialect: str) -> None:
    graph = graph_of(name, dialect)
    inputs = zoo.inputs(STOCK.get(name, name) if dialect == "onnx" else name, length=5)
    outputs = dict(graph.outputs())
    known = {value.name for value in graph.inputs()}
    results = [v for node in graph.nodes() for v in node.outputs if v.shape is not None and outputs.get(v.name) != v]
    sized = [v for v in results if v.dtype is not None and not _is_size(v)]
    values = executor_for(graph).open(graph, sized)(inputs) | {key: array for key, array in inputs.items() if key in known}

    def data(operand: Any) -> Any:
        if not isinstance(operand, Value):
            return operand
        return graph.read(operand) if operand.is_parameter else values.get(operand.name)

    checked: Counter[str] = Counter()
    for node in graph.nodes():
        prim = node.prim
        if prim is None or prim.op not in MEANING:
            continue
        operands = [data(operand) for operand in prim.operands]
        actual = values.get(prim.output.name)
        if actual is None or any(o is None and p is not None for o, p in zip(operands, prim.operands, strict=True)):
            continue
        with np.errstate(all="ignore"):
            expected = MEANING[prim.op](prim, *operands)
        if expected is None:
            continue
        assert np.asarray(expected).shape == actual.shape, prim
        assert np.allclose(expected, actual, rtol=1e-4, atol=1e-5, equal_nan=True), prim
        checked[prim.op] += 1
    assert sum(checked.values()) > 45 and len(checked) > 9, checked


# --- scalars ----------------------------------------------------------------------------------------------------------


def test_scalars_lose_the_rounding_of_their_file() -> None:
    assert as_scalar(np.asarray(1e-5, np.float32)) == 1e-05
    assert as_scalar(np.asarray([0.044715], np.float32)) == 0.044715
    assert as_scalar(np.asarray(0.1, np.float64)) == 0.1
    assert as_scalar(np.asarray(3)) == 3 and as_scalar(np.asarray(True)) is True


# --- old spellings of single ops --------------------------------------------------------------------------------------


def _one(opset: int, text: str, **constants: Array) -> Prim:
    proto = onnx_models.parse(
        f'<ir_version: 8, opset_import: ["": {opset}]> g (float[2, 3, 4] x) => (float[1] y) {{ {text} }}', **constants
    )
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    prim = OnnxGraph(ir.from_proto(proto)).nodes()[-1].prim
    assert prim is not None
    return prim


def ints(*values: int) -> Array:
    return np.asarray(values, np.int64)


@pytest.mark.parametrize(
    ("opset", "text", "constants", "op", "attributes"),
    [
        (9, "y = Slice <starts = [1], ends = [3], axes = [2]> (x)", {}, "slice", {"axis": 2, "start": 1, "end": 3, "step": 1}),
        (13, "y = Slice (x, s, e, a)", {"s": ints(1), "e": ints(3), "a": ints(-1)}, "slice",
         {"axis": 2, "start": 1, "end": 3, "step": 1}),
        (9, "y = ReduceMean <axes = [-1]> (x)", {}, "mean", {"axes": (2,), "keepdims": True}),
        (18, "y = ReduceMean <keepdims = 0> (x, a)", {"a": ints(-1, 1)}, "mean", {"axes": (1, 2), "keepdims": False}),
        (18, "y = ReduceSum (x)", {}, "sum", {"axes": (0, 1, 2), "keepdims": True}),
        (11, "y = Softmax <axis = 2> (x)", {}, "softmax", {"axis": 2}),
        (13, "y = Softmax (x)", {}, "softmax", {"axis": 2}),
        (11, "y = Unsqueeze <axes = [0]> (x)", {}, "reshape", {"shape": (1, 2, 3, 4)}),
        (13, "y = Unsqueeze (x, a)", {"a": ints(0)}, "reshape", {"shape": (1, 2, 3, 4)}),
        (9, "y = Flatten <axis = 2> (x)", {}, "reshape", {"shape": (6, 4)}),
        (7, "y = Dropout <ratio = 0.5> (x)", {}, "identity", {}),
        (13, "y = Dropout (x)", {}, "identity", {}),
        (13, "y = Transpose (x)", {}, "transpose", {"perm": (2, 1, 0)}),
        (13, "y = Reshape (x, s)", {"s": ints(2, 3, 4)}, "identity", {}),
        (13, "y = Concat <axis = -1> (x, x)", {}, "concat", {"axis": 2}),
        (20, "y = Gelu <approximate = \"tanh\"> (x)", {}, "gelu", {"approximate": "tanh"}),
        (10, "y, i = TopK <axis = -1> (x, k)", {"k": ints(2)}, "topk", {"k": 2, "axis": 2}),
    ],
)  # fmt: skip
def test_old_and_new_spellings_of_attributes(
    opset: int, text: str, constants: dict[str, Array], op: str, attributes: dict[str, Any]
) -> None:
    prim = _one(opset, text, **constants)
    assert (prim.op, dict(prim.attributes)) == (op, attributes)


def test_bounds_and_numbers_are_operands() -> None:
    assert _one(9, "y = Clip <min = 0.0, max = 6.0> (x)").operands[1:] == (0.0, 6.0)
    assert _one(13, "y = Clip (x, l)", l=np.asarray(0, np.float32)).operands[1:] == (0, None)
    assert _one(13, "y = Mul (x, c)", c=np.asarray([[0.1]], np.float32)).operands[1] == 0.1
    assert _one(13, "y = Sum (x, x)").op == "add"


@pytest.mark.parametrize("text", ["y = Softmax (x)", "y = Softmax <axis = 1> (x)"])
def test_an_old_softmax_over_several_axes_has_no_name(text: str) -> None:
    graph = onnx_models.graph(
        f'<ir_version: 8, opset_import: ["": 11]> g (float[2, 3, 4] x) => (float[2, 3, 4] y) {{ {text} }}'
    )
    assert graph.nodes()[0].prim is None


def test_tables_tell_different_graphs_apart() -> None:
    """The table that the dialects are compared by is not blind to what it shows."""
    tables = {name: view_table(zoo.captured(name)) for name in ("llama", "qwen3", "opt")}
    assert len({tuple(table) for table in tables.values()}) == 3
    graph = zoo.captured("llama")
    linear = graph.views.linears()[2]
    with graph.edit("test") as editor:
        linear.write_weight(editor, 1.1 * linear.read_weight())
    assert view_table(graph) != tables["llama"]
