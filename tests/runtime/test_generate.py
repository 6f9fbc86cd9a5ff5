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

    generator = _Generator(graph, "a", len(tokens), 0.0, 0, 0, True)
    script = iter(tokens)

    def logits(ids: np.ndarray) -> np.ndarray:
        scores = np.zeros(512)
        scores[next(script)] = 1.0
        return scores

    generator._logits = logits  # type: ignore[method-assign]
    return list(generator)


def test_sampling_is_reproducible_and_follows_the_seed(stories: Stories) -> None:
    graph = stories()
    draws = [ag.generate(graph, "Once", 15, temperature=1.0, seed=seed).tokens for seed in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]
    assert ag.generate(graph, "Once", 15, temperature=1.0, top_k=1).tokens == ag.generate(graph, "Once", 15).tokens
    assert ag.generate(graph, "Once", 15, temperature=1e-4, seed=9).tokens == ag.generate(graph, "Once", 15).tokens


def test_sampling_has_the_distribution_of_the_logits(stories: Stories) -> None:
    from actgraph.runtime.generate import _Generator

    generator = _Generator(stories(), [1], 1, 1.0, 0, 0, True)
    counts = np.zeros(4)
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    for generator.seed in range(2000):
        counts[generator._pick(logits)] += 1
    assert np.abs(counts / 2000 - np.exp(logits)).max() < 0.03


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
    ):
        with pytest.raises(InputError, match=words):
            ag.stream(graph, "Once", **options)
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
