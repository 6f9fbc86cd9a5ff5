"""The FX dialect: reading, editing, types, rollback, state, and graphs that were not captured by us."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._functorch.aot_autograd import aot_export_joint_simple, aot_export_module

from actgraph.errors import InputError, PassError
from actgraph.formats.trace import trace
from actgraph.graph import fx_args
from actgraph.graph.fx import FxGraph
from actgraph.graph.graph import Kind, Node, Role, Use, Value
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import TensorType
from tests import zoo

F32 = np.float32


class Small(nn.Module):
    """Tied weights, an absent bias, several results of one op, and sizes that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor([2.0]), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.mix(self.embed(ids)) * self.scale
        left, right = x.chunk(2, dim=-1)
        values, _ = torch.cat([right, left], -1).topk(4, dim=-1)
        flat = values.reshape(ids.shape[0] * ids.shape[1], 4)
        return self.head(x) + flat.sum(-1).reshape(ids.shape)[..., None]


@pytest.fixture
def small() -> FxGraph:
    torch.manual_seed(0)
    return trace(Small(), (torch.ones(2, 3, dtype=torch.int64),), dynamic={"ids": ("batch", "seq")}, name="small")


def node(graph: FxGraph, op: str) -> Node:
    return next(n for n in graph.nodes() if n.op == op)


def run(graph: FxGraph, seed: int = 0) -> Any:
    ids = np.random.default_rng(seed).integers(0, 11, (3, 5))
    return graph.run({"ids": ids})["output"]


# --- reading ----------------------------------------------------------------------------------------------------------


def test_tied_parameters_are_one_value_under_all_their_names(small: FxGraph) -> None:
    names = [p.name for p in small.parameters()]
    assert names == ["embed.weight", "mix.weight", "scale"]
    embed = small.parameters()[0]
    assert small.aliases(embed) == ("embed.weight", "head.weight")
    assert small.value("head.weight") == embed
    assert [(use.node.op, use.index) for use in embed.uses if use.node] == [("aten.embedding", 0), ("aten.linear", 1)]


def test_operands_follow_the_schema(small: FxGraph) -> None:
    linear = node(small, "aten.linear")
    assert [v.name if v else None for v in linear.operands] == ["embedding", "mix.weight", None]
    assert linear.attributes == {}
    top = node(small, "aten.topk")
    assert len(top.operands) == 1 and top.attributes == {"k": 4}
    assert [str(v.type) for v in top.outputs] == ["f32[batch, seq, 4]", "i64[batch, seq, 4]"]
    cat = node(small, "aten.cat")
    assert len(cat.operands) == 2 and cat.attributes == {"dim": -1}


def test_sizes_are_operands_after_the_tensors(small: FxGraph) -> None:
    reshape = node(small, "aten.reshape")
    assert [str(v.type) for v in reshape.operands if v] == ["f32[batch, seq, 4]", "i64[]"]
    size = reshape.operands[1]
    assert size is not None and reshape.attributes == {"shape": [f"%{size.name}", 4]}
    assert size.producer is not None and size.producer.op == "sym.mul"
    assert str(reshape.output.type) == "f32[batch*seq, 4]"


def test_a_number_in_place_of_a_tensor_is_an_attribute() -> None:
    class Plus(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 0.5

    add = node(trace(Plus(), (torch.ones(2),)), "aten.add")
    assert [v.name if v else None for v in add.operands] == ["x", None] and add.attributes == {"other": 0.5}


def test_every_result_of_a_call_is_listed_even_when_unused(small: FxGraph) -> None:
    assert len(node(small, "aten.topk").outputs) == 2
    assert not any(n.key.target is operator.getitem for n in small.nodes())
    values, indices = node(small, "aten.topk").outputs
    assert values.uses and not indices.uses and indices.producer == node(small, "aten.topk")


def test_uses_are_in_topological_order_with_outputs_last() -> None:
    graph = zoo.captured("llama")
    for value in [n.output for n in graph.nodes()]:
        uses = value.uses
        for use in uses:
            where = graph.outputs()[use.index][1] if use.node is None else use.node.operands[use.index]
            assert where == value
        keys = [use.node.key for use in uses if use.node is not None]
        assert all(not later < earlier for earlier, later in itertools.pairwise(keys))
    logits = graph.outputs()[0][1]
    assert logits.uses[-1] == Use(None, 0)


def test_handles_are_equal_when_they_mean_the_same(small: FxGraph) -> None:
    assert node(small, "aten.linear") == node(small, "aten.linear")
    assert len({node(small, "aten.linear"), node(small, "aten.linear")}) == 1
    value = node(small, "aten.linear").output
    assert small.value(value.name) == value and value.kind is Kind.RESULT
    assert small.input("ids").kind is Kind.INPUT and small.parameters()[0].kind is Kind.PARAMETER
    with pytest.raises(KeyError):
        small.value("nonsense")


def test_parameters_are_read_without_a_copy(small: FxGraph) -> None:
    parameter = small.value("mix.weight")
    assert np.shares_memory(small.read(parameter), small.read(parameter))
    assert small.stored(parameter) == small.stored(parameter)


def test_bfloat16_parameters_are_ml_dtypes() -> None:
    graph = trace(nn.Linear(3, 2).bfloat16(), (torch.ones(4, 3, dtype=torch.bfloat16),))
    weight = graph.value("weight")
    assert weight.dtype is DType.BF16 and graph.read(weight).dtype == DType.BF16.numpy
    expected = graph.tensor(weight).float().detach().numpy()
    np.testing.assert_array_equal(graph.read(weight).astype(F32), expected)
    x = np.ones((4, 3), DType.BF16.numpy)
    assert graph.run({"input": x})["output"].dtype == DType.BF16.numpy


def test_module_scopes_and_origins() -> None:
    graph = zoo.captured("llama")
    scopes = {n.origin.scope for n in graph.nodes()}
    assert {"", "model.embed_tokens", "model.layers.1.mlp.act_fn", "lm_head"} <= scopes
    assert all(n.origin.sources and not n.origin.created_by for n in graph.nodes())


def test_a_parameter_named_like_an_input_has_its_own_name() -> None:
    class Clash(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.tensor([3.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.x

    graph = trace(Clash(), (torch.ones(1),))
    names = [graph.inputs()[0].name, graph.parameters()[0].name]
    assert names == ["x", "self.x"]
    assert graph.value("x").kind is Kind.INPUT and graph.value("self.x").kind is Kind.PARAMETER
    graph.verify()


# --- editing ----------------------------------------------------------------------------------------------------------


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
    "op", ["add", "sub", "mul", "div", "where", "matmul", "clip", "cast", "transpose", "identity", "reshape"]
)
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
        "reshape": ([x], {"shape": ("batch*seq", 2, 3)}, value.reshape(15, 2, 3)),
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


# --- as a module ------------------------------------------------------------------------------------------------------


def test_to_torch_keeps_names_and_trains() -> None:
    graph = zoo.captured("llama")
    module = graph.to_torch()
    expected = set(zoo.model("llama").state_dict())
    assert set(module.state_dict()) == expected
    arrays = zoo.inputs("llama")
    out = module(**{key: torch.from_numpy(value) for key, value in arrays.items()})
    np.testing.assert_allclose(out["logits"].detach().numpy(), graph.run(arrays)["logits"], atol=1e-5)
    out["logits"].sum().backward()
    grads = [p.grad for p in module.parameters()]
    assert all(grad is not None for grad in grads)
    for parameter in module.parameters():
        parameter.grad = None


def test_a_module_is_not_changed_by_later_edits(small: FxGraph) -> None:
    module = small.to_torch()
    ids = torch.zeros(2, 3, dtype=torch.int64)
    before = module(ids)
    with small.edit("test") as editor:
        editor.set_parameter(small.value("mix.weight"), np.zeros((6, 6), F32))
    torch.testing.assert_close(module(ids), before)


# --- the engine -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "'ids' of small is missing"),
        ({"ids": np.zeros((2, 3), np.int64), "other": np.zeros(1)}, "no input 'other'"),
        ({"ids": np.zeros((2, 3), np.float32)}, "is float32, the graph takes i64"),
        ({"ids": np.zeros((2, 3, 4), np.int64)}, r"shape \[2, 3, 4\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(small: FxGraph, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        small.run(inputs)


def test_the_limit_of_a_dimension_is_kept() -> None:
    graph = zoo.captured("llama")
    with pytest.raises(InputError, match="the limit is 64"):
        graph.run(zoo.inputs("llama", batch=1, length=65))
    assert graph.run(zoo.inputs("llama", batch=1, length=64))["logits"].shape == (1, 64, zoo.VOCAB)


def test_extra_values_come_with_the_outputs(small: FxGraph) -> None:
    from actgraph.graph.executor import executor_for

    values = [small.input("ids"), small.value("mix.weight"), *node(small, "aten.topk").outputs]
    out = executor_for(small).open(small, values)({"ids": np.zeros((2, 3), np.int64)})
    assert list(out) == ["output", *(v.name for v in values)]
    np.testing.assert_array_equal(out["mix.weight"], small.read(small.value("mix.weight")))
    np.testing.assert_array_equal(out["output"], small.run({"ids": np.zeros((2, 3), np.int64)})["output"])


# --- graphs of other origin -------------------------------------------------------------------------------------------


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("mask", torch.tensor([1.0, 0.5, 2.0]))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.b(torch.relu(self.a(x))) * self.mask
        return ((out - y) ** 2).mean(), out.detach()


def test_a_joint_graph_is_read_printed_verified_and_edited() -> None:
    torch.manual_seed(0)
    module, x, y = Loss(), torch.randn(5, 4), torch.randn(5, 3)
    gm, signature = aot_export_module(module, (x, y), trace_joint=True, output_loss_index=0)
    graph = FxGraph.from_joint(gm, signature)
    roles = {value.name: graph.role(value.name) for value in graph.inputs()}
    assert [roles[name] for name in ("a.weight", "a.bias", "b.weight", "b.bias")] == [Role.PARAMETER] * 4
    assert roles["mask"] is Role.BUFFER and list(roles.values())[-2:] == [Role.USER, Role.USER]
    names = [name for name, _ in graph.outputs()]
    assert names == ["loss", "output_1", "grad.a.weight", "grad.a.bias", "grad.b.weight", "grad.b.bias"]
    assert all(graph.role(name) is Role.GRADIENT for name in names[2:])
    assert not graph.parameters()
    text = graph.text()
    assert "a.weight: f32[8, 4] <parameter>" in text and "grad.b.bias: f32[3] <gradient>" in text and "aten.addmm" in text
    graph.verify()

    inputs = {**{k: v.detach().numpy() for k, v in module.state_dict().items()}}
    users = [value.name for value in graph.inputs() if graph.role(value.name) is Role.USER]
    inputs |= dict(zip(users, (x.numpy(), y.numpy()), strict=True))
    found = graph.run(inputs)
    loss, _ = module(x, y)
    loss.backward()
    np.testing.assert_allclose(found["loss"], loss.detach().numpy(), rtol=1e-6)
    np.testing.assert_allclose(found["grad.a.weight"], module.a.weight.grad.numpy(), rtol=1e-5, atol=1e-7)

    with graph.edit("test") as editor:  # double what the loss sees of the hidden layer, in forward only
        relu = node(graph, "aten.relu").output
        forward = [use for use in relu.uses if use.node is not None and use.node.op == "aten.addmm"]
        shift = editor.insert("actgraph.shift", [relu, np.full(8, 0.25, F32)])
        editor.redirect(relu, shift.output, forward)
    graph.verify()
    assert "by test" in graph.text()
    with torch.no_grad():
        moved = module.b(torch.relu(module.a(x)) + 0.25) * module.mask
    np.testing.assert_allclose(graph.run(inputs)["loss"], ((moved - y) ** 2).mean().numpy(), rtol=1e-5)


def test_a_joint_graph_without_a_signature() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        return [torch.tanh(x @ w)]

    gm = aot_export_joint_simple(function, (torch.randn(5, 4), torch.randn(4, 3, requires_grad=True)), trace_joint=True)
    graph = FxGraph.from_joint(gm)
    assert [graph.role(value.name) for value in graph.inputs()] == [Role.USER, Role.USER, Role.TANGENT]
    assert [name for name, _ in graph.outputs()] == ["output", "grad.primals_2"]
    graph.verify()
    x, w, t = (np.random.default_rng(i).standard_normal(s).astype(F32) for i, s in enumerate([(5, 4), (4, 3), (5, 3)]))
    out = graph.run({"primals_1": x, "primals_2": w, "tangents_1": t})
    np.testing.assert_allclose(out["grad.primals_2"], x.T @ (t * (1 - np.tanh(x @ w) ** 2)), rtol=1e-4, atol=1e-5)


def test_saved_activations_have_a_role() -> None:
    from torch._functorch.partitioners import default_partition

    def function(x: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        return [torch.tanh(x @ w)]

    joint = aot_export_joint_simple(function, (torch.randn(5, 4), torch.randn(4, 3, requires_grad=True)), trace_joint=True)
    forward, _ = default_partition(joint, (), num_fwd_outputs=1)
    saved = len(forward.graph.output_node().args[0]) - 1
    names = ["output", *(f"saved_{i}" for i in range(saved))]
    graph = FxGraph.from_graph_module(forward, output_names=names, output_roles=dict.fromkeys(names[1:], Role.SAVED))
    assert saved and graph.role("saved_0") is Role.SAVED and "<saved>" in graph.text()
    graph.verify()


def test_the_verifier_sees_broken_graphs(small: FxGraph) -> None:
    def problems(spoil: Any) -> str:
        twin = small.clone()
        spoil(twin)
        return "\n".join(twin.structural_problems())

    def in_place(graph: FxGraph) -> None:
        node(graph, "aten.mul").key.target = torch.ops.aten.mul_.Tensor

    def untyped(graph: FxGraph) -> None:
        del node(graph, "aten.mul").key.meta["val"]

    def homeless(graph: FxGraph) -> None:
        node(graph, "aten.mul").key.meta["custom"] = {}

    def dataless(graph: FxGraph) -> None:
        del graph.root.mix._parameters["weight"]

    def mistyped(graph: FxGraph) -> None:
        graph.root.mix.weight = nn.Parameter(torch.zeros(2, 2))

    def unordered(graph: FxGraph) -> None:
        first, last = node(graph, "aten.embedding").key, graph.nodes()[-1].key
        last.append(first)

    assert problems(lambda graph: None) == ""
    assert "functional" in problems(in_place)
    assert "no type" in problems(untyped)
    assert "no origin" in problems(homeless)
    assert "no stored data" in problems(dataless)
    assert "but typed" in problems(mistyped)
    assert "broken" in problems(unordered)


def test_arguments_are_rebuilt_as_they_were() -> None:
    """Binding and writing back the arguments of every call of the zoo changes no result."""
    for name in ("llama", "gpt2", "t5", "resnet"):
        graph = zoo.captured(name)
        expected = graph.run(zoo.inputs(name))
        for each in graph.graph.nodes:
            if each.op == "call_function":
                fx_args.rebuild(each, fx_args.bind(each))
        graph._index()
        for key, value in graph.run(zoo.inputs(name)).items():
            np.testing.assert_array_equal(value, expected[key])
