"""transformers in torch: ``generate`` as users call it, plain or compiled, also with a vector added after every block.

options: ``dtype`` (float32, bfloat16), ``compiled``, ``vector`` (a safetensors file with one vector), ``by`` (what adds it:
``hooks``, ``repeng`` or ``nnsight``).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from protocol import Run, serve, versions
from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig


class Clock:
    """What ``generate`` calls with the prompt and each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def open_runner(folder: Path, options: dict[str, Any], threads: int) -> Run:
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.get("dtype", "float32"))).eval()
    compiled = options.get("compiled", False)
    generate: Callable[..., Any] = model.generate
    names = ["torch", "transformers"]
    if "vector" in options:
        generate = steered(model, options["vector"], options["by"])
        names += [options["by"]] if options["by"] != "hooks" else []

    def run(prompt: list[int], count: int) -> tuple[float, float, list[int]]:
        more: dict[str, Any] = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        if compiled:
            more["cache_implementation"] = "static"
            more["compile_config"] = CompileConfig(fullgraph=False, mode="default")
            more["compile_config"]._compile_all_devices = True
        clock = Clock()
        ids = torch.tensor([prompt])
        start = time.perf_counter()
        with torch.no_grad():
            made = generate(
                ids,
                attention_mask=torch.ones_like(ids),
                streamer=clock,
                generation_config=GenerationConfig(eos_token_id=None, **more),
            )
        assert len(clock.times) == count + 1, f"{len(clock.times)} calls of the streamer"
        return clock.times[1] - start, clock.times[-1] - clock.times[1], made[0, len(prompt) :].tolist()

    run.note = versions(*names)  # type: ignore[attr-defined]
    return run


def steered(model: Any, file: str, by: str) -> Callable[..., Any]:
    """``model.generate`` with the vector added to what every block puts out."""
    from safetensors.torch import load_file

    (vector,) = load_file(file).values()
    vector = vector.to(model.dtype)
    layers = model.model.layers
    if by == "hooks":

        def add(module: Any, inputs: Any, output: Any) -> Any:
            return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

        for layer in layers:
            layer.register_forward_hook(add)
        return model.generate
    if by == "repeng":
        from repeng import ControlModel, ControlVector

        numbers = range(len(layers))
        control = ControlModel(model, list(numbers))
        control.set_control(ControlVector("llama", {number: vector.float().numpy() for number in numbers}), 1.0)
        return control.generate
    if by == "nnsight":
        from nnsight import TransformersModel

        loaded = TransformersModel(model.name_or_path, task="text-generation", dispatch=True, dtype=model.dtype)
        return traced(loaded, vector, len(layers))
    raise ValueError(f"no way to steer by {by}")


def traced(model: Any, vector: torch.Tensor, layers: int) -> Callable[..., Any]:
    """The intervention written as nnsight asks: in the order in which the blocks run, at each step."""

    def generate(ids: torch.Tensor, **options: Any) -> torch.Tensor:
        steps = options["generation_config"].max_new_tokens
        with model.generate(ids, **options) as tracer:
            for _ in tracer.iter[:steps]:
                for number in range(layers):
                    model.model.layers[number].output[:] += vector
            made = tracer.result.save()
        return made

    return generate


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        serve(open_runner)
