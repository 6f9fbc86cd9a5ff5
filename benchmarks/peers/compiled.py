"""torch.compile at its best: the forward of transformers with a static cache, compiled once, in a plain loop.

options: ``dtype`` (float32, bfloat16), ``torchao`` (int8, int4: its weight-only quantization of every linear).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from protocol import Run, greedy, serve, versions
from transformers import AutoModelForCausalLM, StaticCache


def quantized(model: Any, bits: str) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # the embedding table stays as it is
    if bits == "int8":
        quantize_(model, Int8WeightOnlyConfig())
    else:  # the form with a CPU kernel (torch.ops.aten._weight_int4pack_mm_for_cpu); later versions have none
        from torchao.prototype.int4_opaque_tensor import Int4WeightOnlyOpaqueTensorConfig

        quantize_(model, Int4WeightOnlyOpaqueTensorConfig(group_size=32))


class Step:
    """One call of the model with a cache that stays where it is."""

    def __init__(self, model: Any) -> None:
        self.model = model
        # A loop over single tokens alone is worth generating code for.
        self.decode = torch.compile(model.forward, dynamic=False)
        self.cache: StaticCache | None = None
        self.length = 0

    def restart(self) -> None:
        if self.cache is None:
            self.cache = StaticCache(
                config=self.model.config, max_cache_len=min(2048, self.model.config.max_position_embeddings)
            )
        else:
            self.cache.reset()
        self.length = 0

    def __call__(self, tokens: list[int]) -> int:
        forward = self.decode if len(tokens) == 1 else self.model.forward
        positions = torch.arange(self.length, self.length + len(tokens))
        with torch.no_grad():
            logits = forward(
                input_ids=torch.tensor([tokens]), position_ids=positions[None], past_key_values=self.cache, use_cache=True,
                logits_to_keep=1,
            ).logits  # fmt: skip
        self.length += len(tokens)
        return int(logits[0, -1].argmax())


def open_runner(folder: Path, options: dict[str, Any], threads: int) -> Run:
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options["dtype"])).eval()
    packages = ["torch", "transformers"]
    if "torchao" in options:
        quantized(model, options["torchao"])
        packages.append("torchao")
    run = greedy(Step(model))
    run.note = versions(*packages)  # type: ignore[attr-defined]
    return run


if __name__ == "__main__":
    serve(open_runner)
