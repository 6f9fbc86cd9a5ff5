"""Hugging Face models: directories, hub ids (safetensors only, no remote code), live models, and the packaged one.

What a model is captured with follows from its ``forward`` and configuration, never from its class name:
a causal language model takes ``(input_ids, attention_mask, position_ids)`` as optimum and onnxruntime-genai do, an encoder
``(input_ids, attention_mask, token_type_ids)``, a vision model ``pixel_values``, an encoder-decoder
``(input_ids, attention_mask, decoder_input_ids)``; each argument only where ``forward`` has it.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import inspect
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actgraph.errors import InputError
from actgraph.formats import EMBEDDED
from actgraph.formats.trace import trace
from actgraph.graph.fx import FxGraph
from actgraph.graph.fx_types import array_of
from actgraph.graph.graph import Companions

#: Files of a model directory that make up its tokenizer or image processor; copied verbatim.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "preprocessor_config.json",
)  # fmt: skip


def load_huggingface(
    source: Any,
    dtype: str | None = None,
    revision: str | None = None,
    *,
    length: int = 16,
    strict_dims: bool = False,
    name: str | None = None,
) -> FxGraph:
    """Capture a transformers model.

    source: a directory, a hub id (``org/name`` or ``org/name@revision``), ``stories260k`` or a live ``PreTrainedModel``.
    dtype: ``float32`` (the default), ``auto`` (the checkpoint's) or a type name; live models keep theirs.
    length: the sequence length of the example; it is the length of the graph where torch can only capture a constant.

    Raises InputError when transformers is missing, for sources that cannot be read and unsafe weights, CaptureError when torch
    cannot capture the model.
    """
    transformers = _transformers()
    if isinstance(source, (str, Path)):
        folder, label = _locate(str(source), revision)
        with _quiet(transformers):
            model = _read_model(transformers, folder, dtype or "float32", label)
        companions = read_companions(folder)
        companions.source = label
        default_name = Path(label.split("@")[0]).name
    else:
        model, companions = source, Companions(source=f"{type(source).__module__}.{type(source).__qualname__}")
        if dtype not in (None, "auto") and _torch_dtype(dtype) != model.dtype:
            raise InputError(f"the live model is {model.dtype}, not {dtype}", "convert it with model.to(...) first")
        default_name = type(source).__name__
    if not companions.config:
        companions.config = json.loads(model.config.to_json_string(use_diff=False))
    call = example_call(model, length)
    with _quiet(transformers):
        graph = trace(
            model, (), call.inputs, dynamic=call.dynamic, limits=call.limits, strict_dims=strict_dims, name=name or default_name
        )
    generation = getattr(model, "generation_config", None)
    if generation is not None and not companions.generation_config:
        companions.generation_config = json.loads(generation.to_json_string(use_diff=True))
    companions.sample_inputs = {key: array_of(value) for key, value in call.inputs.items()}
    graph.companions = companions
    for dimension, (_, high) in call.limits.items():
        if high is not None:
            graph.metadata[f"limit.{dimension}"] = str(high)
    return graph


@dataclass(frozen=True)
class Call:
    """How a model is called for its capture."""

    inputs: dict[str, torch.Tensor]
    dynamic: dict[str, tuple[str | None, ...]]
    limits: dict[str, tuple[int | None, int | None]]


def example_call(model: Any, length: int = 16) -> Call:
    """Example inputs, dimension names and limits for ``model``. Raises InputError for modalities that are not known."""
    config, parameters = model.config, inspect.signature(model.forward).parameters
    if "pixel_values" in parameters and "input_ids" not in parameters:
        return _vision_call(model)
    if "input_ids" not in parameters:
        main = getattr(model, "main_input_name", "?")
        raise InputError(f"do not know how to call a model that takes {main!r}", "use actgraph.trace with example inputs")
    if "pixel_values" in parameters and not model.can_generate():
        raise InputError("do not know how to call a model of both text and images", "use actgraph.trace with example inputs")
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    limit = limit if isinstance(limit, int) and limit > 1 else None  # XLNet says -1: no limit
    length = min(length, limit) if limit else length
    ids = (torch.arange(2 * length) * 7 % max(text.vocab_size - 3, 1) + min(3, text.vocab_size - 1)).reshape(2, length)
    inputs: dict[str, torch.Tensor] = {"input_ids": ids}
    if "attention_mask" in parameters:
        inputs["attention_mask"] = torch.ones_like(ids)
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids.flip(1)[:, : max(length // 2, 2)].contiguous()
    elif model.can_generate():
        if "position_ids" in parameters:
            inputs["position_ids"] = torch.arange(length).expand(2, length).contiguous()
    elif "token_type_ids" in parameters and (getattr(text, "type_vocab_size", 0) or 0) > 1:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    dynamic = {key: ("batch", "decoder_seq" if key.startswith("decoder_") else "seq") for key in inputs}
    return Call(inputs, dict(dynamic), {"seq": (None, limit)} if limit else {})


def _vision_call(model: Any) -> Call:
    config = model.config
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, getattr(config, "num_channels", 3), height, width, generator=generator).to(model.dtype)
    return Call({"pixel_values": pixels}, {"pixel_values": ("batch", None, None, None)}, {})


def read_companions(folder: Path) -> Companions:
    """What travels with the model of a directory: tokenizer, configuration, generation settings."""
    files = {name: (folder / name).read_bytes() for name in _TOKENIZER_FILES if (folder / name).is_file()}
    return Companions(
        tokenizer=make_tokenizer(files),
        tokenizer_files=files,
        config=_read_json(folder / "config.json"),
        generation_config=_read_json(folder / "generation_config.json"),
    )


def make_tokenizer(files: dict[str, bytes]) -> Any:
    """The ``tokenizers.Tokenizer`` of a ``tokenizer.json``; ``None`` without one, or without the tokenizers package."""
    if "tokenizer.json" not in files:
        return None
    try:
        import tokenizers
    except ImportError:
        return None
    try:
        return tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError(f"the model's tokenizer.json cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise InputError(f"{path} is no valid JSON: {error}") from error


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise InputError("loading Hugging Face models needs the package transformers", "pip install 'actgraph[hf]'") from error
    return transformers


def _locate(source: str, revision: str | None) -> tuple[Path, str]:
    """The directory of a source (downloaded for hub ids) and its label."""
    if source == EMBEDDED and not Path(source).exists():
        with importlib.resources.as_file(importlib.resources.files("actgraph") / "data" / EMBEDDED) as folder:
            return folder, EMBEDDED
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{source} has no config.json", "a Hugging Face directory holds config.json and *.safetensors")
        return path, source
    name, _, tag = source.partition("@")
    revision = revision or tag or None
    from huggingface_hub import snapshot_download

    try:
        local = snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors", *_TOKENIZER_FILES])
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"cannot download {source}: {reason[:200]}", "check the name, or give a local directory") from error
    return Path(local), f"{name}@{revision}" if revision else name


def _read_model(transformers: Any, folder: Path, dtype: str, label: str) -> Any:
    if not list(folder.glob("*.safetensors")):
        raise InputError(f"{label} has no safetensors weights", "convert the checkpoint: pickled weights are not loaded")
    kind = "auto" if dtype == "auto" else _torch_dtype(dtype)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        names = getattr(config, "architectures", None) or []
        cls = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), transformers.AutoModel)
        options = {"dtype": kind, "use_safetensors": True, "trust_remote_code": False, "local_files_only": True}
        return cls.from_pretrained(folder, config=config, **options).eval()
    except InputError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"cannot read the model in {folder}: {reason[:300]}") from error


def _torch_dtype(name: str) -> torch.dtype:
    from actgraph.ops.dtypes import DType

    try:
        kind = DType.of(name)
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"there is no dtype {name!r}", "use float32, float16, bfloat16 or auto") from error
    if not kind.is_float:
        raise InputError(f"a model cannot be loaded as {name}", "use float32, float16, bfloat16 or auto")
    return kind.torch


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and no warnings from transformers; its settings as they were afterwards."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="transformers")
        try:
            yield
        finally:
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()
