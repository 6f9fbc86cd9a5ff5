"""Collected statistics equal those of each document run alone; padding, batching and grouping do not matter."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actgraph.calibrate import Request, Statistics
from actgraph.calibrate.engine import collect, locate
from actgraph.errors import InputError, SiteError
from actgraph.graph import Graph
from actgraph.graph.executor import executor_for
from tests.calibrate import models

Array = np.ndarray[Any, Any]

ROWS = [[1, 5, 7, 9, 11, 200], [1, 30], [1, 77, 78, 300], [1, 400, 401], [1, 9, 8, 7, 6, 5, 4, 3]]
HIDDEN = "blocks.2.mlp.hidden"
REQUESTS = [
    Request(HIDDEN, "absmax"), Request(HIDDEN, "mean", axis=-1), Request(HIDDEN, "second_moment", positions=True),
    Request(HIDDEN, "abs_quantile"), Request(HIDDEN, "gram"), Request("blocks.0.attn.q", "min", tokens="last"),
    Request("blocks.0.attn.q", "max", tokens="not_first"), Request("blocks.4.resid_post", "norm", tokens="first"),
    Request("linear.7:in", "l2", axis=-1), Request("logits", "count"),
]  # fmt: skip


def alone(graph: Graph, site: str, rows: Sequence[Sequence[int]]) -> list[Array]:
    """The value of a site for each document run alone, without padding: ``[tokens, channels]`` each."""
    value = graph.site(site).value
    run = executor_for(graph).open(graph, [value])
    return [run(models.padded([list(row)]))[value.name][0] for row in rows]


def as_arrays(statistics: Statistics) -> dict[Request, Array]:
    return {
        r: statistics.sketch(r).quantile(np.linspace(0, 1, 5)) if "quantile" in r.kind else statistics.array(r)
        for r in statistics
    }


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_statistics_are_those_of_each_document_alone(dialect: str) -> None:
    graph = models.stories(dialect)
    found = collect(graph, REQUESTS, models.padded(ROWS), batch_size=3, cache=False)
    assert (found.documents, found.tokens) == (5, sum(map(len, ROWS)))
    hidden = [x.astype(np.float64) for x in alone(graph, HIDDEN, ROWS)]
    joined = np.concatenate(hidden)
    q = alone(graph, "blocks.0.attn.q", ROWS)
    resid = [x.astype(np.float64) for x in alone(graph, "blocks.4.resid_post", ROWS)]
    longest = max(map(len, ROWS))
    by_position = [np.mean(np.square(np.stack([x[p] for x in hidden if len(x) > p]))) for p in range(longest)]
    wanted = [
        np.abs(joined).max(), joined.mean(0), np.array(by_position), None, joined.T @ joined, min(x[-1].min() for x in q),
        max(x[1:].max() for x in q), np.mean([np.linalg.norm(x[0]) for x in resid]),
        np.sqrt(np.square(np.concatenate(alone(graph, "linear.7:in", ROWS)).astype(np.float64)).sum(0)), 512 * joined.shape[0],
    ]  # fmt: skip
    for request, expected in zip(REQUESTS, wanted, strict=True):
        if expected is not None:
            scale = np.abs(expected).max()
            np.testing.assert_allclose(found.array(request), expected, rtol=2e-5, atol=2e-6 * scale, err_msg=str(request))
    exact = np.quantile(np.abs(joined), 0.4, method="inverted_cdf")
    assert found.sketch(REQUESTS[3]).quantile(0.4) == pytest.approx(exact, rel=2**-8)


def test_left_padding_right_padding_and_batch_size_do_not_matter() -> None:
    graph = models.stories()
    reference = as_arrays(collect(graph, REQUESTS, [models.padded([row]) for row in ROWS], batch_size=1, cache=False))
    for corpus, size in (
        (models.padded(ROWS), 5),
        (models.padded(ROWS, left=True), 2),
        ([models.padded(ROWS[:2], left=True), models.padded(ROWS[2:])], 3),
    ):
        for request, array in as_arrays(collect(graph, REQUESTS, corpus, batch_size=size, cache=False)).items():
            scale = np.abs(reference[request]).max()
            np.testing.assert_allclose(array, reference[request], rtol=2e-5, atol=2e-6 * scale, err_msg=str(request))


def test_padding_would_show_if_it_were_counted() -> None:
    """The power of the tests above: the padding id moves what they look at."""
    graph = models.stories()
    full = models.padded(ROWS)
    counted = {**full, "attention_mask": np.ones_like(full["attention_mask"])}
    request = Request(HIDDEN, "second_moment")
    right, wrong = (collect(graph, [request], c, cache=False).array(request) for c in (full, counted))
    assert abs(wrong / right - 1) > 0.05


def test_an_edge_site_reads_its_operand_and_not_the_other_readers() -> None:
    graph = models.stories()
    with graph.edit("test") as editor:
        first = graph.site("linear.0:in")
        editor.insert_at(first, "actgraph.gate", [None], {"threshold": 1e9})
    edge, value = Request("linear.0:in", "absmax"), Request("blocks.0.attn.norm", "absmax")
    found = collect(graph, [edge, value], models.padded(ROWS), cache=False)
    assert found.array(edge) == 0.0
    assert found.array(value) > 0.1


def test_a_virtual_site_is_read_without_changing_the_graph() -> None:
    graph = models.stories()
    before = graph.text()
    request = Request("blocks.1.attn.pattern", "max")
    other = Request(HIDDEN, "absmax")
    found = collect(graph, [request, other], models.padded(ROWS), cache=False)
    assert found.array(request) == pytest.approx(1.0, abs=1e-6)  # the first token attends to itself alone
    assert found.array(other) == pytest.approx(collect(graph, [other], models.padded(ROWS), cache=False).array(other), rel=1e-5)
    assert graph.text() == before
    clone, values = locate(graph, [request])
    assert clone is not graph
    assert values[request.site].graph is clone


def test_attention_patterns_leave_padded_queries_and_keys_out() -> None:
    graph = models.stories()
    pattern = Request("blocks.1.attn.pattern", "count")
    found = collect(graph, [pattern], models.padded(ROWS), batch_size=5, cache=False)
    assert found.array(pattern) == 8 * sum(len(row) ** 2 for row in ROWS)


def test_rows_joined_with_positions_are_masked() -> None:
    graph = models.flattening()
    rows = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    corpus = {key: array for key, array in models.padded(rows).items() if key != "position_ids"}
    corpus["input_ids"] = corpus["input_ids"] % 20
    request = Request("inner", "mean", axis=-1)
    value = graph.site("inner").value
    assert value.shape == ("batch*seq", 4)
    run = executor_for(graph).open(graph, [value])
    single = [
        run({"input_ids": np.array([row]), "attention_mask": np.ones((1, len(row)), np.int64)})[value.name] for row in rows
    ]
    for size in (1, 3):
        found = collect(graph, [request], corpus, batch_size=size, cache=False)
        np.testing.assert_allclose(
            found.array(request), np.concatenate(single).astype(np.float64).mean(0), rtol=1e-5, atol=1e-6
        )


def test_plain_rows_and_image_channels() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(11, 4)).astype(np.float32)
    graph = models.mlp()
    request = Request("linear.0", "mean", axis=-1)
    found = collect(graph, [request], {"x": x}, batch_size=4, cache=False)
    value = graph.site("linear.0").value
    direct = executor_for(graph).open(graph, [value])({"x": x})[value.name]
    np.testing.assert_allclose(found.array(request), direct.astype(np.float64).mean(0), rtol=1e-6, atol=1e-7)
    assert (found.documents, found.tokens) == (11, 0)

    pixels = rng.normal(size=(5, 3, 8, 8)).astype(np.float32)
    images = models.convolutions()
    channel = Request("conv.0", "absmax", axis=1)
    value = images.site("conv.0").value
    direct = executor_for(images).open(images, [value])({"pixel_values": pixels})[value.name]
    found = collect(images, [channel], {"pixel_values": pixels}, batch_size=2, cache=False)
    np.testing.assert_allclose(found.array(channel), np.abs(direct).max((0, 2, 3)), rtol=1e-6)
    assert found.array(channel).shape == (5,)


def test_shards_merge_into_the_whole_and_survive_the_disk(tmp_path: Path) -> None:
    from actgraph.calibrate.files import load, save

    graph = models.stories()
    rows = [models.padded([row]) for row in ROWS]
    whole = collect(graph, REQUESTS, rows, batch_size=1, cache=False)
    shards = [
        collect(graph, REQUESTS, rows, batch_size=1, start=a, stop=b, cache=False) for a, b in ((0, 2), (2, 3), (3, None))
    ]
    kept = [load(save(shard, tmp_path / f"{i}.safetensors")) for i, shard in enumerate(shards)]
    merged = kept[0].merge(kept[1]).merge(kept[2])
    assert (merged.documents, merged.tokens) == (whole.documents, whole.tokens)
    for request, array in as_arrays(whole).items():
        np.testing.assert_allclose(as_arrays(merged)[request], array, rtol=1e-9, atol=1e-12)


class Counting:
    """Counts the forwards that an executor makes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forwards = 0
        import actgraph.calibrate.engine as engine

        original = engine.executor_for

        def counting(graph: Graph) -> Any:
            outer = self

            class Executor:
                def open(self, graph: Graph, values: Sequence[Any] = ()) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
                    run = original(graph).open(graph, values)

                    def counted(inputs: Mapping[str, Array]) -> dict[str, Array]:
                        outer.forwards += 1
                        return run(inputs)

                    return counted

            return Executor()

        monkeypatch.setattr(engine, "executor_for", counting)


def test_the_cache_saves_the_forward_and_knows_what_it_depends_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    counting = Counting(monkeypatch)
    graph = models.stories()
    first = collect(graph, REQUESTS, models.padded(ROWS), cache=tmp_path)
    assert counting.forwards == 1
    again = collect(graph.clone(), REQUESTS[::-1], models.padded(ROWS), cache=tmp_path)
    assert counting.forwards == 1
    assert (again.documents, again.tokens) == (first.documents, first.tokens)
    assert list(again) == REQUESTS[::-1]
    for request, array in as_arrays(first).items():
        np.testing.assert_array_equal(as_arrays(again)[request], array)
    collect(graph, [*REQUESTS, Request(HIDDEN, "zeros")], models.padded(ROWS), cache=tmp_path)
    assert counting.forwards == 2  # one new statistic, one forward
    collect(graph, REQUESTS, models.padded(ROWS[:3]), cache=tmp_path)
    assert counting.forwards == 3
    collect(graph, REQUESTS, models.padded(ROWS), cache=tmp_path, stop=2)
    assert counting.forwards == 4
    with graph.edit("test") as editor:
        editor.insert_at(graph.site("blocks.1.resid_post"), "actgraph.gate", [None], {"threshold": 0.5})
    collect(graph, REQUESTS, models.padded(ROWS), cache=tmp_path)
    assert counting.forwards == 5


def test_damaged_and_unwritable_caches_do_not_stop_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    counting = Counting(monkeypatch)
    graph = models.stories()
    request = Request(HIDDEN, "absmax")
    first = collect(graph, [request], models.padded(ROWS), cache=tmp_path)
    (entry,) = tmp_path.rglob("*.safetensors")
    entry.write_bytes(entry.read_bytes()[:-7])
    assert collect(graph, [request], models.padded(ROWS), cache=tmp_path).array(request) == first.array(request)
    assert counting.forwards == 2
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert collect(graph, [request], models.padded(ROWS), cache=blocked).array(request) == first.array(request)


def test_nan_is_an_error_that_names_the_site() -> None:
    graph = models.mlp()
    x = np.zeros((3, 4), np.float32)
    x[1, 2] = np.nan
    with pytest.raises(InputError, match=r"activations at linear\.0 are NaN \(6 of 18"):
        collect(graph, [Request("linear.0", "mean")], {"x": x}, cache=False)


def test_bad_requests_and_corpora_are_errors() -> None:
    graph = models.mlp()
    x = {"x": np.ones((2, 4), np.float32)}
    request = Request("linear.0", "mean")
    with pytest.raises(SiteError, match="linear"):
        collect(graph, [Request("linear.9", "mean")], x, cache=False)
    with pytest.raises(InputError, match="no sequence axis"):
        collect(graph, [Request("linear.0", "mean", positions=True)], x, cache=False)
    with pytest.raises(InputError, match="no axis 5"):
        collect(graph, [Request("linear.0", "mean", axis=5)], x, cache=False)
    with pytest.raises(InputError, match="no input of the graph"):
        collect(graph, [request], {"y": x["x"]}, cache=False)
    with pytest.raises(InputError, match=r"as \[5\] for one sample"):
        collect(graph, [request], {"x": np.ones((2, 5), np.float32)}, cache=False)
    with pytest.raises(InputError, match="and no text"):
        collect(graph, [request], ["text"], cache=False)
    with pytest.raises(InputError, match="is left"):
        collect(graph, [request], x, start=2, cache=False)
    with pytest.raises(InputError, match="batch_size is 0"):
        collect(graph, [request], x, batch_size=0, cache=False)


def test_a_value_that_is_equal_for_all_rows_is_refused() -> None:
    graph = models.stories()
    constant = next(
        node.output for node in graph.nodes() if node.output.shape == ("seq", "seq") or node.output.shape == ("seq",)
    )
    with pytest.raises(InputError, match="same for every row"):
        collect(graph, [Request(f"%{constant.name}", "mean")], models.padded(ROWS), cache=False)


def test_limits_cut_and_stop() -> None:
    graph = models.stories()
    count = Request("embed", "count", axis=-1)
    assert collect(graph, [count], None, max_length=10, stop=4, cache=False).array(count).tolist() == [40] * 64
    found = collect(graph, [count], None, max_length=10, max_tokens=35, cache=False)
    assert (found.documents, found.tokens) == (3, 30)


def test_the_progress_bar_is_for_terminals(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    graph = models.mlp()
    x = {"x": np.ones((2, 4), np.float32)}
    collect(graph, [Request("linear.0", "mean")], x, cache=False)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    collect(graph, [Request("linear.0", "mean")], x, cache=False)
    assert "calibrating" in capsys.readouterr().err
