"""What the benchmarks share: lines of output, models, and the physical limit."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # also where actgraph is not installed


def emit(benchmark: str, **figures: Any) -> None:
    """Print one JSON line."""
    print(json.dumps({"benchmark": benchmark, **figures}), flush=True)


def round_to(value: float) -> float:
    return float(f"{value:.4g}")


def processor() -> str:
    """The name of the processor, for the record."""
    import platform

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


class Bandwidth:
    """How many bytes per second the fastest read loop there is gets from memory, over ``size`` bytes."""

    def __init__(self, threads: int, size: int = 1 << 30) -> None:
        self.how = "numba"
        try:
            from actgraph.runtime.kernels.numba.stream import Stream

            self._once: Callable[[], float] = Stream(threads, size).measure
            self._once()
        except Exception as error:  # without a processor or a C library that it can use
            self.how = f"torch sum ({type(error).__name__}: no loop of our own)"
            self._once = _torch_sum(threads, size)
            self._once()

    def measure(self, times: int = 1) -> float:
        """The best of ``times`` readings."""
        return max(self._once() for _ in range(times))


def _torch_sum(threads: int, size: int) -> Callable[[], float]:
    import torch

    torch.set_num_threads(threads)
    data = torch.ones(size // 4)

    def once() -> float:
        start = time.perf_counter()
        data.sum()
        return data.nbytes / (time.perf_counter() - start)

    return once


# --- models -------------------------------------------------------------------------------------------------------------------

#: The Llama shapes that are made here, all with tied embeddings. tiny: for tests.
SHAPES: dict[str, dict[str, int]] = {
    "llama110m": {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2048, "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
    "tiny": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 512,
        "max_position_embeddings": 128,
    },
}  # fmt: skip


def make_model(name: str, folder: Path) -> None:
    """A Hugging Face directory with the weights that every runner uses."""
    import actgraph

    data = Path(actgraph.__file__).parent / "data" / "stories260k"
    if name == "stories260k":
        import shutil

        shutil.copytree(data, folder, dirs_exist_ok=True)
        return
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES[name], tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)).eval()
    with torch.no_grad():  # as they are drawn, a few tokens repeat whatever was computed
        for parameter in model.model.layers.parameters():
            if parameter.dim() == 2:
                parameter.mul_(2)
    model.save_pretrained(folder)
    # the model builder of onnxruntime-genai and nnsight want some tokenizer; no runner uses it
    for file in data.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())


def make_vector(folder: Path, number: int = 0) -> Path:
    """A steering vector for the model in ``folder``, another one for each ``number``."""
    import numpy as np
    from safetensors.numpy import save_file

    path = folder / "steering" / f"vector{number or ''}.safetensors"
    path.parent.mkdir(exist_ok=True)
    size = json.loads((folder / "config.json").read_text())["hidden_size"]
    save_file({"vector": np.random.default_rng(1 + number).standard_normal(size).astype(np.float32) / 2}, path)
    return path


def bytes_per_token(config: dict[str, Any], bits: int, gated: float, tokens: float) -> float:
    """What one more token must read: the weights of linears (scales aside) that are not gated off, and the cache.

    Keys and values are float32 beside float32 weights, else float16.
    """
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    groups = config.get("num_key_value_heads") or heads
    block = hidden * head * (2 * heads + 2 * groups) + 3 * hidden * config["intermediate_size"]
    weights = layers * block * (1 - gated) + hidden * config["vocab_size"]
    return weights * bits / 8 + 2 * (4 if bits == 32 else 2) * layers * groups * head * tokens
