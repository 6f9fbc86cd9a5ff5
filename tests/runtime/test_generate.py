"""Text generation: the documented continuation in both engines, sampling, streaming, limits, bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.cli.demo import DOCUMENTED
from actgraph.errors import InputError

Stories = Callable[[], ag.Graph]


@pytest.fixture(scope="module")
def onnx(stories: Stories, tmp_path_factory: pytest.TempPathFactory) -> ag.Graph:
    return ag.load(stories().save(tmp_path_factory.mktemp("generate") / "stories.onnx"))


def test_documented_continuation_token_for_token(stories: Stories, onnx: ag.Graph) -> None:
    graph = stories()
    expected = graph.companions.tokenizer.encode(DOCUMENTED).ids
    assert expected[0] == 1 and len(expected) == 87
    for candidate in (graph, onnx):
        made = ag.generate(candidate, "", len(expected) - 1)
        assert made.prompt_tokens == (1,)
        assert list(made.tokens) == expected[1:]
        assert made.text == DOCUMENTED == str(made)
        assert made.reason == "length"


def test_equals_transformers(stories: Stories) -> None:
    from transformers import AutoModelForCausalLM

    folder = Path(ag.__file__).parent / "data" / "stories260k"
    model = AutoModelForCausalLM.from_pretrained(folder)
    made = ag.generate(stories(), "Tom and Lily", 25)
    ids = torch.tensor([made.prompt_tokens])
    with torch.no_grad():
        reference = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=25, do_sample=False)
    assert list(made.tokens) == reference[0, ids.shape[1] :].tolist()


def test_stream_gives_the_same_text_in_pieces(stories: Stories) -> None:
    whole = ag.generate(stories(), "Once upon a time", 20)
    steps = list(ag.stream(stories(), "Once upon a time", 20))
    assert tuple(step.token for step in steps) == whole.tokens
    assert "".join(step.text for step in steps) == whole.text
    assert whole.text.startswith(", there was")


def test_incomplete_characters_wait(stories: Stories) -> None:
    """A character of several bytes appears with its last byte; what never completes is still part of the text."""
    graph = stories()
    tokens = graph.companions.tokenizer.encode("日").ids[-3:]
    assert [graph.companions.tokenizer.decode([t]) for t in tokens] == ["\ufffd"] * 3, "one token a byte"
    made = _scripted(graph, tokens)
    assert [step.text for step in made] == ["", "", "日"]
    assert [step.text for step in _scripted(graph, tokens[:1])] == ["\ufffd"]


def _scripted(graph: ag.Graph, tokens: list[int]) -> list[ag.Step]:
    """The steps of a generation whose most likely tokens are ``tokens``."""
    from actgraph.runtime.generate import _Generator
    from actgraph.runtime.sampling import Sampling

    generator = _Generator(graph, ["a"], len(tokens), Sampling())
    script = iter(tokens)

    def feed(ids: np.ndarray, valid: np.ndarray) -> dict[str, np.ndarray]:
        scores = np.zeros((1, 1, 512))
        scores[..., next(script)] = 1.0
        return {"logits": scores}

    generator.session.feed = feed  # type: ignore[method-assign, assignment]
    return [step for steps in generator for step in steps.values()]


def test_sampling_is_reproducible_and_follows_the_seed(stories: Stories) -> None:
    graph = stories()
    draws = [ag.generate(graph, "Once", 15, temperature=1.0, seed=seed).tokens for seed in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]
    assert ag.generate(graph, "Once", 15, temperature=1.0, top_k=1).tokens == ag.generate(graph, "Once", 15).tokens
    assert ag.generate(graph, "Once", 15, temperature=1e-4, seed=9).tokens == ag.generate(graph, "Once", 15).tokens


def test_sampling_has_the_distribution_of_the_logits() -> None:
    from actgraph.runtime.sampling import Sampling

    counts = np.zeros(4)
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    for seed in range(2000):
        counts[Sampling(1.0, seed=seed).pick(logits, 0)] += 1
    assert np.abs(counts / 2000 - np.exp(logits)).max() < 0.03


def test_top_p_draws_among_the_most_likely_that_reach_it() -> None:
    from actgraph.runtime.sampling import Sampling

    logits = np.log(np.array([0.05, 0.5, 0.15, 0.3]))
    for top_p, expected in ((0.49, {1}), (0.51, {1, 3}), (0.79, {1, 3}), (0.9, {1, 3, 2}), (1.0, {0, 1, 2, 3})):
        assert {Sampling(1.0, top_p=top_p, seed=seed).pick(logits, 0) for seed in range(200)} == expected
    assert {Sampling(1.0, top_k=2, top_p=0.9, seed=seed).pick(logits, 0) for seed in range(200)} == {1, 3}


def test_stops_at_the_end_token(stories: Stories) -> None:
    graph = stories()
    first = ag.generate(graph, "Once upon a time", 10).tokens
    graph.companions.generation_config = {**graph.companions.generation_config, "eos_token_id": [first[4]]}
    made = ag.generate(graph, "Once upon a time", 10)
    assert made.reason == "end" and made.tokens == first[:4]
    assert ag.generate(graph, "Once upon a time", 10, stop_at_end=False).tokens == first


def test_stops_when_the_context_is_full(stories: Stories) -> None:
    graph = stories()
    graph.companions.config = {**graph.companions.config, "max_position_embeddings": 8}
    made = ag.generate(graph, [1, 403, 407], 20)
    assert made.reason == "context" and len(made.prompt_tokens) + len(made.tokens) == 9
    with pytest.raises(InputError, match="context holds 8"):
        ag.generate(graph, [1] * 9, 1)


def test_nothing_to_generate(stories: Stories) -> None:
    assert ag.generate(stories(), "Once", 0).tokens == ()


def test_bad_arguments_are_refused_before_the_first_step(stories: Stories) -> None:
    graph = stories()
    for options, words in (
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"temperature": -0.5}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ):
        with pytest.raises(InputError, match=words):
            ag.stream(graph, "Once", **options)
    with pytest.raises(InputError, match="no prompts"):
        ag.generate(graph, [[]][:0])
    graph.companions.tokenizer = None
    with pytest.raises(InputError, match="no tokenizer"):
        ag.generate(graph, "Once")
    assert ag.generate(graph, [1], 2).text == "403 407"


def test_other_models_are_refused() -> None:
    linear = ag.trace(torch.nn.Linear(4, 2), (torch.zeros(3, 4),))
    with pytest.raises(InputError, match="takes no input_ids"):
        ag.generate(linear, [1])


def test_an_unknown_input_is_refused(stories: Stories) -> None:
    from actgraph.ops import DType, TensorType

    graph = stories()
    with graph.edit("test") as editor:
        editor.add_input("strange", TensorType(DType.F32, ("batch",)))
    with pytest.raises(InputError, match="strange"):
        ag.generate(graph, [1])


@pytest.fixture(scope="module")
def cached(stories: Stories) -> dict[str, ag.Graph]:
    """The model with a cache: growing and fixed, in both dialects."""
    from actgraph.formats.onnx_export import to_onnx

    graphs = {"torch": stories(), "onnxruntime": to_onnx(stories())}
    forms = {"growing": "kv_cache{graphs=combined}", "static": "kv_cache{graphs=combined form=static max_length=512}"}
    return {f"{e} {form}": ag.run(graph, text).graph for e, graph in graphs.items() for form, text in forms.items()}


def test_with_a_cache_the_text_is_the_same(stories: Stories, cached: dict[str, ag.Graph]) -> None:
    for graph in cached.values():
        made = ag.generate(graph, "", 86)
        assert made.text == DOCUMENTED and made.reason == "length"
    drawn = ag.generate(stories(), "Tom", 20, temperature=0.8, top_p=0.9, seed=5)
    assert all(ag.generate(g, "Tom", 20, temperature=0.8, top_p=0.9, seed=5).tokens == drawn.tokens for g in cached.values())


def test_a_batch_is_its_rows(stories: Stories, cached: dict[str, ag.Graph]) -> None:
    prompts = ["Once upon a time", "Tom", "The little dog saw a big red ball and"]
    single = [ag.generate(stories(), prompt, 24) for prompt in prompts]
    assert ag.generate(stories(), prompts, 24) == single
    for graph in cached.values():
        assert ag.generate(graph, prompts, 24) == single


def test_chunks_of_a_prompt_change_nothing(cached: dict[str, ag.Graph]) -> None:
    prompt = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    for graph in cached.values():
        whole = ag.generate(ag.compile(graph), prompt, 20)
        assert ag.generate(ag.compile(graph, chunk=7), prompt, 20) == whole


def test_stop_strings_end_the_text_before_them(cached: dict[str, ag.Graph]) -> None:
    graph = cached["torch growing"]
    plain = ag.generate(graph, "Once upon a time", 40).text
    stop = plain[30:36]
    made = ag.generate(graph, "Once upon a time", 40, stop=[stop, "never said"])
    assert made.reason == "stop" and made.text == plain[: plain.index(stop)]
    steps = list(ag.stream(graph, "Once upon a time", 40, stop=stop))
    assert "".join(step.text for step in steps) == made.text
    assert "".join(step.text for step in ag.stream(graph, "Once upon a time", 40, stop=plain[-3:] + "#")) == plain


def test_sessions_do_not_disturb_each_other(cached: dict[str, ag.Graph]) -> None:
    """Two interleaved sessions, one that is thrown away half-way, and several threads on one Compiled."""
    from concurrent.futures import ThreadPoolExecutor

    for graph in cached.values():
        compiled = ag.compile(graph)
        prompts = ["Once upon a time", "Tom and Lily", "The sun"]
        alone = [ag.generate(graph, prompt, 15) for prompt in prompts]
        streams = [ag.stream(compiled, prompt, 15) for prompt in prompts]
        mixed: list[list[int | None]] = [[], [], []]
        for _ in range(15):
            for row, steps in enumerate(streams):
                mixed[row].append(next(steps).token)
        assert [tuple(tokens) for tokens in mixed] == [made.tokens for made in alone]
        left = ag.stream(compiled, "A dragon", 15)
        next(left)
        del left
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(lambda prompt: ag.generate(compiled, prompt, 15), prompts)) == alone  # noqa: B023


def test_a_session_starts_clean_after_a_reset(cached: dict[str, ag.Graph]) -> None:
    for graph in cached.values():
        session = ag.compile(graph).session()
        ids = np.asarray([[1, 403, 407, 261]])
        first = session.feed(ids)["logits"]
        session.feed(ids)
        session.reset()
        assert session.length == 0
        assert np.array_equal(session.feed(ids)["logits"], first)


def test_a_full_context_is_an_error(cached: dict[str, ag.Graph], stories: Stories) -> None:
    graph = ag.run(stories(), "kv_cache{graphs=combined form=static max_length=8}").graph
    session = ag.compile(graph).session()
    session.feed(np.ones((1, 6), np.int64))
    with pytest.raises(InputError, match="the context is full: 6 of 8 tokens are used, and 3 are to come"):
        session.feed(np.ones((1, 3), np.int64))
    assert ag.generate(graph, [1, 403, 407], 20).reason == "context"


def test_engines(stories: Stories) -> None:
    expected = ag.generate(stories(), "Once", 10).tokens
    assert ag.generate(ag.compile(stories(), "onnxruntime"), "Once", 10).tokens == expected
    with pytest.raises(InputError, match="no engine 'tensorrt'"):
        ag.compile(stories(), "tensorrt")
    with pytest.raises(ag.ActgraphError, match="which torch does not run"):
        ag.compile(ag.compile(stories(), "onnxruntime").graph, "torch")
