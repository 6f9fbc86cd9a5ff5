"""Rotary angles that change beyond a length: the graph holds those of short inputs, and says so by its context length."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.errors import InputError
from actgraph.graph.context import context_length

SHORT = 32


def test_a_longrope_model_is_cached_up_to_its_short_length() -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = Phi3Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, vocab_size=100,
        max_position_embeddings=128, original_max_position_embeddings=SHORT, pad_token_id=0, rope_scaling=scaling,
    )  # fmt: skip
    model = Phi3ForCausalLM(config).eval()
    graph = ag.load(model)
    assert context_length(graph) == SHORT
    assert not any(value.name.startswith("state_in.") for value in graph.inputs())  # what only is written is no state
    ids = torch.randint(3, 100, (1, SHORT))
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    session = ag.compile(ag.run(graph, "kv_cache").program).session()
    found = [session.feed(ids[:, :20].numpy())["logits"]]
    found += [session.feed(ids[:, index : index + 1].numpy())["logits"] for index in range(20, SHORT)]
    assert np.abs(np.concatenate(found, axis=1) - expected).max() < 1e-5
    with pytest.raises(InputError, match="the context is full: 32 of 32"):
        session.feed(np.array([[3]]))
