"""From documents to samples and batches: what is filled in, packed, padded and refused."""

from __future__ import annotations

import builtins
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import actgraph as ag
from actgraph.calibrate import Request
from actgraph.calibrate.batches import batches
from actgraph.calibrate.corpora import Corpus
from actgraph.calibrate.encode import Signature, max_length, samples, token_ids
from actgraph.calibrate.engine import collect
from actgraph.calibrate.perplexity import log_likelihoods
from actgraph.errors import InputError
from actgraph.graph import Graph
from tests.calibrate import models


def encoded(graph: Graph, corpus: Any, **options: Any) -> list[dict[str, np.ndarray[Any, Any]]]:
    return list(samples(graph, Corpus.of(corpus), **options))


def test_derived_inputs_are_filled_in_with_the_graphs_dtypes() -> None:
    (sample,) = encoded(models.stories(), ["Once upon a time"])
    length = len(sample["input_ids"])
    assert sample["input_ids"][0] == 1
    assert sample["attention_mask"].tolist() == [1] * length
    assert sample["position_ids"].tolist() == list(range(length))
    assert {array.dtype for array in sample.values()} == {np.dtype(np.int64)}


def test_rows_of_a_batch_lose_their_padding_on_either_side() -> None:
    rows = [[1, 2, 3], [1], [1, 2]]
    for left in (False, True):
        found = encoded(models.stories(), models.padded(rows, left=left))
        assert [sample["input_ids"].tolist() for sample in found] == rows
        assert [sample["position_ids"].tolist() for sample in found] == [[0, 1, 2], [0], [0, 1]]


def test_the_longest_document_is_the_models_the_tokenizers_or_the_users() -> None:
    graph = models.stories()
    assert max_length(graph) == 512
    assert max_length(graph, 100) == 100
    graph.companions.tokenizer_files = {"tokenizer_config.json": b'{"model_max_length": 64}'}
    assert max_length(graph) == 64
    graph.companions.tokenizer_files = {"tokenizer_config.json": b'{"model_max_length": 1e30}'}
    graph.companions.config = {"n_positions": 1024}
    assert max_length(graph) == 1024
    graph.companions.config = {}
    assert max_length(graph) is None


def test_chats_go_through_the_tokenizers_own_template() -> None:
    graph = models.stories()
    messages = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Once"})
    with pytest.raises(InputError, match="no chat template"):
        token_ids(graph, messages)
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    settings_of = {"chat_template": template, "bos_token": {"content": "<s>"}}
    graph.companions.tokenizer_files["tokenizer_config.json"] = json.dumps(settings_of).encode()
    wanted = graph.companions.tokenizer.encode("<s>user: Hello\nassistant: Once\n", add_special_tokens=False).ids
    assert token_ids(graph, messages) == list(wanted)
    asked = graph.companions.tokenizer.encode("<s>user: Hello\nassistant: ", add_special_tokens=False).ids
    assert token_ids(graph, messages[:1]) == list(asked), "a question ends where the assistant begins"
    assert wanted[0] == 1
    settings_of["chat_template"] = "{{ ''.__class__.__mro__[1].__subclasses__() }}"  # a template is data, not code
    graph.companions.tokenizer_files["tokenizer_config.json"] = json.dumps(settings_of).encode()
    with pytest.raises(InputError, match="chat template of stories260k failed"):
        token_ids(graph, messages)


class Fixed(torch.nn.Module):
    """Takes exactly four tokens and no mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(512, 6)
        self.head = torch.nn.Linear(6, 512)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(input_ids).cumsum(1))


def fixed(rows: int | None = None) -> Graph:
    shape = (rows or 2, 4)
    dynamic = {"input_ids": (None if rows else "batch", None)}
    graph = ag.trace(Fixed().eval(), (torch.ones(shape, dtype=torch.int64),), dynamic=dynamic, name="fixed")
    graph.companions.tokenizer = models.stories().companions.tokenizer
    return graph


def test_a_graph_of_fixed_length_gets_the_joined_texts_in_windows() -> None:
    graph = fixed()
    texts = ["Once upon a time", "Tom ran", "A cat"]
    joined = [i for text in texts for i in token_ids(graph, text)]
    found = encoded(graph, texts)
    assert [sample["input_ids"].tolist() for sample in found] == [joined[i : i + 4] for i in range(0, len(joined) - 3, 4)]
    with pytest.raises(InputError, match="takes 4 tokens at a time, and the corpus has 2"):
        encoded(graph, [texts[0][:1]])


def test_perplexity_of_a_graph_of_fixed_length_pads_what_a_causal_model_does_not_see() -> None:
    graph, text = fixed(), "Tom"
    ids = token_ids(graph, text)
    assert 1 < len(ids) < 4
    found = log_likelihoods(graph, [text])
    padded = np.zeros((2, 4), np.int64)
    padded[:, : len(ids)] = ids
    scores = torch.log_softmax(torch.from_numpy(graph.run({"input_ids": padded})[graph.outputs()[0][0]]).double(), -1)[0]
    direct = sum(float(scores[i, ids[i + 1]]) for i in range(len(ids) - 1))
    assert found.totals.tolist() == pytest.approx([direct], rel=1e-6)


def test_a_graph_of_fixed_batch_size_gets_full_batches_and_counts_no_filler() -> None:
    graph = fixed(rows=4)
    ids = np.arange(24).reshape(6, 4)
    found = list(batches(Signature.of(graph), samples(graph, Corpus.of({"input_ids": ids})), batch_size=99))
    assert [(batch.inputs["input_ids"].shape, batch.rows) for batch in found] == [((4, 4), 4), ((4, 4), 2)]
    request = Request("embed", "count")
    assert collect(graph, [request], {"input_ids": ids}, cache=False).array(request) == 6 * 4 * 6


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20), size=st.integers(1, 6), pad=st.booleans())
def test_batches_hold_every_sample_once_with_true_masks(lengths: list[int], size: int, pad: bool) -> None:
    graph = models.stories()
    rows = [[1] + [3 + (7 * i + j) % 400 for j in range(length - 1)] for i, length in enumerate(lengths)]
    seen: dict[int, list[int]] = {}
    for batch in batches(Signature.of(graph), iter(encoded(graph, models.padded(rows))), batch_size=size, pad=pad):
        assert batch.rows <= size
        assert pad or not batch.padded
        (mask,) = batch.masks.values()
        np.testing.assert_array_equal(mask, batch.inputs["attention_mask"].astype(bool))
        for row, index in enumerate(batch.indices):
            assert index not in seen
            seen[index] = batch.inputs["input_ids"][row][mask[row]].tolist()
            assert not batch.inputs["input_ids"][row][~mask[row]].any()
    assert [seen[i] for i in range(len(rows))] == rows


def test_arrays_of_different_numbers_of_rows_are_refused() -> None:
    arrays = {**models.padded([[1, 2]]), "position_ids": np.zeros((2, 2), np.int64)}
    with pytest.raises(InputError, match="different numbers of rows"):
        encoded(models.stories(), arrays)


def test_what_a_text_cannot_give_is_named() -> None:
    class TwoInputs(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
            return input_ids.sum() + pixel_values

    graph = ag.trace(TwoInputs(), (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 2)), name="two")
    graph.companions.tokenizer = models.stories().companions.tokenizer
    with pytest.raises(InputError, match="the graph takes %pixel_values"):
        encoded(graph, ["text"])


def test_images_without_pillow_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    original = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("PIL"):
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"needs Pillow \(pip install pillow\)"):
        encoded(models.convolutions(), tmp_path)


def test_images_are_resized_scaled_and_normalised(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[..., 0], pixels[..., 2] = 255, 51
    image.fromarray(pixels).save(tmp_path / "b.png")
    image.fromarray(pixels[..., 0]).save(tmp_path / "a.png")
    graph = models.convolutions()
    gray, colour = encoded(graph, tmp_path)
    assert colour["pixel_values"].shape == (3, 8, 8)
    np.testing.assert_allclose(colour["pixel_values"].mean((1, 2)), [1.0, 0.0, 0.2], atol=1e-6)
    np.testing.assert_allclose(gray["pixel_values"], 1.0, atol=1e-6)
    preprocessor = {"rescale_factor": 1 / 255, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 0.5]}
    graph.companions.tokenizer_files["preprocessor_config.json"] = json.dumps(preprocessor).encode()
    np.testing.assert_allclose(encoded(graph, tmp_path)[1]["pixel_values"].mean((1, 2)), [1.0, -2.0, -0.6], atol=1e-6)
    (tmp_path / "c.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"c\.png is no image"):
        encoded(graph, tmp_path)


def test_a_text_goes_to_the_decoder_too_shifted_right_as_transformers_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from actgraph.calibrate.perplexity import log_likelihoods
    from tests import zoo

    model, graph = zoo.model("t5"), zoo.captured("t5").clone()
    assert graph.companions.config["pad_token_id"] == 0  # a configuration without a start token of its own
    graph.companions = replace(graph.companions, tokenizer=models.words(zoo.VOCAB))
    texts = ["3 1 4 1 5", "9 2 6", "5"]
    found = encoded(graph, texts)
    for text, sample in zip(texts, found, strict=True):
        ids = [int(word) for word in text.split()]
        assert sample["input_ids"].tolist() == ids
        assert sample["decoder_input_ids"].tolist() == [0, *ids[:-1]]
    graph.companions.generation_config = {"decoder_start_token_id": 7}
    assert [sample["decoder_input_ids"][0] for sample in encoded(graph, texts)] == [7, 7, 7]
    mean = collect(graph, [Request("decoder.blocks.1.resid_post", "mean", axis=-1)], texts, cache=False)
    wanted = []
    monkeypatch.setattr(model.config, "decoder_start_token_id", 7, raising=False)
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([[int(word) for word in text.split()]])
            shifted = model._shift_right(ids)
            assert shifted[0].tolist() == [7, *ids[0, :-1].tolist()]
            caught: list[torch.Tensor] = []
            hook = model.decoder.block[1].register_forward_hook(lambda module, args, out, into=caught: into.append(out))
            model(input_ids=ids, decoder_input_ids=shifted)
            hook.remove()
            state = caught[0][0] if isinstance(caught[0], tuple) else caught[0]
            wanted.append(state[0])
    np.testing.assert_allclose(
        mean.array(Request("decoder.blocks.1.resid_post", "mean", axis=-1)),
        torch.cat(wanted).mean(0).numpy(),
        rtol=1e-3,
        atol=1e-4,
    )
    # The arrays of a corpus may leave the decoder out as well, and what they give is taken as it is.
    (sample,) = encoded(graph, {"input_ids": np.array([[3, 1, 4]])})
    assert sample["decoder_input_ids"].tolist() == [7, 3, 1]
    (sample,) = encoded(graph, {"input_ids": np.array([[3, 1, 4]]), "decoder_input_ids": np.array([[2, 2]])})
    assert sample["decoder_input_ids"].tolist() == [2, 2]
    # Position t of the decoder predicts token t and not t + 1: the perplexity of a causal model would be silently wrong.
    with pytest.raises(InputError, match="no causal language model"):
        log_likelihoods(graph, texts)


def test_a_model_without_text_says_what_to_give() -> None:
    for corpus in (None, ["a text"]):
        with pytest.raises(InputError, match=r"mlp takes x f32\[batch, 4\] and no text.*--corpus data.npz with the arrays x "):
            encoded(models.mlp(), corpus)
