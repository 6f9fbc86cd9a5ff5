"""Other tools' names for our role sites: TransformerLens (legacy and canonical), Hugging Face paths, pyvene components.

They are accepted in selectors when no name of the graph itself matches, and never listed. A Hugging Face path here is the
Llama-style or GPT-2-style path that most users know (``model.layers.5.mlp.down_proj:in``, ``transformer.h.5``), so that recipes
work on files without scopes; where a model has module scopes its true paths are ordinary site names and come first.

A site is defined by its place in the data flow, and a spelling names the tensor that its tool means by it. Where a tool gives
one name to several tensors, these are the choices:

- TransformerLens documents ``attn.hook_out`` as the residual after attention and as the attention's output. It is what its
  name (and the tool's code) says, the attention's output; the residual is ``hook_resid_mid``.
- Where a sandwich norm follows (Gemma 2 and 3), ``hook_attn_out`` and ``ln1_post.hook_out`` are the normed tensor that is added
  to the stream, ``attn.out``; ``attn.hook_out``, ``self_attn`` and pyvene's ``attention_output`` are what that norm reads. The
  same holds for ``mlp``.
- ``lm_head`` and ``unembed.hook_out`` are the head's output before the model soft-caps it; ``logits`` is what comes out.
- ``ln1.hook_normalized`` is the norm's output, as the tool has it since version 3.
- ``hook_mlp_in``, ``hook_attn_in``, ``hook_q_input`` (before the norm in version 2, behind it in version 3),
  ``attn.hook_result`` (per head in version 2) and ``mlp.hook_expert_weights`` (of all experts, or of the chosen ones) are not
  accepted.
- ``hook_in`` of a norm or a projection is what that one reads: an edge (``norm.3:in``); an edit there reaches nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_BLOCK = re.compile(r"(?P<prefix>(?:encoder\.|decoder\.)?)blocks\.(?P<i>\d+)\.(?P<part>.+)")

#: Role of a block -> templates: ``{t}`` is TransformerLens' block, ``{l}`` a Llama-style and ``{g}`` a GPT-2-style path,
#: ``{i}`` the block's number behind a pyvene component. ``role:in`` is what the linear or norm that computes the role reads;
#: ``role@norm`` is the role where a sandwich norm computes it, and ``role@raw`` what that norm reads: they come first.
_PARTS: dict[str, tuple[str, ...]] = {
    "resid_pre": ("{t}.hook_resid_pre", "{t}.hook_in", "{l}:in", "{g}:in", "block_input.{i}"),
    "resid_mid": ("{t}.hook_resid_mid",),
    "resid_post": ("{t}.hook_resid_post", "{t}.hook_out", "{l}", "{g}", "block_output.{i}"),
    "attn.norm": ("{t}.ln1.hook_out", "{t}.ln1.hook_normalized", "{t}.attn.hook_in", "{l}.input_layernorm", "{l}.self_attn:in",
                  "{g}.ln_1", "{g}.attn:in", "attention_input.{i}"),
    "attn.norm:in": ("{t}.ln1.hook_in", "{l}.input_layernorm:in", "{g}.ln_1:in"),
    "attn.q": ("{t}.attn.hook_q", "{t}.attn.q.hook_out", "{t}.attn.qkv.q_hook_out", "{l}.self_attn.q_proj", "query_output.{i}",
               "head_query_output.{i}"),
    "attn.k": ("{t}.attn.hook_k", "{t}.attn.k.hook_out", "{t}.attn.qkv.k_hook_out", "{l}.self_attn.k_proj", "key_output.{i}",
               "head_key_output.{i}"),
    "attn.v": ("{t}.attn.hook_v", "{t}.attn.v.hook_out", "{t}.attn.qkv.v_hook_out", "{l}.self_attn.v_proj", "value_output.{i}",
               "head_value_output.{i}"),
    "attn.q:in": ("{t}.attn.q.hook_in", "{l}.self_attn.q_proj:in"),
    "attn.k:in": ("{t}.attn.k.hook_in", "{l}.self_attn.k_proj:in"),
    "attn.v:in": ("{t}.attn.v.hook_in", "{l}.self_attn.v_proj:in"),
    "attn.pattern": ("{t}.attn.hook_pattern", "{t}.attn.hook_attention_weights"),
    "attn.head_out": ("{t}.attn.hook_z", "{t}.attn.o.hook_in", "{l}.self_attn.o_proj:in", "{g}.attn.c_proj:in",
                      "attention_value_output.{i}", "head_attention_value_output.{i}"),
    "attn.out@norm": ("{t}.ln1_post.hook_out", "{l}.post_attention_layernorm"),
    "attn.out@raw": ("{t}.attn.hook_out", "{t}.attn.o.hook_out", "{t}.ln1_post.hook_in", "{l}.self_attn",
                     "{l}.self_attn.o_proj", "{l}.post_attention_layernorm:in", "attention_output.{i}"),
    "attn.out": ("{t}.hook_attn_out", "{t}.attn.hook_out", "{t}.attn.o.hook_out", "{l}.self_attn", "{l}.self_attn.o_proj",
                 "{g}.attn", "{g}.attn.c_proj", "attention_output.{i}"),
    "mlp.norm": ("{t}.ln2.hook_out", "{t}.ln2.hook_normalized", "{t}.mlp.hook_in", "{l}.post_attention_layernorm",
                 "{l}.pre_feedforward_layernorm", "{l}.mlp:in", "{g}.ln_2", "{g}.mlp:in", "mlp_input.{i}"),
    "mlp.norm:in": ("{t}.ln2.hook_in", "{l}.post_attention_layernorm:in", "{l}.pre_feedforward_layernorm:in", "{g}.ln_2:in"),
    "mlp.gate": ("{t}.mlp.gate.hook_out", "{l}.mlp.gate_proj"),
    "mlp.gate:in": ("{t}.mlp.gate.hook_in", "{l}.mlp.gate_proj:in"),
    "mlp.up": ("{t}.mlp.hook_pre_linear", "{t}.mlp.in.hook_out", "{l}.mlp.up_proj", "{g}.mlp.c_fc"),
    "mlp.up:in": ("{t}.mlp.in.hook_in", "{l}.mlp.up_proj:in", "{g}.mlp.c_fc:in"),
    "mlp.pre_act": ("{t}.mlp.hook_pre", "{l}.mlp.act_fn:in", "{g}.mlp.act:in"),
    "mlp.act": ("{l}.mlp.act_fn", "{g}.mlp.act", "mlp_activation.{i}"),
    "mlp.hidden": ("{t}.mlp.hook_post", "{t}.mlp.out.hook_in", "{l}.mlp.down_proj:in", "{g}.mlp.c_proj:in"),
    "mlp.out@norm": ("{t}.ln2_post.hook_out", "{l}.post_feedforward_layernorm"),
    "mlp.out@raw": ("{t}.mlp.hook_out", "{t}.mlp.out.hook_out", "{t}.ln2_post.hook_in", "{l}.mlp", "{l}.mlp.down_proj",
                    "{l}.post_feedforward_layernorm:in", "mlp_output.{i}"),
    "mlp.out": ("{t}.hook_mlp_out", "{t}.mlp.hook_out", "{t}.mlp.out.hook_out", "{l}.mlp", "{l}.mlp.down_proj",
                "{l}.block_sparse_moe", "{g}.mlp", "{g}.mlp.c_proj", "mlp_output.{i}"),
    "moe.router_logits": ("{t}.mlp.hook_router_logits", "{t}.mlp.gate.hook_out", "{l}.mlp.gate", "{l}.block_sparse_moe.gate"),
}  # fmt: skip

_WHOLE: dict[str, tuple[str, ...]] = {
    "embed": ("hook_embed", "embed.hook_out", "model.embed_tokens", "transformer.wte"),
    "final_norm": ("ln_final.hook_out", "ln_final.hook_normalized", "model.norm", "transformer.ln_f", "lm_head:in",
                   "unembed.hook_in"),
    "final_norm:in": ("ln_final.hook_in", "model.norm:in", "transformer.ln_f:in"),
    "logits@raw": ("unembed.hook_out", "lm_head"),
    "logits": ("unembed.hook_out", "lm_head"),
}  # fmt: skip


def spell(roles: Mapping[str, str]) -> dict[str, str]:
    """Foreign spelling, in its normal form -> role name, for the role names that are keys of ``roles``.

    See ``normal_spelling`` for the form, and ``_PARTS`` for the endings ``:in``, ``@norm`` and ``@raw`` of a role name.
    """
    table: dict[str, str] = {}
    for name in sorted(roles, key=lambda name: "@" not in name):  # stable: otherwise in the order of ``roles``
        for whole in _WHOLE.get(name, ()):
            table.setdefault(whole, name)
        match = _BLOCK.fullmatch(name)
        if match is None:
            continue
        prefix, index = match.group("prefix"), match.group("i")
        lens = f"{prefix}blocks.{index}"
        path = f"model.{prefix}layers.{index}"
        for template in _PARTS.get(match.group("part"), ()):
            # pyvene addresses decoders only (two stacks would share the layer numbers), and GPT-2 is one.
            if (template.startswith("{g}") and prefix) or (template.endswith(".{i}") and prefix == "encoder."):
                continue
            table.setdefault(template.format(t=lens, l=path, g=f"transformer.h.{index}", i=index), name)
    return table


_INDEX = re.compile(r"(?<=\w)\[(-?\d+|\*|\?)\](?=\.|$)")


def normal_spelling(name: str) -> str:
    """A foreign name in the form of the tables: list indices as ``.5``, pyvene's components as ``block_output.5``.

    ``layer=5, component="block_output"`` and ``block_output[5]`` are ``block_output.5``; ``model.layers[5].mlp`` is
    ``model.layers.5.mlp``; the endings ``.output`` and ``.input`` of nnsight and pyvene are no suffix and ``:in``.
    """
    if "component" in name:
        parts = [part.replace(" ", "").partition("=") for part in name.replace('"', "").replace("'", "").split(",")]
        given = {key: value for key, _, value in parts}
        if given.keys() <= {"layer", "component", "unit"} and given.get("component"):
            name = given["component"] + (f".{given['layer']}" if "layer" in given else "")
    stem, colon, suffix = name.partition(":")
    stem = _INDEX.sub(r".\1", stem)
    if not colon:
        for ending, ours in ((".output", ""), (".input", ":in")):
            if stem.endswith(ending):
                return stem.removesuffix(ending) + ours
    return stem + colon + suffix
