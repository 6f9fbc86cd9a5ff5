"""Variants of tests that run in `make slow`: others of the same test run in `make test`, and see most of what these see.

By test, the ids of its variants. A test beside which an entry fits nothing any more is an error.
"""

from __future__ import annotations

SLOW: dict[str, tuple[str, ...]] = {
    "tests/graph/test_architectures.py::test_role_sites_hold_what_the_modules_compute": (
        "albert-fx", "albert-onnx", "bert-fx", "gemma3-fx", "gemma3-onnx", "gpt2-fx", "gpt_neox-fx", "gpt_neox-onnx",
        "llama-onnx", "mamba-fx", "mamba-onnx", "minilm-fx", "minilm-onnx", "mixtral-fx", "mixtral_batched-fx",
        "mixtral_batched-onnx", "opt-fx", "opt-onnx", "phi3-fx", "phi3-onnx", "qwen3-fx", "qwen3-onnx", "resnet-onnx",
        "stories260k-fx", "stories260k-onnx", "t5-onnx", "vit-onnx",
    ),
    "tests/passes/test_kif.py::test_a_capsule_scales_the_signature_alone": (
        "fx--0.8", "fx--1.0", "onnx--0.8", "onnx--1.0",
    ),
    "tests/passes/test_kv_cache.py::test_after_other_passes": (
        "onnx-before0", "onnx-prune{ratio=0.25 importance=magnitude}", "onnx-quantize{weights=int8}",
    ),
    "tests/passes/test_kv_cache_masks.py::test_numbers_that_mix_causal_and_padding": (
        "added-False-fx", "added-True-onnx", "filled-True-onnx", "heads-False-fx", "heads-True-onnx", "least-True-fx",
        "thousands-True-fx", "window-False-onnx", "window-True-fx",
    ),
    "tests/passes/test_kv_cache_storage.py::test_after_other_passes": (
        "fx-prune{ratio=0.25 importance=magnitude}", "fx-quantize{weights=int8}", "fx-sparsify{threshold=0.05}",
        "onnx-before0",
    ),
    "tests/passes/test_quantize_formats.py::test_exported": (
        "fx-weights=fp8", "fx-weights=int4", "fx-weights=int4 group_size=0", "fx-weights=int8 group_size=16",
        "onnx-weights=fp8", "onnx-weights=int4", "onnx-weights=int4 group_size=0", "onnx-weights=int8 group_size=16",
    ),
    "tests/passes/test_steer_inputs.py::test_vectors": (
        "fx-none", "fx-restore", "onnx-none", "onnx-restore",
    ),
    "tests/passes/test_steer_inputs.py::test_with_a_cache": (
        "fx-scale-before", "fx-vector-after", "onnx-pick-before", "onnx-vector-after",
    ),
    "tests/runtime/test_held.py::test_results_belong_to_the_caller": (
        "fx-form=growing", "fx-form=growing graphs=combined", "fx-form=static graphs=combined", "onnx-form=growing",
        "onnx-form=growing graphs=combined", "onnx-form=ring graphs=combined",
    ),
    "tests/runtime/test_steering_with_cache.py::test_logits_at_every_place": (
        "gpt2-fx-4:", "gpt2-onnx-:4", "llama-fx-generated & 5:9", "llama-onnx-2:8", "llama-onnx-4:",
        "llama-onnx-last_of_the_prompt", "llama-onnx-prompt",
    ),
    "tests/runtime/test_torch_recorded.py::test_architectures_need_no_python": (
        "float16-gpt2", "float16-gpt_neox", "float16-llama", "float16-phi3", "float16-qwen3", "int8-gpt2", "int8-gpt_neox",
        "int8-llama", "int8-opt", "int8-phi3", "int8-qwen3", "same-llama",
    ),
    "tests/runtime/test_torch_recorded.py::test_recorded_steps": (
        "gemma3-kv_cache{form=growing}", "gemma3-kv_cache{form=ring}", "llama-sparsify{threshold=0.2}, kv_cache{}, fuse",
        "llama-sparsify{threshold=0.2}, quantize{weights=int8}, kv_cache{storage=int8}", "mixtral-kv_cache{}",
        "qwen3-quantize{weights=int8}, kv_cache{form=static}",
    ),
}  # fmt: skip
