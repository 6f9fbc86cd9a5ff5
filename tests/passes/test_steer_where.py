"""Clauses that say which tokens are steered: how they are read, what they are on arrays, and where they are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

import actgraph as ag
from actgraph.errors import InputError, OptionError, PassError
from actgraph.formats.vectors import model_fingerprint
from actgraph.graph import Graph
from actgraph.graph.graph import Array
from actgraph.graph.where import Where
from tests import zoo
from tests.passes.conftest import in_dialect

VECTOR = np.random.default_rng(11).normal(0, 0.5, zoo.WIDTH).astype(np.float32)
LENGTH = 9


def steered(graph: Graph, where: str, **options: object) -> ag.RunResult:
    vector = "[" + ", ".join(repr(float(v)) for v in VECTOR) + "]"
    more = " ".join(f"{name}={value}" for name, value in ({"site": "blocks.1.resid_post"} | options).items())
    return ag.run(graph, f"steer{{vector={vector} where={where} {more}}}")


@pytest.mark.parametrize(
    ("clause", "canonical"),
    [
        ("all", "all"), ("0:", "all"), ("all & all", "all"), ("all | prompt", "all"), ("prompt", "prompt"), ("3:", "3:"),
        (":4", ":4"), ("2:5", "2:5"), (" 2 : 5 ", "2:5"), ("3", "3"), ("generated & 5:9", "generated & 5:9"),
        ("1:6&:4&prompt&prompt", "prompt & 1:4"), ("prompt[-1]", "prompt[-1]"), ("prompt[ -3: ]", "prompt[-3:]"),
        ("prompt[2:-1]", "prompt[:-1] & 2:"), ("prompt[2:5]", "prompt & 2:5"), ("generated[0]", "generated[0]"),
        ("generated[2:] & generated[:4]", "generated[2:4]"), ("token(7, 3,3)", "token(3, 7)"), ("row(0, 2:4)", "row(0, 2:4)"),
        ("token(1,2) & token(2,3)", "token(2)"), ("row(0:4) & row(2, 9)", "row(2)"),
        ("prompt&2:|generated ! token(1)!row(3)", "prompt & 2: | generated ! token(1) ! row(3)"),
        ("all ! 0 | prompt[-1]", "all ! :1 ! prompt[-1]"),
    ],
)  # fmt: skip
def test_clauses_are_read(clause: str, canonical: str) -> None:
    where = Where.parse(clause)
    assert str(where) == canonical
    assert Where.parse(str(where)) == where and where.everywhere == (canonical == "all")


@pytest.mark.parametrize(
    ("clause", "why"),
    [
        ("", "is empty"), ("  ", "is empty"), ("3: &", "empty part"), ("prompt |", "empty part"), (":", "':'.*not known"),
        ("-3:", "count from 0"), ("-1", "count from 0"), ("promt", "'promt'.*not known"), ("5:5", "no token"),
        (":0", "no token"), ("4: & :2", "no token"), ("prompt & generated", "no token"), ("99999999:", "positions go up to"),
        ("! 3", "nothing to exclude from"), ("3 !", "empty part"), ("all ! all", "all are excluded"), ("token()", "not known"),
        ("token(1:3)", "no list of token ids"), ("token(-1)", "tokens count from 0"), ("row(-1)", "rows count from 0"),
        ("generated[-1]", "where a text will end"), ("prompt[3:2]", "no token"), ("2 3", "not known"),
        ("token(1) & token(2)", "no token"),
    ],
)  # fmt: skip
def test_a_clause_that_says_nothing_is_refused(clause: str, why: str) -> None:
    with pytest.raises(OptionError, match=why) as caught:
        Where.parse(clause)
    assert caught.value.hint
    with pytest.raises(OptionError, match=why):
        steered(zoo.captured("llama"), f'"{clause}"')


def test_masks_on_arrays() -> None:
    """Each kind of term, by hand, for two rows of 4 and 2 prompt tokens."""
    positions = np.array([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]])
    lengths, tokens = np.array([4, 2]), np.array([[5, 6, 7, 5, 6, 7], [9, 9, 5, 5, 9, 9]])
    expected = {
        "prompt": ["111100", "110000"], "generated": ["000011", "001111"], "prompt[-1]": ["000100", "010000"],
        "prompt[-3:]": ["011100", "110000"], "prompt[1:-1]": ["011000", "000000"], "generated[1:3]": ["000001", "000110"],
        "generated[0]": ["000010", "001000"], "2": ["001000", "001000"], "1:3": ["011000", "011000"],
        "token(5)": ["100100", "001100"], "token(5, 9) & generated": ["000000", "001111"], "row(1)": ["000000", "111111"],
        "prompt[-1] | generated ! token(6)": ["000101", "011111"], "all ! prompt ! row(1)": ["000011", "000000"],
        "row(0) | 0": ["111111", "100000"],
    }  # fmt: skip
    for clause, rows in expected.items():
        mask = Where.parse(clause).mask(positions, lengths, tokens)
        assert ["".join(map(str, row)) for row in mask.astype(int)] == rows, clause
    assert Where.parse("prompt").mask(positions).all() and not Where.parse("prompt[-1]").mask(positions).any()
    with pytest.raises(InputError, match="token ids"):
        Where.parse("token(5)").mask(positions)


def padded(model: str = "llama") -> tuple[dict[str, Array], list[int]]:
    """Rows of 9, 5 and 2 real tokens, on the right."""
    inputs = zoo.inputs(model, batch=3, length=LENGTH)
    counts = [LENGTH, 5, 2]
    inputs["attention_mask"] = np.stack([np.r_[np.zeros(LENGTH - n, np.int64), np.ones(n, np.int64)] for n in counts])
    inputs["position_ids"] = np.maximum(inputs["attention_mask"].cumsum(1) - 1, 0)
    return inputs, counts


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize(
    "clause",
    [
        "prompt", "generated", "3:", ":4", "2:5", "prompt & 1:", "prompt[-1]", "prompt[-2:] | generated[1:3]",
        "token({0}, {1})", "row(0, 2)", "all ! token({0}) ! 0", "generated ! row(1)", "prompt[1:] & 2: | generated[0]",
    ],
)  # fmt: skip
@pytest.mark.parametrize("model", ["llama", "gpt2", "opt"])
def test_exactly_the_named_tokens_move(dialect: str, model: str, clause: str) -> None:
    """Seen at the site itself: the shift at tokens of the clause, and the others bit for bit as they were."""
    graph = in_dialect(model, dialect)
    tap = "tap{site=blocks.1.resid_post}"
    inputs, _ = padded(model)
    clause = clause.format(inputs["input_ids"][0, 3], inputs["input_ids"][1, 7])
    before = ag.run(graph, tap).graph.run(inputs)["blocks.1.resid_post"]
    result = steered(graph, f'"{clause}"')
    given = {"prompt_lengths": np.array([4, 3, 1]), "row_index": np.arange(3)}
    names = {value.name for value in result.graph.inputs()}
    told = {name: array for name, array in given.items() if name in names}
    after = ag.run(result.graph, tap).graph.run({**inputs, **told})["blocks.1.resid_post"]
    named = Where.parse(clause).mask(inputs["position_ids"], given["prompt_lengths"], inputs["input_ids"])
    real = inputs["attention_mask"] == 1
    assert 0 < (real & named).sum() < real.sum()
    assert np.array_equal(after[real & ~named], before[real & ~named])
    np.testing.assert_allclose(after[real & named], before[real & named] + VECTOR, atol=1e-5)


def test_token_ids_in_a_file(tmp_path: Path) -> None:
    """The table that ids are looked up in is no embedding: sites and the fingerprint of a saved model stay those it had."""
    graph = zoo.captured("llama")
    made = steered(graph, '"token(3)"').graph
    again = ag.load(made.save(tmp_path / "x.onnx"))
    inputs = {**padded()[0], "input_ids": np.full((3, LENGTH), 3)}
    assert [site.name for site in again.sites("embed")] == ["embed"] and model_fingerprint(again) == model_fingerprint(graph)
    np.testing.assert_allclose(again.run(inputs)["logits"], made.run(inputs)["logits"], atol=1e-5)
    with pytest.raises(InputError, match=r"token\(99999\): .* has \d+ tokens"):
        steered(graph, '"token(99999)"')


@pytest.mark.parametrize(
    "clause", ["prompt ! prompt", "0 ! 0", "3 ! 2:", "token(5) ! token(4, 5)", "row(1) ! row(0:3)", "0 | 1 ! :2"]
)
def test_what_is_excluded_whole_is_an_error(clause: str) -> None:
    with pytest.raises(OptionError, match="is met by no token: all are excluded"):
        Where.parse(clause)
    for met in ("prompt ! 0", "3: ! 3", "token(4, 5) ! token(5)", "row(0:3) ! row(1)", "prompt ! 2: & generated"):
        assert Where.parse(met).excludes


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_rows_that_nobody_tells_are_of_no_clause(dialect: str) -> None:
    """A host that knows nothing of rows gets the unsteered model, and the pass says so."""
    graph, inputs = in_dialect("llama", dialect), padded()[0]
    plain = graph.run(inputs)["logits"]
    for clause in ("row(0)", "row(:2)", "row(1:)"):
        result = steered(graph, f'"{clause}"')
        assert any("reads the input row_index" in message for message in result.report[0].messages)
        assert np.array_equal(result.graph.run(inputs)["logits"], plain)
        moved = result.graph.run({**inputs, "row_index": np.arange(3)})["logits"]
        real = inputs["attention_mask"] == 1
        rows = {n for n in range(3) if not np.array_equal(moved[n][real[n]], plain[n][real[n]])}
        assert rows == {"row(0)": {0}, "row(:2)": {0, 1}, "row(1:)": {1, 2}}[clause]


def test_without_lengths_all_tokens_are_prompt() -> None:
    graph = zoo.captured("llama")
    inputs = padded()[0]
    plain = graph.run(inputs)["logits"]
    made = steered(graph, "generated")
    assert np.array_equal(made.graph.run(inputs)["logits"], plain)
    assert any("where nobody gives it, all tokens are prompt" in message for message in made.report[0].messages)
    everywhere = steered(graph, "all", fold="false").graph.run(inputs)["logits"]
    assert np.array_equal(steered(graph, "prompt").graph.run(inputs)["logits"], everywhere)


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_files_say_what_a_clause_asks_for(dialect: str, tmp_path: Path) -> None:
    """In metadata, and beside the input, where any viewer of ONNX files shows it."""
    path = steered(in_dialect("llama", dialect), '"generated & row(0)"').graph.save(tmp_path / "made.onnx")
    model = onnx.load(path)
    said = {value.name: value.doc_string for value in model.graph.input}
    assert "where nobody tells it, all tokens are prompt" in said["prompt_lengths"] and "-1 where nobody" in said["row_index"]
    stored = {prop.key: prop.value for prop in model.metadata_props}
    assert json.loads(stored["actgraph.roles"]) == {"prompt_lengths": "context", "row_index": "context"}
    assert json.loads(stored["actgraph.optional"]) == ["prompt_lengths", "row_index"]
    assert "generated & row(0)" in json.loads(stored["actgraph.history"])[0]["text"]
    again = ag.load(path).save(tmp_path / "again.onnx")
    assert {value.name: value.doc_string for value in onnx.load(again).graph.input} == said


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
