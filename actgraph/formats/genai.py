"""A decoder with its cache as onnxruntime-genai takes it: the model, ``genai_config.json`` and the tokenizer in one folder.

The names are those that the pass ``kv_cache`` gives (and optimum expects): ``past_key_values.{i}.key``, ``present.{i}.key``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from actgraph.errors import InputError, UnsupportedError
from actgraph.formats.atomic import atomic_file
from actgraph.graph.context import KINDS, context_length, logits_output
from actgraph.graph.graph import Graph, Role
from actgraph.graph.slots import Slot, slots_of

#: Architectures of decoders whose inputs onnxruntime-genai fills in as the plain ones that a cached graph has.
_TYPE = "llama"


def genai_config(graph: Graph, filename: str) -> dict[str, Any]:
    """The content of ``genai_config.json`` for ``graph`` saved as ``filename``.

    Raises UnsupportedError for a graph without a growing cache, with one that is stored in fewer bits, or with inputs that
    onnxruntime-genai cannot fill.
    """
    slots = list(slots_of(graph).values())
    layers = sorted({int(slot.name.split(".")[1]) for slot in slots if slot.name.startswith("past_key_values.")})
    odd = next((slot for slot in slots if slot.update == "append" and _is_narrow(graph, slot)), None)
    if odd is not None:
        raise UnsupportedError(
            f"the cache of {graph.name} is stored in {odd.dtype.value} ({odd.name}), and onnxruntime-genai keeps keys and "
            "values in the type that the model computes in",
            "use kv_cache{storage=same}",
        )
    if not slots or len(slots) != 2 * len(layers) or any(slot.update != "append" for slot in slots):
        raise UnsupportedError(f"{graph.name} has no growing key-value cache", "run the pass kv_cache on it first")
    told = [value.name for value in graph.inputs() if graph.role(value.name) is Role.CONTEXT and value.name in KINDS]
    if told:
        raise UnsupportedError(
            f"onnxruntime-genai cannot tell the graph its {told[0]}, which an edit reads", "leave that edit (a where=...) out"
        )
    names = {value.name for value in graph.inputs() if graph.default(value.name) is None}
    known = {"input_ids", "attention_mask", "position_ids", *(slot.input for slot in slots)}
    if names - known:
        raise UnsupportedError(f"onnxruntime-genai cannot fill the input {min(names - known)!r} of {graph.name}")
    shape = slots[0].shape
    config, generation = graph.companions.config, graph.companions.generation_config
    logits = next(value for name, value in graph.outputs() if name == logits_output(graph))
    vocabulary = logits.shape[-1] if logits.shape is not None else None
    end = generation.get("eos_token_id", config.get("eos_token_id"))
    first_end = end[0] if isinstance(end, list) and end else end
    length = context_length(graph)
    if length is None or first_end is None:
        what = "context length" if length is None else "end token"
        raise InputError(f"the configuration of {graph.name} names no {what}", "set it in graph.companions.config")
    heads = {attention.heads for attention in graph.views.attentions()}
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in names}
    return {
        "model": {
            "bos_token_id": _first_known(generation.get("bos_token_id"), config.get("bos_token_id"), first_end),
            "context_length": length,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": filename,
                "head_size": shape[3],
                "hidden_size": config.get("hidden_size", config.get("n_embd", 0)),
                "inputs": {
                    **inputs,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": logits_output(graph),
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": max(heads, default=shape[1]),
                "num_hidden_layers": len(layers),
                "num_key_value_heads": shape[1],
            },
            "eos_token_id": end,
            "pad_token_id": _first_known(generation.get("pad_token_id"), config.get("pad_token_id"), first_end),
            "type": _TYPE,
            "vocab_size": vocabulary,
        },
        "search": {
            "do_sample": False, "early_stopping": True, "max_length": length, "min_length": 0, "num_beams": 1,
            "past_present_share_buffer": False, "repetition_penalty": 1.0, "temperature": 1.0, "top_k": 1, "top_p": 1.0,
        },
    }  # fmt: skip


def _is_narrow(graph: Graph, slot: Slot) -> bool:
    """Whether a slot is stored in another type than its attention computes in."""
    computed = {attention.key.dtype for attention in graph.views.attentions()}
    return slot.name.endswith("_scale") or (bool(computed) and slot.dtype not in computed)


def _first_known(*values: Any) -> Any:
    """The first that is not ``None``: 0 is a token."""
    return next((value for value in values if value is not None), None)


def save_genai(graph: Graph, folder: str | Path, filename: str = "model.onnx") -> Path:
    """Write ``graph`` (with a growing cache) to ``folder`` for onnxruntime-genai, of standard ops only; returns the folder.

    Raises UnsupportedError, before anything is written, where onnxruntime-genai could not run it.
    """
    folder = Path(folder)
    config = genai_config(graph, filename)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror or error}") from error
    graph.save(folder / filename, inline="all")
    with atomic_file(folder / "genai_config.json") as stream:
        stream.write((json.dumps(config, indent=2) + "\n").encode())
    return folder
