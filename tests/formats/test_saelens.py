"""SAEs in SAELens' layout: what is read encodes and decodes as SAELens does, and what cannot be honoured is one clear line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from actgraph.errors import InputError, SiteError
from actgraph.formats.sae import SparseAutoencoder, is_for_another_model, sae_site
from actgraph.formats.saelens import load_sae
from tests import zoo
from tests.saes import Reference, random_sae, write_sae

X = torch.randn(3, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) * 2 + 0.5
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("standard", {}),
    "the bias stays": ("standard", {"apply_b_dec_to_input": False}),
    "finetuned": ("standard", {"finetuning_scaling_factor": True}),
    "rescaled input": ("standard", {"normalize_activations": "constant_norm_rescale"}),
    "normalised input": ("standard", {"normalize_activations": "layer_norm"}),
    "jumprelu": ("jumprelu", {}),
    "jumprelu, normalised": ("jumprelu", {"normalize_activations": "layer_norm", "apply_b_dec_to_input": False}),
    "gated": ("gated", {}),
    "gated, the bias stays": ("gated", {"apply_b_dec_to_input": False}),
    "topk": ("topk", {"k": 5}),
    "topk by norms": ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True, "normalize_activations": "layer_norm"}),
}


def close(got: np.ndarray, want: torch.Tensor, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=tolerance * float(want.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_encodes_and_decodes_as_saelens(tmp_path: Path, kind: str) -> None:
    architecture, settings = KINDS[kind]
    reference = random_sae(architecture, 16, 40, **settings)
    sae = load_sae(write_sae(tmp_path / "sae", reference))
    f = reference.encode(X)
    assert 0.05 < float((f > 0).double().mean()) < 0.8
    close(sae.encode(X.numpy()), f)
    close(sae.decode(f.numpy(), X.numpy()), reference.decode(f, X))
    assert sae.whole and (sae.hook_name, sae.model_name) == ("blocks.2.hook_resid_post", "stories260k")
    some = load_sae(tmp_path / "sae", [31, 2, 7])
    assert some.indices == (31, 2, 7) and some.size == 40 and not some.whole
    for name in ("encoder", "decoder", "bias", "thresholds"):
        whole, part = getattr(sae, name), getattr(some, name)
        assert (whole is None) == (part is None)
        if part is not None:
            np.testing.assert_allclose(part, whole[[31, 2, 7]], rtol=1e-6, atol=1e-7)
    if some.k is None:
        close(some.encode(X.numpy()), f[..., [31, 2, 7]])
        np.testing.assert_array_equal(sae.chosen([31, 2, 7]).decoder, some.decoder)


def test_a_wrong_sign_of_the_bias_would_be_seen(tmp_path: Path) -> None:
    reference = random_sae("standard", 16, 40)
    sae = load_sae(write_sae(tmp_path, reference))
    reference.settings["apply_b_dec_to_input"] = False
    assert np.abs(sae.encode(X.numpy()) - reference.encode(X).numpy()).max() > 0.1


def test_a_factor_on_the_input_must_be_given(tmp_path: Path) -> None:
    reference = random_sae("jumprelu", 16, 40)
    folder = write_sae(tmp_path, reference)
    plain = load_sae(folder)
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, "normalize_activations": "expected_average_only_in"}))
    with pytest.raises(InputError, match="not in its files") as error:
        load_sae(folder)
    assert "input_scale" in error.value.hint
    scaled = load_sae(folder, input_scale=0.25)
    np.testing.assert_allclose(scaled.encode(4 * X.numpy()), plain.encode(X.numpy()), rtol=1e-4, atol=1e-5)
    f = plain.encode(X.numpy())
    np.testing.assert_allclose(scaled.decode(f, X.numpy()), 4 * plain.decode(f, X.numpy()), rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="input_scale is nan"):
        load_sae(folder, input_scale=math.nan)
    with pytest.raises(InputError, match="does not scale its input"):
        load_sae(write_sae(tmp_path / "plain", reference), input_scale=2.0)


def test_older_configurations(tmp_path: Path) -> None:
    """Flat keys under older names, switches instead of names, and top-k as a nonlinearity of a standard SAE."""
    reference = random_sae("topk", 16, 40, k=6)
    folder = write_sae(tmp_path, reference)
    old = {
        "d_in": 16, "d_sae": 40, "hook_point": "blocks.1.hook_resid_pre", "model_name": "gpt2-small", "hook_point_layer": 1,
        "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 6}, "normalize_activations": False,
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(old))
    sae = load_sae(folder)
    assert (sae.k, sae.hook_name, sae.model_name, sae.normalize) == (6, "blocks.1.hook_resid_pre", "gpt2-small", "none")
    close(sae.encode(X.numpy()), reference.encode(X))
    (folder / "cfg.json").write_text(json.dumps({**old, "normalize_activations": True}))
    with pytest.raises(InputError, match="expected_average_only_in"):
        load_sae(folder)


def test_centred_weights_are_a_centred_encoder(tmp_path: Path) -> None:
    """Trained on TransformerLens' centred stream, the SAE reads the stream of the model as it is."""
    reference = random_sae("standard", 16, 40)
    kwargs = {"center_writing_weights": True, "fold_ln": True}
    sae = load_sae(write_sae(tmp_path, reference, model_from_pretrained_kwargs=kwargs))
    assert sae.centred
    close(sae.encode(X.numpy()), reference.encode(X - X.mean(-1, keepdim=True)))
    with pytest.raises(InputError, match=r"center_writing_weights.*changes blocks.1.attn.hook_z"):
        load_sae(write_sae(tmp_path, reference, model_from_pretrained_kwargs=kwargs, hook_name="blocks.1.attn.hook_z"))
    graph = zoo.captured("stories260k")
    centred = load_sae(write_sae(tmp_path / "wide", random_sae(), model_from_pretrained_kwargs=kwargs))
    with pytest.raises(InputError, match="needs a model with layer norms"):
        sae_site(graph, centred)


def test_half_precision_and_training_checkpoints(tmp_path: Path) -> None:
    reference = random_sae("jumprelu", 16, 40)
    reference.tensors["threshold"] = reference.tensors["threshold"].abs() + 0.01
    sae = load_sae(write_sae(tmp_path / "half", reference, torch.bfloat16))
    assert sae.encoder.dtype == np.float32
    np.testing.assert_array_equal(sae.decoder, reference.tensors["W_dec"].bfloat16().float().numpy())
    folder = write_sae(tmp_path / "log", reference)
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["log_threshold"] = tensors.pop("threshold").log()
    save_file(tensors, folder / "sae_weights.safetensors")
    close(load_sae(folder).thresholds, reference.tensors["threshold"])


def broken(folder: Path, **settings: Any) -> Path:
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, **settings}))
    return folder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "transcoder"}, "is a transcoder SAE"),
        ({"architecture": "batchtopk"}, "is a batchtopk SAE.*save it for inference"),
        ({"activation_fn": "tanh-relu"}, "has the nonlinearity tanh-relu"),
        ({"hook_head_index": 3}, "is for head 3 alone"),
        ({"normalize_activations": "whitened"}, "unknown normalize_activations=whitened"),
        ({"d_sae": 41}, "says 41 latents"),
        ({"d_in": 15}, "says 15 channels"),
        ({"finetuning_scaling_factor": True}, "asks for a finetuning_scaling_factor"),
        ({"architecture": "topk"}, "k=None for a top-k SAE"),
        ({"architecture": "topk", "k": 41}, "k=41 for a top-k SAE of 40 latents"),
        ({"architecture": "jumprelu"}, "threshold is missing"),
        ({"architecture": "gated"}, "b_gate is missing"),
    ],
)
def test_what_cannot_be_honoured(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    folder = broken(write_sae(tmp_path, random_sae("standard", 16, 40)), **settings)
    with pytest.raises(InputError, match=message):
        load_sae(folder)


def test_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder"):
        load_sae(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no cfg.json"):
        load_sae(tmp_path / "empty")
    folder = write_sae(tmp_path / "sae", random_sae("standard", 16, 40))
    weights = folder / "sae_weights.safetensors"
    for tensors, message in (
        ({"b_enc": torch.zeros(39)}, r"b_enc is \[39\] and should be \[40\]"),
        ({"W_skip": torch.zeros(16, 16)}, "has the tensor W_skip"),
        ({"W_enc": torch.zeros(40, 16)}, r"W_enc is \[40, 16\] and should be \[16, 40\]"),
        ({"W_dec": torch.full((40, 16), torch.nan)}, "W_dec holds NaN"),
        ({"scaling_factor": torch.full((40,), 2.0)}, "has a scaling_factor that cfg.json does not ask for"),
    ):
        good = load_file(weights)
        save_file({**good, **tensors}, weights)
        with pytest.raises(InputError, match=message):
            load_sae(folder)
        save_file(good, weights)
    load_sae(folder)
    weights.write_bytes(b"nothing")
    with pytest.raises(InputError, match="is not a safetensors file"):
        load_sae(folder)
    (folder / "cfg.json").write_text("[]")
    with pytest.raises(InputError, match="is no configuration of SAELens"):
        load_sae(folder)
    (folder / "cfg.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        load_sae(folder)


def test_latents_that_are_not_there(tmp_path: Path) -> None:
    folder = write_sae(tmp_path, random_sae("topk", 16, 40, k=3))
    for latents, message in (
        ([], "no latent is named"),
        ([40], "no latent 40"),
        ([-1], "no latent -1"),
        ([3, 3], "3 is named twice"),
    ):
        with pytest.raises(InputError, match=message):
            load_sae(folder, latents)
    with pytest.raises(InputError, match="is a top-3 SAE"):
        load_sae(folder, [1]).encode(X.numpy())
    with pytest.raises(InputError, match="reads 16 channels"):
        load_sae(folder).encode(np.ones((2, 15)))


def test_the_place_of_an_sae(tmp_path: Path) -> None:
    """Its own site by TransformerLens' spelling; another site, model or width is refused, the first two unless forced."""
    graph = zoo.captured("stories260k")
    reference = random_sae()
    sae = load_sae(write_sae(tmp_path, reference))
    assert sae_site(graph, sae).name == "blocks.2.resid_post"
    assert sae_site(graph, sae, "blocks.3.resid_pre").name  # the same value under another name
    with pytest.raises(InputError, match=r"was trained at blocks\.2\.hook_resid_post, not at blocks\.1\.resid_post"):
        sae_site(graph, sae, "blocks.1.resid_post")
    assert sae_site(graph, sae, "blocks.1.resid_post", other_site=True).name == "blocks.1.resid_post"
    with pytest.raises(InputError, match=r"reads 64 channels, but blocks.2.mlp.hidden is f32\[batch, seq, 172\]"):
        sae_site(graph, sae, "blocks.2.mlp.hidden", other_site=True)
    other = load_sae(write_sae(tmp_path, reference, model_name="gpt2-small"))
    with pytest.raises(InputError, match="was trained on gpt2-small, and the model is stories260k"):
        sae_site(graph, other)
    assert sae_site(graph, other, other_model=True).name == "blocks.2.resid_post"
    with pytest.raises(SiteError):
        sae_site(graph, load_sae(write_sae(tmp_path, reference, hook_name="blocks.17.hook_resid_post")))
    own = SparseAutoencoder.of(np.ones((3, 64)), np.ones((3, 64)))
    with pytest.raises(InputError, match="does not say which site"):
        sae_site(graph, own)
    assert sae_site(graph, own, "blocks.0.mlp.out").name == "blocks.0.mlp.out"


def test_names_of_models() -> None:
    graph = zoo.captured("stories260k")
    for source, name, another in (
        ("openai-community/gpt2", "gpt2-small", False),
        ("google/gemma-2-2b@main", "gemma-2-2b", False),
        ("google/gemma-2-2b", "gemma-2b", True),
        ("EleutherAI/pythia-70m-deduped", "EleutherAI/pythia-160m", True),
        ("LlamaForCausalLM", "gpt2-small", False),
        ("package.module:factory", "gpt2-small", False),
        ("", "gpt2-small", False),
        ("models/llama.onnx", "", False),
    ):
        graph.companions.source = source
        assert is_for_another_model(name, graph) is another, (source, name)


def test_the_reference_is_not_the_reader() -> None:
    """A reference that reads nothing of ours: the sum of its parts is the input."""
    reference: Reference = random_sae("gated", 16, 40)
    torch.testing.assert_close(reference.steer(X, lambda f: f), X)
    assert not torch.allclose(reference.steer(X, lambda f: 0 * f), X)
