"""What every role site of the zoo's models must hold, read off the eager model with forward hooks.

Each function below names, for one family of models, the module whose input or output a site is. Nothing here looks at a
graph: the tests compare these arrays with what the graphs compute at their sites.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from tests import zoo

Arrays = dict[str, np.ndarray[Any, Any]]


class Hooks:
    """Inputs and outputs of every module during one forward, in order of its calls."""

    def __init__(self, model: nn.Module, inputs: Arrays, options: dict[str, Any]) -> None:
        self.calls: dict[str, list[tuple[list[torch.Tensor], Any]]] = {}
        handles = [
            m.register_forward_hook(functools.partial(self._record, n), with_kwargs=True) for n, m in model.named_modules()
        ]
        try:
            with torch.no_grad():
                self.result = model(**{key: torch.from_numpy(value) for key, value in inputs.items()}, **options)
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        # Copies: some modules go on in place with what they were given (ResNet's sum).
        given = [a.clone() for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        if isinstance(output, dict):  # transformers' output classes
            output = tuple(output.values())
        if isinstance(output, tuple):
            output = tuple(part.clone() if isinstance(part, torch.Tensor) else part for part in output)
        elif isinstance(output, torch.Tensor):
            output = output.clone()
        self.calls.setdefault(name, []).append((given, output))

    def into(self, module: str, call: int = 0) -> np.ndarray[Any, Any]:
        """What the module was given first."""
        return self.calls[module][call][0][0].numpy()

    def out(self, module: str, call: int = 0, part: int = 0) -> np.ndarray[Any, Any]:
        """What the module returned (one part of a tuple)."""
        output = self.calls[module][call][1]
        tensor = output[part] if isinstance(output, tuple) else output
        return tensor.numpy()


def _llama(h: Hooks, layers: int) -> Arrays:
    found = {"embed": h.out("model.embed_tokens"), "final_norm": h.out("model.norm"), "logits": h.result.logits.numpy()}
    for i in range(layers):
        layer, block = f"model.layers.{i}", f"blocks.{i}"
        found |= {
            f"{block}.resid_pre": h.into(layer),
            f"{block}.resid_post": h.out(layer),
            f"{block}.attn.norm": h.out(f"{layer}.input_layernorm"),
            f"{block}.attn.head_out": h.into(f"{layer}.self_attn.o_proj"),
            f"{block}.attn.out": h.out(f"{layer}.self_attn.o_proj"),
            f"{block}.resid_mid": h.into(f"{layer}.post_attention_layernorm"),
            f"{block}.mlp.norm": h.out(f"{layer}.post_attention_layernorm"),
        }
        if f"{layer}.self_attn.q_proj" in h.calls:
            found |= {f"{block}.attn.{part}": h.out(f"{layer}.self_attn.{part}_proj") for part in "qkv"}
        if f"{layer}.mlp.gate_proj" in h.calls:
            found |= _gated(h, f"{layer}.mlp", f"{block}.mlp")
    return found


def _gated(h: Hooks, module: str, stem: str) -> Arrays:
    return {
        f"{stem}.gate": h.out(f"{module}.gate_proj"),
        f"{stem}.up": h.out(f"{module}.up_proj"),
        f"{stem}.pre_act": h.into(f"{module}.act_fn"),
        f"{stem}.act": h.out(f"{module}.act_fn"),
        f"{stem}.hidden": h.into(f"{module}.down_proj"),
        f"{stem}.out": h.out(f"{module}.down_proj"),
    }


def _gemma3(h: Hooks, layers: int) -> Arrays:
    found = _llama(h, layers)
    for i in range(layers):  # norms on both sides of each branch
        layer, block = f"model.layers.{i}", f"blocks.{i}"
        found |= {
            f"{block}.attn.out": h.out(f"{layer}.post_attention_layernorm"),
            f"{block}.resid_mid": h.into(f"{layer}.pre_feedforward_layernorm"),
            f"{block}.mlp.norm": h.out(f"{layer}.pre_feedforward_layernorm"),
            f"{block}.mlp.out": h.out(f"{layer}.post_feedforward_layernorm"),
        }
    return found


def _phi3(h: Hooks, layers: int) -> Arrays:
    found = _llama(h, layers)
    for i in range(layers):
        layer, block = f"model.layers.{i}", f"blocks.{i}"
        qkv, width = h.out(f"{layer}.self_attn.qkv_proj"), found[f"{block}.attn.head_out"].shape[-1]
        q, k, v = np.split(qkv, [width, width + (qkv.shape[-1] - width) // 2], axis=-1)
        gate, up = np.split(h.out(f"{layer}.mlp.gate_up_proj"), 2, axis=-1)
        found |= {f"{block}.attn.q": q, f"{block}.attn.k": k, f"{block}.attn.v": v}
        found |= {f"{block}.mlp.gate": gate, f"{block}.mlp.pre_act": gate, f"{block}.mlp.up": up}
        found[f"{block}.mlp.act"] = h.out(f"{layer}.mlp.activation_fn")
        found[f"{block}.mlp.hidden"] = h.into(f"{layer}.mlp.down_proj")
        found[f"{block}.mlp.out"] = h.out(f"{layer}.mlp.down_proj")
    return found


def _mixtral(h: Hooks, layers: int) -> Arrays:
    found = _llama(h, layers)
    for i in range(layers):
        layer, block = f"model.layers.{i}", f"blocks.{i}"
        found[f"{block}.moe.router_logits"] = h.out(f"{layer}.mlp.gate")
        found[f"{block}.moe.gates"] = h.out(f"{layer}.mlp.gate", part=1)
        found[f"{block}.mlp.out"] = h.out(f"{layer}.mlp")
    return found


def _ungated(h: Hooks, stem: str, up: str, act: str, down: str) -> Arrays:
    return {
        f"{stem}.up": h.out(up),
        f"{stem}.pre_act": h.into(act),
        f"{stem}.act": h.out(act),
        f"{stem}.hidden": h.into(down),
        f"{stem}.out": h.out(down),
    }


def _gpt2(h: Hooks, layers: int) -> Arrays:
    found = {"embed": h.out("transformer.wte"), "final_norm": h.out("transformer.ln_f"), "logits": h.result.logits.numpy()}
    for i in range(layers):
        layer, block = f"transformer.h.{i}", f"blocks.{i}"
        q, k, v = np.split(h.out(f"{layer}.attn.c_attn"), 3, axis=-1)
        found |= {
            f"{block}.resid_pre": h.into(layer),
            f"{block}.resid_post": h.out(layer),
            f"{block}.attn.norm": h.out(f"{layer}.ln_1"),
            f"{block}.attn.q": q,
            f"{block}.attn.k": k,
            f"{block}.attn.v": v,
            f"{block}.attn.head_out": h.into(f"{layer}.attn.c_proj"),
            f"{block}.attn.out": h.out(f"{layer}.attn.c_proj"),
            f"{block}.resid_mid": h.into(f"{layer}.ln_2"),
            f"{block}.mlp.norm": h.out(f"{layer}.ln_2"),
        }
        found |= _ungated(h, f"{block}.mlp", f"{layer}.mlp.c_fc", f"{layer}.mlp.act", f"{layer}.mlp.c_proj")
    return found


def _gpt_neox(h: Hooks, layers: int) -> Arrays:
    found = {
        "embed": h.out("gpt_neox.embed_in"),
        "final_norm": h.out("gpt_neox.final_layer_norm"),
        "logits": h.result.logits.numpy(),
    }
    for i in range(layers):
        layer, block = f"gpt_neox.layers.{i}", f"blocks.{i}"
        fused = h.out(f"{layer}.attention.query_key_value")
        heads = fused.reshape(*fused.shape[:2], 4, -1).transpose(0, 2, 1, 3)  # each head holds its q, k and v
        q, k, v = np.split(heads, 3, axis=-1)
        found |= {
            f"{block}.resid_pre": h.into(layer),
            f"{block}.resid_post": h.out(layer),
            f"{block}.attn.norm": h.out(f"{layer}.input_layernorm"),
            f"{block}.attn.q": q,
            f"{block}.attn.k": k,
            f"{block}.attn.v": v,
            f"{block}.attn.head_out": h.into(f"{layer}.attention.dense"),
            f"{block}.attn.out": h.out(f"{layer}.attention.dense"),
            f"{block}.mlp.norm": h.out(f"{layer}.post_attention_layernorm"),
        }
        mlp = f"{layer}.mlp"
        found |= _ungated(h, f"{block}.mlp", f"{mlp}.dense_h_to_4h", f"{mlp}.act", f"{mlp}.dense_4h_to_h")
    return found


def _opt(h: Hooks, layers: int) -> Arrays:
    found = {
        "embed": h.out("model.decoder.embed_tokens"), "final_norm": h.out("model.decoder.final_layer_norm"),
        "logits": h.result.logits.numpy(),
    }  # fmt: skip
    for i in range(layers):
        layer, block = f"model.decoder.layers.{i}", f"blocks.{i}"
        found |= {
            f"{block}.resid_pre": h.into(layer),
            f"{block}.resid_post": h.out(layer),
            f"{block}.attn.norm": h.out(f"{layer}.self_attn_layer_norm"),
            f"{block}.attn.head_out": h.into(f"{layer}.self_attn.out_proj"),
            f"{block}.attn.out": h.out(f"{layer}.self_attn.out_proj"),
            f"{block}.resid_mid": h.into(f"{layer}.final_layer_norm"),
            f"{block}.mlp.norm": h.out(f"{layer}.final_layer_norm"),
        }
        found |= {f"{block}.attn.{part}": h.out(f"{layer}.self_attn.{part}_proj") for part in "qkv"}
        found |= _ungated(h, f"{block}.mlp", f"{layer}.fc1", f"{layer}.activation_fn", f"{layer}.fc2")
    return found


def _bert(h: Hooks, layers: int) -> Arrays:
    found = {"embed": h.out("embeddings.word_embeddings")}
    for i in range(layers):
        layer, block = f"encoder.layer.{i}", f"blocks.{i}"
        found |= {
            f"{block}.resid_pre": h.into(layer),
            f"{block}.resid_post": h.out(layer),
            f"{block}.attn.q": h.out(f"{layer}.attention.self.query"),
            f"{block}.attn.k": h.out(f"{layer}.attention.self.key"),
            f"{block}.attn.v": h.out(f"{layer}.attention.self.value"),
            f"{block}.attn.head_out": h.into(f"{layer}.attention.output.dense"),
            f"{block}.attn.out": h.out(f"{layer}.attention.output.dense"),
            f"{block}.resid_mid": h.out(f"{layer}.attention.output"),  # after the norm
        }
        up, act = f"{layer}.intermediate.dense", f"{layer}.intermediate.intermediate_act_fn"
        found |= _ungated(h, f"{block}.mlp", up, act, f"{layer}.output.dense")
    return found


def _albert(h: Hooks, layers: int) -> Arrays:
    found = {"embed": h.out("embeddings.word_embeddings")}
    layer = "encoder.albert_layer_groups.0.albert_layers.0"  # one set of weights, called once per block
    for i in range(layers):
        block = f"blocks.{i}"
        found |= {
            f"{block}.resid_pre": h.into(layer, i),
            f"{block}.resid_post": h.out(layer, i),
            f"{block}.attn.q": h.out(f"{layer}.attention.query", i),
            f"{block}.attn.k": h.out(f"{layer}.attention.key", i),
            f"{block}.attn.v": h.out(f"{layer}.attention.value", i),
            f"{block}.attn.head_out": h.into(f"{layer}.attention.dense", i),
            f"{block}.attn.out": h.out(f"{layer}.attention.dense", i),
            f"{block}.resid_mid": h.out(f"{layer}.attention", i),
            f"{block}.mlp.up": h.out(f"{layer}.ffn", i),
            f"{block}.mlp.pre_act": h.into(f"{layer}.activation", i),
            f"{block}.mlp.act": h.out(f"{layer}.activation", i),
            f"{block}.mlp.hidden": h.into(f"{layer}.ffn_output", i),
            f"{block}.mlp.out": h.out(f"{layer}.ffn_output", i),
        }
    return found


def _vit(h: Hooks, layers: int) -> Arrays:
    found = {
        "embed": h.out("vit.embeddings.patch_embeddings"),
        "final_norm": h.out("vit.layernorm"),
        "logits": h.result.logits.numpy(),
    }
    for i in range(layers):
        layer, block = f"vit.layers.{i}", f"blocks.{i}"
        found |= {
            f"{block}.resid_pre": h.into(layer),
            f"{block}.resid_post": h.out(layer),
            f"{block}.attn.norm": h.out(f"{layer}.layernorm_before"),
            f"{block}.attn.head_out": h.into(f"{layer}.attention.o_proj"),
            f"{block}.attn.out": h.out(f"{layer}.attention.o_proj"),
            f"{block}.resid_mid": h.into(f"{layer}.layernorm_after"),
            f"{block}.mlp.norm": h.out(f"{layer}.layernorm_after"),
        }
        found |= {f"{block}.attn.{part}": h.out(f"{layer}.attention.{part}_proj") for part in "qkv"}
        found |= _ungated(h, f"{block}.mlp", f"{layer}.mlp.fc1", f"{layer}.mlp.activation_fn", f"{layer}.mlp.fc2")
    return found


def _mamba(h: Hooks, layers: int) -> Arrays:
    found = {"embed": h.out("backbone.embeddings"), "final_norm": h.out("backbone.norm_f"), "logits": h.result.logits.numpy()}
    for i in range(layers):
        layer, block = f"backbone.layers.{i}", f"blocks.{i}"
        found |= {
            f"{block}.resid_pre": h.into(layer),
            f"{block}.resid_post": h.out(layer),
            f"{block}.mixer.norm": h.out(f"{layer}.norm"),
            f"{block}.mixer.in": h.out(f"{layer}.mixer.in_proj"),
            f"{block}.mixer.hidden": h.into(f"{layer}.mixer.out_proj"),
            f"{block}.mixer.out": h.out(f"{layer}.mixer.out_proj"),
        }
    return found


def _t5(h: Hooks, layers: int) -> Arrays:
    found = {"logits": h.result.logits.numpy()}
    for side in ("encoder", "decoder"):
        found[f"{side}.embed"] = (
            h.out("shared", 0 if side == "encoder" else 1) if "shared" in h.calls else h.out(f"{side}.embed_tokens")
        )
        found[f"{side}.final_norm"] = h.out(f"{side}.final_layer_norm")
        for i in range(layers):
            layer, block = f"{side}.block.{i}.layer", f"{side}.blocks.{i}"
            parts = [("attn", 0, "SelfAttention")] + ([("cross_attn", 1, "EncDecAttention")] if side == "decoder" else [])
            for part, place, kind in parts:
                attention = f"{layer}.{place}.{kind}"
                found |= {f"{block}.{part}.{x}": h.out(f"{attention}.{x}") for x in "qkv"}
                found[f"{block}.{part}.norm"] = h.out(f"{layer}.{place}.layer_norm")
                found[f"{block}.{part}.head_out"] = h.into(f"{attention}.o")
                found[f"{block}.{part}.out"] = h.out(f"{attention}.o")
            last = len(parts)
            dense = f"{layer}.{last}.DenseReluDense"
            found |= {
                f"{block}.resid_pre": h.into(f"{side}.block.{i}"),
                f"{block}.resid_mid": h.into(f"{layer}.1.layer_norm"),
                f"{block}.resid_post": h.out(f"{side}.block.{i}"),
                f"{block}.mlp.norm": h.out(f"{layer}.{last}.layer_norm"),
                f"{block}.mlp.gate": h.out(f"{dense}.wi_0"),
                f"{block}.mlp.pre_act": h.into(f"{dense}.act"),
                f"{block}.mlp.act": h.out(f"{dense}.act"),
                f"{block}.mlp.up": h.out(f"{dense}.wi_1"),
                f"{block}.mlp.hidden": h.into(f"{dense}.wo"),
                f"{block}.mlp.out": h.out(f"{dense}.wo"),
            }
            if side == "decoder":
                found[f"{block}.resid_mid_cross"] = h.into(f"{layer}.2.layer_norm")
    return found


def _resnet(h: Hooks, layers: int) -> Arrays:
    found = {"logits": h.result.logits.numpy()}
    for i in range(2):
        for j in range(2):
            layer, block = f"resnet.encoder.stages.{i}.layers.{j}", f"stages.{i}.blocks.{j}"
            found |= {
                f"{block}.resid_pre": h.into(layer),
                f"{block}.resid_post": h.out(layer),
                f"{block}.conv.out": h.out(f"{layer}.layer"),
            }
    return found


def _mlp(h: Hooks, layers: int) -> Arrays:
    found = {"final_norm": h.out("norm"), "logits": h.out("head")}
    for i in range(layers):
        layer, block = f"hidden.{i}", f"blocks.{i}"
        following = f"hidden.{i + 1}" if i + 1 < layers else "norm"
        found |= {f"{block}.resid_pre": h.into(layer), f"{block}.resid_post": h.into(following)}
        found |= _ungated(h, f"{block}.mlp", f"{layer}.0", f"{layer}.1", f"{layer}.2")
    return found


_FAMILIES = {
    "llama": _llama, "qwen3": _llama, "stories260k": _llama, "gemma3": _gemma3, "phi3": _phi3, "mixtral": _mixtral,
    "mixtral_batched": _mixtral, "gpt2": _gpt2, "gpt_neox": _gpt_neox, "opt": _opt, "bert": _bert, "minilm": _bert,
    "albert": _albert, "vit": _vit, "mamba": _mamba, "t5": _t5, "resnet": _resnet, "mlp": _mlp,
}  # fmt: skip


def reference(name: str, inputs: Arrays) -> Arrays:
    """Role site -> array, for every role site with a module behind it (patterns: ``patterns``; experts: ``experts``)."""
    model = zoo.model(name)
    config = getattr(model, "config", None)
    layers = getattr(config, "num_hidden_layers", 2)
    return {
        key: value.copy() for key, value in _FAMILIES[name](Hooks(model, inputs, zoo._NO_CACHE.get(name, {})), layers).items()
    }


def patterns(name: str, inputs: Arrays) -> Arrays:
    """``attn.pattern`` sites -> what transformers' eager attention returns as attentions."""
    model = copy.deepcopy(zoo.model(name))
    if not hasattr(model, "set_attn_implementation"):
        return {}
    model.set_attn_implementation("eager")
    with torch.no_grad():
        tensors = {key: torch.from_numpy(value) for key, value in inputs.items()}
        out = model(**tensors, **zoo._NO_CACHE.get(name, {}), output_attentions=True)
    fields = {"attentions": "blocks.{}.attn", "encoder_attentions": "encoder.blocks.{}.attn",
              "decoder_attentions": "decoder.blocks.{}.attn", "cross_attentions": "decoder.blocks.{}.cross_attn"}  # fmt: skip
    found: Arrays = {}
    for field, stem in fields.items():
        for i, pattern in enumerate(getattr(out, field, None) or ()):
            if pattern is not None:
                found[f"{stem.format(i)}.pattern"] = pattern.numpy()
    return found


def experts(name: str, inputs: Arrays, block: int) -> dict[int, np.ndarray[Any, Any]]:
    """Expert -> the rows that go into its down projection, in order of their tokens."""
    model = zoo.model(name)
    h = Hooks(model, inputs, zoo._NO_CACHE.get(name, {}))
    module = model.get_submodule(f"model.layers.{block}.mlp.experts")
    x = torch.from_numpy(h.into(f"model.layers.{block}.mlp.experts"))
    chosen = torch.from_numpy(h.out(f"model.layers.{block}.mlp.gate", part=2))
    found = {}
    with torch.no_grad():
        for expert in range(module.num_experts):
            rows = x[(chosen == expert).any(-1)]
            gate, up = nn.functional.linear(rows, module.gate_up_proj[expert]).chunk(2, dim=-1)
            found[expert] = (module.act_fn(gate) * up).numpy()
    return found
