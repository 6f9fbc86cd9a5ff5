"""Views: equal for a model captured from torch and for its stock ONNX file, and true to the numbers in both."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import actgraph as ag
from actgraph.errors import PassError
from actgraph.graph import Graph
from tests import zoo
from tests.graph.readings import Numbers, fingerprint, input_value, kind, view_table

#: The model whose stock file a model is compared with: stock export cannot express the grouped matmul.
STOCK = {"mixtral": "mixtral_batched"}


def onnx(name: str) -> Graph:
    return ag.load(zoo.stock_onnx(STOCK.get(name, name)))


def graph_of(name: str, dialect: str) -> Graph:
    return zoo.captured(name) if dialect == "fx" else onnx(name)


# --- equality of the two dialects -------------------------------------------------------------------------------------


def _unnamed_rows(lines: list[str]) -> list[str]:
    """GPT-2: stock export merges the two reshapes before ``attn.c_proj`` (heads to features, tokens to rows) into one.

    The file has no value ``[batch, seq, features]`` there, so the projection's input edge is that of the product.
    """
    return [re.sub(r"^(linear\.[15]) f32\[batch(\*|, )seq, 32\]", r"\1 rows", line) for line in lines]


def _folded_batch_norms(lines: list[str]) -> list[str]:
    """ResNet: stock export folds each batch norm into the convolution before it (weight and bias)."""
    kept = [re.sub(r" bias=(True|False)$", "", line) for line in lines if not line.startswith("norm.")]
    return [line.replace(" norm", "") if line.startswith("order ") else line for line in kept]


#: The differences between the dialects that remain, each with what explains it.
EXCEPTIONS: dict[str, Callable[[list[str]], list[str]]] = {"gpt2": _unnamed_rows, "resnet": _folded_batch_norms}


@pytest.mark.parametrize("name", zoo.NAMES)
def test_views_are_equal_in_both_dialects(name: str) -> None:
    fx, other = view_table(zoo.captured(name)), view_table(onnx(name))
    if name in EXCEPTIONS:
        assert fx != other, "the exception is not needed any more"
        fx, other = EXCEPTIONS[name](fx), EXCEPTIONS[name](other)
    assert fx == other


#: What each architecture must show: (linears, convs, norms, activations, attentions, feed-forwards, mixtures).
COUNTS = {
    "llama": (15, 0, 5, 2, 2, 2, 0), "qwen3": (15, 0, 9, 2, 2, 2, 0), "gemma3": (22, 0, 19, 3, 3, 3, 0),
    "gpt2": (9, 0, 5, 2, 2, 2, 0), "gpt_neox": (9, 0, 5, 2, 2, 2, 0), "phi3": (9, 0, 5, 2, 2, 2, 0),
    "opt": (13, 0, 5, 2, 2, 2, 0), "bert": (13, 0, 5, 3, 2, 2, 0), "vit": (13, 1, 5, 2, 2, 2, 0),
    "mixtral": (11, 0, 5, 2, 2, 0, 2), "mixtral_batched": (11, 0, 5, 2, 2, 0, 2), "mamba": (7, 2, 3, 6, 0, 0, 0),
    "albert": (20, 0, 7, 4, 3, 3, 0), "t5": (37, 0, 12, 4, 6, 4, 0), "resnet": (1, 15, 15, 13, 0, 0, 0),
    "mlp": (6, 0, 1, 3, 0, 2, 0), "minilm": (37, 0, 13, 7, 6, 6, 0), "stories260k": (36, 0, 11, 5, 5, 5, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_part_of_each_architecture_is_found(name: str) -> None:
    views = zoo.captured(name).views
    found = (
        views.linears(), views.convs(), views.norms(), views.activations(), views.attentions(), views.feed_forwards(),
        views.moe(),
    )  # fmt: skip
    assert tuple(map(len, found)) == COUNTS[name]


@pytest.mark.parametrize("inline", ["none", "all"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_views_are_equal_in_our_own_files(name: str, inline: str, tmp_path: Path) -> None:
    """Functions kept or inlined: an inlined grouped product is one product for each expert, and still one mixture."""
    graph = zoo.captured(name)
    file = ag.load(graph.save(tmp_path / "model.onnx", **({"inline": "all"} if inline == "all" else {})))
    assert view_table(file) == view_table(graph)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize("name", zoo.NAMES)
def test_views_compute_what_the_graph_computes(name: str, dialect: str) -> None:
    errors = Numbers(graph_of(name, dialect), zoo.inputs(name, length=7)).check()
    assert errors and max(errors.values()) < 5e-6, errors


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize("name", ["mixtral", "mixtral_batched"])
def test_mixture_rows_belong_to_their_experts(name: str, dialect: str) -> None:
    """Each row of ``hidden`` is what its expert makes of some token that the router sent there, and the output mixes them."""
    graph = graph_of(name, dialect)
    numbers = Numbers(graph, zoo.inputs(name, length=5))
    weights = {tuple(p.shape or ())[1:]: [] for p in graph.parameters()}  # type: ignore[var-annotated]
    for parameter in graph.parameters():
        weights[tuple(parameter.shape or ())[1:]].append(graph.read(parameter))
    up, down = weights[2 * zoo.HIDDEN, zoo.WIDTH], weights[zoo.WIDTH, zoo.HIDDEN]
    mixtures = graph.views.moe()
    assert len(mixtures) == len(up) == len(down) == 2
    for mixture in mixtures:
        assert mixture.hidden is not None and mixture.expert_index is not None and mixture.gates is not None
        tokens, logits = numbers(input_value(mixture.router)), numbers(mixture.router_logits)
        hidden, expert, gates = numbers(mixture.hidden), numbers(mixture.expert_index), numbers(mixture.gates)
        chosen = np.argsort(-logits, axis=-1)[:, :2]
        odds = np.exp(np.take_along_axis(logits, chosen, -1))
        assert np.allclose(gates, odds / odds.sum(-1, keepdims=True), atol=1e-6)
        layer = min(range(2), key=lambda i: np.abs(_rows(tokens, up[i], expert) - hidden[:, None]).max(-1).min(-1).max())
        distance = np.abs(_rows(tokens, up[layer], expert) - hidden[:, None]).max(-1)
        assert distance.min(-1).max() < 1e-5
        token = distance.argmin(-1)
        assert sorted(zip(token, expert, strict=True)) == sorted((t, e) for t, row in enumerate(chosen) for e in row)
        output = np.zeros_like(tokens)
        for row, (t, e) in enumerate(zip(token, expert, strict=True)):
            output[t] += gates[t, list(chosen[t]).index(e)] * (down[layer][e] @ hidden[row])
        assert numbers.error(mixture.output, output) < 1e-5


def _rows(tokens: np.ndarray, up: np.ndarray, expert: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """``[rows, tokens, features]``: the hidden row that each row's expert would make of each token."""
    gate, value = np.split(np.einsum("td,efd->etf", tokens, up), 2, axis=-1)
    made = gate / (1 + np.exp(-gate)) * value
    return np.asarray(made[expert])


# --- projections ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt_neox", "phi3", "bert", "t5"])
def test_query_key_and_value_are_cut_from_their_projections(name: str, dialect: str) -> None:
    """Scaling the part of the projection that q (k, v) is scales the query (key, value) and leaves the others alone."""
    graph = graph_of(name, dialect)
    inputs = zoo.inputs(name, length=5)
    before = Numbers(graph, inputs)
    a = graph.views.attentions()[0]
    for part in (a.q, a.k, a.v):
        assert part is not None
        changed = graph.clone()
        target = changed.value(part.name)
        with changed.edit("test") as editor:
            product = editor.insert("mul", [target, np.asarray(3.0, np.float32)], after=target.producer)
            editor.redirect(target, product.output)
        after, b = Numbers(changed, inputs), changed.views.attentions()[0]
        for old, new, source in ((a.query, b.query, a.q), (a.key, b.key, a.k), (a.value, b.value, a.v)):
            same = np.allclose(before(old), after(new), atol=1e-6)
            normed = name == "qwen3" and part != a.v  # a norm after the projection undoes a scale
            assert same == (source != part or normed)


# --- writing weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "phi3", "t5", "minilm"])
def test_weights_are_written_as_they_are_read(name: str, dialect: str) -> None:
    graph = graph_of(name, dialect)
    inputs = zoo.inputs(name, length=5)
    rng = np.random.default_rng(0)
    count = len(graph.views.linears())
    for index in (0, count // 2, count - 1):
        linear = graph.views.linears()[index]
        weight = rng.standard_normal((linear.out_features, linear.in_features)).astype(np.float32)
        others = [other.read_weight().copy() for i, other in enumerate(graph.views.linears()) if i != index]
        with graph.edit("test") as editor:
            linear.write_weight(editor, weight)
            editor.retype(linear.nodes)
        again = graph.views.linears()
        assert np.array_equal(again[index].read_weight(), weight)
        kept = [other.read_weight() for i, other in enumerate(again) if i != index]
        assert all(np.array_equal(x, y) for x, y in zip(kept, others, strict=True))
        graph.verify()
    assert max(Numbers(graph, inputs).check().values()) < 5e-6


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_writing_the_head_unties_it_from_the_embedding(dialect: str) -> None:
    graph = graph_of("stories260k", dialect)
    head = graph.views.linears()[-1]
    table = next(p for p in graph.parameters() if "embed" in p.name or "lm_head" in p.name)
    before = graph.read(table).copy()
    with graph.edit("test") as editor:
        head.write_weight(editor, np.zeros((512, 64), np.float32))
    assert any("untied" in message for message in editor.messages)
    assert np.array_equal(graph.read(graph.value(table.name)), before)
    result = graph.run(zoo.inputs("stories260k"))
    assert not next(iter(result.values())).any()
    assert max(Numbers(graph, zoo.inputs("stories260k")).check().values()) < 5e-6


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "vit", "minilm", "mlp"])
def test_biases_are_written_and_created(name: str, dialect: str) -> None:
    graph = graph_of(name, dialect)
    inputs = zoo.inputs(name, length=5)
    table = [line for line in view_table(graph) if not line.startswith("linear.")]
    for index in range(len(graph.views.linears())):
        linear = graph.views.linears()[index]
        before = Numbers(graph, inputs)(linear.output)
        old = linear.read_bias()
        bias = np.linspace(-1, 1, linear.out_features, dtype=np.float32)
        others = [fingerprint(other.read_bias()) for i, other in enumerate(graph.views.linears()) if i != index]
        with graph.edit("test") as editor:
            linear.write_bias(editor, bias)
        linear = graph.views.linears()[index]
        written = linear.read_bias()
        assert written is not None and np.array_equal(written, bias)
        assert [fingerprint(other.read_bias()) for i, other in enumerate(graph.views.linears()) if i != index] == others
        after = Numbers(graph, inputs)(linear.output)
        assert np.allclose(after - before, bias - (0 if old is None else old), atol=1e-4)
        graph.verify()
        if index == 3:
            break
    assert [line for line in view_table(graph) if not line.startswith("linear.")] == table


def test_a_site_moves_with_a_bias_that_is_added() -> None:
    graph = onnx("llama")
    linear = graph.views.linears()[0]
    assert linear.bias is None
    site = graph.site("linear.0")
    assert site.value == linear.output
    with graph.edit("test") as editor:
        linear.write_bias(editor, np.ones(linear.out_features, np.float32))
    assert graph.site("linear.0").value == graph.views.linears()[0].output != linear.output


# --- edits of passes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize("name", ["llama", "bert", "phi3"])
def test_views_see_through_edits_of_activations(name: str, dialect: str) -> None:
    graph = graph_of(name, dialect)
    f, a = graph.views.feed_forwards()[0], graph.views.attentions()[0]
    before = [(kind(f.hidden), kind(f.pre_act), f.down.out_features) for f in graph.views.feed_forwards()]
    with graph.edit("test") as editor:
        for value in (f.pre_act, f.act, f.hidden, a.q, a.v, a.output):
            assert value is not None
            width = value.shape[-1] if value.shape else None
            assert isinstance(width, int)
            shift = editor.insert("actgraph.shift", [value, np.ones(width, np.float32), None, None], after=value.producer)
            editor.redirect(value, shift.output)
    after = graph.views
    assert [(kind(f.hidden), kind(f.pre_act), f.down.out_features) for f in after.feed_forwards()] == before
    first = after.attentions()[0]
    assert (kind(first.q), kind(first.k), kind(first.v)) == (kind(a.q), kind(a.k), kind(a.v))
    assert first.out_projection is not None and first.out_projection.weight == graph.views.linears()[_index(a, name)].weight


def _index(attention: object, name: str) -> int:
    return 1 if name == "phi3" else 3


# --- old files --------------------------------------------------------------------------------------------------------


def test_an_old_file_is_read_alike() -> None:
    graph = ag.load(Path(__file__).parent.parent / "data" / "mnist.onnx")
    assert [line.split(" weight~")[0] for line in view_table(graph)] == [
        "linear.0 f32[1, 256] -> f32[1, 10] 256->10",
        "conv.0 f32[1, 1, 28, 28] -> f32[1, 8, 28, 28] f32[8, 1, 5, 5] groups=1 bias=True",
        "conv.1 f32[1, 8, 14, 14] -> f32[1, 16, 14, 14] f32[16, 8, 5, 5] groups=1 bias=True",
        "activation.0 relu f32[1, 8, 28, 28] -> f32[1, 8, 28, 28]",
        "activation.1 relu f32[1, 16, 14, 14] -> f32[1, 16, 14, 14]",
        "order conv activation conv activation linear",
    ]
    x = np.random.default_rng(0).standard_normal((1, 1, 28, 28)).astype(np.float32)
    assert max(Numbers(graph, {graph.inputs()[0].name: x}).check().values()) < 5e-6


def test_integer_products_keep_their_weights() -> None:
    from tests.graph.test_spellings import dynamic_quantized

    graph, weight = dynamic_quantized()
    (linear,) = graph.views.linears()
    assert np.allclose(linear.read_weight(), weight, atol=np.abs(weight).max() / 200)
    with graph.edit("test") as editor, pytest.raises(PassError, match="integers"):
        linear.write_weight(editor, weight)
