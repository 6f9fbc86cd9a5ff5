"""One vector of each document: which tokens it is the mean of, and that nothing else matters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import actgraph as ag
from actgraph.calibrate.corpora import Corpus, Marked, Prompted
from actgraph.calibrate.document_rows import collect_rows, pooled_request
from actgraph.calibrate.engine import collect
from actgraph.calibrate.files import load, save
from actgraph.calibrate.statistics import Request
from actgraph.errors import InputError, OptionError, SiteError
from actgraph.graph import Graph
from actgraph.graph.graph import Array
from tests import zoo

SITE = "blocks.1.resid_post"
TEXTS = ["Once upon a time there was a dog.", "The sun", "Lily and Ben went to the park to play with a ball.", "She said no."]
EXCHANGES = [
    ("Once upon a time", " there was a big dog."),
    ("The sun was", " hot."),
    ("Lily", " and Ben went to the park today."),
]


@pytest.fixture(scope="module")
def graph() -> Graph:
    return zoo.captured("stories260k")


def hidden(graph: Graph, ids: list[int]) -> Array:
    """The site's value ``[tokens, width]`` for one text, computed alone."""
    tapped = ag.run(graph, f"tap{{site={SITE}}}", parity="none").graph
    array = np.asarray([ids])
    full = {"input_ids": array, "attention_mask": np.ones_like(array), "position_ids": np.arange(len(ids))[None]}
    value: Array = tapped.run(full)[SITE][0]
    return value


def ids_of(graph: Graph, text: str) -> list[int]:
    tokenizer = graph.companions.tokenizer
    assert tokenizer is not None
    return list(tokenizer.encode(text).ids)


@pytest.mark.parametrize("position", ["last", "mean", "first:3"])
def test_each_document_is_what_it_is_alone(graph: Graph, position: str) -> None:
    found = {
        size: collect_rows(graph, [SITE], TEXTS, position=position, batch_size=size, cache=False)[SITE] for size in (1, 3, 8)
    }
    for row, text in enumerate(TEXTS):
        alone = hidden(graph, ids_of(graph, text))
        expected = {"last": alone[-1], "mean": alone.mean(0), "first:3": alone[:3].mean(0)}[position]
        for rows in found.values():
            assert rows.shape == (len(TEXTS), alone.shape[1]) and rows.dtype == np.float32
            np.testing.assert_allclose(rows[row], expected, atol=2e-5)


def test_responses_and_spans(graph: Graph) -> None:
    """The response is predicted from the last token of the prompt on, and by all of its own tokens but the last."""
    documents = [Prompted(*pair) for pair in EXCHANGES]
    rows = collect_rows(graph, [SITE], documents, position="response", cache=False)[SITE]
    generated = collect_rows(graph, [SITE], documents, where="generated", position="mean", cache=False)[SITE]
    for row, (prompt, response) in enumerate(EXCHANGES):
        first, alone = ids_of(graph, prompt), hidden(graph, ids_of(graph, prompt + response))
        np.testing.assert_allclose(rows[row], alone[len(first) - 1 : -1].mean(0), atol=2e-5)
        np.testing.assert_allclose(generated[row], alone[len(first) :].mean(0), atol=2e-5)
    marked = collect_rows(graph, [SITE], [Marked(TEXTS[2], "park")], position="span", cache=False)[SITE]
    tokenizer = graph.companions.tokenizer
    assert tokenizer is not None
    encoded, at = tokenizer.encode(TEXTS[2]), TEXTS[2].index("park")
    inside = [start < at + 4 and end > at for start, end in encoded.offsets]
    assert 0 < sum(inside) < len(inside)
    np.testing.assert_allclose(marked[0], hidden(graph, list(encoded.ids))[inside].mean(0), atol=2e-5)


def test_clauses_choose_tokens(graph: Graph) -> None:
    ids = ids_of(graph, TEXTS[0])
    alone = hidden(graph, ids)
    for clause, kept in (
        ("2:4", [2, 3]), ("prompt[-2:]", [len(ids) - 2, len(ids) - 1]),
        (f"token({ids[3]})", [i for i, t in enumerate(ids) if t == ids[3]]),
        ("all ! 0", list(range(1, len(ids)))),
    ):  # fmt: skip
        (row,) = collect_rows(graph, [SITE], TEXTS[:1], position="mean", where=clause, cache=False)[SITE]
        np.testing.assert_allclose(row, alone[kept].mean(0), atol=2e-5)
    with pytest.raises(InputError, match=r"no token of document 1 \(from 0\) counts"):
        collect_rows(graph, [SITE], TEXTS, position="mean", where="7:", cache=False)


def test_other_statistics_of_documents(graph: Graph, tmp_path: Path) -> None:
    """Mean and Gram matrix are those of the rows; parts of a corpus merge in order, also through files."""
    requests = [pooled_request(SITE, kind, "mean") for kind in ("rows", "mean", "gram", "norm")]
    whole = collect(graph, requests, TEXTS, cache=False)
    rows = whole.array(requests[0]).astype(np.float64)
    np.testing.assert_allclose(whole.array(requests[1]), rows.mean(0), atol=1e-6)
    np.testing.assert_allclose(whole.array(requests[2]), rows.T @ rows, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(whole.array(requests[3]), np.linalg.norm(rows, axis=1).mean(), rtol=1e-6)
    parts = [collect(graph, requests, TEXTS, start=a, stop=b, batch_size=2, cache=False) for a, b in ((0, 1), (1, 4))]
    parts = [load(save(part, tmp_path / f"{i}.safetensors")) for i, part in enumerate(parts)]
    np.testing.assert_allclose(parts[0].merge(parts[1]).array(requests[0]), rows, atol=2e-5)
    cached = [collect_rows(graph, [SITE], TEXTS, cache=tmp_path / "cache")[SITE] for _ in range(2)]
    assert np.array_equal(*cached)


def test_where_a_response_begins(graph: Graph) -> None:
    """A token with a letter of the response is of the response; ids are taken as they are."""
    from actgraph.calibrate.encode import PROMPT_LENGTH, text_sample

    begun = [int(text_sample(graph, Prompted(*pair))[PROMPT_LENGTH]) for pair in (EXCHANGES[0], ("Once upon a ti", "me there"))]
    assert begun == [1 + 4, 1 + 3], "BOS and words"
    sample = text_sample(graph, Corpus.of([([1, 5, 7], [9, 11])]).documents[0])  # type: ignore[arg-type]
    assert (sample["input_ids"].tolist(), int(sample[PROMPT_LENGTH])) == ([1, 5, 7, 9, 11], 3)


def test_files_of_exchanges(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": p, "response": r}) for p, r in EXCHANGES))
    assert Corpus.of(path).documents == tuple(Prompted(*pair) for pair in EXCHANGES)
    assert Corpus.of([{"text": "a cat", "span": "cat"}]).documents == (Marked("a cat", "cat"),)
    path.write_text('{"response": "no prompt"}')
    with pytest.raises(InputError, match="line 1: 'response' without a 'prompt'"):
        Corpus.of(path)


def test_what_cannot_be(graph: Graph) -> None:
    with pytest.raises(OptionError, match="no position 'middle'"):
        pooled_request(SITE, "rows", "middle")
    with pytest.raises(OptionError, match="pool"):
        Request(SITE, "rows")
    with pytest.raises(InputError, match="a prompt and a response"):
        collect_rows(graph, [SITE], TEXTS, position="response", cache=False)
    with pytest.raises(InputError, match="'cow' is not in the text"):
        collect_rows(graph, [SITE], [Marked("a cat", "cow")], position="span", cache=False)
    with pytest.raises(SiteError, match="no fixed width"):
        collect_rows(graph, ["blocks.0.attn.pattern"], TEXTS, cache=False)
    with pytest.raises(InputError, match="documents are cut to 4"):
        collect_rows(graph, [SITE], [Prompted(*EXCHANGES[0])], max_length=4, cache=False)
