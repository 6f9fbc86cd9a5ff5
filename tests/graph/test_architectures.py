"""Sites of every architecture of the zoo: equal in both dialects, and holding what the eager model computes there.

``tests/golden/sites`` has one table per architecture, as captured from torch.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from actgraph import formats
from actgraph.graph.executor import executor_for
from actgraph.graph.graph import Graph
from actgraph.graph.sites import SiteKind
from tests import zoo
from tests.graph import reference_sites

#: The stock file that a model is compared with.
FILES = {name: name for name in zoo.STOCK} | {"mixtral": "mixtral_batched"}

#: Where a stock file cannot hold the same sites as the capture, by model: (what, the site names that may differ).
EXCEPTIONS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "gpt2": (
        "the exporter merges two reshapes, so that attention results come out as rows [batch * seq, features]",
        lambda name: name.endswith("attn.head_out") or name in ("linear.1:in", "linear.5:in"),
    ),
    "resnet": (
        "the exporter folds batch norms into the convolutions before them: no norm is left, a branch ends in a convolution",
        lambda name: name.startswith(("norm.", "conv.")) or name.endswith(".conv.out"),
    ),
}

_STRUCTURAL = re.compile(r"(linear|conv|norm|activation|attention)\.\d+(:.*)?")


@functools.cache
def _onnx(name: str) -> Graph:
    return formats.load(str(zoo.stock_onnx(name)))


def graph_of(name: str, dialect: str) -> Graph:
    return zoo.captured(name) if dialect == "fx" else _onnx(FILES[name]).clone()


def table(graph: Graph) -> list[tuple[str, tuple[str, ...], str]]:
    """Each site in order: its best name, its other role and structural names, its type."""
    roles = graph.site_table.role_names
    rows = []
    for site in graph.sites():
        names = [n for n in (site.name, *site.aliases) if n in roles or _STRUCTURAL.fullmatch(n)]
        if names:
            rows.append((names[0], tuple(names[1:]), str(site.type)))
    return rows


def line(row: tuple[str, tuple[str, ...], str]) -> str:
    best, others, kind = row
    return f"{best:38} {kind:38} {' '.join(others)}".rstrip()


@pytest.mark.parametrize("name", list(FILES))
def test_both_dialects_have_the_same_sites(name: str, golden: Callable[[str, str], None]) -> None:
    ours, theirs = table(zoo.captured(name)), table(_onnx(FILES[name]))
    lines = [line(row) for row in ours]
    differing = {row for row in (*ours, *theirs) if (row in ours) != (row in theirs)}
    if name in EXCEPTIONS:
        reason, allowed = EXCEPTIONS[name]
        lines += ["", f"In a stock ONNX file {reason}:"]
        lines += [line(row) for row in theirs if row in differing]
        assert differing, f"{name} no longer differs: drop the exception"
        assert all(allowed(n) for best, others, _ in differing for n in (best, *others)), sorted(differing)
    else:
        assert differing == set()
    same = [row for row in ours if row not in differing]
    assert same == [row for row in theirs if row not in differing]
    golden(f"sites/{name}", "\n".join(lines))


def test_at_most_three_exceptions() -> None:
    assert len(EXCEPTIONS) <= 3 and set(EXCEPTIONS) <= set(FILES)


def read_sites(graph: Graph, names: list[str], inputs: reference_sites.Arrays) -> reference_sites.Arrays:
    """What the graph computes at ``names``; virtual sites are materialised on the way."""
    with graph.edit("probe") as editor:
        for name in names:
            editor.site_value(graph.site(name))
    graph.verify()
    values = {name: graph.site(name).value for name in names}
    results = executor_for(graph).open(graph, list(dict.fromkeys(values.values())))(inputs)
    return {name: results[value.name] for name, value in values.items()}


def role_sites(graph: Graph) -> list[str]:
    """Every role name whose tensor a module of the source model computes."""
    named = sorted(graph.site_table.role_names)
    return [name for name in named if ".moe.experts." not in name]


@functools.cache
def _expected(name: str) -> reference_sites.Arrays:
    inputs = zoo.inputs(name)
    return reference_sites.reference(name, inputs) | reference_sites.patterns(name, inputs)


def mismatch(have: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> float:
    """Largest difference, relative to the largest magnitude; infinite when the shapes hold different numbers of elements."""
    if have.size != want.size or have.shape[-1] != want.shape[-1]:
        return np.inf
    return float(np.abs(have.reshape(want.shape) - want).max() / max(np.abs(want).max(), 1e-6))


#: float32 sums in another order, amplified by the zoo's large weights.
TOLERANCE = 2e-4


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize("name", list(FILES))
def test_role_sites_hold_what_the_modules_compute(name: str, dialect: str) -> None:
    graph = graph_of(name, dialect)
    wanted = _expected(name)
    names = role_sites(graph)
    assert set(names) == set(wanted), set(names) ^ set(wanted)
    have = read_sites(graph, names, zoo.inputs(name))
    wrong = {site: m for site in names if (m := mismatch(have[site], wanted[site])) > TOLERANCE}
    assert not wrong


@pytest.mark.parametrize("name", list(FILES))
def test_a_wrong_site_would_fail(name: str) -> None:
    """No two places hold the same numbers, so naming one after another (a wrong layer, q for k) cannot go unnoticed."""
    graph = zoo.captured(name)
    wanted = _expected(name)
    places: dict[object, str] = {}
    for site in sorted(wanted):
        places.setdefault(graph.site(site).anchor.key, site)
    distinct = sorted(places.values())
    for i, left in enumerate(distinct):
        for right in distinct[i + 1 :]:
            assert mismatch(wanted[left], wanted[right]) > 10 * TOLERANCE, (left, right)
    layered = [site for site in wanted if ".1." in site]
    assert layered and all(site.replace(".1.", ".0.", 1) in wanted for site in layered)


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize("name", ["mixtral", "mixtral_batched"])
def test_experts(name: str, dialect: str) -> None:
    """``experts.hidden`` holds the rows of all experts; ``experts.{j}.hidden`` those of one and zeros elsewhere."""
    graph = graph_of(name, dialect)
    inputs = zoo.inputs(name)
    mixture = graph.views.moe()[1]
    assert mixture.hidden is not None and mixture.expert_index is not None
    index = mixture.expert_index
    sites = ["blocks.1.moe.experts.hidden", *(f"blocks.1.moe.experts.{j}.hidden" for j in range(4))]
    assert all(graph.site(site).kind is SiteKind.VIRTUAL for site in sites[1:])
    before = graph.run(inputs)
    rows = executor_for(graph).open(graph, [mixture.hidden, index])(inputs)
    have = read_sites(graph, sites, inputs)
    after = graph.run(inputs)
    assert all(np.array_equal(before[key], after[key]) for key in before)
    wanted = reference_sites.experts(name, inputs, 1)
    everything, of = rows[mixture.hidden.name], rows[index.name]
    assert mismatch(have[sites[0]], everything) == 0
    for expert, expected in wanted.items():
        mine = everything[of == expert]
        assert mine.shape == expected.shape and len(mine)
        assert np.allclose(sorted(map(tuple, mine)), sorted(map(tuple, expected)), rtol=1e-3, atol=1e-4)
        one = have[f"blocks.1.moe.experts.{expert}.hidden"]
        assert np.array_equal(one, np.where((of == expert)[:, None], everything, 0))


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_editing_one_expert_changes_its_rows_only(dialect: str) -> None:
    graph = graph_of("mixtral_batched", dialect)
    inputs = zoo.inputs("mixtral_batched")
    mixture = graph.views.moe()[0]
    assert mixture.hidden is not None and mixture.expert_index is not None
    hidden, of = (executor_for(graph).open(graph, [mixture.hidden, mixture.expert_index])(inputs)[v.name]
                  for v in (mixture.hidden, mixture.expert_index))  # fmt: skip
    with graph.edit("double") as editor:
        for expert, factor in ((2, 2.0), (0, 3.0)):
            editor.insert_at(graph.site(f"blocks.0.moe.experts.{expert}.hidden"), "mul", [np.float32(factor)])
    graph.verify()
    now = read_sites(graph, ["blocks.0.moe.experts.hidden"], inputs)["blocks.0.moe.experts.hidden"]
    factors = np.select([of == 2, of == 0], [2.0, 3.0], 1.0).astype(np.float32)
    assert np.allclose(now, hidden * factors[:, None], rtol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "vit", "t5"])
def test_a_materialised_pattern_can_be_edited_and_keeps_blind_rows(name: str) -> None:
    """Taking a fused attention apart changes nothing, zeros for rows that may see no key included; an edit has its effect."""
    graph = zoo.captured(name)
    inputs = zoo.inputs(name)
    if name in ("llama", "gpt_neox"):
        inputs["attention_mask"][0, :3] = 0  # padding on the left: the first rows may see nothing
    before = graph.run(inputs)
    sites = graph.sites("*attn.pattern")
    assert sites and all(site.kind is SiteKind.VIRTUAL for site in sites)
    shapes = [site.type for site in sites]
    pattern = read_sites(graph, [site.name for site in sites], inputs)[sites[0].name]
    assert [graph.site(site.name).type for site in sites] == shapes
    assert "aten.scaled_dot_product_attention" not in {node.op for node in graph.nodes()}
    after = graph.run(inputs)
    assert all(mismatch(after[key], before[key]) < TOLERANCE for key in before)
    sums = pattern.sum(-1)
    if name in ("llama", "gpt_neox"):
        assert np.array_equal(pattern[0, :, :3], np.zeros_like(pattern[0, :, :3])) and np.allclose(sums[0, :, 3:], 1, atol=1e-5)
    else:
        assert np.allclose(sums, 1, atol=1e-5)
    # The views still see the attentions, and structural sites moved along.
    assert [a.pattern for a in graph.views.attentions()] == [graph.site(site.name).value for site in sites]
    assert graph.site("attention.0:in[0]").value == graph.views.attentions()[0].query
    with graph.edit("halve") as editor:
        editor.insert_at(graph.site(sites[0].name), "mul", [np.float32(0.5)])
    changed = graph.run(inputs)
    assert max(mismatch(changed[key], before[key]) for key in before) > 1e-2


def test_blocks_of_every_layout() -> None:
    """The grouping into blocks, by the kinds of their units."""
    kinds = {
        name: [(b.prefix, b.index, "+".join(u.kind for u in b.units)) for b in zoo.captured(name).views.blocks()]
        for name in ("llama", "gemma3", "gpt_neox", "bert", "mixtral", "mamba", "t5", "resnet", "albert")
    }
    assert kinds["llama"] == kinds["bert"] == [("", 0, "attn+mlp"), ("", 1, "attn+mlp")]
    assert kinds["gemma3"] == kinds["albert"] == [("", i, "attn+mlp") for i in range(3)]
    assert kinds["gpt_neox"] == [("", 0, "parallel"), ("", 1, "parallel")]
    assert kinds["mixtral"] == [("", 0, "attn+moe"), ("", 1, "attn+moe")]
    assert kinds["mamba"] == [("", 0, "mixer"), ("", 1, "mixer")]
    assert kinds["t5"] == [
        *(("encoder.", i, "attn+mlp") for i in range(2)), *(("decoder.", i, "attn+cross_attn+mlp") for i in range(2)),
    ]  # fmt: skip
    assert kinds["resnet"] == [(f"stages.{i}.", j, "conv") for i in range(2) for j in range(2)]


def test_other_tools_spellings_on_a_real_model() -> None:
    """Every spelling names the place that its tool means; on an ONNX file without scopes, Hugging Face paths work as well."""
    meant = {
        "blocks.1.hook_resid_pre": "blocks.1.resid_pre", "blocks.1.hook_in": "blocks.1.resid_pre",
        "blocks.1.hook_resid_mid": "blocks.1.resid_mid", "blocks.1.hook_resid_post": "blocks.1.resid_post",
        "blocks.1.hook_out": "blocks.1.resid_post", "blocks.1.attn.hook_q": "blocks.1.attn.q",
        "blocks.1.attn.k.hook_out": "blocks.1.attn.k", "blocks.1.attn.hook_z": "blocks.1.attn.head_out",
        "blocks.1.attn.hook_pattern": "blocks.1.attn.pattern", "blocks.1.hook_attn_out": "blocks.1.attn.out",
        "blocks.1.attn.hook_out": "blocks.1.attn.out", "blocks.1.ln2.hook_out": "blocks.1.mlp.norm",
        "blocks.1.mlp.hook_pre": "blocks.1.mlp.pre_act", "blocks.1.mlp.hook_post": "blocks.1.mlp.hidden",
        "blocks.1.hook_mlp_out": "blocks.1.mlp.out", "hook_embed": "embed", "ln_final.hook_out": "final_norm",
        "unembed.hook_out": "logits", "layer=1,component=block_output": "blocks.1.resid_post",
        "layer=0, component=query_output": "blocks.0.attn.q", "model.layers.1": "blocks.1.resid_post",
        "model.layers.1.self_attn": "blocks.1.attn.out", "model.layers.1.mlp.down_proj:in": "blocks.1.mlp.hidden",
        "model.embed_tokens": "embed", "lm_head": "logits",
    }  # fmt: skip
    for dialect in ("fx", "onnx"):
        graph = graph_of("llama", dialect)
        for spelling, name in meant.items():
            site, expected = graph.site(spelling), graph.site(name)
            if site.kind is SiteKind.VIRTUAL:
                assert site.anchor == expected.anchor, spelling
            else:
                assert site.value == expected.value, spelling


def test_stream_values_are_what_blocks_say() -> None:
    """Views and sites agree, and keep agreeing after an edit at a site."""
    graph = zoo.captured("llama")
    with graph.edit("steer") as editor:
        editor.insert_at(graph.site("blocks.0.resid_post"), "add", [np.ones(32, np.float32)])
        editor.insert_at(graph.site("blocks.1.mlp.out"), "add", [np.ones(32, np.float32)])
    graph.verify()
    blocks = graph.views.blocks()
    assert [(b.prefix, b.index, len(b.units)) for b in blocks] == [("", 0, 2), ("", 1, 2)]
    assert blocks[1].resid_pre == graph.site("blocks.1.resid_pre").value
    assert blocks[1].feed_forward is not None and blocks[1].units[1].branch == graph.site("blocks.1.mlp.out").value


def test_sites_of_a_lifted_joint_graph() -> None:
    """Nothing assumes that parameters are stored: a graph that takes them as inputs lists its values and edges all the same."""
    import torch
    from torch._functorch.aot_autograd import aot_export_joint_simple

    from actgraph.graph.fx import FxGraph

    def loss(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.relu(x @ w).sum(),)

    gm = aot_export_joint_simple(loss, (torch.randn(5, 4), torch.randn(4, 3, requires_grad=True)), trace_joint=True)
    graph = FxGraph.from_joint(gm)
    graph.verify()
    names = [site.name for site in graph.sites()]
    assert "activation.0" in names
    assert graph.sites("%*") and graph.text() and graph.content_hash() == graph.clone().content_hash()
