"""The Triton kernels on a CUDA device beside torch: linear in each format and sparsity, feed-forward, steering.

    python benchmarks/gpu.py --out benchmarks/results/h100.json         # everything: some minutes
    python benchmarks/gpu.py --only linear --tokens 1 8 --forms i8 u4

A runner is captured into a CUDA graph that goes once over as many copies of the weights as the L2 cache does not hold (cold
weights, no launch overhead of Python), and replays it. In a round every runner of a case is replayed in turn; times are medians
over the rounds, ratios are medians of the ratios within a round. ``bandwidth`` is the fastest plain read or copy of 1 GiB in
the same run; ``gb_s`` counts the bytes of weights and scales that a call has to touch: rows of dropped channels do not count.

The kernels are put in place as ``ag.compile(..., device="cuda")`` does it. Peers: ``F.linear`` (cuBLAS) in float32, float16 and
bfloat16, for codes also on the weight dequantized beforehand; torch's own weight-only products (``_weight_int8pack_mm``,
``_weight_int4pack_mm``) where this torch has them for the device. The peers skip nothing: a sparse case is compared with their
dense product. Each figure is one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from actgraph.errors import UnsupportedError
from actgraph.ops.torch_library import torch_op
from actgraph.runtime.torch_device import find_device, install_kernels

FORMS = ("f32", "f16", "bf16", "i8", "u4")
TOKENS = (1, 4, 8, 16, 64)
SPARSITIES = (0.0, 0.5, 0.7)
GROUP = 32
FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

#: Runs once on copy ``n`` of the weights and gives the result.
Runner = Callable[[int], torch.Tensor]


@dataclass
class Case:
    """One point: ours and its peers over the same numbers, and the bytes of weights that a call touches."""

    name: dict[str, Any]
    want: torch.Tensor  # in float32, from the reference, on copy 0
    ours: Runner
    touched: int
    copies: int
    peers: dict[str, Runner] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)


# --- cases --------------------------------------------------------------------------------------------------------------------


@dataclass
class Weight:
    """Copies of a stored weight [N, K] or [K, N], and the same one dense in the type of the activations."""

    copies: list[torch.Tensor]
    scale: torch.Tensor | None
    zero: torch.Tensor | None
    dense: list[torch.Tensor]  # [N, K]
    exact: torch.Tensor  # [N, K] in float32
    attributes: dict[str, Any]

    @property
    def bytes(self) -> int:
        parts = [self.copies[0], *([] if self.scale is None else [self.scale])]
        return sum(t.numel() * t.element_size() for t in parts)


def make_weight(form: str, layout: str, outputs: int, inputs: int, copies: int, device: torch.device) -> Weight:
    dtype = FLOATS.get(form, torch.bfloat16)
    generator = torch.Generator().manual_seed(outputs + inputs)
    numbers = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    scale = zero = None
    attributes: dict[str, Any] = {"layout": layout}
    if form == "i8":
        scale = numbers.abs().amax(1) / 127
        codes = (numbers / scale[:, None]).round().to(torch.int8)
        numbers = codes.float() * scale[:, None]
    elif form == "u4":
        grouped = numbers.reshape(outputs, inputs // GROUP, GROUP)
        scale = grouped.abs().amax(2) / 7
        codes = ((grouped / scale[:, :, None]).round() + 8).to(torch.uint8).reshape(outputs, inputs)
        numbers = ((codes.float() - 8).reshape(grouped.shape) * scale[:, :, None]).reshape(outputs, inputs)
        attributes |= {"packed": "u4", "block_size": GROUP}
    else:
        codes = numbers.to(dtype)
        numbers = codes.float()
    if layout == "in_out":
        codes = codes.T.contiguous()
        scale = scale.T.contiguous() if scale is not None and scale.dim() == 2 else scale
    if form == "u4":
        codes = codes[:, ::2] | (codes[:, 1::2] << 4)
        zero = torch.full(scale.shape, 8, dtype=torch.uint8, device=device)  # type: ignore[union-attr]
    made = [codes.to(device, copy=True).contiguous() for _ in range(copies)]
    dense = [numbers.to(device, dtype, copy=True) for _ in range(copies)]
    return Weight(made, None if scale is None else scale.to(device), zero, dense, numbers.to(device), attributes)


def threshold_for(x: torch.Tensor, sparsity: float) -> float:
    """Drops about ``sparsity`` of the channels for every token: they are scaled alike over the tokens."""
    return float(x.float().abs().amax(0).quantile(sparsity)) if sparsity else 0.0


def linear_case(form: str, tokens: int, sparsity: float, size: tuple[int, int], copies: int, device: torch.device) -> Case:
    """Dense cases store [N, K]; sparse ones [K, N], of which whole rows are skipped."""
    outputs, inputs = size
    weight = make_weight(form, "in_out" if sparsity else "out_in", outputs, inputs, copies, device)
    dtype = weight.dense[0].dtype
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    gate: dict[str, Any] = {"keep": "abs>", "threshold": threshold_for(x, sparsity)} if sparsity else {}
    op = torch_op("linear")

    def ours(n: int) -> torch.Tensor:
        result: torch.Tensor = op(x, weight.copies[n], weight.scale, weight.zero, **weight.attributes, **gate)
        return result

    kept = torch.where(x.abs() > gate["threshold"], x, 0) if gate else x
    touched = weight.bytes * int((kept != 0).any(0).sum()) // inputs
    name = {"op": "linear", "form": form, "tokens": tokens, "size": [outputs, inputs], "sparsity": sparsity}
    case = Case(name, kept.float() @ weight.exact.T, ours, touched, copies)
    case.peers["linear"] = lambda n: functional.linear(x, weight.dense[n])
    if not sparsity:
        for peer, make in (("int8pack", int8pack), ("int4pack", int4pack)):
            if peer[:4] == {"i8": "int8", "u4": "int4"}.get(form):
                try:
                    runner = make(x, weight)
                    runner(0)
                    case.peers[peer] = runner
                except (RuntimeError, NotImplementedError, AttributeError) as error:
                    case.unavailable[peer] = str(error).splitlines()[0]
    return case


def int8pack(x: torch.Tensor, weight: Weight) -> Runner:
    assert weight.scale is not None
    scale = weight.scale.to(x.dtype)
    return lambda n: torch._weight_int8pack_mm(x, weight.copies[n], scale)


def int4pack(x: torch.Tensor, weight: Weight) -> Runner:
    """torch keeps scales and zero points [K / group, N, 2] in bfloat16; its zero point is in units of the result."""
    assert weight.scale is not None
    # torch's byte holds its first code in the high half
    packed = [torch._convert_weight_to_int4pack((c << 4) | (c >> 4), 8) for c in weight.copies]
    parameters = torch.stack([weight.scale.T, torch.zeros_like(weight.scale.T)], -1).to(torch.bfloat16).contiguous()
    return lambda n: torch._weight_int4pack_mm(x, packed[n], GROUP, parameters)


def feed_forward_case(
    form: str, tokens: int, sparsity: float, size: tuple[int, int], copies: int, device: torch.device
) -> Case:
    """SwiGLU; sparse: the activation is gated, so that rows of up and down of dropped neurons are skipped."""
    neurons, width = size
    up, gate = (make_weight(form, "out_in", neurons, width, copies, device) for _ in range(2))
    gate.copies, gate.dense = [c.flip(0) for c in gate.copies], [d.flip(0) for d in gate.dense]
    gate.scale, gate.exact = None if gate.scale is None else gate.scale.flip(0), gate.exact.flip(0)
    down = make_weight(form, "in_out", width, neurons, copies, device)
    dtype = up.dense[0].dtype
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    act = functional.silu(x.float() @ gate.exact.T)
    threshold = threshold_for(act, sparsity)
    stay = act.abs() > threshold if sparsity else torch.ones_like(act, dtype=torch.bool)
    op = torch_op("feed_forward")
    attributes = {k: v for k, v in up.attributes.items() if k != "layout"}
    attributes |= {"sparse": "act", "threshold": threshold} if sparsity else {}

    def ours(n: int) -> torch.Tensor:
        weights = (up.copies[n], down.copies[n], gate.copies[n], up.scale, down.scale, gate.scale)
        result: torch.Tensor = op(x, *weights, **attributes)
        return result

    def peer(n: int) -> torch.Tensor:
        h = functional.silu(functional.linear(x, gate.dense[n])) * functional.linear(x, up.dense[n])
        return functional.linear(h, down.dense[n])

    hidden = torch.where(stay, act * (x.float() @ up.exact.T), 0.0)
    touched = gate.bytes + (up.bytes + down.bytes) * int(stay.any(0).sum()) // neurons
    name = {"op": "feed_forward", "form": form, "tokens": tokens, "size": [neurons, width], "sparsity": sparsity}
    return Case(name, hidden @ down.exact.T, ours, touched, copies, {"linear": peer})


def steering_case(tokens: int, width: int, copies: int, device: torch.device) -> Case:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    vectors = [torch.randn(width, generator=torch.Generator().manual_seed(1)).to(device) for _ in range(copies)]
    op = torch_op("shift")
    name = {"op": "shift", "form": "bf16", "tokens": tokens, "size": [width], "sparsity": 0.0}

    def ours(n: int) -> torch.Tensor:
        result: torch.Tensor = op(x, vectors[n], scale=4.0)
        return result

    case = Case(name, x.float() + 4 * vectors[0], ours, 2 * x.numel() * 2 + width * 4, copies)
    case.peers["add"] = lambda n: torch.add(x, vectors[n].to(x.dtype), alpha=4.0)
    return case


def cases(
    only: Sequence[str], forms: Sequence[str], tokens: Sequence[int], size: tuple[int, int], device: torch.device, cache: int
) -> Iterator[Case]:
    """``cache``: bytes that copies of the weights must exceed fourfold."""
    for form, count, sparsity in itertools.product(forms, tokens, SPARSITIES):
        bits = {"f32": 32, "i8": 8, "u4": 4}.get(form, 16)
        copies = 1 + 4 * cache * 8 // (size[0] * size[1] * bits)
        if "linear" in only:
            yield linear_case(form, count, sparsity, size, copies, device)
        if "feed_forward" in only:
            yield feed_forward_case(form, count, sparsity, size, 1 + copies // 3, device)
    if "shift" in only:
        for count in tokens:
            yield steering_case(count, size[1], 4, device)


# --- measurement --------------------------------------------------------------------------------------------------------------


def capture(run: Runner, copies: int) -> torch.cuda.CUDAGraph:
    """One pass over the copies as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(0)  # compiles, and chooses algorithms
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for n in range(copies):
            run(n)
    return graph


def seconds(work: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def bandwidth() -> float:
    """Bytes per second of the fastest plain read or copy of 1 GiB."""
    block = torch.ones(2**28, device="cuda")
    target = torch.empty_like(block)
    size = block.numel() * 4
    reads = [size / seconds(lambda: block.sum()) for _ in range(12)]
    copies = [2 * size / seconds(lambda: target.copy_(block)) for _ in range(12)]
    return max(statistics.median(reads[2:]), statistics.median(copies[2:]))


def measure(case: Case, rounds: int, stream: float) -> list[dict[str, Any]]:
    runners = {"actgraph": case.ours, **case.peers}
    errors = {name: float((run(0).float() - case.want).norm() / case.want.norm()) for name, run in runners.items()}
    graphs = {name: capture(run, case.copies) for name, run in runners.items()}
    for graph in graphs.values():
        graph.replay()
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, graph in graphs.items():
            times[name].append(seconds(graph.replay) / case.copies)
    lines = []
    for name, taken in times.items():
        median = statistics.median(taken)
        line: dict[str, Any] = {**case.name, "runner": name, "us": round(median * 1e6, 2)}
        if name == "actgraph" or not case.name["sparsity"]:
            line["error"] = errors[name]
        if name == "actgraph":
            line["gb_s"] = round(case.touched / median / 1e9, 1)
            line["of_bandwidth"] = round(case.touched / median / stream, 3)
        else:
            ratios = [theirs / ours for theirs, ours in zip(taken, times["actgraph"], strict=True)]
            line["actgraph_is_faster_by"] = round(statistics.median(ratios), 3)
        lines.append(line)
    return lines + [{**case.name, "runner": peer, "unavailable": why} for peer, why in case.unavailable.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["linear", "feed_forward", "shift"])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--size", nargs=2, type=int, default=[14336, 4096], metavar=("OUTPUTS", "INPUTS"))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file, too")
    options = parser.parse_args(arguments)
    try:
        device = find_device("cuda")
    except UnsupportedError as error:
        print(f"{error.message}: nothing was measured", file=sys.stderr)
        return 2
    assert device is not None
    if not install_kernels(device):  # says why
        print("nothing was measured", file=sys.stderr)
        return 2
    import triton

    torch.backends.cuda.matmul.allow_tf32 = False
    properties = torch.cuda.get_device_properties(device)
    stream = bandwidth()
    about = {
        "device": properties.name, "torch": torch.__version__, "triton": triton.__version__, "rounds": options.rounds,
        "l2_bytes": properties.L2_cache_size, "bandwidth_gb_s": round(stream / 1e9, 1),
    }  # fmt: skip
    print(json.dumps({"benchmark": "gpu", **about}), flush=True)
    figures = []
    with torch.no_grad():
        size = (options.size[0], options.size[1])
        for case in cases(options.only, options.forms, options.tokens, size, device, properties.L2_cache_size):
            for line in measure(case, options.rounds, stream):
                figures.append(line)
                print(json.dumps({"benchmark": "gpu", **line}), flush=True)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**about, "figures": figures}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
