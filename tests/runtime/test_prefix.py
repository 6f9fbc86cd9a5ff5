"""Prompts that begin alike: the same results as without reuse, fewer tokens computed, and never another graph's prefix."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

import actgraph as ag
from actgraph.errors import UnsupportedError
from actgraph.graph import Graph
from actgraph.graph.context import graph_context
from actgraph.ops.dtypes import DType
from tests import zoo

BLOCK = 4
PREFIX = np.random.default_rng(1).integers(1, zoo.VOCAB, 19).tolist()
NEW = 6
VECTOR = "[" + ", ".join(repr(round(float(v), 4)) for v in np.random.default_rng(2).normal(0, 0.5, zoo.WIDTH)) + "]"
FORMS = ("growing graphs=combined", "static graphs=combined", "growing", "static")


@functools.cache
def cached(dialect: str, form: str, before: str = "", name: str = "gpt2") -> Graph | ag.Program:
    graph = zoo.captured(name) if dialect == "fx" else zoo.exported(name)
    passes = f"{before}{', ' if before else ''}kv_cache{{form={form}}}"
    result = ag.run(graph, passes, parity="none", reproducer=False)
    return result.program if "combined" not in form else result.graph


def steer(scale: float, sign: int = 1) -> str:
    vector = VECTOR if sign > 0 else VECTOR.replace("[", "[-", 1).replace("--", "")
    return f"steer{{vector={vector} site=blocks.0.resid_post scale={scale} fold=false}}"


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers of tokens that sessions compute."""
    counts: list[int] = []
    feed = ag.Session.feed

    def counting(self: ag.Session, tokens: np.ndarray, *rest: object) -> dict[str, np.ndarray]:
        counts.append(tokens.shape[1])
        return feed(self, tokens, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(ag.Session, "feed", counting)
        yield counts


def generate(compiled: ag.Compiled, prompt: list[int], **options: object) -> ag.Generation:
    return ag.generate(compiled, prompt, NEW, stop_at_end=False, **options)  # type: ignore[arg-type, call-overload, no-any-return]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_the_same_as_without_and_less_to_compute(dialect: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prefixes = ag.PrefixCache(block=BLOCK)
    graph = cached(dialect, form)
    plain, reusing = ag.compile(graph), ag.compile(graph, prefixes=prefixes)
    prompts = [PREFIX, PREFIX, [*PREFIX, 7, 8], [*PREFIX[:9], 3], PREFIX[:8], [PREFIX[0] + 1, *PREFIX[1:]], PREFIX]
    hits = [0, 16, 16, 8, 4, 0, 16]
    for prompt, hit in zip(prompts, hits, strict=True):
        expected = generate(plain, prompt)
        with counted(monkeypatch) as counts:
            assert generate(reusing, prompt) == expected
        assert counts == [len(prompt) - hit, *[1] * (NEW - 1)]
    assert prefixes.statistics.tokens == sum(hits)


#: Each form in both dialects and both models, in turn.
IN_TURN = [(("fx", "onnx")[(n + other) % 2], form, name) for n, form in enumerate(FORMS)
           for other, name in enumerate(("gpt2", "llama"))]  # fmt: skip


@pytest.mark.parametrize(("dialect", "form", "name"), IN_TURN)
def test_logits_are_equal_bit_for_bit_where_chunks_are(dialect: str, form: str, name: str) -> None:
    """With chunks of a block the same calls compute them; with others they differ by rounding."""
    graph = cached(dialect, form, name=name)
    for chunk, tolerance in ((BLOCK, 0.0), (512, 1e-5)):
        prefixes = ag.PrefixCache(block=BLOCK)
        compiled = ag.compile(graph, chunk=chunk)
        results = []
        for reuse in (False, True, True):
            session = compiled.session()
            fed = prefixes.feed(session, np.asarray([PREFIX])) if reuse else session.feed(np.asarray([PREFIX]))
            logits = [fed["logits"][:, -1], *(session.feed(np.asarray([[t]]))["logits"][:, -1] for t in (5, 9))]
            results.append(np.concatenate(logits))
        assert prefixes.statistics.tokens == 16
        assert np.array_equal(results[0], results[1])
        np.testing.assert_allclose(results[2], results[0], rtol=0, atol=tolerance * np.abs(results[0]).max())


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_another_strength_or_vector_is_another_prefix(dialect: str) -> None:
    prefixes = ag.PrefixCache(block=BLOCK)
    made = []
    for before in ("", steer(1.0), steer(1.5), steer(1.0, -1), "sparsify{threshold=0.05}", "quantize{weights=int8}"):
        graph = cached(dialect, "growing graphs=combined", before)
        before_it = prefixes.statistics
        made.append(generate(ag.compile(graph, prefixes=prefixes), PREFIX))
        assert prefixes.statistics.hits == before_it.hits, before
        assert made[-1] == generate(ag.compile(graph), PREFIX)
        assert generate(ag.compile(graph, prefixes=prefixes), PREFIX) == made[-1]
        assert prefixes.statistics.hits == before_it.hits + 4, "the same graph, compiled anew"
    assert len({result.tokens for result in made[:4]}) > 1


def test_both_engines_and_two_models_share_one_cache() -> None:
    prefixes = ag.PrefixCache(block=BLOCK)
    graphs = [cached(d, "growing graphs=combined", name=n) for d in ("fx", "onnx") for n in ("gpt2", "llama")]
    alone = [generate(ag.compile(graph), PREFIX) for graph in graphs]
    sharing = [ag.compile(graph, prefixes=prefixes) for graph in graphs]
    for _ in range(2):
        assert [generate(compiled, PREFIX) for compiled in sharing] == alone
    assert prefixes.statistics.hits == prefixes.statistics.misses == 4 * len(graphs)


def _sums(prefixes: ag.PrefixCache) -> dict[bytes, str]:
    return {
        key: hashlib.sha256(b"".join(part.tobytes() for part in block.arrays.values())).hexdigest()
        for key, block in prefixes._blocks.items()
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_no_session_ever_writes_into_a_block(dialect: str, form: str) -> None:
    """Several sessions go on from the same blocks, in turns, and one is thrown away half-way."""
    prefixes = ag.PrefixCache(block=BLOCK)
    compiled = ag.compile(cached(dialect, form), prefixes=prefixes)
    prompts = [[*PREFIX, token] for token in (1, 2, 3)]
    alone = [generate(ag.compile(cached(dialect, form)), prompt).tokens for prompt in prompts]
    generate(compiled, PREFIX)
    before = _sums(prefixes)
    left = ag.stream(compiled, [*PREFIX, 4], NEW, stop_at_end=False)
    next(left)
    del left
    streams = [ag.stream(compiled, prompt, NEW, stop_at_end=False) for prompt in prompts]
    made = list(zip(*[[step.token for step in steps] for steps in zip(*streams, strict=True)], strict=True))
    assert made == alone
    after = _sums(prefixes)
    assert before and {key: after[key] for key in before} == before


def test_threads(dialect: str = "fx") -> None:
    prefixes = ag.PrefixCache(max_bytes=40_000, block=BLOCK)
    compiled = ag.compile(cached(dialect, "static graphs=combined"), prefixes=prefixes)
    prompts = [[*PREFIX[: 6 + 3 * (n % 5)], n] for n in range(12)]
    alone = [generate(ag.compile(cached(dialect, "static graphs=combined")), prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda prompt: generate(compiled, prompt), prompts)) == alone
    assert prefixes.statistics.tokens and prefixes.statistics.bytes <= 40_000


def test_a_batch_does_not_use_it_and_a_batch_of_one_does() -> None:
    prefixes = ag.PrefixCache(block=BLOCK)
    compiled = ag.compile(cached("fx", "growing graphs=combined"), prefixes=prefixes)
    both = ag.generate(compiled, [PREFIX, PREFIX[:3]], NEW, stop_at_end=False)
    assert prefixes.statistics.blocks == 0
    assert ag.generate(compiled, [PREFIX], NEW, stop_at_end=False) == both[:1]
    assert prefixes.statistics.blocks == 4


def test_a_clause_about_the_prompt_makes_prompts_of_other_lengths_others() -> None:
    """Steering of the last prompt token: the same beginning has other keys where it is the end."""
    graph = zoo.captured("gpt2")
    vector = np.random.default_rng(3).normal(0, 2.0, zoo.WIDTH).astype(np.float32)
    with graph.edit("test") as editor:
        lengths = editor.insert("reshape", [graph_context(graph, editor, "prompt_lengths")], {"shape": (-1, 1)}).output
        left = editor.insert("sub", [graph_context(graph, editor, "positions"), lengths]).output
        two = editor.insert("cast", [editor.insert("add", [left, np.asarray(3)]).output], {"to": DType.F32}).output
        strength = editor.insert("clip", [two, 0.0, 1.0]).output  # the last two tokens of the prompt
        editor.insert_at(graph.site("blocks.0.resid_post"), "actgraph.shift", [vector, strength])
    graph = ag.run(graph, "kv_cache{graphs=combined}").graph
    prefixes = ag.PrefixCache(block=BLOCK)
    plain, reusing = ag.compile(graph), ag.compile(graph, prefixes=prefixes)
    for prompt, hits in ((PREFIX[:8], 0), (PREFIX[:9], 0), ([*PREFIX[:8], 1], 2), (PREFIX[:9], 4)):
        assert generate(reusing, prompt) == generate(plain, prompt)
        assert prefixes.statistics.hits == hits


def test_state_without_an_entry_for_each_token_is_refused() -> None:
    for graph, why in (
        (zoo.captured("gpt2"), "no cache of keys and values"),
        (ag.run(zoo.captured("gemma3"), "kv_cache{form=ring graphs=combined}").graph, r"\(ring\) does not keep one entry"),
    ):
        with pytest.raises(UnsupportedError, match=why):
            ag.generate(ag.compile(graph, prefixes=ag.PrefixCache()), PREFIX, 2)
