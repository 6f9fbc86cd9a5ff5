"""Other tools' names for our role sites: TransformerLens (legacy and canonical), Hugging Face paths, pyvene components.

They are accepted in selectors when no name of the graph itself matches, and never listed. A Hugging Face path here is the
Llama-style path that most users know (``model.layers.5.mlp.down_proj:in``), so that recipes work on files without scopes;
where a model has module scopes its true paths are ordinary site names and come first.

TransformerLens documents ``attn.hook_out`` with two meanings (the residual after attention and the attention output). A
site is defined by its place in the data flow, so here it is what its name says, the attention output; the residual is
``hook_resid_mid``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_BLOCK = re.compile(r"(?P<prefix>(?:encoder\.|decoder\.)?)blocks\.(?P<i>\d+)\.(?P<part>.+)")

#: Role of a block -> templates; ``{i}`` is the block index and ``{t}`` TransformerLens' stem.
_PARTS: dict[str, tuple[str, ...]] = {
    "resid_pre": ("{t}.hook_resid_pre", "{t}.hook_in", "{l}:in", "layer={i},component=block_input"),
    "resid_mid": ("{t}.hook_resid_mid",),
    "resid_post": ("{t}.hook_resid_post", "{t}.hook_out", "{l}", "{l}.output", "layer={i},component=block_output"),
    "attn.norm": ("{t}.ln1.hook_out", "{t}.ln1.hook_normalized", "{l}.input_layernorm", "layer={i},component=attention_input"),
    "attn.q": ("{t}.attn.hook_q", "{t}.attn.q.hook_out", "{l}.self_attn.q_proj", "layer={i},component=query_output"),
    "attn.k": ("{t}.attn.hook_k", "{t}.attn.k.hook_out", "{l}.self_attn.k_proj", "layer={i},component=key_output"),
    "attn.v": ("{t}.attn.hook_v", "{t}.attn.v.hook_out", "{l}.self_attn.v_proj", "layer={i},component=value_output"),
    "attn.pattern": ("{t}.attn.hook_pattern",),
    "attn.head_out": (
        "{t}.attn.hook_z", "{t}.attn.o.hook_in", "{l}.self_attn.o_proj:in", "layer={i},component=attention_value_output",
    ),
    "attn.out": (
        "{t}.hook_attn_out", "{t}.attn.hook_out", "{t}.attn.o.hook_out", "{l}.self_attn", "{l}.self_attn.o_proj",
        "layer={i},component=attention_output",
    ),
    "mlp.norm": ("{t}.ln2.hook_out", "{t}.ln2.hook_normalized", "{t}.mlp.hook_in", "{l}.post_attention_layernorm",
                 "{l}.mlp:in", "layer={i},component=mlp_input"),
    "mlp.gate": ("{t}.mlp.gate.hook_out", "{l}.mlp.gate_proj"),
    "mlp.up": ("{t}.mlp.hook_pre_linear", "{t}.mlp.in.hook_out", "{l}.mlp.up_proj"),
    "mlp.pre_act": ("{t}.mlp.hook_pre", "{l}.mlp.act_fn:in"),
    "mlp.act": ("{l}.mlp.act_fn",),
    "mlp.hidden": ("{t}.mlp.hook_post", "{t}.mlp.out.hook_in", "{l}.mlp.down_proj:in", "layer={i},component=mlp_activation"),
    "mlp.out": ("{t}.hook_mlp_out", "{t}.mlp.hook_out", "{l}.mlp", "{l}.mlp.down_proj", "layer={i},component=mlp_output"),
    "moe.router_logits": ("{t}.mlp.hook_router_logits", "{l}.mlp.gate", "{l}.block_sparse_moe.gate"),
    "moe.gates": ("{t}.mlp.hook_expert_weights",),
}  # fmt: skip

_WHOLE: dict[str, tuple[str, ...]] = {
    "embed": ("hook_embed", "embed.hook_out", "model.embed_tokens"),
    "final_norm": ("ln_final.hook_out", "ln_final.hook_normalized", "model.norm", "lm_head:in", "unembed.hook_in"),
    "logits": ("unembed.hook_out", "lm_head", "lm_head.output"),
}


def spell(roles: Mapping[str, str]) -> dict[str, str]:
    """Foreign spelling -> role name, for the role names that are keys of ``roles``."""
    table: dict[str, str] = {}
    for name in roles:
        for whole in _WHOLE.get(name, ()):
            table.setdefault(whole, name)
        match = _BLOCK.fullmatch(name)
        if match is None:
            continue
        prefix, index = match.group("prefix"), match.group("i")
        lens = f"{prefix}blocks.{index}"
        path = f"model.{prefix}layers.{index}" if prefix else f"model.layers.{index}"
        for template in _PARTS.get(match.group("part"), ()):
            # pyvene addresses decoders only: two stacks would share the layer numbers.
            if "component=" in template and prefix == "encoder.":
                continue
            table.setdefault(template.format(t=lens, l=path, i=index), name)
    return table
