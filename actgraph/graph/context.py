"""Context values: what a pass may need to know about the tokens at hand, asked for by name.

A graph gives the one it has (its ``position_ids`` or ``attention_mask`` input, or the positions it counts itself). A missing
one becomes an *optional* input with a neutral default, so that hosts that know nothing of it still run the file.

The default has size 1 on every axis (``[1, 1]`` for an input of rank 2: onnxruntime checks the rank of a default against
the declared shape), so whoever computes with a context value must let it broadcast, and reshape it with -1 instead of
``batch`` or ``seq``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from actgraph.errors import InputError
from actgraph.graph.graph import Array, Graph, Node, Role, Value
from actgraph.graph.slots import slots_of
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import Dim, Shape, TensorType

if TYPE_CHECKING:
    from actgraph.graph.editor import Editor


@dataclass(frozen=True)
class ContextKind:
    """One kind of context value.

    axes: which of the axes of the tokens it has, ``"batch"`` and ``"seq"`` (none: one number). neutral: the default.
    spellings: names of inputs that are this value.
    """

    doc: str
    dtype: DType
    axes: tuple[str, ...]
    neutral: int
    spellings: tuple[str, ...] = ()


KINDS: dict[str, ContextKind] = {
    "positions": ContextKind(
        "position of each token in its row, from 0", DType.I64, ("batch", "seq"), 0, ("position_ids", "decoder_position_ids")
    ),
    "valid_tokens": ContextKind(
        "true for tokens, false for padding", DType.BOOL, ("batch", "seq"), 1, ("attention_mask", "valid_tokens")
    ),
    "prompt_lengths": ContextKind(
        "number of prompt tokens of each row; where nobody tells it, all tokens are prompt", DType.I64, ("batch",), 2**31 - 1
    ),
    "row_index": ContextKind(
        "index of each row among the requests of a batch; -1 where nobody tells it", DType.I64, ("batch",), -1
    ),
    "step": ContextKind("number of the step of an iterated model, from 0", DType.I64, (), 0),
}  # fmt: skip


def graph_context(graph: Graph, editor: Editor, name: str) -> Value:
    """The context value called ``name``, broadcastable to its axes of the tokens (see ``KINDS``).

    The graph's own input or computed value is used where there is one (``valid_tokens`` of a number mask is its cast to
    bool); otherwise an optional input with role CONTEXT is added, once. ``positions`` count real tokens: where there are no
    position ids they are counted from the mask, and only without one they are what the graph counts. With a cache both are
    about the new tokens, though the mask covers all. Raises InputError for an unknown name or a graph without token dimensions.
    """
    if name not in KINDS:
        raise InputError(f"there is no context value {name!r}", f"they are {', '.join(KINDS)}")
    kind = KINDS[name]
    own = _own_input(graph, kind)
    if own is not None:
        return _as_dtype(editor, own, kind.dtype, name)
    mask = _mask(graph)
    if mask is not None and name == "valid_tokens":
        return _as_dtype(editor, _derived(editor, "actgraph.recent", mask, {"axis": 1}), kind.dtype, name)
    if mask is not None and name == "positions":
        return _derived(editor, "actgraph.valid_positions", mask, {})
    if name == "positions":
        counted = counted_positions(graph)
        if counted is not None:
            return counted
    shape = _shape(graph, kind)
    default = np.full([1] * len(shape), kind.neutral, kind.dtype.numpy)
    return editor.add_input(name, TensorType(kind.dtype, shape), role=Role.CONTEXT, default=default)


def has_context(graph: Graph, name: str) -> bool:
    """Whether ``graph`` has the context value itself, so that ``graph_context`` adds no input."""
    if _own_input(graph, KINDS[name]) is not None or (name == "positions" and counted_positions(graph) is not None):
        return True
    return name in ("positions", "valid_tokens") and _mask(graph) is not None


def input_default(graph: Graph, name: str) -> Array | None:
    """The default of an optional input; ``None`` for inputs that must be given."""
    return graph.default(name)


def token_dims(graph: Graph) -> tuple[Dim, ...] | None:
    """The batch and sequence dimensions: the first two axes of the token ids, else of the first input that has two."""
    tokens = _tokens(graph)
    return tokens.shape[:2] if tokens is not None and tokens.shape is not None else None


def _tokens(graph: Graph) -> Value | None:
    """The input whose first two axes are those of the tokens."""
    inputs = [value for value in graph.inputs() if graph.role(value.name) is Role.USER and value.shape is not None]
    ids = [v for v in inputs if v.name in ("input_ids", "decoder_input_ids", "inputs_embeds", "tokens")]
    return next((value for value in (*ids, *inputs) if value.shape is not None and len(value.shape) >= 2), None)


#: How configurations spell the number of tokens that a model was made for.
_SHORT = "original_max_position_embeddings"
_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")


def context_length(graph: Graph) -> int | None:
    """The number of tokens that the model was made for (the smallest its configuration names); ``None`` where it names none.

    A model whose rotary angles change beyond a length (longrope) is captured with those of short inputs, up to that length.
    """
    limits = []
    for config in (graph.companions.config, graph.companions.config.get("text_config") or {}):
        limits += [config[key] for key in _LENGTHS if isinstance(config.get(key), int)]
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if "longrope" in (rope.get("rope_type"), rope.get("type")):
            limits += [each[_SHORT] for each in (config, rope) if isinstance(each.get(_SHORT), int)]
    return min(limits, default=None)


def logits_output(graph: Graph) -> str:
    """The name of the output that holds next-token scores ``[batch, seq, vocabulary]``: ``logits``, or the only one of rank 3.

    Raises InputError when ``graph`` is no language model.
    """
    users = [(name, value) for name, value in graph.outputs() if graph.role(name) is Role.USER]
    names = [name for name, _ in users]
    scores = [name for name, value in users if value.shape is not None and len(value.shape) == 3 and _is_float(value)]
    if "input_ids" not in {value.name for value in graph.inputs()}:
        raise InputError(f"{graph.name} takes no input_ids: it is no language model", "use a causal language model")
    if "logits" in names:
        return "logits"
    if len(scores) == 1:
        return scores[0]
    raise InputError(
        f"{graph.name} has no output of next-token logits (outputs: {', '.join(names)})", "use a causal language model"
    )


def _is_float(value: Value) -> bool:
    return value.dtype is not None and value.dtype.is_float


def _own_input(graph: Graph, kind: ContextKind) -> Value | None:
    """The input that is the context value: spelled like it, with its axes."""
    dims = token_dims(graph)
    for spelling in (*kind.spellings, *(name for name, k in KINDS.items() if k is kind)):
        for value in graph.inputs():
            if value.name != spelling or value.shape is None or value.dtype is None:
                continue
            if graph.role(spelling) is Role.CONTEXT or (dims is not None and value.shape == dims[: len(kind.axes)]):
                return value
    return None


def _mask(graph: Graph) -> Value | None:
    """The attention mask ``[batch, tokens]``, which covers past tokens, too, where the graph has a cache."""
    dims = token_dims(graph)
    for value in graph.inputs():
        if value.name == "attention_mask" and value.dtype is not None and value.shape is not None and dims is not None:
            covers = len(value.shape) == 2 and (value.shape[1] == dims[1] or bool(slots_of(graph)))
            return value if covers and value.shape[0] == dims[0] else None
    return None


def _derived(editor: Editor, op: str, mask: Value, attributes: Mapping[str, int]) -> Value:
    """What ``op`` makes of the mask and the new tokens, made once."""
    tokens = _tokens(editor.graph)
    for use in mask.uses:
        if use.node is not None and use.node.op == op and use.node.operands[1] == tokens:
            return use.node.output
    return editor.insert(op, [mask, tokens], attributes).output


def _as_dtype(editor: Editor, value: Value, dtype: DType, name: str) -> Value:
    """``value``, cast once where its type differs; a cast that is there already is used again."""
    if value.dtype == dtype:
        return value
    for use in value.uses:
        if use.node is not None and use.node.prim is not None and use.node.prim.op == "cast" and use.node.output.dtype == dtype:
            return use.node.output
    return editor.insert("cast", [value], {"to": dtype}, name=name).output


def counted_positions(graph: Graph) -> Value | None:
    """The positions that the graph counts itself: the first ``0, 1, 2 ...`` as long as the sequence."""
    dims = token_dims(graph)
    if dims is None or len(dims) < 2 or not isinstance(dims[1], str):
        return None
    for node in graph.nodes():
        prim = node.prim
        if prim is not None and prim.op == "arange" and node.output.shape == (dims[1],) and _counts_from_zero(graph, node):
            return node.output if node.output.dtype is DType.I64 else None
    return None


def _counts_from_zero(graph: Graph, node: Node) -> bool:
    if node.op == "onnx.Range":
        start, _, step = (_number(graph, operand) for operand in node.operands)
        return start == 0 and step == 1
    attributes = node.attributes
    return bool(attributes.get("start", 0) == 0 and attributes.get("step", 1) == 1)


def _number(graph: Graph, value: Value | None) -> float | None:
    if value is None or not value.is_parameter:
        return None
    data = graph.read(value)
    return float(data.reshape(-1)[0]) if data.size == 1 else None


def _shape(graph: Graph, kind: ContextKind) -> Shape:
    if not kind.axes:
        return (1,)
    dims = token_dims(graph)
    if dims is None or len(dims) < len(kind.axes):
        raise InputError(f"{graph.name} has no input with batch and sequence dimensions", "context values are about tokens")
    return tuple(dims[: len(kind.axes)])
