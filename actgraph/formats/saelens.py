"""Reading sparse autoencoders in SAELens' layout: a folder with ``cfg.json`` and ``sae_weights.safetensors``.

Architectures ``standard``, ``jumprelu``, ``gated`` and ``topk``, in configurations of SAELens 6 (``metadata``) and of older
ones, all brought into the form of ``SparseAutoencoder``:

- a decoder bias that is taken from the input (``apply_b_dec_to_input``) goes into the encoder's bias;
- a gated SAE, ``(x W + b_gate > 0) relu(x W e^r + b_mag)``, is a JumpReLU one: with ``s = x W e^r + b_mag`` the first factor is
  ``s > b_mag - e^r b_gate``;
- ``finetuning_scaling_factor`` multiplies the decoder's rows, ``rescale_acts_by_decoder_norm`` moves their norms into the
  encoder;
- ``normalize_activations`` ``constant_norm_rescale`` and ``layer_norm`` are kept as what is done to the input. With
  ``expected_average_only_in`` the factor is in no file: it is refused unless it is given;
- ``center_writing_weights`` (the model's weights were centred by TransformerLens) is centring what the encoder reads.

Only the latents asked for are read from the file.

Source: SAELens (Bloom et al., 2024), ``sae_lens/saes``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from actgraph.errors import InputError
from actgraph.formats.sae import Normalization, SparseAutoencoder, check_latents

Array = np.ndarray[Any, Any]
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ARCHITECTURES = ("standard", "jumprelu", "gated", "topk")
#: Our name of each normalisation that needs no number from elsewhere.
_NORMALIZE: Mapping[str, Normalization] = {"none": "none", "constant_norm_rescale": "rescale", "layer_norm": "layer_norm"}
#: Keys of older configurations.
_RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
#: Tensors of each architecture besides W_enc, W_dec and b_dec.
_OWN = {
    "standard": {"b_enc"},
    "jumprelu": {"b_enc", "threshold"},
    "gated": {"b_gate", "b_mag", "r_mag"},
    "topk": {"b_enc"},
}
_SCALING = ("finetuning_scaling_factor", "scaling_factor")
#: Places that center_writing_weights centres: what is on, or added to, the residual stream.
_STREAM = re.compile(r"blocks\.\d+\.hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out|in|out)")


def load_sae(
    folder: str | Path, latents: Sequence[int] | None = None, *, input_scale: float | None = None
) -> SparseAutoencoder:
    """Read an SAE in SAELens' layout.

    latents: the indices to read, in that order; ``None``: all. input_scale: the factor on activations of an SAE with
    ``normalize_activations=expected_average_only_in`` (SAELens' ``norm_scaling_factor``).

    Raises InputError for a folder that is none, a damaged file, shapes that do not fit, numbers that are not finite, and what
    cannot be honoured: other architectures and nonlinearities, an SAE of one head, a missing factor.
    """
    folder = Path(folder)
    settings = _settings(folder)
    architecture = _architecture(folder, settings)
    normalize = _normalization(folder, settings, input_scale)
    centred = _centred(folder, settings, normalize)
    tensors = _Tensors(folder)
    size, width = tensors.shape("W_dec", 2)
    for name, key, actual in (("d_sae", "latents", size), ("d_in", "channels", width)):
        if settings.get(name) not in (None, actual):
            raise InputError(
                f"{folder}: cfg.json says {settings[name]} {key} ({name}), and W_dec has {actual}", "get the SAE again"
            )
    tensors.check(_expected(tensors, architecture, size, width))
    chosen = None if latents is None else list(latents)
    if chosen is not None:
        check_latents(chosen, size, str(folder))

    weight = tensors.read("W_enc", chosen, axis=1).T  # [latents, channels]
    decoder, decoder_bias = tensors.read("W_dec", chosen), tensors.read("b_dec")
    taken = -(weight @ decoder_bias) if settings.get("apply_b_dec_to_input", True) else np.zeros(len(weight))
    thresholds = None
    if architecture == "gated":
        gain = np.exp(tensors.read("r_mag", chosen))
        middle = tensors.read("b_mag", chosen)
        thresholds = middle - gain * tensors.read("b_gate", chosen)
        bias, weight = gain * taken + middle, gain[:, None] * weight
    else:
        bias = taken + tensors.read("b_enc", chosen)
    if architecture == "jumprelu":
        logarithm = "log_threshold" in tensors.shapes
        thresholds = np.exp(tensors.read("log_threshold", chosen)) if logarithm else tensors.read("threshold", chosen)
    if settings.get("rescale_acts_by_decoder_norm"):
        norms = np.maximum(np.linalg.norm(decoder, axis=1), 1e-30)
        weight, bias, decoder = norms[:, None] * weight, norms * bias, decoder / norms[:, None]
    decoder = decoder * _finetuned(folder, settings, tensors, chosen)
    if input_scale is not None:
        weight, decoder, decoder_bias = weight * input_scale, decoder / input_scale, decoder_bias / input_scale
    if centred:
        weight = weight - weight.mean(axis=1, keepdims=True)
    return SparseAutoencoder(
        encoder=_single(weight), decoder=_single(decoder), bias=_single(bias), decoder_bias=_single(decoder_bias),
        indices=tuple(range(size) if chosen is None else chosen), size=size,
        thresholds=None if thresholds is None else _single(thresholds),
        k=_count(folder, settings, architecture, size), normalize=normalize, centred=centred,
        hook_name=str(settings.get("hook_name") or ""), model_name=str(settings.get("model_name") or ""), source=str(folder),
    )  # fmt: skip


def _settings(folder: Path) -> dict[str, Any]:
    """``cfg.json`` as one flat mapping with today's names."""
    path = folder / CONFIG
    if not path.is_file() or not (folder / WEIGHTS).is_file():
        what = f"has no {WEIGHTS}" if path.is_file() else f"has no {CONFIG}" if folder.is_dir() else "is no folder"
        raise InputError(f"{folder} {what}", f"an SAE in SAELens' layout is a folder with {CONFIG} and {WEIGHTS}")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error}", "get the SAE again") from error
    metadata = given.get("metadata") or {} if isinstance(given, dict) else None
    if not isinstance(metadata, dict):
        raise InputError(f"{path} is no configuration of SAELens", "get the SAE again")
    return {_RENAMED.get(key, key): value for key, value in {**metadata, **given}.items() if key != "metadata"}


def _architecture(folder: Path, settings: Mapping[str, Any]) -> str:
    """The architecture. Raises InputError for what is no encoder and decoder of one activation, elementwise or top-k."""
    found = settings.get("architecture", "standard")
    if found not in ARCHITECTURES:
        hint = "save it for inference: SAELens then makes it jumprelu" if "batchtopk" in str(found) else ""
        raise InputError(f"{folder} is a {found} SAE", hint or f"{', '.join(ARCHITECTURES)} can be read")
    function = settings.get("activation_fn", "relu")
    if function == "topk" and found == "standard":
        return "topk"
    if function != "relu" and not (function == "topk" and found == "topk"):
        raise InputError(f"{folder} has the nonlinearity {function}", "relu can be read, and topk of all latents")
    if settings.get("hook_head_index") is not None:
        raise InputError(f"{folder} is for head {settings['hook_head_index']} alone", "SAEs of whole activations can be read")
    return str(found)


def _normalization(folder: Path, settings: Mapping[str, Any], input_scale: float | None) -> Normalization:
    given = settings.get("normalize_activations") or "none"
    given = "expected_average_only_in" if given is True else given
    if given == "expected_average_only_in":
        if input_scale is None:
            raise InputError(
                f"{folder} was trained on activations times a number that is not in its files (normalize_activations={given})",
                "give it: input_scale=0.37 (SAELens calls it norm_scaling_factor)",
            )
        if not (np.isfinite(input_scale) and input_scale > 0):
            raise InputError(f"input_scale is {input_scale}", "it is a positive number")
        return "none"
    if given not in _NORMALIZE:
        raise InputError(f"{folder} has the unknown normalize_activations={given}", f"known are {', '.join(_NORMALIZE)}")
    if input_scale is not None:
        raise InputError(
            f"{folder} does not scale its input by a number (normalize_activations={given})", "leave out input_scale"
        )
    return _NORMALIZE[given]


def _centred(folder: Path, settings: Mapping[str, Any], normalize: str) -> bool:
    """Whether the SAE reads centred activations. Raises InputError where processed weights changed more than that."""
    kwargs = settings.get("model_from_pretrained_kwargs") or {}
    changed = sorted(name for name in ("center_writing_weights", "fold_ln", "fold_value_biases") if kwargs.get(name))
    if not changed:
        return False
    hook = str(settings.get("hook_name") or "")
    if not _STREAM.fullmatch(hook):
        what = f"{folder} was trained on a model with {', '.join(changed)}, which changes {hook or 'its site'}"
        raise InputError(what, "use one that was trained on the model as it is")
    centred = "center_writing_weights" in changed
    if centred and normalize == "rescale":
        raise InputError(f"{folder} was trained with center_writing_weights and constant_norm_rescale, which do not commute")
    return centred


def _count(folder: Path, settings: Mapping[str, Any], architecture: str, size: int) -> int | None:
    """How many latents of a token fire, of a top-k SAE."""
    if architecture != "topk":
        return None
    found = settings.get("k", (settings.get("activation_fn_kwargs") or {}).get("k"))
    if not isinstance(found, int) or isinstance(found, bool) or not 0 < found <= size:
        raise InputError(f"{folder}: cfg.json says k={found} for a top-k SAE of {size} latents", "get the SAE again")
    return found


def _finetuned(folder: Path, settings: Mapping[str, Any], tensors: _Tensors, chosen: list[int] | None) -> Array:
    """Factors of the decoder's rows, ``[latents, 1]``."""
    name = next((name for name in _SCALING if name in tensors.shapes), None)
    wanted = bool(settings.get("finetuning_scaling_factor"))
    if name is None:
        if wanted:
            raise InputError(
                f"{folder}: cfg.json asks for a finetuning_scaling_factor that {WEIGHTS} lacks", "get the SAE again"
            )
        return np.ones((1, 1))
    factors = tensors.read(name, chosen)[:, None]
    if not wanted and not np.allclose(factors, 1):
        raise InputError(f"{folder}: {WEIGHTS} has a {name} that cfg.json does not ask for", "set finetuning_scaling_factor")
    return factors


def _expected(tensors: _Tensors, architecture: str, size: int, width: int) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that there must be, and of those that there may be and are."""
    own = set(_OWN[architecture])
    if architecture == "jumprelu" and "threshold" not in tensors.shapes and "log_threshold" in tensors.shapes:
        own = (own - {"threshold"}) | {"log_threshold"}
    own |= {name for name in _SCALING if name in tensors.shapes}
    return {"W_enc": (width, size), "W_dec": (size, width), "b_dec": (width,), **dict.fromkeys(sorted(own), (size,))}


def _single(array: Array) -> Array:
    return np.ascontiguousarray(array, np.float32)


class _Tensors:
    """The tensors of a folder, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        opening: Any = safe_open
        try:
            self._file: Any = opening(str(folder / WEIGHTS), framework="pt")
            names: list[str] = list(self._file.keys())
            self.shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in names}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{folder / WEIGHTS} is not a safetensors file: {error}", "get the SAE again") from error

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        found = self.shapes.get(name)
        if found is None or len(found) != rank:
            raise InputError(
                f"{self.folder / WEIGHTS}: {name} is {'missing' if found is None else list(found)}", "get the SAE again"
            )
        return cast("tuple[int, ...]", found)

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raise InputError unless the file has these tensors, in these shapes, and no others."""
        for name, shape in expected.items():
            if self.shape(name, len(shape)) != shape:
                raise InputError(
                    f"{self.folder / WEIGHTS}: {name} is {list(self.shapes[name])} and should be {list(shape)}",
                    "get the SAE again",
                )
        unknown = sorted(set(self.shapes) - set(expected))
        if unknown:
            raise InputError(
                f"{self.folder / WEIGHTS} has the tensor {unknown[0]}, which its architecture has not",
                "is cfg.json of this SAE?",
            )

    def read(self, name: str, chosen: Sequence[int] | None = None, axis: int = 0) -> Array:
        """A tensor, or its entries ``chosen`` along ``axis``, as float64."""
        import torch

        part = self._file.get_slice(name)
        if chosen is None:
            tensor = part[:]
        else:
            pieces = [part[:, i : i + 1] if axis else part[i : i + 1] for i in chosen]
            tensor = torch.cat(pieces, dim=axis)
        array = np.asarray(tensor.to(torch.float64).numpy())
        if not np.isfinite(array).all():
            raise InputError(f"{self.folder / WEIGHTS}: {name} holds NaN or infinite values", "get the SAE again")
        return array
