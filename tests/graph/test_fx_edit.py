"""The FX dialect: every primitive edit, types after edits, rollback and clones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actgraph.errors import InputError, PassError
from actgraph.graph.fx import FxGraph
from actgraph.graph.graph import Role, Value
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import TensorType
from tests import zoo
from tests.graph.fx_models import node, run

F32 = np.float32


def test_insert_registry_op_with_types_and_provenance(small: FxGraph) -> None:
    before = run(small)
    with small.edit("steer", "steer{a=1}") as editor:
        value = node(small, "aten.linear").output
        shift = editor.insert("actgraph.shift", [value, np.ones(6, F32)])
        editor.redirect(value, shift.output)
    assert str(shift.output.type) == "f32[batch, seq, 6]"
    assert shift.origin.created_by == "steer" and shift.origin.options == "steer{a=1}" and shift.origin.scope == "mix"
    small.verify()
    assert np.abs(run(small) - before).max() > 0.1


@pytest.mark.parametrize(
    "op",
    [
        "add", "sub", "mul", "div", "where", "matmul", "clip", "cast", "transpose", "identity", "reshape", "relu", "sigmoid",
        "concat", "cos", "sin",
    ],
)  # fmt: skip
def test_insert_vocabulary(small: FxGraph, op: str) -> None:
    x = node(small, "aten.linear").output
    ids = np.random.default_rng(0).integers(0, 11, (3, 5))
    value = torch.from_numpy(np.asarray(small_value(small, x, ids)))
    two = np.full(6, 2, F32)
    cases: dict[str, tuple[list[Any], dict[str, Any], torch.Tensor]] = {
        "add": ([x, two], {}, value + 2),
        "sub": ([x, two], {}, value - 2),
        "mul": ([x, two], {}, value * 2),
        "div": ([x, two], {}, value / 2),
        "where": ([np.array(False), x, two], {}, torch.full_like(value, 2)),
        "matmul": ([x, np.ones((6, 3), F32)], {}, value.sum(-1, keepdim=True).expand(3, 5, 3)),
        "clip": ([x, np.asarray(-0.1, F32), None], {}, value.clamp(min=-0.1)),
        "cast": ([x], {"to": "f64"}, value.double()),
        "transpose": ([x], {"perm": (2, 0, 1)}, value.permute(2, 0, 1)),
        "identity": ([x], {}, value),
        "cos": ([x], {}, value.cos()),
        "sin": ([x], {}, value.sin()),
        "reshape": ([x], {"shape": ("batch*seq", 2, 3)}, value.reshape(15, 2, 3)),
        "relu": ([x], {}, value.relu()),
        "sigmoid": ([x], {}, value.sigmoid()),
        "concat": ([x, x], {"axis": -1}, torch.cat([value, value], -1)),
    }
    operands, attributes, expected = cases[op]
    with small.edit("test") as editor:
        made = editor.insert(op, operands, attributes)
        editor.add_output(made.output, "made", role=Role.TAP)
    small.verify()
    found = small.run({"ids": ids})["made"]
    torch.testing.assert_close(torch.from_numpy(found), expected)


def small_value(graph: FxGraph, value: Value, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    from actgraph.graph.executor import executor_for

    return executor_for(graph).open(graph, [value])({"ids": ids})[value.name]


def test_an_insert_that_fails_leaves_nothing_behind(small: FxGraph) -> None:
    text = small.text()
    with pytest.raises(InputError), small.edit("test") as editor:
        editor.insert("matmul", [node(small, "aten.linear").output, np.ones((5, 5), F32)])
    assert small.text() == text
    small.verify()


def test_an_op_that_would_fix_a_dynamic_size_is_refused(small: FxGraph) -> None:
    """The example length must not leak: adding a vector of just that length along ``seq`` is an error, not a guess."""
    value = node(small, "aten.linear").output
    hint = value.key.meta["val"].shape[1].node.hint
    with pytest.raises(InputError, match="only work for"), small.edit("test") as editor:
        editor.insert("add", [value, np.ones((hint, 6), F32)])
    assert str(node(small, "aten.linear").output.type) == "f32[batch, seq, 6]"
    small.verify()


def test_an_absent_operand_can_be_filled_and_emptied(small: FxGraph) -> None:
    before = run(small)
    linear = node(small, "aten.linear")
    with small.edit("test") as editor:
        editor.set_operand(linear, 2, np.full(6, 0.5, F32))
    assert linear.operands[2] is not None
    assert np.abs(run(small) - before).max() > 1e-2
    with small.edit("test") as editor:
        editor.set_operand(linear, 2, None)
    np.testing.assert_array_equal(run(small), before)
    small.verify()


def test_redirecting_one_edge_leaves_the_others(small: FxGraph) -> None:
    mul = node(small, "aten.mul").output
    with small.edit("test") as editor:
        zero = editor.insert("mul", [mul, np.zeros(1, F32)])
        edge = next(use for use in mul.uses if use.node is not None and use.node.op == "aten.linear")
        editor.redirect(mul, zero.output, [edge])
    others = [use.node.op for use in mul.uses if use.node is not None]
    assert "aten.linear" not in others and len(others) >= 2
    small.verify()


def test_editing_one_use_of_a_tied_weight_unties_it_and_says_so(small: FxGraph) -> None:
    embed = small.value("embed.weight")
    head = next(use for use in embed.uses if use.node is not None and use.node.op == "aten.linear")
    before = run(small)
    with small.edit("test") as editor:
        copy = editor.set_parameter(embed, small.read(embed) * 2, uses=[head])
        assert any("untied embed.weight" in message for message in editor.messages)
    assert copy != embed and len(small.parameters()) == 4
    assert np.abs(run(small) - before).max() > 1e-2
    small.verify()


def test_setting_a_parameter_changes_all_its_names(small: FxGraph) -> None:
    embed = small.value("embed.weight")
    data = np.random.default_rng(3).standard_normal((11, 6)).astype(F32)
    with small.edit("test") as editor:
        editor.set_parameter(embed, data)
    state = small.to_torch().state_dict()
    np.testing.assert_array_equal(state["embed.weight"].numpy(), data)
    np.testing.assert_array_equal(state["head.weight"].numpy(), data)


def test_types_follow_a_parameter_that_changes_its_shape() -> None:
    graph = zoo.captured("mlp")
    up, down = (n for n in graph.nodes() if n.origin.scope in ("hidden.0.0", "hidden.0.2"))
    with graph.edit("prune") as editor:
        for linear, cut in ((up, (slice(0, 30), slice(None))), (down, (slice(None), slice(0, 30)))):
            weight, bias = linear.operands[1], linear.operands[2]
            assert weight is not None and bias is not None
            editor.set_parameter(weight, graph.read(weight)[cut])
            if linear == up:
                editor.set_parameter(bias, graph.read(bias)[:30])
        editor.retype([up, down])
    assert str(up.output.type) == "f32[batch, 30]" and str(down.output.type) == "f32[batch, 32]"
    gelu = next(n for n in graph.nodes() if n.origin.scope == "hidden.0.1")
    assert str(gelu.output.type) == "f32[batch, 30]"
    graph.verify()
    assert graph.run(zoo.inputs("mlp"))["output"].shape == (2, 7)


def test_dead_code_goes_and_live_code_stays(small: FxGraph) -> None:
    before = run(small)
    with small.edit("test") as editor:
        dead = editor.insert("mul", [node(small, "aten.linear").output, np.ones(6, F32)])
        editor.insert("add", [dead.output, dead.output])
        assert editor.erase_dead() == 3  # two nodes and the constant
        assert editor.erase_dead() == 0
    assert node(small, "aten.topk").outputs[1].uses == ()  # the unused half of a live call stays
    np.testing.assert_array_equal(run(small), before)
    small.verify()


def test_an_optional_input_has_a_default(small: FxGraph) -> None:
    before = run(small)
    with small.edit("test") as editor:
        strength = editor.add_input("strength", TensorType(DType.F32, (1,)), role=Role.CONTEXT, default=np.ones(1, F32))
        value = node(small, "aten.linear").output
        scaled = editor.insert("mul", [value, strength])
        editor.redirect(value, scaled.output)
    small.verify()
    np.testing.assert_array_equal(run(small), before)
    ids = np.random.default_rng(0).integers(0, 11, (3, 5))
    given = small.run({"ids": ids, "strength": np.full(1, 3, F32)})["output"]
    assert np.abs(given - before).max() > 1e-2
    module = small.to_torch()
    torch.testing.assert_close(module(torch.from_numpy(ids)), torch.from_numpy(before))
    torch.testing.assert_close(module(torch.from_numpy(ids), strength=torch.full((1,), 3.0)), torch.from_numpy(given))
    assert "strength" not in module.state_dict() and "default_strength" not in module.state_dict()


def test_an_input_may_bring_a_new_dimension(small: FxGraph) -> None:
    with small.edit("test") as editor:
        extra = editor.add_input("extra", TensorType(DType.F32, ("batch", "extras")))
        editor.add_output(editor.insert("mul", [extra, np.ones(1, F32)]).output, "doubled")
    assert str(dict(small.outputs())["doubled"].type) == "f32[batch, extras]"
    out = small.run({"ids": np.zeros((2, 3), np.int64), "extra": np.ones((2, 9), F32)})
    assert out["doubled"].shape == (2, 9)
    small.verify()


def test_a_name_that_is_no_identifier_stays_the_public_one(small: FxGraph) -> None:
    with small.edit("test") as editor:
        state = editor.add_input("state_in.cache", TensorType(DType.F32, (1,)), role=Role.SLOT, default=np.zeros(1, F32))
        editor.add_output(editor.insert("add", [state, np.ones(1, F32)]).output, "state_out.cache", role=Role.SLOT)
    assert small.input("state_in.cache") == state and small.role("state_in.cache") is Role.SLOT
    out = small.run({"ids": np.zeros((2, 3), np.int64)})
    np.testing.assert_array_equal(out["state_out.cache"], [1])
    assert [v.name for v in small.clone().inputs()] == ["ids", "state_in.cache"]


def test_outputs_are_added_and_removed(small: FxGraph) -> None:
    value = node(small, "aten.linear").output
    with small.edit("tap") as editor:
        editor.add_output(value, "inner", role=Role.TAP)
        editor.add_output(value, "again")
        with pytest.raises(PassError, match="exists already"):
            editor.add_output(value, "inner")
    assert [name for name, _ in small.outputs()] == ["output", "inner", "again"]
    assert [use.index for use in value.uses if use.node is None] == [1, 2]
    assert small.role("inner") is Role.TAP
    with small.edit("tap") as editor:
        editor.remove_output("inner")
    assert [name for name, _ in small.outputs()] == ["output", "again"]
    small.verify()


def test_copied_regions_compute_the_same(small: FxGraph) -> None:
    region = [n for n in small.nodes() if n.op in ("aten.mul", "aten.split", "aten.cat", "aten.topk")]
    with small.edit("copy") as editor:
        mapping = editor.copy_region(region, {})
        old = node(small, "aten.topk").outputs[0]
        editor.add_output(mapping[old], "copy")
        editor.add_output(old, "old")
    out = small.run({"ids": np.random.default_rng(0).integers(0, 11, (3, 5))})
    np.testing.assert_array_equal(out["copy"], out["old"])
    assert mapping[old].producer is not None and mapping[old].producer.origin.created_by == "copy"
    small.verify()


# --- rollback and clones ----------------------------------------------------------------------------------------------


def test_a_failed_edit_is_rolled_back(small: FxGraph) -> None:
    text, digest, sites = small.text(), small.content_hash(), [str(s) for s in small.sites()]

    def spoil() -> None:
        with small.edit("bad") as editor:
            value = node(small, "aten.linear").output
            editor.redirect(value, editor.insert("actgraph.shift", [value, np.ones(6, F32)]).output)
            editor.set_parameter(small.value("embed.weight"), np.zeros((11, 6), F32))
            editor.add_input("more", TensorType(DType.F32, (1,)))
            editor.remove_output("output")
            editor.add_output(value, "else")
            raise ValueError("stop")

    before = run(small)
    with pytest.raises(ValueError, match="stop"):
        spoil()
    assert (small.text(), small.content_hash()) == (text, digest)
    assert [str(s) for s in small.sites()] == sites
    np.testing.assert_array_equal(run(small), before)
    small.verify()


def test_a_clone_is_independent_and_shares_tensors(small: FxGraph) -> None:
    twin = small.clone()
    assert twin.text() == small.text() and twin.content_hash() == small.content_hash()
    assert np.shares_memory(small.read(small.value("mix.weight")), twin.read(twin.value("mix.weight")))
    before = run(small)
    with twin.edit("test") as editor:
        editor.set_parameter(twin.value("mix.weight"), np.zeros((6, 6), F32))
        editor.add_output(node(twin, "aten.linear").output, "inner")
    np.testing.assert_array_equal(run(small), before)
    assert len(small.outputs()) == 1 and np.abs(run(twin) - before).max() > 1e-2


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_edits_keep_every_invariant(data: st.DataObject) -> None:
    """Identity-like edits anywhere: the graph stays valid, its function the same, and rollback restores it exactly."""
    graph = zoo.captured("mlp")
    text, expected = graph.text(), graph.run(zoo.inputs("mlp"))["output"]
    with graph.edit("random") as editor:
        for _ in range(data.draw(st.integers(1, 6))):
            kind = data.draw(st.sampled_from(["add", "mul", "identity", "copy", "parameter", "dead"]))
            nodes = [n for n in graph.nodes() if n.output.dtype is DType.F32]
            chosen = data.draw(st.sampled_from(nodes))
            value = chosen.output
            if kind in ("add", "mul", "identity"):
                operands = [value] if kind == "identity" else [value, np.asarray([0.0 if kind == "add" else 1.0], F32)]
                made = editor.insert(kind, operands).output
                uses = [u for u in value.uses if u.node != made.producer]
                picked = [u for u in uses if data.draw(st.booleans())]
                editor.redirect(value, made, picked)
            elif kind == "copy":
                copied = editor.copy_region([chosen], {})
                editor.redirect(value, copied[value], list(value.uses)[:1])
            elif kind == "parameter" and chosen.op == "aten.linear" and chosen.operands[1] is not None:
                weight = chosen.operands[1]
                editor.set_parameter(weight, graph.read(weight).copy())
            else:
                editor.erase_dead()
        graph.verify()
        np.testing.assert_allclose(graph.run(zoo.inputs("mlp"))["output"], expected, rtol=1e-5, atol=1e-6)
        editor.rollback()
        assert graph.text() == text
