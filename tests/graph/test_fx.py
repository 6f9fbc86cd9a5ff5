"""The FX dialect: reading, modules, the engine, and what only its verifier sees."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from actgraph.errors import InputError
from actgraph.formats.trace import trace
from actgraph.graph import fx_args
from actgraph.graph.fx import FxGraph
from actgraph.graph.graph import Kind, Use
from actgraph.ops.dtypes import DType
from tests import zoo
from tests.graph.fx_models import node

F32 = np.float32


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


# --- the verifier -----------------------------------------------------------------------------------------------------


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
