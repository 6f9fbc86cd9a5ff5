"""Tiny mixtures of experts of both router styles, and their routing once more by hand, token by token in numpy."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from actgraph import formats
from actgraph.formats.onnx_export import to_onnx
from actgraph.graph import Graph
from actgraph.graph.executor import executor_for
from actgraph.graph.graph import Array
from actgraph.passes.steer.mote import mixtures_by_block
from tests import captures, zoo

BLOCK = "blocks.1"  # of every model here: the one whose router is edited
_BATCHED = {"experts_implementation": "batched_mm"}
_MLA = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}  # fmt: skip


@functools.cache
def eager(name: str) -> nn.Module:
    """The model. Do not change it: it is shared."""
    if name in zoo.ENTRIES:
        return zoo.model(name)
    import transformers

    zoo._silence()
    torch.manual_seed(0)
    small = {"num_experts": 6, "num_experts_per_tok": 2, **_BATCHED}
    groups = {
        "moe_intermediate_size": 24, "n_routed_experts": 12, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 3,
        "first_k_dense_replace": 1, **_BATCHED,
    }  # fmt: skip
    llama = zoo._LLAMA | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if name.startswith("deepseek_v2"):
        v2 = transformers.DeepseekV2Config(**{**llama, **_MLA, **groups}, topk_method="group_limited_greedy")
        return zoo._random(transformers.DeepseekV2ForCausalLM(v2), name)
    if name.startswith("deepseek"):  # V3: sigmoid, a bias for the choice alone, groups; "deepseek_plain" does not normalise
        v3 = transformers.DeepseekV3Config(
            **{**llama, **_MLA, **groups}, num_mtp_layers=0, norm_topk_prob=name == "deepseek"
        )  # fmt: skip
        model = zoo._random(transformers.DeepseekV3ForCausalLM(v3), name)
        bias = model.model.layers[1].mlp.gate.e_score_correction_bias
        bias.copy_(torch.linspace(-0.1, 0.1, len(bias)))
        return model
    if name == "olmoe":  # a softmax over all experts, and no normalisation of those chosen
        return zoo._random(transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**llama, **small)), name)
    if name == "gpt_oss":  # a top-k of logits, and a softmax of those chosen
        config = transformers.GptOssConfig(
            **{**llama, "intermediate_size": 24}, head_dim=8, num_local_experts=6, num_experts_per_tok=2,
            attn_implementation="eager", **_BATCHED,
        )  # fmt: skip
        return zoo._random(transformers.GptOssForCausalLM(config), name)
    raise KeyError(name)


@functools.cache
def _captured(name: str) -> Graph:
    if name in zoo.ENTRIES:
        return zoo.captured(name)
    recipe = Path(__file__).read_text(encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return captures.shared(f"moe-{name}", lambda: formats.load(eager(name), name=name, length=8), recipe)


@functools.cache
def _exported(name: str) -> Graph:
    return to_onnx(_captured(name))


def in_dialect(name: str, dialect: str) -> Graph:
    """The model as traced from torch, or as ONNX; a clone."""
    return (_captured(name) if dialect == "fx" else _exported(name)).clone()


def inputs() -> dict[str, Array]:
    """Two rows of eight tokens, the second one padded on the left by three."""
    given = zoo.inputs("llama", batch=2, length=8)
    given["attention_mask"][1, :3] = 0
    given["position_ids"] = np.maximum(given["attention_mask"].cumsum(1) - 1, 0)
    return given


def routed(graph: Graph, given: dict[str, Array] | None = None) -> tuple[Array, Array, Array]:
    """``(experts, weights, logits)``: what the router of ``BLOCK`` chose, ``[tokens, k]`` each, and the model's logits."""
    router = mixtures_by_block(graph)[BLOCK][1]
    assert not isinstance(router, str), router
    runner = executor_for(graph).open(graph, [router.chosen, router.gates], optimize=False)
    out = runner(inputs() if given is None else given)
    return out[router.chosen.name], out[router.gates.name], out["logits"]


@dataclass(frozen=True)
class Convention:
    """How a router goes from logits to weights: ``groups`` is ``(count, kept, experts that a group's score is the sum of)``."""

    k: int
    normalise: bool
    scores: Callable[[Array], Array]
    bias: Array | float = 0.0
    scale: float = 1.0
    groups: tuple[int, int, int] = (1, 1, 1)


def _softmax(logits: Array) -> Array:
    e = np.exp(logits - logits.max())
    return np.asarray(e / e.sum())


def _sigmoid(logits: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-logits)))


def convention(name: str) -> Convention:
    if name.startswith("mixtral"):
        return Convention(2, True, _softmax)
    if name == "olmoe":
        return Convention(2, False, _softmax)
    if name == "deepseek_v2":
        return Convention(3, False, _softmax, groups=(3, 2, 1))
    gate: Any = eager(name).model.layers[1].mlp.gate  # type: ignore[union-attr]
    bias = gate.e_score_correction_bias.double().numpy()
    return Convention(3, name == "deepseek", _sigmoid, bias, gate.routed_scaling_factor, (3, 2, 2))


def choose(
    c: Convention, logits: Array, *, gone: Collection[int] = (), forced: Collection[int] = (), added: Array | float = 0.0
) -> tuple[Array, Array]:
    """``(experts, weights)`` of one token, for ``logits [experts]``: ``gone`` do not exist, ``forced`` come first."""
    scores = c.scores(logits)
    wish = scores + c.bias + added
    count, kept, summed = c.groups
    members = [[e for e in group if e not in gone] for group in np.split(np.arange(len(logits)), count)]
    best = [sorted((wish[e] for e in group), reverse=True)[:summed] for group in members]
    worth = [np.inf if set(group) & set(forced) else sum(top) for group, top in zip(members, best, strict=True)]
    open_to = sorted(range(count), key=lambda g: -worth[g])[:kept]
    candidates = sorted((e for g in open_to for e in members[g]), key=lambda e: (e not in forced, -wish[e]))
    experts = np.array(candidates[: c.k])
    weights = scores[experts]
    return experts, weights / (weights.sum() if c.normalise else 1.0) * c.scale


Route = Callable[[Convention, Array], tuple[Array, Array]]


def by_hand(name: str, route: Route, named: Array | None = None, given: dict[str, Array] | None = None) -> Array:
    """Logits of the eager model, whose router in ``BLOCK`` is ``route`` for the tokens ``named [batch, seq]`` (all)."""
    c, taken = convention(name), inputs() if given is None else given
    flat = np.ones(taken["input_ids"].size, bool) if named is None else named.reshape(-1)

    def hook(module: nn.Module, args: object, output: Any) -> Any:
        logits, weights, experts = output
        pairs = [route(c, row) if on else None for row, on in zip(logits.double().numpy(), flat, strict=True)]
        new_weights, new_experts = weights.clone(), experts.clone()
        for token, pair in enumerate(pairs):
            if pair is not None:
                new_experts[token] = torch.from_numpy(pair[0])
                new_weights[token] = torch.from_numpy(pair[1]).to(weights.dtype)
        return logits, new_weights, new_experts

    model: Any = eager(name)
    handle = model.model.layers[1].mlp.gate.register_forward_hook(hook)
    try:
        with torch.no_grad():
            tensors = {key: torch.from_numpy(value) for key, value in taken.items()}
            return np.asarray(model(**tensors, use_cache=False).logits.numpy())
    finally:
        handle.remove()
