"""Capture: names of dimensions, inputs and outputs; what torch refuses; state; the module left as it was."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import actgraph as ag
from actgraph.errors import CaptureError, InputError
from actgraph.formats.trace import trace
from actgraph.graph.graph import Role
from tests import zoo


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def types(graph: Any) -> dict[str, str]:
    return {value.name: str(value.type) for value in graph.inputs()}


def test_dimension_names_are_the_users() -> None:
    graph = ag.trace(Linear(), (torch.randn(5, 7, 4),), dynamic={"x": ("rows", "columns", None)})
    assert types(graph) == {"x": "f32[rows, columns, 4]"}
    assert [str(v.type) for _, v in graph.outputs()] == ["f32[rows, columns, 3]"]


@pytest.mark.parametrize("size", [0, 1])
def test_sizes_zero_and_one_are_not_specialised(size: int) -> None:
    module = Linear()
    graph = trace(module, (torch.randn(size, 4),), dynamic={"x": ("batch", None)})
    for rows in (0, 1, 5):
        x = np.random.default_rng(0).standard_normal((rows, 4)).astype(np.float32)
        expected = module(torch.from_numpy(x)).detach().numpy()
        np.testing.assert_allclose(graph.run({"x": x})["output"], expected, rtol=1e-6)


def test_equal_example_sizes_of_two_names_stay_apart() -> None:
    class Outer(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a[:, None] * b[None, :]

    graph = trace(Outer(), (torch.randn(3), torch.randn(3)), dynamic={"a": ("m",), "b": ("n",)})
    assert [str(v.type) for _, v in graph.outputs()] == ["f32[m, n]"]
    out = graph.run({"a": np.ones(2, np.float32), "b": np.ones(5, np.float32)})["output"]
    assert out.shape == (2, 5)


def test_one_name_in_two_inputs_is_one_dimension() -> None:
    class Add(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a + b

    graph = trace(Add(), (torch.randn(3, 2), torch.randn(3, 2)), dynamic={"a": ("n", None), "b": ("n", None)})
    assert types(graph) == {"a": "f32[n, 2]", "b": "f32[n, 2]"}
    with pytest.raises(InputError, match="n = "):
        graph.run({"a": np.ones((3, 2), np.float32), "b": np.ones((4, 2), np.float32)})


def test_a_sum_of_dimensions_is_named() -> None:
    class Cat(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return torch.cat([a, b]).reshape(-1)

    graph = trace(Cat(), (torch.randn(3, 2), torch.randn(4, 2)), dynamic={"a": ("m", None), "b": ("n", None)})
    assert [str(v.type) for _, v in graph.outputs()] == ["f32[2*m + 2*n]"]


class Loop(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = x[:, 0]
        for step in range(x.shape[1]):  # the line that makes the length a constant
            total = torch.tanh(total + x[:, step])
        return total


def test_a_constant_dimension_is_kept_static_loudly() -> None:
    with pytest.warns(UserWarning, match=r"'seq' is kept static at 5.*test_trace\.py:\d+: for step in range"):
        graph = trace(Loop(), (torch.randn(2, 5),), dynamic={"x": ("batch", "seq")})
    assert types(graph) == {"x": "f32[batch, 5]"}
    assert len(graph.notes) == 1 and "\n" not in graph.notes[0] and "'seq'" in graph.notes[0]
    assert graph.run({"x": np.ones((3, 5), np.float32)})["output"].shape == (3,)
    with pytest.raises(InputError, match="shape"):
        graph.run({"x": np.ones((3, 6), np.float32)})


def test_strict_dims_refuses_a_constant_dimension() -> None:
    with pytest.raises(CaptureError, match=r"'seq'.*for step in range"):
        trace(Loop(), (torch.randn(2, 5),), dynamic={"x": ("batch", "seq")}, strict_dims=True)


def test_mamba_keeps_its_length_static_loudly() -> None:
    graph = zoo.captured("mamba")
    assert types(graph)["input_ids"] == "i64[batch, 8]"
    assert any("'seq'" in note and "modeling_mamba.py" in note for note in graph.notes)


def test_a_multiple_that_the_model_demands_is_noted() -> None:
    class Pairs(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(x.shape[0] // 2, 2, 3).sum(1)

    with pytest.warns(UserWarning, match="'n' must be"):
        graph = trace(Pairs(), (torch.randn(6, 3),), dynamic={"x": ("n", None)})
    assert len(graph.notes) == 1
    assert types(graph) == {"x": "f32[n, 3]"} and [str(v.type) for _, v in graph.outputs()] == ["f32[n/2, 3]"]
    assert graph.run({"x": np.ones((8, 3), np.float32)})["output"].shape == (4, 3)
    with graph.edit("test") as editor:
        shaped = editor.insert("reshape", [graph.outputs()[0][1]], {"shape": ("n/2", 1, 3)})
        editor.add_output(shaped.output, "shaped")
    graph.verify()
    assert graph.run({"x": np.ones((8, 3), np.float32)})["shaped"].shape == (4, 1, 3)


def test_a_guard_that_torch_cannot_express_makes_a_dimension_static_loudly() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            size = x.shape[0]
            return x + 1 if (2 * size - 1) % size != 0 else x

    with pytest.warns(UserWarning, match="'n' is kept static at 4: torch cannot express the guard"):
        graph = trace(Odd(), (torch.randn(4),), dynamic={"x": ("n",)})
    assert types(graph) == {"x": "f32[4]"}


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # depends on data
            return x + 1
        return x - 1


def test_a_failed_capture_names_the_line_of_user_code() -> None:
    with pytest.raises(CaptureError) as caught:
        trace(Branch(), (torch.randn(3),))
    assert "test_trace.py:" in caught.value.message and "if x.sum() > 0" in caught.value.message
    assert "\n" not in caught.value.message and caught.value.hint


def test_an_error_inside_forward_names_its_line() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ torch.ones(9, 9)

    with pytest.raises(CaptureError, match=r"test_trace\.py:\d+: return x @ torch\.ones"):
        trace(Broken(), (torch.randn(3, 4),))


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda x: x + 1, ["output"]),
        (lambda x: (x + 1, x + 2), ["output", "output_1"]),
        (lambda x: (x + 1, None, x + 2), ["output", "output_1"]),
        (lambda x: {"logits": x + 1, "hidden": x + 2}, ["logits", "hidden"]),
        (lambda x: {"logits": x + 1, "cache": [x + 2, x + 3]}, ["logits", "cache_0", "cache_1"]),
        (lambda x: Pair(x + 1, x + 2), ["left", "right"]),
        (lambda x: {"same": x, "logits": x + 1}, ["same", "logits"]),
    ],
)
def test_outputs_are_named_after_the_fields_of_the_result(make: Any, names: list[str]) -> None:
    class Made(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return make(x)

    graph = trace(Made(), (torch.zeros(2),))
    assert [name for name, _ in graph.outputs()] == names
    out = graph.run({"x": np.zeros(2, np.float32)})
    flat = [t for t in torch.utils._pytree.tree_leaves(make(torch.zeros(2))) if t is not None]
    for name, tensor in zip(names, flat, strict=True):
        np.testing.assert_array_equal(out[name], tensor.numpy())


class Two(nn.Module):
    def forward(self, first: torch.Tensor, second: torch.Tensor, scale: float = 1.0, extra: Any = None) -> torch.Tensor:
        out = first - scale * second
        return out if extra is None else out + extra["a"][0] * extra["a"][1]


def test_inputs_are_in_the_order_given() -> None:
    graph = trace(Two(), (), {"second": torch.ones(2), "first": torch.zeros(2)})
    assert [value.name for value in graph.inputs()] == ["second", "first"]
    arrays = {"first": np.zeros(2, np.float32), "second": np.ones(2, np.float32)}
    np.testing.assert_array_equal(graph.run(arrays)["output"], -np.ones(2, np.float32))
    assert torch.equal(graph.to_torch()(torch.ones(2), torch.zeros(2)), -torch.ones(2))


def test_constants_and_nested_arguments() -> None:
    extra = {"a": [torch.randn(2, 3), torch.randn(2, 3)]}
    graph = trace(
        Two(),
        (torch.randn(2, 3), torch.randn(2, 3)),
        {"scale": 2.0, "extra": extra},
        dynamic={"first": ("n", None), "second": ("n", None), "extra": {"a": [("n", None), ("n", None)]}},
    )
    assert types(graph) == dict.fromkeys(["first", "second", "extra_a_0", "extra_a_1"], "f32[n, 3]")
    arrays = {name: np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32) for name in types(graph)}
    expected = arrays["first"] - 2 * arrays["second"] + arrays["extra_a_0"] * arrays["extra_a_1"]
    np.testing.assert_allclose(graph.run(arrays)["output"], expected, rtol=1e-6)


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(x)
        return self.count * 2


def test_a_buffer_that_the_model_writes_becomes_a_slot() -> None:
    module = Counter()
    graph = trace(module, (torch.ones(3),))
    assert torch.equal(module.count, torch.zeros(3)), "capture changed the model"
    assert [value.name for value in graph.inputs()] == ["x", "state_in.count"]
    assert [name for name, _ in graph.outputs()] == ["output", "state_out.count"]
    assert graph.role("state_in.count") is Role.SLOT and graph.role("state_out.count") is Role.SLOT
    graph.verify()
    first = graph.run({"x": np.ones(3, np.float32)})
    np.testing.assert_array_equal(first["output"], 2 * np.ones(3))
    second = graph.run({"x": np.ones(3, np.float32), "state_in.count": first["state_out.count"]})
    np.testing.assert_array_equal(second["output"], 4 * np.ones(3))
    out = graph.to_torch()(torch.ones(3))
    assert torch.equal(out["output"], 2 * torch.ones(3))


def test_writing_into_an_argument_is_refused() -> None:
    class Writes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.add_(1)
            return x * 2

    with pytest.raises(CaptureError, match="writes into its argument 'x'"):
        trace(Writes(), (torch.ones(3),))


def test_in_place_code_becomes_functional() -> None:
    class InPlace(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.zeros_like(x)
            y[:, 0] = x[:, 1]
            y.relu_().mul_(2)
            return y

    graph = trace(InPlace(), (torch.randn(3, 2),), dynamic={"x": ("n", None)})
    graph.verify()
    x = np.array([[1.0, 2.0], [3.0, -4.0]], np.float32)
    np.testing.assert_array_equal(graph.run({"x": x})["output"], [[4, 0], [0, 0]])


def test_the_module_is_left_as_it_was() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)
            self.fc = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.drop(x))

    module = Noisy().train()
    module.fc.eval()
    graph = trace(module, (torch.ones(2, 3),))
    assert module.training and module.drop.training and not module.fc.training
    x = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(graph.run({"x": x})["output"], graph.run({"x": x})["output"])  # dropout is off
    before = [p.clone() for p in module.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_the_cache_setting_of_a_model_is_left_as_it_was() -> None:
    model = zoo.model("llama")
    assert model.config.use_cache is True
    zoo.captured("llama")
    assert model.config.use_cache is True


def test_capture_is_quiet_and_deterministic() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        texts = [trace(zoo.model("mlp"), (), zoo.call("mlp").inputs, dynamic={"x": ("batch", None)}).text() for _ in range(2)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({"y": ("batch", None)}, "'y', which is not given"),
        ({"x": ("batch",)}, "names 1 axes, the tensor has 2"),
        ({"x": "batch"}, "must be a tuple"),
        ({"x": {5: "batch"}}, "axis 5"),
        ({"x": ("not a name", None)}, "no dimension name"),
        ({"x": (3, None)}, "must hold names or None"),
        ({"x": ("n", "n")}, "is 2 in one argument and 4"),
    ],
)
def test_specs_that_do_not_fit_are_refused(dynamic: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        trace(Linear(), (torch.randn(2, 4),), dynamic=dynamic)


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"torch\.nn\.Module"):
        trace(lambda x: x, (torch.ones(1),))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="needs example inputs"):
        trace(Linear())
    with pytest.raises(InputError, match="2 arguments by position"):
        trace(Linear(), (torch.ones(1), torch.ones(1)))
    with pytest.raises(InputError, match="given twice"):
        trace(Linear(), (torch.ones(1),), {"x": torch.ones(1)})


def test_no_architecture_of_the_zoo_needs_its_class_name() -> None:
    """Every zoo model captures, verifies and computes what the eager model computes, at sizes it was not traced with."""
    for name in zoo.TINY:
        graph = zoo.captured(name)
        graph.verify()
        arrays = zoo.inputs(name, batch=3, length=11, seed=4)
        if "attention_mask" in arrays:
            arrays["attention_mask"][1, -3:] = 0
        expected = zoo.eager(name, arrays)
        found = graph.run(arrays)
        assert list(found) == list(expected), name
        for key, value in expected.items():
            assert np.abs(found[key] - value).max() <= 1e-5 * np.abs(value).max(), (name, key)
            assert value.std() > 0.05, f"{name}: a test on this model would have no power"


def test_a_tensor_given_for_two_arguments_is_two_inputs() -> None:
    """torch.export would read both arguments from one input, and the other one would be ignored ever after."""

    class Difference(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return 2 * x - y

    x = torch.randn(2, 3)
    graph = trace(Difference(), (x, x), dynamic={"x": ("batch", None), "y": ("batch", None)})
    assert [value.name for value in graph.inputs()] == ["x", "y"]
    a, b = np.ones((4, 3), np.float32), np.full((4, 3), 5, np.float32)
    np.testing.assert_array_equal(graph.run({"x": a, "y": b})["output"], 2 * a - b)


def test_dim_objects_bring_their_limits() -> None:
    batch, seq = torch.export.Dim("batch"), torch.export.Dim("seq", min=2, max=8)
    net, x = nn.Linear(4, 2), torch.zeros(3, 5, 4)
    graph = trace(net, (x,), dynamic={"input": (batch, seq, None)})
    named = trace(net, (x,), dynamic={"input": ("batch", "seq", None)}, limits={"seq": (2, 8)})
    assert graph.dim_ranges == named.dim_ranges and graph.dim_ranges["seq"] == (2, 8)
    with pytest.raises(InputError, match=r"seq.*8"):
        graph.run({"input": np.zeros((3, 9, 4), np.float32)})
    with pytest.raises(InputError, match="'seq' is 9 in the arguments, and must be at least 2 and at most 8"):
        trace(net, (torch.zeros(3, 9, 4),), dynamic={"input": (batch, seq, None)})
    with pytest.raises(InputError, match="'seq' is given different limits"):
        trace(net, (x,), dynamic={"input": (batch, seq, None)}, limits={"seq": (2, 9)})
