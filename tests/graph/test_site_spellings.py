"""Names of other tools: each stands for the tensor that its tool means, read off the eager model by hooks, and for no other.

The graphs are files without module scopes, where only the data flow tells what a name means.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

import actgraph as ag
from actgraph import formats
from actgraph.errors import SiteError
from actgraph.graph import Graph, SiteKind
from actgraph.graph.executor import executor_for
from actgraph.graph.spellings import normal_spelling, spell
from tests import zoo
from tests.graph.reference_sites import Hooks

Array = np.ndarray[Any, Any]


@functools.cache
def _file(name: str) -> Graph:
    return formats.load(str(zoo.stock_onnx("mixtral_batched" if name == "mixtral" else name)))


def file_of(name: str) -> Graph:
    return _file(name).clone()


@functools.cache
def hooks(name: str) -> Hooks:
    return Hooks(zoo.model(name), zoo.inputs(name), {"use_cache": False})


def values(name: str, spellings: list[str]) -> dict[str, Array]:
    """What the sites of the model's file hold, by spelling."""
    graph = _file(name)
    found = {spelling: graph.site(spelling).value for spelling in spellings}
    inner = list({value.name: value for value in found.values()}.values())
    names = {output for output, _ in graph.outputs()}
    run = executor_for(graph).open(graph, [value for value in inner if value.name not in names])(zoo.inputs(name))
    return {spelling: run[value.name] for spelling, value in found.items()}


LLAMA = [
    "model.embed_tokens", "model.layers.1", "model.layers.1:in", "model.layers.1.input_layernorm",
    "model.layers.1.input_layernorm:in", "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj",
    "model.layers.1.self_attn.v_proj", "model.layers.1.self_attn.q_proj:in", "model.layers.1.self_attn.o_proj:in",
    "model.layers.1.self_attn", "model.layers.1.self_attn.o_proj", "model.layers.1.post_attention_layernorm",
    "model.layers.1.post_attention_layernorm:in", "model.layers.1.mlp:in", "model.layers.1.mlp", "model.norm", "model.norm:in",
    "lm_head:in", "lm_head",
]  # fmt: skip
GATED = [f"model.layers.1.mlp.{part}" for part in ("gate_proj", "up_proj", "act_fn", "act_fn:in", "down_proj:in", "down_proj")]
GPT2 = [
    "transformer.wte", "transformer.h.1", "transformer.h.1:in", "transformer.h.1.ln_1", "transformer.h.1.ln_1:in",
    "transformer.h.1.attn:in", "transformer.h.1.attn", "transformer.h.1.attn.c_proj:in", "transformer.h.1.attn.c_proj",
    "transformer.h.1.ln_2", "transformer.h.1.ln_2:in", "transformer.h.1.mlp:in", "transformer.h.1.mlp.c_fc",
    "transformer.h.1.mlp.act:in", "transformer.h.1.mlp.act", "transformer.h.1.mlp.c_proj:in", "transformer.h.1.mlp.c_proj",
    "transformer.h.1.mlp", "transformer.ln_f", "transformer.ln_f:in", "lm_head",
]  # fmt: skip
PATHS = {
    "llama": LLAMA + GATED,
    "gemma3": [
        *LLAMA, *GATED, "model.layers.1.pre_feedforward_layernorm", "model.layers.1.pre_feedforward_layernorm:in",
        "model.layers.1.post_feedforward_layernorm", "model.layers.1.post_feedforward_layernorm:in",
    ],
    "mixtral": [*LLAMA, "model.layers.1.mlp.gate"],
    "gpt2": GPT2,
}  # fmt: skip


@pytest.mark.parametrize("name", PATHS)
def test_a_hugging_face_path_is_what_a_hook_there_sees(name: str) -> None:
    meant: dict[str, Array] = {}
    for path in PATHS[name]:
        module, colon, _ = path.partition(":")
        meant[path] = hooks(name).into(module) if colon else hooks(name).out(module)
    held = values(name, list(meant))
    for path, array in meant.items():
        error = np.abs(held[path].reshape(array.shape) - array).max() / max(np.abs(array).max(), 1e-6)
        assert error < 1e-4, (path, error)
    one, other = (meant[path] for path in (PATHS[name][1], PATHS[name][2]))  # the block before is another tensor
    assert np.abs(one - other).max() > 1e-2


#: TransformerLens' names -> ours; the first column of each pair is a legacy name, of which the second is an alias.
LENS = {
    "hook_embed": "embed", "embed.hook_out": "embed",
    "blocks.1.hook_resid_pre": "blocks.1.resid_pre", "blocks.1.hook_in": "blocks.1.resid_pre",
    "blocks.1.hook_resid_mid": "blocks.1.resid_mid",
    "blocks.1.hook_resid_post": "blocks.1.resid_post", "blocks.1.hook_out": "blocks.1.resid_post",
    "blocks.1.ln1.hook_normalized": "blocks.1.attn.norm", "blocks.1.ln1.hook_out": "blocks.1.attn.norm",
    "blocks.1.attn.hook_in": "blocks.1.attn.norm",
    "blocks.1.attn.hook_q": "blocks.1.attn.q", "blocks.1.attn.q.hook_out": "blocks.1.attn.q",
    "blocks.1.attn.hook_k": "blocks.1.attn.k", "blocks.1.attn.k.hook_out": "blocks.1.attn.k",
    "blocks.1.attn.hook_v": "blocks.1.attn.v", "blocks.1.attn.v.hook_out": "blocks.1.attn.v",
    "blocks.1.attn.hook_pattern": "blocks.1.attn.pattern",
    "blocks.1.attn.hook_z": "blocks.1.attn.head_out", "blocks.1.attn.o.hook_in": "blocks.1.attn.head_out",
    "blocks.1.hook_attn_out": "blocks.1.attn.out", "blocks.1.attn.hook_out": "blocks.1.attn.out",
    "blocks.1.attn.o.hook_out": "blocks.1.attn.out",
    "blocks.1.ln2.hook_normalized": "blocks.1.mlp.norm", "blocks.1.ln2.hook_out": "blocks.1.mlp.norm",
    "blocks.1.mlp.hook_in": "blocks.1.mlp.norm",
    "blocks.1.mlp.hook_pre": "blocks.1.mlp.pre_act", "blocks.1.mlp.gate.hook_out": "blocks.1.mlp.gate",
    "blocks.1.mlp.hook_pre_linear": "blocks.1.mlp.up", "blocks.1.mlp.in.hook_out": "blocks.1.mlp.up",
    "blocks.1.mlp.hook_post": "blocks.1.mlp.hidden", "blocks.1.mlp.out.hook_in": "blocks.1.mlp.hidden",
    "blocks.1.hook_mlp_out": "blocks.1.mlp.out", "blocks.1.mlp.hook_out": "blocks.1.mlp.out",
    "ln_final.hook_normalized": "final_norm", "ln_final.hook_out": "final_norm", "unembed.hook_in": "final_norm",
    "unembed.hook_out": "logits",
    "blocks.1.ln1.hook_in": "norm.2:in", "blocks.1.ln2.hook_in": "norm.3:in", "ln_final.hook_in": "norm.4:in",
    "blocks.1.attn.q.hook_in": "linear.7:in", "blocks.1.attn.k.hook_in": "linear.8:in",
    "blocks.1.attn.v.hook_in": "linear.9:in",
    "blocks.1.mlp.gate.hook_in": "linear.11:in", "blocks.1.mlp.in.hook_in": "linear.12:in",
}  # fmt: skip

#: pyvene's components -> ours.
PYVENE = {
    "block_input": "resid_pre", "block_output": "resid_post", "attention_input": "attn.norm", "attention_output": "attn.out",
    "attention_value_output": "attn.head_out", "head_attention_value_output": "attn.head_out", "query_output": "attn.q",
    "key_output": "attn.k", "value_output": "attn.v", "head_query_output": "attn.q", "head_key_output": "attn.k",
    "head_value_output": "attn.v", "mlp_input": "mlp.norm", "mlp_activation": "mlp.act", "mlp_output": "mlp.out",
}  # fmt: skip


def same(graph: Graph, spelling: str, name: str) -> bool:
    return graph.site(spelling).anchor == graph.site(name).anchor


def test_transformer_lens() -> None:
    for graph in (file_of("llama"), zoo.captured("llama")):
        for spelling, name in LENS.items():
            assert same(graph, spelling, name), spelling
        assert graph.site("blocks.1.hook_resid_mid").kind is SiteKind.VALUE
        assert graph.site("blocks.1.ln2.hook_in").kind is SiteKind.EDGE
        assert not same(graph, "blocks.1.attn.hook_out", "blocks.1.resid_mid")
        assert not same(graph, "blocks.0.hook_out", "blocks.1.resid_post")


def test_fused_projections_of_transformer_lens() -> None:
    graph = file_of("gpt2")
    for part in "qkv":
        assert same(graph, f"blocks.0.attn.qkv.{part}_hook_out", f"blocks.0.attn.{part}")
    with pytest.raises(SiteError):  # one fused projection reads for all three
        graph.site("blocks.0.attn.q.hook_in")


@pytest.mark.parametrize("component", PYVENE)
def test_pyvene(component: str) -> None:
    graph, ours = _file("llama"), f"blocks.1.{PYVENE[component]}"
    for spelling in (
        f"layer=1,component={component}",
        f'layer=1, component="{component}"',
        f"component = '{component}', layer = 1",
        f"layer=1, component={component}, unit=pos",
        f"{component}[1]",
        f"{component}[-1]",
        f"layer=-1,component={component}",
    ):
        assert same(graph, spelling, ours), spelling
    both = [site.anchor for site in graph.sites(f"blocks.*.{PYVENE[component]}")]
    for spelling in (f"{component}[*]", f"layer={{0..1}},component={component}", f"{component}[{{0..1}}]"):
        assert [site.anchor for site in graph.sites(spelling)] == both, spelling
    assert not same(graph, f"{component}[0]", ours)


def test_what_pyvene_means_by_the_activation() -> None:
    """The output of the activation function: not the product with the gate, which the down projection reads."""
    held = values("llama", ["mlp_activation[1]", "blocks.1.mlp.hidden"])
    act = hooks("llama").out("model.layers.1.mlp.act_fn")
    assert np.abs(held["mlp_activation[1]"] - act).max() < 1e-4
    assert np.abs(held["blocks.1.mlp.hidden"] - act).max() > 1e-2


def test_sandwich_norms_tell_two_outputs_apart() -> None:
    """Gemma 3: what attention computes, and what is added to the stream behind its norm."""
    raw = ["blocks.1.attn.hook_out", "blocks.1.ln1_post.hook_in", "attention_output[1]"]
    normed = ["blocks.1.hook_attn_out", "blocks.1.ln1_post.hook_out", "blocks.1.attn.out"]
    held = values("gemma3", raw + normed)
    for spelling in raw:
        assert np.abs(held[spelling] - hooks("gemma3").out("model.layers.1.self_attn")).max() < 1e-4, spelling
    for spelling in normed:
        assert np.abs(held[spelling] - hooks("gemma3").out("model.layers.1.post_attention_layernorm")).max() < 1e-4, spelling
    assert np.abs(held[raw[0]] - held[normed[0]]).max() > 1e-2
    graph = _file("gemma3")
    assert same(graph, "blocks.1.mlp.hook_out", "mlp_output[1]") and same(graph, "blocks.1.hook_mlp_out", "blocks.1.mlp.out")
    assert not same(graph, "blocks.1.mlp.hook_out", "blocks.1.mlp.out")


def test_routers() -> None:
    graph = _file("mixtral")
    for spelling in ("blocks.0.mlp.gate.hook_out", "model.layers.0.mlp.gate", "model.layers.0.block_sparse_moe.gate"):
        assert same(graph, spelling, "blocks.0.moe.router_logits")
    assert same(graph, "model.layers.0.block_sparse_moe", "blocks.0.mlp.out")


@pytest.mark.parametrize(
    "spelling",
    [
        "blocks.1.hook_mlp_in", "blocks.1.hook_attn_in", "blocks.1.hook_q_input", "blocks.1.attn.hook_result",
        "blocks.1.mlp.hook_expert_weights", "blocks.1.attn.hook_rot_q", "model.layers.1.output[0]", "block_output[2]",
        "layer=1,component=nothing", "layer=1,component=block_output,strength=2", "blocks.1.ln1_post.hook_out",
    ],
)  # fmt: skip
def test_what_is_ambiguous_or_absent_is_refused(spelling: str) -> None:
    with pytest.raises(SiteError) as error:
        _file("llama").site(spelling)
    assert error.value.hint


@pytest.mark.parametrize(
    ("spelling", "normal"),
    [
        ("model.layers[5].mlp.output", "model.layers.5.mlp"),
        ("transformer.h[-1].input", "transformer.h.-1:in"),
        ("model.layers.5", "model.layers.5"),
        ("attention.3:in[0]", "attention.3:in[0]"),
        ("x[0]:in[1]", "x.0:in[1]"),
        ("component=model.layers[5].mlp.output", "model.layers.5.mlp"),
        ("layer = 5 , component = block_output", "block_output.5"),
        ("blocks.*.hook_out", "blocks.*.hook_out"),
    ],
)
def test_the_normal_form(spelling: str, normal: str) -> None:
    assert normal_spelling(spelling) == normal


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_paths_as_nnsight_and_pyvene_write_them(dialect: str) -> None:
    """With modules they are the model's own names, without by role: any module path takes ``.output`` and ``.input`` there."""
    graph = zoo.captured("llama") if dialect == "fx" else file_of("llama")
    assert same(graph, "model.layers[1].output", "blocks.1.resid_post")
    assert same(graph, "model.layers[-1].mlp.output", "blocks.1.mlp.out")
    assert same(graph, "model.layers[0].self_attn.q_proj.input", "linear.0:in")
    assert [s.name for s in graph.sites("model.layers[*].mlp.down_proj.output")] == ["blocks.0.mlp.out", "blocks.1.mlp.out"]
    kept = graph.sites("blocks.*.mlp.out", ignore="model.layers[0].mlp.output")
    assert [s.name for s in kept] == ["blocks.1.mlp.out"]
    if dialect == "fx":
        assert same(zoo.captured("gpt2"), "transformer.h[1].attn.c_attn.output", "transformer.h.1.attn.c_attn")


def test_a_removed_site_is_told_by_every_name() -> None:
    graph = zoo.captured("llama")
    with graph.edit("the test") as editor:
        editor.forget_sites(graph.site("blocks.1.mlp.out").value, "the test")
    for spelling in ("blocks.1.hook_mlp_out", "mlp_output[1]", "layer=1, component=mlp_output", "model.layers[1].mlp.output"):
        with pytest.raises(SiteError, match="was removed by the test"):
            graph.site(spelling)


def test_in_pipelines() -> None:
    """A spelling with an index or commas is quoted in pipeline text."""
    graph = file_of("llama")
    inputs = zoo.inputs("llama")
    for text in ('"layer=1,component=block_output"', '"block_output[1]"', "blocks.1.hook_out", '"model.layers[1].output"'):
        tapped = ag.run(graph, f"tap{{site={text}}}", parity="none", reproducer=False).graph.run(inputs)
        assert np.abs(tapped["blocks.1.resid_post"] - hooks("llama").out("model.layers.1")).max() < 1e-4


def test_no_spelling_names_two_roles() -> None:
    parts = ("resid_post", "attn.out", "mlp.out", "mlp.norm")
    roles = {f"blocks.{i}.{part}": "" for i in (0, 1) for part in parts}
    table = spell(roles)
    assert set(table.values()) == set(roles)
    assert table["model.layers.1.mlp"] == "blocks.1.mlp.out" and "encoder.blocks.0.hook_out" not in table
    stacks = spell({"encoder.blocks.0.resid_post": "", "decoder.blocks.0.resid_post": ""})
    assert stacks["block_output.0"] == "decoder.blocks.0.resid_post" and "transformer.h.0" not in stacks
