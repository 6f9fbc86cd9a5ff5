"""OpenVINO on what optimum-intel exports, weights compressed by nncf.

options: ``bits`` (8 or 4; left out: not compressed), ``precision`` (f32 or bf16: in what the plugin computes).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from protocol import Run, greedy, serve, versions


class Step:
    """Its stateful model: keys and values stay inside the request."""

    def __init__(self, request: Any) -> None:
        self.request = request
        self.inputs = {name for port in request.model_inputs for name in port.get_names()}
        self.length = 0

    def restart(self) -> None:
        self.request.reset_state()
        self.length = 0

    def __call__(self, tokens: list[int]) -> int:
        end = self.length + len(tokens)
        feeds = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(self.length, end, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self.request.infer({name: array for name, array in feeds.items() if name in self.inputs}, share_inputs=True)
        self.length = end
        return int(self.request.get_tensor("logits").data[0, -1].argmax())


def open_runner(folder: Path, options: dict[str, Any], threads: int) -> Run:
    import openvino
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    bits = options.get("bits")
    path = folder / f"openvino-{bits or 32}"
    if not (path / "openvino_model.xml").exists():
        how: dict[str, Any] = {"load_in_8bit": False}
        if bits == 8:
            how = {"quantization_config": OVWeightQuantizationConfig(bits=8, sym=True)}
        elif bits == 4:  # every matrix, as for the others
            how = {
                "quantization_config": OVWeightQuantizationConfig(bits=4, sym=True, group_size=32, ratio=1.0, all_layers=True)
            }
        OVModelForCausalLM.from_pretrained(folder, export=True, compile=False, **how).save_pretrained(path)
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": options["precision"],
    }
    compiled = openvino.Core().compile_model(str(path / "openvino_model.xml"), "CPU", settings)
    run = greedy(Step(compiled.create_infer_request()))
    used = {name: str(compiled.get_property(name)) for name in ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION")}
    note = f"{versions('openvino', 'nncf', 'optimum-intel')} {json.dumps(used)}"
    run.note = note  # type: ignore[attr-defined]
    return run


if __name__ == "__main__":
    serve(open_runner)
