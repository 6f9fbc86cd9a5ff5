"""Variants of tests that run in `make slow`: others of the same test run in `make test`, and see most of what these see.

By test, the ids of its variants. A test beside which an entry fits nothing any more is an error.
"""

from __future__ import annotations

SLOW: dict[str, tuple[str, ...]] = {
    "tests/calibrate/test_perplexity.py::test_a_cache_starts_empty_for_each_document": (
        "onnx",
    ),
    "tests/formats/test_onnx_export.py::test_an_edit_at_a_site_does_the_same_before_and_after_export": (
        "gpt2", "mixtral",
    ),
    "tests/graph/test_architectures.py::test_both_dialects_have_the_same_sites": (
        "albert", "gemma3", "gpt_neox", "mamba", "minilm", "mixtral_batched", "opt", "phi3", "qwen3",
    ),
    "tests/graph/test_architectures.py::test_role_sites_hold_what_the_modules_compute": (
        "albert-fx", "albert-onnx", "bert-fx", "gemma3-fx", "gemma3-onnx", "gpt2-fx", "gpt_neox-fx", "gpt_neox-onnx",
        "llama-onnx", "mamba-fx", "mamba-onnx", "minilm-fx", "minilm-onnx", "mixtral-fx", "mixtral_batched-fx",
        "mixtral_batched-onnx", "opt-fx", "opt-onnx", "phi3-fx", "phi3-onnx", "qwen3-fx", "qwen3-onnx", "resnet-onnx",
        "stories260k-fx", "stories260k-onnx", "t5-onnx", "vit-onnx",
    ),
    "tests/graph/test_router.py::test_routers_are_read": (
        "gpt_oss", "olmoe",
    ),
    "tests/passes/test_cast_fills.py::test_masked_rows_stay_finite": (
        "bf16-masked_fill", "bf16-stored", "f16-times", "f16-where",
    ),
    "tests/passes/test_cast_fills.py::test_masked_rows_stay_finite_in_onnx": (
        "bf16-stored", "bf16-times", "f16-where",
    ),
    "tests/passes/test_compose.py::test_pipeline_through_onnx": (
        "pipeline0", "pipeline2",
    ),
    "tests/passes/test_fuse.py::test_exported": (
        "fx-sparsify{method=cats threshold=0.1}, fuse-none", "onnx-sparsify{method=cats threshold=0.1}, fuse-all",
        "onnx-sparsify{method=teal threshold=0.05}, quantize, fuse-none",
    ),
    "tests/passes/test_fuse.py::test_with_a_cache_before_and_behind": (
        "fx",
    ),
    "tests/passes/test_guardit.py::test_every_mode_is_the_authors_selection": (
        "best--1.5-None-onnx", "best-None-None-fx", "ratio-1.5-0.5-fx", "ratio-None-None-onnx", "soft-None-0.5-onnx",
        "threshold-None-0.5-onnx", "weighted-0.2-0.3-fx",
    ),
    "tests/passes/test_guardit.py::test_the_gate_inside_the_graph": (
        "distant-best-left-fx", "distant-best-right-onnx", "distant-left-onnx", "distant-right-fx", "inside-right-onnx",
    ),
    "tests/passes/test_guardit.py::test_the_gate_inside_the_graph_behind_a_cache": (
        "after", "program",
    ),
    "tests/passes/test_guiding_giants.py::test_the_same_tokens_for_every_way_of_calling": (
        "gpt2-fx",
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
    "tests/passes/test_kv_cache_masks.py::test_packed_sequences_are_detected_without_an_attention_mask": (
        "gemma3-fx",
    ),
    "tests/passes/test_kv_cache_ring.py::test_after_other_passes": (
        "fx-quantize{weights=int8}", "fx-sparsify{threshold=0.05}", "onnx-before0",
        "onnx-prune{ratio=0.25 importance=magnitude}",
    ),
    "tests/passes/test_kv_cache_ring.py::test_growing_static_and_ring_are_equal": (
        "mixtral-fx", "phi3-fx",
    ),
    "tests/passes/test_kv_cache_ring.py::test_one_token_attends_after_the_write": (
        "gemma3-int8-onnx", "gemma3-same-fx", "mistral-same-onnx",
    ),
    "tests/passes/test_kv_cache_storage.py::test_after_other_passes": (
        "fx-prune{ratio=0.25 importance=magnitude}", "fx-quantize{weights=int8}", "fx-sparsify{threshold=0.05}", "onnx-before0",
    ),
    "tests/passes/test_kv_cache_storage.py::test_forms_and_chunks_agree": (
        "onnx-int8", "stock-float16",
    ),
    "tests/passes/test_kv_cache_storage.py::test_models_in_half_precision": (
        "qwen3-fx-bf16", "qwen3-onnx-f16",
    ),
    "tests/passes/test_kv_cache_storage.py::test_the_real_model_keeps_its_perplexity": (
        "fx-int8", "onnx-float16",
    ),
    "tests/passes/test_mote.py::test_composes": (
        "fx-quantize", "onnx-steer",
    ),
    "tests/passes/test_mote.py::test_former_edits_count": (
        "fx-true", "onnx-false",
    ),
    "tests/passes/test_mote_profile.py::test_a_planted_expert_is_found_and_suppressed": (
        "onnx",
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
    "tests/passes/test_tap_clip_cast.py::test_clip_at_percentiles_of_the_calibration": (
        "fx-tensor", "onnx-channel",
    ),
    "tests/runtime/test_fused.py::test_sizes_of_heads": (
        "12-None", "24-kinds1",
    ),
    "tests/runtime/test_held.py::test_held_is_explicit": (
        "fx-form=growing", "fx-form=ring", "fx-form=ring graphs=combined", "onnx-form=growing",
        "onnx-form=growing graphs=combined", "onnx-form=ring", "onnx-form=ring graphs=combined", "onnx-form=static",
    ),
    "tests/runtime/test_held.py::test_results_belong_to_the_caller": (
        "fx-form=growing", "fx-form=growing graphs=combined", "fx-form=static graphs=combined", "onnx-form=growing",
        "onnx-form=growing graphs=combined", "onnx-form=ring graphs=combined",
    ),
    "tests/runtime/test_session_edges.py::test_a_full_buffer_changes_hands": (
        "1-1-counts3-1-torch", "2-2-counts0-None-onnxruntime",
    ),
    "tests/runtime/test_session_kernels.py::test_attention_reads_caches_as_they_are_stored": (
        "onnxruntime-growing storage=float16", "torch-growing storage=int8", "torch-static storage=int8",
    ),
    "tests/runtime/test_session_kernels.py::test_kernels_change_nothing": (
        "onnxruntime-quantize{weights=int4}", "onnxruntime-quantize{weights=int8}",
        "onnxruntime-sparsify{method=teal sparsity=0.5}, quantize{weights=bf16}",
        "torch-quantize{weights=bf16 embeddings=true}", "torch-quantize{weights=int8}",
        "torch-sparsify{method=cats sparsity=0.5}, quantize{weights=int4}",
        "torch-sparsify{method=teal sparsity=0.5}, quantize{weights=int8}",
    ),
    "tests/runtime/test_sessions.py::test_generation_again_and_again": (
        "fx-growing", "fx-static graphs=combined", "onnx-growing", "onnx-static graphs=combined",
    ),
    "tests/runtime/test_steering_with_cache.py::test_a_ring_gives_what_a_whole_cache_does": (
        "fx-5:12", "fx-prompt",
    ),
    "tests/runtime/test_steering_with_cache.py::test_logits_at_every_place": (
        "gpt2-fx-2:8", "gpt2-fx-4:", "gpt2-onnx-:4", "gpt2-onnx-generated & 5:9", "llama-fx-:4", "llama-fx-generated & 5:9",
        "llama-fx-one_row", "llama-onnx-2:8", "llama-onnx-4:", "llama-onnx-last_of_the_prompt", "llama-onnx-prompt",
    ),
    "tests/runtime/test_steering_with_cache.py::test_programs_and_a_cache_that_was_there_before": (
        "gpt2-fx-prompt", "llama-onnx-prompt",
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
