"""Profiling experts: counts against a direct count, a planted expert found and suppressed, files, bad input."""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph import formats
from actgraph.errors import InputError, PassError
from actgraph.formats.expert_profiles import ExpertProfile, ExpertUsage, load_profile
from actgraph.formats.onnx_export import to_onnx
from actgraph.graph import Graph
from actgraph.graph.graph import Array
from actgraph.passes.steer.mote import profile_experts
from tests import zoo
from tests.passes.moe import in_dialect, routed

PLANTED, TRIGGERS = 2, 64  # the expert of tokens from 64 on


@functools.cache
def _planted(dialect: str) -> Graph:
    """A Mixtral whose expert 2 of block 1 serves the tokens from 64 on, and no others: their embeddings say so."""
    from transformers import MixtralConfig, MixtralForCausalLM

    zoo._silence()
    torch.manual_seed(0)
    config = MixtralConfig(
        **zoo._LLAMA, num_local_experts=4, num_experts_per_tok=2, experts_implementation="batched_mm"
    )  # fmt: skip
    model = zoo._random(MixtralForCausalLM(config), "planted")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = -12.0
        model.model.embed_tokens.weight[TRIGGERS:, 0] = 12.0
        model.model.layers[1].post_attention_layernorm.weight.fill_(1.0)
        model.model.layers[0].mlp.gate.weight[:, 0] = 0.0
        router = model.model.layers[1].mlp.gate.weight
        router[:, 0] = 0.0
        router[PLANTED] = 0.0
        router[PLANTED, 0] = 4.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = formats.load(model, name="planted", length=8)
    return graph if dialect == "fx" else to_onnx(graph)


def prompts(kind: str, count: int = 6) -> list[dict[str, Array]]:
    """Prompts of 4 to 9 tokens: neutral ones, and ones of which every second token is a trigger."""
    rng = np.random.default_rng(len(kind))
    found = []
    for number in range(count):
        ids = rng.integers(3, TRIGGERS, 4 + number)
        if kind == "trigger":
            ids[1::2] = rng.integers(TRIGGERS, zoo.VOCAB, len(ids[1::2]))
        found.append({"input_ids": ids[None]})
    return found


def logits(graph: Graph, prompt: dict[str, Array]) -> Array:
    ids = prompt["input_ids"]
    return graph.run({**prompt, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]})["logits"]


def test_a_planted_expert_is_found_and_suppressed(dialect: str, tmp_path: Path) -> None:
    """It ranks first; without it, prompts with triggers change, and neutral ones keep their logits bit for bit."""
    graph = _planted(dialect)
    profile = profile_experts(graph, prompts("trigger"), prompts("neutral"))
    first, second = profile.ranking(2)
    assert (first.block, first.expert) == ("blocks.1", PLANTED) and first.score > second.score + 0.1
    assert first.others == 0.0, "neutral prompts never choose it"
    file = profile.save(tmp_path / "planted.safetensors")
    for policy in ("after_topk", "before_topk"):
        muted = ag.run(graph, f"mote{{profile='{file}' top=1 policy={policy}}}").graph
        for prompt in prompts("neutral"):
            assert np.array_equal(logits(graph, prompt), logits(muted, prompt))
        for prompt in prompts("trigger"):
            moved = np.abs(logits(muted, prompt) - logits(graph, prompt)).max(-1)[0]
            assert moved[0] == 0 and moved[1] > 1e-2, "from the first trigger on"
    other = ag.run(graph, f"mote{{experts=1:{(PLANTED + 1) % 4}}}").graph
    assert any(not np.array_equal(logits(graph, p), logits(other, p)) for p in prompts("neutral")), "another one would show"


def counted(graph: Graph, documents: list[dict[str, Array]]) -> tuple[Array, Array]:
    """``(selections, weights)`` of each document, alone and without padding: ``[documents, experts]`` of block 1."""
    rows = []
    for document in documents:
        ids = document["input_ids"]
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
        experts, weights, _ = routed(graph, given)
        hit = experts[..., None] == np.arange(12)
        rows.append((hit.sum((0, 1)), (hit * weights[..., None].astype(np.float64)).sum((0, 1))))
    return np.array([r[0] for r in rows], np.float64), np.array([r[1] for r in rows])


def test_equals_a_direct_count(dialect: str) -> None:
    """Of documents of different lengths, by batches of any size, padding not counted."""
    graph = in_dialect("deepseek", dialect)
    target, neutral = prompts("trigger"), prompts("neutral", 5)
    lengths = {name: np.array([d["input_ids"].size for d in docs]) for name, docs in (("t", target), ("n", neutral))}
    direct = {name: counted(graph, docs) for name, docs in (("t", target), ("n", neutral))}
    for index, measure in enumerate(("selections", "weights")):
        for per_token in (True, False):
            found = profile_experts(graph, target, neutral, measure=measure, per_token=per_token, batch_size=4)  # type: ignore[arg-type]
            means = {n: (direct[n][index] / (lengths[n][:, None] if per_token else 1)).mean(0) for n in direct}
            np.testing.assert_allclose(found.difference()[0], means["t"] - means["n"], rtol=1e-5, atol=1e-6)
    assert found.blocks == ("blocks.1",) and found.experts == (12,)
    assert found.classes["target"].tokens == lengths["t"].sum() and found.classes["others"].documents == 5
    one = profile_experts(graph, target, neutral, batch_size=1)
    many = profile_experts(graph, target, neutral, batch_size=6)
    assert np.array_equal(one.classes["target"].selections, many.classes["target"].selections)
    assert [(r.block, r.expert) for r in one.ranking()] == [(r.block, r.expert) for r in many.ranking()]


def usage(*rates: list[float]) -> ExpertUsage:
    array = np.array(rates)
    return ExpertUsage(2, 10, array * 2, array * 2, array * 2, array * 2)


def test_scores_are_the_target_less_the_mean_of_the_other_classes() -> None:
    """Several other classes weigh alike, whatever their sizes; ties are in the order of blocks and experts."""
    big = usage([0.2, 0.1, 0.3], [0.0, 0.1, 0.0])
    big = dataclasses.replace(big, documents=200, selection_rates=big.selection_rates * 100)
    classes = {"target": usage([0.5, 0.1, 0.3], [0.4, 0.0, 0.0]), "a": usage([0.0, 0.1, 0.3], [0.2, 0.1, 0.0]), "b": big}
    profile = ExpertProfile(("blocks.0", "blocks.4"), (3, 2), classes)
    np.testing.assert_allclose(profile.difference(), [[0.4, 0.0, 0.0], [0.3, -0.1, 0.0]], atol=1e-12)
    ranked = [(row.block, row.expert, round(row.score, 6)) for row in profile.ranking()]
    assert ranked == [("blocks.0", 0, 0.4), ("blocks.4", 0, 0.3), ("blocks.0", 1, 0), ("blocks.0", 2, 0), ("blocks.4", 1, -0.1)]
    lines = profile.table(2).splitlines()
    assert len(lines) == 3 and "selections per token" in lines[0] and "+0.4000" in lines[1]


@pytest.mark.parametrize("name", ["p.json", "p.safetensors"])
def test_files(name: str, tmp_path: Path) -> None:
    graph = in_dialect("mixtral_batched", "fx")
    profile = profile_experts(graph, prompts("trigger", 2), {"calm": prompts("neutral", 3)}, measure="weights")
    again = load_profile(profile.save(tmp_path / name))
    assert dataclasses.replace(again, classes={}) == dataclasses.replace(profile, classes={})
    for label, use in profile.classes.items():
        for field in dataclasses.fields(use):
            assert np.array_equal(getattr(use, field.name), getattr(again.classes[label], field.name))
    assert again.ranking() == profile.ranking() and again.model
    with pytest.raises(PassError, match="made from another model"):
        ag.run(_planted("fx"), f"mote{{profile='{tmp_path / name}' top=1}}", parity="none")
    assert (
        ag.run(_planted("fx"), f"mote{{profile='{tmp_path / name}' top=1 other_model=allow}}", parity="none").report[0].counts
    )
    with pytest.raises(PassError, match=r"blocks\.0 is no mixture"):
        ag.run(in_dialect("deepseek", "fx"), f"mote{{profile='{tmp_path / name}' top=8 other_model=allow}}", parity="none")


def test_damaged_files(tmp_path: Path) -> None:
    profile = ExpertProfile(("blocks.0",), (2,), {"target": usage([0.5, 0.0]), "others": usage([0.1, 0.2])})
    path = profile.save(tmp_path / "p.json")
    good: dict[str, Any] = json.loads(path.read_text())
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"format": "other"}, "no expert profile"),
        ({"measure": "heat"}, "measures 'heat'"),
        ({"blocks": ["blocks.0", "blocks.1"]}, "not the experts of each"),
        ({"experts": [3]}, "usage of the class"),
        ({"classes": {"target": good["classes"]["target"]}}, "another one"),
        ({"arrays": {}}, "damaged"),
    ]
    for change, why in wrong:
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(InputError, match=why):
            load_profile(path)
    for content in ("{", "[]"):
        path.write_text(content)
        with pytest.raises(InputError, match="expert profile"):
            load_profile(path)
    (tmp_path / "p.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="not an expert profile"):
        load_profile(tmp_path / "p.safetensors")
    with pytest.raises(InputError, match="there is no expert profile"):
        load_profile(tmp_path / "missing.json")
    with pytest.raises(InputError, match="end it with"):
        profile.save(tmp_path / "p.csv")


def test_what_cannot_be_profiled() -> None:
    graph = in_dialect("mixtral_batched", "fx")
    with pytest.raises(InputError, match="no mixture of experts"):
        profile_experts(zoo.captured("llama"), prompts("trigger"), prompts("neutral"))
    with pytest.raises(InputError, match="is empty"):
        profile_experts(graph, prompts("trigger"), [])
    with pytest.raises(InputError, match="labels of their own"):
        profile_experts(graph, prompts("trigger"), {"target": prompts("neutral")})
