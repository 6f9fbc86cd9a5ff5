"""Clauses that say which tokens are steered: how they are read, what they are on arrays, and where they are refused."""

from __future__ import annotations

import numpy as np
import pytest

import actgraph as ag
from actgraph.errors import OptionError, PassError
from actgraph.graph import Graph
from actgraph.graph.graph import Array
from actgraph.passes.steer.where import Where
from tests import zoo
from tests.passes.conftest import in_dialect

VECTOR = np.random.default_rng(11).normal(0, 0.5, zoo.WIDTH).astype(np.float32)
LENGTH = 9


def steered(graph: Graph, where: str, **options: object) -> ag.RunResult:
    vector = "[" + ", ".join(repr(float(v)) for v in VECTOR) + "]"
    more = " ".join(f"{name}={value}" for name, value in ({"site": "blocks.1.resid_post"} | options).items())
    return ag.run(graph, f"steer{{vector={vector} where={where} {more}}}")


@pytest.mark.parametrize(
    ("clause", "meaning"),
    [
        ("all", Where()), ("0:", Where()), ("all & all", Where()), ("prompt", Where(part="prompt")), ("3:", Where(3)),
        (":4", Where(0, 4)), ("2:5", Where(2, 5)), (" 2 : 5 ", Where(2, 5)), ("generated & 5:9", Where(5, 9, "generated")),
        ("1:6&:4&prompt&prompt", Where(1, 4, "prompt")),
    ],
)  # fmt: skip
def test_clauses_are_read(clause: str, meaning: Where) -> None:
    assert Where.parse(clause) == meaning
    assert meaning.everywhere == (clause in ("all", "0:", "all & all"))


@pytest.mark.parametrize(
    ("clause", "why"),
    [
        ("", "is empty"), ("  ", "is empty"), ("3: &", "empty part"), (":", "':'.*not known"), ("3", "'3'.*not known"),
        ("-3:", "not known"), ("promt", "'promt'.*not known"), ("5:5", "no token"), (":0", "no token"), ("4: & :2", "no token"),
        ("prompt & generated", "both"), ("99999999:", "positions go up to"),
    ],
)  # fmt: skip
def test_a_clause_that_says_nothing_is_refused(clause: str, why: str) -> None:
    with pytest.raises(OptionError, match=why) as caught:
        Where.parse(clause)
    assert "prompt, generated" in caught.value.hint
    with pytest.raises(OptionError, match=why):
        steered(zoo.captured("llama"), f'"{clause}"')


def padded() -> tuple[dict[str, Array], list[int]]:
    """Rows of 9, 5 and 2 real tokens, on the right."""
    inputs = zoo.inputs("llama", batch=3, length=LENGTH)
    counts = [LENGTH, 5, 2]
    inputs["attention_mask"] = np.stack([np.r_[np.zeros(LENGTH - n, np.int64), np.ones(n, np.int64)] for n in counts])
    inputs["position_ids"] = np.maximum(inputs["attention_mask"].cumsum(1) - 1, 0)
    return inputs, counts


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize("clause", ["prompt", "generated", "3:", ":4", "2:5", "prompt & 1:"])
def test_exactly_the_named_tokens_move(dialect: str, clause: str) -> None:
    """Seen at the site itself: the shift at tokens of the clause, and the others bit for bit as they were."""
    graph = in_dialect("llama", dialect)
    tap = "tap{site=blocks.1.resid_post}"
    inputs, counts = padded()
    before = ag.run(graph, tap).graph.run(inputs)["blocks.1.resid_post"]
    result = steered(graph, f'"{clause}"')
    lengths = np.array([4, 2, 1])
    told = {"prompt_lengths": lengths} if "prompt" in clause or "generated" in clause else {}
    after = ag.run(result.graph, tap).graph.run({**inputs, **told})["blocks.1.resid_post"]
    where = Where.parse(clause)
    for row, count in enumerate(counts):
        p = np.arange(count)
        named = (p >= where.start) & (p < (where.stop or LENGTH))
        named &= {"": p >= 0, "prompt": p < lengths[row], "generated": p >= lengths[row]}[where.part]
        real = slice(LENGTH - count, None)
        assert np.array_equal(after[row, real][~named], before[row, real][~named])
        np.testing.assert_allclose(after[row, real][named], before[row, real][named] + VECTOR, atol=1e-5)


def test_without_lengths_all_tokens_are_prompt() -> None:
    graph = zoo.captured("llama")
    inputs = padded()[0]
    plain = graph.run(inputs)["logits"]
    made = steered(graph, "generated")
    assert np.array_equal(made.graph.run(inputs)["logits"], plain)
    assert any("where nobody gives it, all tokens are prompt" in message for message in made.report[0].messages)
    everywhere = steered(graph, "all", fold="false").graph.run(inputs)["logits"]
    assert np.array_equal(steered(graph, "prompt").graph.run(inputs)["logits"], everywhere)


def test_a_clause_is_never_folded_or_merged() -> None:
    """blocks.1.mlp.out is the output of a linear: a shift for all tokens becomes its bias."""
    graph, site = zoo.captured("llama"), {"site": "blocks.1.mlp.out"}
    folded, kept = steered(graph, "all", **site), steered(graph, "3:", **site)
    assert [row.counts for row in (folded.report[0], kept.report[0])] == [{"folded": 1}, {"inserted": 1}]
    assert "not folded" in kept.report[0].messages[0] and not steered(graph, "3:", fold="false", **site).report[0].messages
    twice = steered(steered(graph, "3:").graph, "all", fold="false").graph
    assert sum(node.op == "actgraph.shift" for node in twice.nodes()) == 2


def test_one_mask_serves_all_sites_and_scale_zero_leaves_no_trace() -> None:
    graph = zoo.captured("gpt2")
    both = steered(graph, "generated", site="[blocks.1.resid_post, blocks.0.resid_post]").graph
    both.verify()
    shifts = [node for node in both.nodes() if node.op == "actgraph.shift"]
    assert len(shifts) == 2 and len({node.operands[3] for node in shifts}) == 1
    assert [value.name for value in both.inputs()].count("prompt_lengths") == 1
    same = steered(graph, "generated", scale=0).graph
    assert [value.name for value in same.inputs()] == [value.name for value in graph.inputs()]


def test_a_place_without_tokens_is_declined() -> None:
    with pytest.raises(PassError, match=r"changed nothing.*pattern.*has other axes"):
        ag.run(zoo.captured("llama"), "steer{site=blocks.0.attn.pattern vector=[1.0, 0.0, 0.0, 2.0] axis=1 where=3:}")
