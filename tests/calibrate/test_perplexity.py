"""Perplexity of the real model, as its documentation states it."""

from __future__ import annotations

import numpy as np
import pytest

import actgraph as ag
from actgraph.calibrate.corpora import Corpus
from actgraph.calibrate.encode import token_ids
from actgraph.calibrate.perplexity import log_likelihoods, perplexity
from actgraph.errors import InputError
from tests.calibrate import models


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_the_real_model_has_its_documented_perplexity(dialect: str) -> None:
    found = log_likelihoods(models.stories(dialect))
    assert found.tokens == 9136
    assert found.perplexity == pytest.approx(5.17, abs=0.005)


def test_documents_begin_with_bos_and_are_cut_at_the_context() -> None:
    graph = models.stories()
    documents = [token_ids(graph, str(document), 512) for document in Corpus.of()]
    assert all(ids[0] == 1 for ids in documents)
    assert max(map(len, documents)) == 512
    assert sum(len(ids) - 1 for ids in documents) == 9136


def test_each_document_has_the_likelihood_that_it_has_alone() -> None:
    graph = models.stories()
    texts = ["Once upon a time there was a cat.", "Tom", "The dog saw a big red ball in the park and ran to it."]
    together = log_likelihoods(graph, texts, batch_size=3)
    for index, text in enumerate(texts):
        ids = np.array([token_ids(graph, text)])
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
        logits = graph.run(inputs)["logits"][0].astype(np.float64)
        scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        direct = sum(scores[i, ids[0, i + 1]] for i in range(ids.shape[1] - 1))
        assert together.totals[index] == pytest.approx(direct, rel=1e-5)
        assert together.counts[index] == ids.shape[1] - 1
    assert together.perplexity == pytest.approx(np.exp(-together.totals.sum() / together.counts.sum()))


def test_batching_does_not_matter_and_nonsense_is_less_likely() -> None:
    graph = models.stories()
    one, many = (log_likelihoods(graph, None, max_length=64, batch_size=size) for size in (1, 7))
    np.testing.assert_allclose(one.totals, many.totals, rtol=1e-5)
    assert perplexity(graph, ["xq zv jj kk ww qqq"]) > 10 * perplexity(graph, ["Once upon a time there was a little girl."])


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_a_cache_starts_empty_for_each_document(dialect: str) -> None:
    """Documents of several lengths, padded on the right: with a cache of any kind, in one graph or a program."""
    graph = models.stories(dialect)
    texts = ["Once upon a time there was a cat.", "Tom", "The dog saw a big red ball in the park and ran to it."]
    expected = log_likelihoods(graph, texts)
    for options in ("", "{graphs=combined}", "{form=static max_length=64}"):
        found = log_likelihoods(ag.run(graph, f"kv_cache{options}", parity="none").program, texts)
        np.testing.assert_allclose(found.totals, expected.totals, rtol=1e-5)
        assert np.array_equal(found.counts, expected.counts)
    short = ag.run(graph, "kv_cache{form=static max_length=6}", parity="none").program
    np.testing.assert_allclose(
        log_likelihoods(short, texts).totals, log_likelihoods(graph, texts, max_length=6).totals, rtol=1e-5
    )
    last = ag.run(graph, "kv_cache{last_logits=true}", parity="none").program
    with pytest.raises(InputError, match="no logits per token") as caught:
        perplexity(last, texts)
    assert "last_logits" in caught.value.hint


def test_what_is_no_language_model_is_an_error() -> None:
    with pytest.raises(InputError, match="no causal language model"):
        perplexity(models.mlp(), ["text"])
    graph = models.stories()
    graph.companions.tokenizer = None
    with pytest.raises(InputError, match="no tokenizer"):
        perplexity(graph, ["text"])
