"""A decoder that onnxruntime-genai runs: its files, and its tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import actgraph as ag
from actgraph.errors import UnsupportedError
from actgraph.formats.genai import save_genai
from tests import zoo


@pytest.mark.parametrize("steered", [False, True])
def test_onnxruntime_genai_generates_the_same_tokens(tmp_path: Path, steered: bool) -> None:
    import onnxruntime_genai as og

    vector = "[" + ", ".join(["0.2"] * 64) + "]"
    steer = f"steer{{vector={vector} site=blocks.2.resid_post scale=0.3 fold=false}}, " if steered else ""
    pipeline = f"{steer}kv_cache{{graphs=combined}}"
    graph = ag.run(zoo.captured("stories260k"), pipeline).graph
    folder = save_genai(graph, tmp_path / "model")
    model = og.Model(str(folder))
    options = og.GeneratorParams(model)
    options.set_search_options(max_length=60, do_sample=False)
    generator = og.Generator(model, options)
    generator.append_tokens([1, 403, 407])
    while not generator.is_done():
        generator.generate_next_token()
    found = [int(token) for token in generator.get_sequence(0)][3:]
    assert len(found) == 57
    assert found == list(ag.generate(graph, [1, 403, 407], 57).tokens)


def test_the_configuration_says_what_the_graph_is(tmp_path: Path) -> None:
    graph = ag.run(zoo.captured("llama"), "kv_cache{graphs=combined}").graph
    config = json.loads((save_genai(graph, tmp_path / "llama") / "genai_config.json").read_text())
    decoder = config["model"]["decoder"]
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"], decoder["head_size"]) == (4, 2, 8)
    assert (decoder["num_hidden_layers"], config["model"]["vocab_size"], config["model"]["context_length"]) == (2, 96, 64)
    assert decoder["inputs"]["past_key_names"] % 1 in {value.name for value in graph.inputs()}


def test_what_genai_cannot_run_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for graph in (
        zoo.captured("llama"),
        ag.run(zoo.captured("llama"), "kv_cache{graphs=combined form=static max_length=16}").graph,
    ):
        with pytest.raises(UnsupportedError, match="no growing key-value cache"):
            save_genai(graph, tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("storage", ["int8", "float16"])
def test_a_cache_in_fewer_bits_is_refused_by_name(tmp_path: Path, storage: str) -> None:
    graph = ag.run(zoo.captured("llama"), f"kv_cache{{graphs=combined storage={storage}}}").graph
    with pytest.raises(UnsupportedError, match=r"is stored in (i8|f16) \(past_key_values.0.key\)") as caught:
        save_genai(graph, tmp_path / "no")
    assert "storage=same" in caught.value.hint and not (tmp_path / "no").exists()
