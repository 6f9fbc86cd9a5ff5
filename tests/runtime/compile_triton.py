"""Compiles the Triton kernels for a compute capability without its device: ``python compile_triton.py 90``.

The host code of the ops runs as it is, on CPU tensors of the sizes of a model; each launch compiles and does not launch. One
JSON line for each compiled variant: kernel, registers, stack (spilled registers) and shared memory in bytes.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from actgraph.runtime.kernels.triton import feed_forward, linear, steering

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class NoDevice:
    """As much of a driver as compiling needs."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def compile_launches() -> None:
    """Make every launch a compilation that reports."""
    run, seen = JITFunction.run, set()

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(kernel.asm["cubin"])
                file.flush()
                usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
            found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
            assert found, usage
            figures = {"registers": int(found[1]), "stack": int(found[2]), "shared": kernel.metadata.shared}
            print(json.dumps({"kernel": self.__name__, **figures}), flush=True)

    JITFunction.run = compile_only


def stored(form: str, layout: str, outputs: int, inputs: int, dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
    shape = (outputs, inputs) if layout == "out_in" else (inputs, outputs)
    if form == "float":
        return [torch.zeros(shape, dtype=dtype), None], {}
    if form in ("i8", "f8"):
        return [torch.zeros(shape, dtype=torch.int8 if form == "i8" else torch.float8_e4m3fn), torch.ones(outputs)], {}
    groups = inputs // 32
    scale = torch.ones((outputs, groups) if layout == "out_in" else (groups, outputs))
    return [torch.zeros((shape[0], shape[1] // 2), dtype=torch.uint8), scale], {"packed": "u4", "block_size": 32}


def linears() -> None:
    inputs = outputs = 2048
    forms, layouts = ("float", "i8", "u4", "f8"), ("out_in", "in_out")
    for tokens, dtype, form, layout in itertools.product((1, 8, 64), (torch.float32, torch.bfloat16), forms, layouts):
        operands, attributes = stored(form, layout, outputs, inputs, dtype)
        zero = torch.zeros_like(operands[1]).to(torch.uint8) if form == "u4" else None
        kept = torch.ones(tokens, outputs) if tokens == 8 else None
        x = torch.zeros(tokens, inputs, dtype=dtype)
        gate = {"keep": "abs>", "threshold": 0.5} if layout == "in_out" or tokens == 8 else {}
        linear.linear(x, *operands, zero, None, None, None, kept, layout=layout, **attributes, **gate)


def feed_forwards() -> None:
    for tokens, form, sparse in itertools.product((1, 8, 64), ("float", "i8", "u4"), ("none", "act", "hidden")):
        (up, up_scale), attributes = stored(form, "out_in", 2048, 1024, torch.bfloat16)
        (down, down_scale), _ = stored(form, "in_out", 1024, 2048, torch.bfloat16)
        gate, gate_scale = (None, None) if sparse == "none" and form == "float" else (up, up_scale)
        x = torch.zeros(tokens, 1024, dtype=torch.bfloat16)
        activation = {"none": "gelu", "act": "silu", "hidden": "gelu_tanh"}[sparse]
        scales = (up_scale, down_scale, gate_scale)
        feed_forward.feed_forward(x, up, down, gate, *scales, activation=activation, sparse=sparse, **attributes)


def steerings() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x, vector, mask = torch.zeros(2, 3, 1000, dtype=dtype), torch.ones(1000), torch.ones(2, 3, dtype=torch.bool)
        for norm in ("none", "restore", "relative"):
            steering.shift(x, vector, torch.ones(1), mask, norm=norm)
            steering.shift(x, vector, norm=norm, scale=0.5)
        steering.channel_scale(x, vector)
        steering.channel_scale(x, torch.ones(()), mask)
        steering.lowrank_map(x, torch.ones(1000, 1), torch.ones(1, 1))
        steering.lowrank_map(x, torch.ones(1000, 64), torch.ones(64, 64), mask)
        for normalize in ("none", "rescale", "layer_norm"):
            rows = torch.ones(64, 1000)
            steering.latent_edit(x, rows, rows, torch.ones(64), torch.ones(64), None, mask, mode="set", normalize=normalize)
            steering.latent_edit(x, rows[:1], rows[:1], None, None, torch.ones(1), mode="scale", normalize=normalize)
            steering.latent_edit(x, rows[:1], mode="add", value=0.5, normalize=normalize)
        steering.clip(x, min=-1.0, max=1.0)
        steering.clip(x, vector, torch.ones(()), policy="zero", nan="zero")
        steering.gate(x, threshold=0.5)
        steering.gate(x, vector, keep="x>=")


def small() -> None:
    """Sizes of 1, which Triton makes constants of, and sizes that nothing divides."""
    for tokens, inputs, outputs in ((1, 1, 1), (3, 37, 5), (20, 1, 1), (20, 37, 5)):
        x, weight, kept = torch.zeros(tokens, inputs), torch.zeros(outputs, inputs), torch.ones(tokens, outputs)
        linear.linear(x, weight, None, None, torch.zeros(outputs), None, None, kept)
        linear.linear(x, weight.T.contiguous(), keep="abs>", threshold=1.0, layout="in_out")
        feed_forward.feed_forward(x, weight, weight, weight, sparse="act")
        steering.shift(x, torch.ones(inputs), norm="restore")
        steering.lowrank_map(x, torch.ones(inputs, 1), torch.ones(1, 1))
        steering.latent_edit(x, torch.ones(1, inputs), torch.ones(1, inputs), mode="set", normalize="layer_norm")
        steering.channel_scale(x, torch.ones(inputs), torch.ones(tokens))
        steering.clip(x, torch.ones(inputs))
        steering.gate(x, torch.ones(inputs))


if __name__ == "__main__":
    driver.set_active(NoDevice(int(sys.argv[1])))
    compile_launches()
    linears()
    feed_forwards()
    steerings()
    small()
