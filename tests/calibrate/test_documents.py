"""One result for each document: its own tokens in the order of the corpus, whatever shares a batch with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.calibrate.documents import per_document
from actgraph.errors import InputError, SiteError
from tests import zoo

TEXTS = ["Once upon a time", "The sun", "Lily had a big red ball and she was very happy.", "Tim", "One day, Tim saw a dog."]


def alone(text: str, site: str) -> np.ndarray:
    """The activations of one text, run by itself."""
    graph = zoo.captured("stories260k")
    ids = np.array([graph.companions.tokenizer.encode(text).ids], np.int64)
    tapped = ag.run(graph, f"tap{{site={site}}}").graph
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
    return tapped.run(inputs)[site][0]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_each_document_by_itself(batch_size: int) -> None:
    graph, site = zoo.captured("stories260k"), "blocks.2.resid_post"
    got = per_document(graph, site, TEXTS, lambda x: np.append(x.max(0), len(x)), batch_size=batch_size, progress=False)
    for row, text in zip(got, TEXTS, strict=True):
        x = alone(text, site)
        assert row[-1] == len(x), "padding is no token"
        np.testing.assert_allclose(row[:-1], x.max(0), rtol=1e-4, atol=1e-4)
    assert np.abs(got[0, :-1] - got[1, :-1]).max() > 0.1


def test_places_of_an_image_are_its_tokens() -> None:
    net = torch.nn.Conv2d(3, 4, 1).eval()
    x = np.random.default_rng(0).normal(0, 1, (5, 3, 2, 6)).astype(np.float32)
    graph = ag.trace(net, (torch.from_numpy(x),), dynamic={"input": ("batch", None, None, None)}, name="net")
    name = graph.inputs()[0].name
    got = per_document(graph, "conv.0", {name: x}, lambda rows: rows, axis=1, batch_size=2, progress=False)
    with torch.no_grad():
        want = net(torch.from_numpy(x)).movedim(1, -1).reshape(5, 12, 4).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_refused() -> None:
    graph = zoo.captured("stories260k")
    with pytest.raises(SiteError):
        per_document(graph, "blocks.9.resid_post", TEXTS, lambda x: x, progress=False)
    with pytest.raises(InputError, match="is empty"):
        per_document(graph, "blocks.1.resid_post", [], lambda x: x, progress=False)
    with pytest.raises(InputError, match="has no rows of documents"):
        per_document(graph, "blocks.1.attn.pattern", TEXTS, lambda x: x, progress=False)
