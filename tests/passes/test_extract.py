"""Extraction of steering vectors, and what a vector extracted from the sample text does."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.calibrate.corpora import Corpus
from actgraph.calibrate.perplexity import log_likelihoods
from actgraph.errors import InputError, SiteError
from actgraph.formats.vectors import SteeringVector, load_vector
from actgraph.graph import Graph
from tests.passes.conftest import hf_stories, run

SITE = "blocks.3.resid_post"
BRIGHT = re.compile(r"\b(happy|smil\w+|fun|laugh\w*|loved|love|excited|proud)\b", re.IGNORECASE)
GLOOMY = re.compile(r"\b(sad|cr(y|ied|ying)|scared|angry|hurt|afraid|lost|upset|mad|sorry)\b", re.IGNORECASE)


@functools.cache
def sentences() -> tuple[list[str], list[str]]:
    """Bright and gloomy sentences of the sample text, 5 to 16 words each."""
    found = [s.strip() for document in Corpus.of() for s in re.findall(r'[^.!?"]+[.!?]', str(document))]
    found = [s for s in dict.fromkeys(found) if 5 <= len(s.split()) <= 16]
    bright = [s for s in found if BRIGHT.search(s) and not GLOOMY.search(s)]
    gloomy = [s for s in found if GLOOMY.search(s) and not BRIGHT.search(s)]
    return bright, gloomy


def preference(graph: Graph) -> float:
    """Mean log-likelihood per token of held-out bright sentences minus that of held-out gloomy ones."""
    means = []
    for texts in sentences():
        found = log_likelihoods(graph, texts[1::2], batch_size=32, progress=False)
        means.append(float((found.totals / found.counts).mean()))
    return means[0] - means[1]


@pytest.fixture
def vector(stories: Graph, tmp_path: Path) -> Path:
    bright, gloomy = sentences()
    return ag.extract_vector(stories, bright[::2], gloomy[::2], site=SITE, progress=False).save(tmp_path / "bright.safetensors")


def steered(graph: Graph, vector: Path, scale: float, **options: str) -> Graph:
    more = "".join(f" {key}={value}" for key, value in options.items())
    return ag.run(graph, f"steer{{vector={vector} site={SITE} scale={scale}{more}}}").graph


def test_against_transformers(stories: Graph) -> None:
    """Direct reference: hidden states of the transformers model at the last token, sentence by sentence."""
    bright, gloomy = (texts[:6] for texts in sentences())
    tokenizer = stories.companions.tokenizer
    means = []
    for texts in (bright, gloomy):
        states = []
        for text in texts:
            ids = torch.tensor([[1, *tokenizer.encode(text, add_special_tokens=False).ids]])
            with torch.no_grad():
                states.append(
                    hf_stories()(ids, use_cache=False, output_hidden_states=True).hidden_states[4][0, -1].double().numpy()
                )
        means.append(np.mean(states, axis=0))
    got = ag.extract_vector(stories, bright, gloomy, site=SITE, progress=False).directions[SITE]
    assert got.shape == (64,) and got.dtype == np.float32
    assert np.abs(got - (means[0] - means[1])).max() < 1e-5


def test_any_batch_size_gives_the_same_vector(stories: Graph) -> None:
    bright, gloomy = (texts[:7] for texts in sentences())
    one, many = (
        ag.extract_vector(stories, bright, gloomy, site=SITE, batch_size=n, progress=False).directions[SITE] for n in (1, 7)
    )
    assert np.abs(one - many).max() < 1e-5


def test_raises_the_likelihood_of_its_set_monotonically(stories: Graph, vector: Path) -> None:
    scales = (-2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
    got = [preference(steered(stories, vector, scale, fold="false")) for scale in scales]
    assert got == sorted(got) and len(set(got)) == len(got), dict(zip(scales, got, strict=True))
    assert got[-1] - got[0] > 0.1


def test_same_text_in_torch_and_onnx(vector: Path, both_stories: dict[str, Graph], tmp_path: Path) -> None:
    base = both_stories["fx"]
    plain = ag.generate(base, "", max_new_tokens=40)
    for fold in ("true", "false"):
        edited = steered(base, vector, 6.0, fold=fold)
        text = ag.generate(edited, "", max_new_tokens=40)
        assert text != plain, "a strong vector changes the text"
        kept, inlined = edited.save(tmp_path / "kept.onnx"), edited.save(tmp_path / "inlined.onnx", inline="all")
        assert ag.generate(ag.load(kept), "", max_new_tokens=40) == text
        assert ag.generate(ag.load(inlined), "", max_new_tokens=40) == text
    off = steered(base, vector, 0.0)
    assert np.array_equal(run(base), run(off))
    assert ag.generate(off, "", max_new_tokens=40) == plain


def test_files_round_trip(vector: Path, tmp_path: Path) -> None:
    loaded = load_vector(vector)
    assert loaded.method == "mean_difference" and loaded.position == "last" and loaded.model.startswith("f32[512,64]:")
    again = load_vector(loaded.save(tmp_path / "again.safetensors"))
    assert np.array_equal(loaded.directions[SITE], again.directions[SITE])
    assert vector.read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    bare = SteeringVector({"": np.ones(4, np.float32)}).save(tmp_path / "bare.safetensors")
    assert load_vector(bare).for_site(("anything",)).tolist() == [1, 1, 1, 1]


def test_both_dialects_have_one_fingerprint(both_stories: dict[str, Graph]) -> None:
    from actgraph.formats.vectors import model_fingerprint

    assert len({model_fingerprint(graph) for graph in both_stories.values()}) == 1


def test_bad_input(stories: Graph, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="same mean"):
        ag.extract_vector(stories, ["One day."], ["One day."], site=SITE, progress=False)
    with pytest.raises(InputError, match="empty"):
        ag.extract_vector(stories, [], ["One day."], site=SITE, progress=False)
    with pytest.raises(SiteError, match="nearest"):
        ag.extract_vector(stories, ["One day."], ["Two."], site="blocks.3.resid_pots", progress=False)
    with pytest.raises(SiteError, match=r"blocks.1.attn.pattern has no fixed width: its last axis is seq \(choose"):
        ag.extract_vector(stories, ["One day."], ["Two long days."], site="blocks.1.attn.pattern", progress=False)
    (tmp_path / "bad.safetensors").write_bytes(b"not a vector")
    with pytest.raises(InputError, match="not a safetensors file"):
        load_vector(tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match="there is no steering vector"):
        load_vector(tmp_path / "missing.safetensors")
