"""onnxruntime in a default session, keys and values handed from step to step without a copy to the host.

options: ``bits`` (4 or 8: MatMulNBits by onnxruntime's own quantizer; left out: float32), ``qdq`` (an int8 file of actgraph,
as ``actgraph`` exports it for any runtime).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from protocol import Run, greedy, serve, versions


def exported(folder: Path, passes: str, name: str) -> Path:
    """An ONNX file of standard operators alone, with growing keys and values as inputs and outputs."""
    path = folder / f"{name}.onnx"
    if not path.exists():
        import actgraph as ag

        pipeline = f"{passes}, kv_cache{{graphs=combined}}" if passes else "kv_cache{graphs=combined}"
        graph = ag.run(ag.load(str(folder)), pipeline, parity="none", reproducer=False).graph
        graph.save(path, inline="all")
    return path


def matmul_nbits(source: Path, bits: int) -> Path:
    path = source.with_name(f"matmulnbits{bits}.onnx")
    if not path.exists():
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

        # It takes constants alone: the transposes in front of the products are folded first.
        folded = source.with_name("folded.onnx")
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(folded)
        ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
        # level 4: products of int8, the fastest that it has
        config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, accuracy_level=4, bits=bits)
        quantizer = MatMulNBitsQuantizer(onnx.load(folded), algo_config=config)
        quantizer.process()
        folded.unlink()
        quantizer.model.save_model_to_file(str(path), use_external_data_format=True)
    return path


class Step:
    def __init__(self, path: Path, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.slots = [name for name in self.inputs if name.startswith("past_key_values.")]
        self.state: dict[str, ort.OrtValue] = {}
        self.length = 0

    def restart(self) -> None:
        self.length = 0
        self.state = {}
        for name in self.slots:
            shape = [size if isinstance(size, int) else 0 for size in self.inputs[name].shape]
            shape[0] = 1
            self.state[name] = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))

    def __call__(self, tokens: list[int]) -> int:
        end = self.length + len(tokens)
        feeds = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(self.length, end, dtype=np.int64)[None],
        }
        binding = self.session.io_binding()
        for name, array in feeds.items():
            if name in self.inputs:
                binding.bind_cpu_input(name, array)
        for name, value in self.state.items():
            binding.bind_ortvalue_input(name, value)
        outputs = [value.name for value in self.session.get_outputs()]
        for name in outputs:
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        found = dict(zip(outputs, binding.get_outputs(), strict=True))
        self.state = {name: found[name.replace("past_key_values", "present")] for name in self.slots}
        self.length = end
        return int(found["logits"].numpy()[0, -1].argmax())


def open_runner(folder: Path, options: dict[str, Any], threads: int) -> Run:
    passes = options.get("qdq", "")
    path = exported(folder, passes, "qdq" if passes else "float32")
    if "bits" in options:
        path = matmul_nbits(path, options["bits"])
    run = greedy(Step(path, threads))
    run.note = versions("onnxruntime")  # type: ignore[attr-defined]
    return run


if __name__ == "__main__":
    serve(open_runner)
