"""Sparse autoencoders for tests: folders in SAELens' layout, and what SAELens computes with them, written out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Tensor = torch.Tensor


@dataclass
class Reference:
    """The forward pass of SAELens (``sae_lens/saes/*_sae.py``), term by term. tensors: as in the file, float64 here."""

    settings: dict[str, Any]
    tensors: dict[str, Tensor]

    def _in(self, x: Tensor) -> tuple[Tensor, Any]:
        kind = self.settings.get("normalize_activations", "none")
        if kind == "constant_norm_rescale":
            factor = x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True)
            return x * factor, lambda h: h / factor
        if kind == "layer_norm":
            mu = x.mean(-1, keepdim=True)
            std = (x - mu).std(-1, keepdim=True)
            return (x - mu) / (std + 1e-5), lambda h: h * std + mu
        return x, lambda h: h

    def encode(self, x: Tensor) -> Tensor:
        t, architecture = self.tensors, self.settings["architecture"]
        h = self._in(x)[0] - t["b_dec"] * self.settings.get("apply_b_dec_to_input", True)
        if architecture == "gated":
            return (h @ t["W_enc"] + t["b_gate"] > 0) * torch.relu(h @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"])
        pre = h @ t["W_enc"] + t["b_enc"]
        if architecture == "jumprelu":
            return torch.relu(pre) * (pre > t["threshold"])
        if architecture == "topk":
            if self.settings.get("rescale_acts_by_decoder_norm"):
                pre = pre * t["W_dec"].norm(dim=-1)
            best = torch.topk(pre, self.settings["k"], dim=-1)
            return torch.zeros_like(pre).scatter_(-1, best.indices, torch.relu(best.values))
        return torch.relu(pre)

    def decode(self, f: Tensor, x: Tensor) -> Tensor:
        t = self.tensors
        if self.settings.get("rescale_acts_by_decoder_norm"):
            f = f / t["W_dec"].norm(dim=-1)
        if self.settings.get("finetuning_scaling_factor"):
            f = f * t["finetuning_scaling_factor"]
        return self._in(x)[1](f @ t["W_dec"] + t["b_dec"])

    def steer(self, x: Tensor, edit: Any) -> Tensor:
        """Encode, edit, decode, add the error term."""
        f = self.encode(x)
        error = x - self.decode(f, x)
        return self.decode(edit(f.clone()), x) + error


def random_sae(
    architecture: str = "standard", width: int = 64, latents: int = 96, *, seed: int = 0, scale: float = 1.0, **settings: Any
) -> Reference:
    """An SAE of random weights whose latents fire for about half of the activations of size ``scale``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {"W_enc": normal(width, latents) / width**0.5, "W_dec": normal(latents, width) * scale / width**0.5}
    tensors["b_dec"] = 0.2 * scale * normal(width)
    names = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}.get(architecture, ("b_enc",))
    for name in names:
        tensors[name] = 0.2 * normal(latents) * (1 if name == "r_mag" else scale)
    if settings.get("finetuning_scaling_factor"):
        tensors["finetuning_scaling_factor"] = 1 + 0.2 * normal(latents)
    tensors = {name: tensor.float().double() for name, tensor in tensors.items()}
    return Reference({"architecture": architecture, "d_in": width, "d_sae": latents, **settings}, tensors)


def write_sae(folder: Path, sae: Reference, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """The folder that SAELens would write: keys about the model in ``metadata``, the others beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"model_name": "stories260k", "hook_name": "blocks.2.hook_resid_post", **settings}
    config = {**sae.settings, "dtype": "float32", "device": "cpu", "metadata": {"sae_lens_version": "6.0.0", **about}}
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in sae.tensors.items()}, folder / "sae_weights.safetensors")
    return folder
