"""llama.cpp through llama-cpp-python, on a GGUF file written here from the same weights.

options: ``type``: F32, BF16, Q8_0 or Q4_0, of every matrix, the (tied) embedding table with them.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from protocol import Run, greedy, serve, versions
from safetensors.numpy import load_file


def write_gguf(folder: Path, path: Path, kind: str) -> None:
    """The Llama of a Hugging Face folder as GGUF, as convert_hf_to_gguf lays it out."""
    config = json.loads((folder / "config.json").read_text())
    weights: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        weights |= load_file(file)
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head)
    theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    writer.add_rope_freq_base(theta)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(getattr(gguf.LlamaFileType, "ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    wanted = gguf.GGMLQuantizationType[kind]
    for name, weight in weights.items():
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        weight = weight.astype(np.float32)
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # its rotary embedding turns neighbours, not halves
            count = heads if "q_proj" in name else groups
            weight = weight.reshape(count, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        kept = wanted if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        target = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(target, gguf.quantize(np.ascontiguousarray(weight), kept), raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Step:
    def __init__(self, path: Path, config: dict[str, Any], threads: int, flash: bool) -> None:
        length = min(2048, config["max_position_embeddings"])
        self.model = llama_cpp.Llama(
            str(path), n_ctx=length, n_batch=512, n_threads=threads, n_threads_batch=threads, flash_attn=flash, verbose=False
        )
        self.context = self.model.ctx
        self.vocabulary = config["vocab_size"]

    def restart(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def __call__(self, tokens: list[int]) -> int:
        for begin in range(0, len(tokens), 512):
            part = tokens[begin : begin + 512]
            array = (llama_cpp.llama_token * len(part))(*part)
            if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(part))):
                raise RuntimeError("llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        address = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(address, (self.vocabulary,)).argmax())


def open_runner(folder: Path, options: dict[str, Any], threads: int) -> Run:
    path = folder / f"{options['type']}.gguf"
    if not path.exists():
        write_gguf(folder, path.with_suffix(".part"), options["type"])
        path.with_suffix(".part").rename(path)
    config = json.loads((folder / "config.json").read_text())
    run = greedy(Step(path, config, threads, options.get("flash", False)))
    run.note = versions("llama-cpp-python", "gguf")  # type: ignore[attr-defined]
    return run


if __name__ == "__main__":
    serve(open_runner)
