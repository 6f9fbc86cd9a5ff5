"""Sessions with kernels: the same results as without, for every format and gate; what has no kernel is said."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import actgraph as ag
from actgraph.errors import UnsupportedError
from actgraph.graph.graph import Array
from actgraph.runtime.native.library import available, library
from tests import zoo

pytestmark = pytest.mark.skipif(not available(), reason="the kernels' library was not built: there is no C compiler")

#: Integer weights meet activations of 16 bits.
ROUNDED = 2e-4
FORMATS = {
    "": 1e-5,
    "quantize{weights=int8}": ROUNDED,
    "quantize{weights=int4}": ROUNDED,
    "quantize{weights=bf16 embeddings=true}": 1e-5,
    "sparsify{method=teal sparsity=0.5}, quantize{weights=bf16}": 1e-5,
    "sparsify{method=teal sparsity=0.5}, quantize{weights=int8}": ROUNDED,
    "sparsify{method=cats sparsity=0.5}, quantize{weights=int4}": 2e-3,  # a gate falls otherwise in the prompt, which all see
}
GATED = "sparsify{method=teal sparsity=0.5}, quantize{weights=int8}"


@functools.cache
def program(passes: str, cache: str = "kv_cache{last_logits=true}") -> ag.Program:
    text = ", ".join(part for part in (passes, cache) if part)
    return ag.run(zoo.captured("stories260k"), text, corpus=TEXTS, parity="none", reproducer=False).program


@functools.cache
def compiled(passes: str, engine: str, kernels: bool) -> ag.Compiled:
    """Of ``program``: all kernels that it needs, or none."""
    return ag.compile(program(passes), engine, **({"require_kernels": True} if kernels else {"kernels": False}))


@functools.cache
def without_kernels(passes: str, engine: str, batch: int = 1) -> list[Array]:
    return converse(compiled(passes, engine, False), batch)


TEXTS = ["Once upon a time there was a little girl who liked to play.", "The sun was warm and the birds sang in the tree."]


def converse(made: ag.Compiled, batch: int = 1) -> list[Array]:
    """Logits of a prompt, of single tokens and of a second turn."""
    session, rng = made.session(batch), np.random.default_rng(3)
    return [session.feed(rng.integers(3, 500, (batch, count)))["logits"] for count in (9, 1, 1, 1, 4, 1)]


def errors(found: list[Array], expected: list[Array]) -> Array:
    """Of each token, relative to the largest logit."""
    pairs = zip(found, expected, strict=True)
    return np.concatenate([(np.abs(a - b).max(-1) / np.abs(b).max()).reshape(-1) for a, b in pairs])


def worst(found: list[Array], expected: list[Array]) -> float:
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("passes", FORMATS, ids=lambda text: text or "float32")
@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_kernels_change_nothing(passes: str, engine: str) -> None:
    """One row and three, prompts and single tokens; and the kernels are what ran."""
    made = compiled(passes, engine, True)
    assert made.claims is not None and (made.claims["decode"].claimed or not passes)
    for batch in (1, 3):
        expected = without_kernels(passes, engine, batch)
        found = errors(converse(made, batch), expected)
        assert np.median(found) < FORMATS[passes]
        # a value next to a threshold may fall on its other side, with all that follows
        assert found.max() < (0.3 if "sparsify" in passes else FORMATS[passes])
        if passes and batch == 1:
            assert np.median(errors(without_kernels("", engine), expected)) > 10 * FORMATS[passes]


def test_bfloat16_weights_are_kept_in_no_other_form() -> None:
    """The kernels of both graphs read the 16 bits: nothing casts them, and no matrix in float32 is held."""
    for engine in ("torch", "onnxruntime"):
        made = compiled("quantize{weights=bf16 embeddings=true}", engine, True)
        assert made.claims is not None and made._held is not None
        for claims in made.claims.values():
            assert len([kernel for kernel in claims.claimed.values() if "bf16" in kernel]) == 36
        for held in made._held.values():
            if engine == "torch":
                assert not [weight for weight in held.weights if weight.dim() > 1 and weight.dtype.itemsize != 2]
            else:
                matrices = [p for p in held.graph.parameters() if len(p.shape or ()) > 1]
                assert {p.dtype for p in matrices} == {"bf16"}
                assert not [use for p in matrices for use in p.uses if use.node is not None and use.node.op == "onnx.Cast"]


@pytest.mark.parametrize("cache", ["growing storage=int8", "static storage=int8", "growing storage=float16"])
@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_attention_reads_caches_as_they_are_stored(cache: str, engine: str) -> None:
    """The graph of single tokens widens no cache, whose front is all that is read; rows and paddings as without kernels."""
    model = program("", f"kv_cache{{last_logits=true form={cache}}}")
    made, plain = ag.compile(model, engine, require_kernels=True), ag.compile(model, engine, kernels=False)
    assert made.claims is not None
    kernels = list(made.claims["decode"].claimed.values())
    assert len([kernel for kernel in kernels if "attention" in kernel]) == 5 and not any("dequantize" in k for k in kernels)
    for batch in (1, 3):
        same_but_for_rounding(converse(made, batch), converse(plain, batch))
    ids, mask = np.random.default_rng(0).integers(3, 500, (2, 70)), np.ones((2, 70), np.int64)
    mask[1, :4] = 0
    sessions = [each.session(2) for each in (made, plain)]
    turns = ((0, 68), (68, 69), (69, 70))
    same_but_for_rounding(*([s.feed(ids[:, a:b], mask[:, a:b])["logits"] for a, b in turns] for s in sessions))


def same_but_for_rounding(found: list[Array], expected: list[Array]) -> None:
    """A number next to where the rounding of a cache turns may fall on its other side, with all that follows: far less than
    what storage in 8 bits costs (5e-3 to 4e-2)."""
    assert errors(found, expected).max() < 1e-3


def test_attention_over_a_ring_in_8_bits() -> None:
    """Windows, several tokens for each key head, and heads that no vector fits."""
    model = ag.run(zoo.captured("gemma3"), "kv_cache{form=ring storage=int8}", parity="none", reproducer=False).program
    for engine in ("torch", "onnxruntime"):
        made, plain = ag.compile(model, engine, require_kernels=True), ag.compile(model, engine, kernels=False)
        assert made.claims is not None and "attention" in " ".join(made.claims["decode"].claimed.values())
        sessions, rng = [each.session(2) for each in (made, plain)], np.random.default_rng(1)
        tokens = [rng.integers(3, zoo.VOCAB, (2, count)) for count in (5, 1, 1, 3, 1, 1)]
        same_but_for_rounding(*([session.feed(each)["logits"] for each in tokens] for session in sessions))


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_the_kernels_ran(engine: str) -> None:
    made = ag.compile(program(GATED), engine)
    assert made.claims is not None
    before = library().ag_runs()
    found = converse(made)
    if engine == "onnxruntime":
        assert library().ag_runs() - before >= 6 * len(made.claims["decode"].claimed) - 10
    else:  # nothing counts there: their activations of 16 bits show in every step, where another order of sums would not
        expected = without_kernels(GATED, engine)
        assert all(worst([one], [other]) > 5e-6 for one, other in zip(found, expected, strict=True))
    assert any("in_out" in kernel for kernel in made.claims["decode"].claimed.values())
    if engine == "onnxruntime":  # what each token of a prompt drops is not skipped: together they drop next to nothing
        prompt = list(made.claims["prefill"].claimed.values())
        assert "gate" in prompt and any("out_in" in kernel for kernel in prompt) and not any("in_out" in k for k in prompt)
    assert any("out_in" in kernel for kernel in made.claims["decode"].claimed.values())


@pytest.mark.slow
def test_torch_compile_calls_kernels() -> None:
    """Whole graphs, without breaks (they are compiled with fullgraph)."""
    found = converse(ag.compile(program(GATED), "torch.compile"))
    assert worst(found, without_kernels(GATED, "torch")) < ROUNDED


def test_text_is_the_same() -> None:
    texts = {
        (engine, kernels): ag.generate(compiled(GATED, engine, kernels), "Once upon a time", 40).text
        for engine in ("torch", "onnxruntime")
        for kernels in (False, True)
    }
    assert len(set(texts.values())) == 1 and all(len(text) > 40 for text in texts.values())


def test_large_linears_in_float() -> None:
    """Of a model whose weights are large enough, linears that are neither gated nor quantized have kernels, too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=zoo.VOCAB, hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    graph = ag.load(zoo._random(LlamaForCausalLM(config), "llama"))
    model = ag.run(graph, "kv_cache{last_logits=true}", parity="none", reproducer=False).program
    for engine in ("torch", "onnxruntime"):
        made = ag.compile(model, engine, require_kernels=True)
        assert made.claims is not None and len([k for k in made.claims["decode"].claimed.values() if "linear" in k]) >= 10
        assert not any("linear" in kernel for kernel in made.claims["prefill"].claimed.values())
        session, plain = made.session(), ag.compile(model, engine, kernels=False).session()
        for count in (5, 1, 1, 3, 1):
            tokens = np.random.default_rng(count).integers(3, zoo.VOCAB, (1, count))
            found, expected = (each.feed(tokens)["logits"] for each in (session, plain))
            assert worst([found], [expected]) < 1e-5


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from actgraph.runtime.native import library as native

    monkeypatch.setenv("ACTGRAPH_LIBRARY", "")
    monkeypatch.setattr(native, "_SAID", [])
    made = ag.compile(program(GATED), "onnxruntime")
    assert made.kernels is False and "kernels were not built" in capsys.readouterr().err
    assert made.claims is not None and not made.claims["decode"].claimed
    ag.compile(program(GATED), "onnxruntime")
    assert capsys.readouterr().err == "", "it is said once"
    with pytest.raises(UnsupportedError, match="library was not built"):
        ag.compile(program(GATED), "onnxruntime", require_kernels=True)
    monkeypatch.undo()
    assert worst(converse(made), converse(ag.compile(program(GATED), "onnxruntime"))) < ROUNDED


def test_a_node_without_a_kernel_is_an_error_where_kernels_are_required() -> None:
    half = ag.run(ag.load("stories260k", dtype="float16"), f"{GATED}, kv_cache", corpus=TEXTS, parity="none", reproducer=False)
    with pytest.raises(UnsupportedError, match=r"has no kernel: .* has no kernel for f16"):
        ag.compile(half.program, "torch", require_kernels=True)
    made = ag.compile(half.program, "torch")
    assert made.claims is not None and made.claims["decode"].unclaimed
    quantized = program("quantize{weights=int8}")
    with pytest.raises(UnsupportedError, match=r"runs without kernels: its slots are explicit \(asked for\)"):
        ag.compile(quantized, "torch", lowering="explicit", require_kernels=True)
    assert np.isfinite(converse(made)[-1]).all()
