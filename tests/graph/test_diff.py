"""Structural diff: empty for equal graphs, precise for edits, useful across dialects."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from actgraph import formats
from actgraph.formats.onnx_export import to_onnx
from actgraph.graph.diff import diff
from actgraph.graph.graph import Graph, Role
from actgraph.graph.provenance import PassRecord
from tests import zoo


def both(name: str) -> list[Graph]:
    graph = zoo.captured(name)
    return [graph, to_onnx(graph)]


@pytest.mark.parametrize("name", ["llama", "resnet", "mixtral"])
def test_equal_graphs_have_no_difference(name: str) -> None:
    for graph in both(name):
        found = diff(graph, graph.clone())
        assert not found and found.changes == () and "no difference" in found.text()
        assert found.scope == "structure"


def test_a_file_read_back_has_no_difference(tmp_path: Path) -> None:
    graph = zoo.exported("gpt2")
    graph.save(tmp_path / "model.onnx")
    assert not diff(graph, formats.load(tmp_path / "model.onnx"))


@pytest.mark.parametrize("name", ["stories260k", "mlp"])
def test_files_of_one_model_in_both_dialects_have_no_difference(name: str, tmp_path: Path) -> None:
    graph = zoo.captured(name)
    fx, onnx = (formats.load(graph.save(tmp_path / f"model.{suffix}")) for suffix in ("pt2", "onnx"))
    assert diff(fx, onnx).scope == "signature, sites and views"
    assert not diff(fx, onnx), diff(fx, onnx).text()
    assert set(fx.site_table.all_names()) == set(onnx.site_table.all_names()), "module sites, too"


def test_a_file_without_modules_differs_by_what_it_computes_only() -> None:
    """The second names of sites by module path are no difference; a role or a structural site is one."""
    stock = formats.load(zoo.stock_onnx("mlp"))
    assert not any(node.origin.scope for node in stock.nodes())
    assert not diff(zoo.captured("mlp"), stock), diff(zoo.captured("mlp"), stock).text()
    stock.site_table.forget(stock.site("linear.1").value, "a test")
    gone = {change.name for change in diff(zoo.captured("mlp"), stock) if change.kind == "site"}
    assert "linear.1" in gone and not any(name.startswith(("hidden", "inp", "head")) for name in gone)


@pytest.mark.parametrize("dialect", [0, 1])
def test_an_inserted_op_is_one_addition_and_its_rewired_readers(dialect: int) -> None:
    old = both("llama")[dialect]
    new = old.clone()
    with new.edit("steer", "steer{}") as editor:
        editor.insert_at(new.site("blocks.0.resid_post"), "actgraph.shift", [np.ones(zoo.WIDTH, np.float32)], {"scale": 1.0})
    new.history.append(PassRecord("steer", "steer{}"))
    found = diff(old, new)
    added = [c for c in found if c.kind == "node" and c.action == "added"]
    assert len(added) == 1 and "actgraph.shift" in (added[0].new or "") and "by steer" in (added[0].new or "")
    changed = [c for c in found if c.kind == "node" and c.action == "changed"]
    assert changed and all("%shift.0" in (c.new or "") or "shift" in (c.new or "") for c in changed)
    assert found.counts() == {
        "node added": 1, "node changed": len(changed), "parameter added": 1, "pass added": 1,
    }  # fmt: skip
    back = diff(new, old)
    assert back.counts() == {"node removed": 1, "node changed": len(changed), "parameter removed": 1, "pass removed": 1}
    text = found.text()
    assert text.startswith("--- ") and "\n+ " in text and "summary: 1 node added" in text
    data = json.loads(json.dumps(found.to_dict()))
    assert data["counts"]["node added"] == 1 and data["changes"][0]["kind"] == "node"


@pytest.mark.parametrize("dialect", [0, 1])
def test_weights_outputs_and_attributes(dialect: int) -> None:
    old = both("mlp")[dialect]
    new = old.clone()
    weight = new.views.linears()[1].weight
    with new.edit("prune") as editor:
        editor.set_parameter(weight, new.read(weight) * 2)
        editor.add_output(new.site("linear.0").value, "tapped", role=Role.TAP)
    found = diff(old, new)
    assert found.counts() == {"output added": 1, "parameter changed": 1}
    (change,) = [c for c in found if c.kind == "parameter"]
    assert change.name == weight.name and change.old != change.new


def test_renumbered_nodes_are_matched_by_origin() -> None:
    """A node that only changed its name is not an edit."""
    left, right = to_onnx(zoo.captured("mlp")), to_onnx(zoo.captured("mlp"))
    for node in right.model.graph:
        node.name = f"renamed_{node.name}"
        for value in node.outputs:
            value.name = f"renamed_{value.name}"
    right._forget()
    assert [c for c in diff(left, right) if c.kind == "node"] == []
    assert [c.kind for c in diff(left, right)] == []


def test_removed_sites_are_listed() -> None:
    old = zoo.captured("mlp")
    new = old.clone()
    with new.edit("cut") as editor:
        second = new.site("linear.2").value
        editor.redirect(new.site("linear.3").value, second)
        editor.erase_dead()
    kinds = diff(old, new).counts()
    assert kinds["site removed"] > 0 and kinds["node removed"] > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "mixtral", "mamba", "t5", "resnet", "mlp"])
def test_across_dialects_signature_sites_and_views_are_compared(name: str) -> None:
    left, right = both(name)
    found = diff(left, right)
    assert found.scope == "signature, sites and views"
    assert not found, found.text()


def test_across_dialects_a_difference_is_found() -> None:
    left, right = both("llama")
    with right.edit("tap") as editor:
        editor.add_output(right.site("blocks.0.resid_post").value, "tapped", role=Role.TAP)
    assert [(c.kind, c.name, c.action) for c in diff(left, right) if c.kind != "dialect"] == [("output", "tapped", "added")]
    other = diff(zoo.captured("llama"), zoo.exported("gpt2"))
    assert any(c.kind == "view" for c in other) and any(c.kind == "site" for c in other)
