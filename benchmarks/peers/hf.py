"""transformers in torch: ``generate`` as users call it, plain or compiled, also with vectors added to outputs of blocks.

options: ``dtype`` (float32, bfloat16), ``compiled``, ``by`` (what adds: ``hooks``, ``repeng`` or ``nnsight``), ``vectors``
(safetensors files with one vector each; none: nothing is added), ``blocks`` (their numbers; default: all), ``by_row`` (each row
of the batch gets a vector of its own). Runners of one process share one model.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from protocol import Run, rows_of, serve, versions
from steered import WAYS, Shifts, read_vectors
from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig


class Streamer:
    """What ``generate`` calls with the prompt and each token."""

    def __init__(self, made: Callable[[], None]) -> None:
        self._made = made
        self._begun = False

    def put(self, value: Any) -> None:
        if self._begun:
            self._made()
        self._begun = True

    def end(self) -> None:
        pass


def open_runner(folder: Path, options: dict[str, Any], threads: int) -> Run:
    torch.set_num_threads(threads)
    dtype, by = options.get("dtype", "float32"), options.get("by")
    model = model_of(folder, dtype, by == "nnsight")
    compiled = options.get("compiled", False)
    names = ["torch", "transformers", *([by] if by in ("repeng", "nnsight") else [])]
    shifts: Shifts | None = None
    if options.get("vectors"):
        blocks = options.get("blocks", range(model.config.num_hidden_layers))
        shifts = Shifts(blocks, read_vectors(options["vectors"], getattr(torch, dtype)), options.get("by_row", False))

    def run(prompt: list[Any], count: int, each: Callable[[], None]) -> list[int]:
        more: dict[str, Any] = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        if compiled:
            more["cache_implementation"] = "static"
            more["compile_config"] = CompileConfig(fullgraph=False, mode="default")
            more["compile_config"]._compile_all_devices = True
        ids = torch.tensor(rows_of(prompt))
        steered = contextlib.nullcontext(model.generate) if shifts is None else WAYS[by](model, shifts)
        with torch.no_grad(), steered as generate:
            made = generate(
                ids,
                attention_mask=torch.ones_like(ids),
                streamer=Streamer(each),
                generation_config=GenerationConfig(eos_token_id=None, **more),
            )
        tokens: list[int] = made[:, ids.shape[1] :].flatten().tolist()
        return tokens

    run.note = versions(*names)  # type: ignore[attr-defined]
    return run


@functools.cache
def model_of(folder: Path, dtype: str, nnsight: bool) -> Any:
    """One for all runners of a process."""
    if nnsight:
        from nnsight import TransformersModel

        return TransformersModel(str(folder), task="text-generation", dispatch=True, dtype=getattr(torch, dtype))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        serve(open_runner)
