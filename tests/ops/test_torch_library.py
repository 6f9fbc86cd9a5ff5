"""The registered torch ops: one node through export, ATen after decomposition, autograd, tracing, refusals."""

from __future__ import annotations

import functools
import io

import pytest
import torch
from torch.export import Dim, ExportedProgram, export

from actgraph.errors import VerifyError
from actgraph.ops import DType, all_ops, get_op
from actgraph.ops.torch_library import decomposition_table, op_of, register_all, result_fakes, torch_op, torch_schema
from tests.conformance.harness import Case, to_torch


class Call(torch.nn.Module):
    """One op between two ATen ops, its side operands as buffers."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        first, *rest = (to_torch(a) for a in case.operands())
        self.first = first
        self.count = len(rest)
        for index, tensor in enumerate(rest):
            if tensor is None:  # export counts buffers that are None among its inputs
                setattr(self, f"side_{index}", None)
            else:
                self.register_buffer(f"side_{index}", tensor)

    def shares_rows(self) -> bool:
        """Whether another operand fixes the size of the leading axis."""
        side = [getattr(self, f"side_{i}") for i in range(self.count)]
        return any(t is not None and t.dim() and t.shape[0] == self.first.shape[0] for t in side)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side = [getattr(self, f"side_{i}") for i in range(self.count)]
        y = torch_op(self.case.op.name)(x.clone(), *side, **self.case.attributes)
        return y.reshape(y.shape) + 0 if y.is_floating_point() else y.clone()


def first_case(op) -> Case:  # type: ignore[no-untyped-def]
    return Case(op, 0, op.samples[0].dtypes[0] if op.samples[0].dtypes else DType.F32)


@functools.cache
def exported(name: str) -> tuple[Call, ExportedProgram]:
    """A call of the op, and what export makes of it, with a dynamic leading axis where the op allows one."""
    call = Call(first_case(get_op(name)))
    shapes = None if call.shares_rows() else {"x": {0: Dim("batch")}}
    return call, export(call, (call.first,), dynamic_shapes=shapes)


def test_most_ops_are_tried_with_a_dynamic_axis() -> None:
    static = {op.name for op in all_ops() if Call(first_case(op)).shares_rows()}
    assert static <= {
        "attention", "attention_mix", "attention_pattern", "cache_append", "cache_write", "dequantize", "quantize",
        "reweight_experts", "rotary", "select_rows", "take_along", "threshold_gate",
    }  # fmt: skip


@pytest.mark.parametrize("op", all_ops(), ids=lambda op: op.name)
def test_one_node_through_export(op) -> None:  # type: ignore[no-untyped-def]
    """With a dynamic leading axis the op stays one node, and reading the file back keeps it."""
    call, program = exported(op.name)
    program = program.run_decompositions({})
    assert [op_of(n.target) for n in program.graph.nodes if op_of(n.target) is not None] == [op]
    torch.testing.assert_close(program.module()(call.first), call(call.first), rtol=0, atol=0)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file)
    torch.testing.assert_close(again.module()(call.first), call(call.first), rtol=0, atol=0)


@pytest.mark.parametrize("op", all_ops(), ids=lambda op: op.name)
def test_decomposes_to_aten(op) -> None:  # type: ignore[no-untyped-def]
    """After decomposition only ATen is left (a file that stock torch loads), dynamic, with the same numbers."""
    call, program = exported(op.name)
    program = program.run_decompositions(decomposition_table())
    targets = {n.target for n in program.graph.nodes if n.op == "call_function"}
    assert targets and all(getattr(t, "namespace", "aten") in ("aten", "_operator") for t in targets), targets
    torch.testing.assert_close(program.module()(call.first), call(call.first), rtol=1e-6, atol=1e-6)
    if not call.shares_rows() and op.name != "grouped_linear":  # whose offsets say how many rows there are
        double = torch.cat([call.first, call.first])
        torch.testing.assert_close(program.module()(double), call(double), rtol=1e-6, atol=1e-6)


def test_registering_twice_is_harmless() -> None:
    register_all()
    before = torch_op("shift")
    register_all()
    assert torch_op("shift") is before and op_of(before) is get_op("shift")
    assert op_of(torch.ops.aten.add.Tensor) is None and op_of(len) is None


def test_schema() -> None:
    assert torch_schema(get_op("gate")) == (
        '(Tensor x, Tensor? thresholds=None, *, float threshold=0.0, str keep="abs>", int axis=-1) -> Tensor'
    )
    for op in all_ops():
        assert str(torch_op(op.name)._schema).startswith(f"actgraph::{op.name}(Tensor {op.inputs[0].name}")


def test_errors_name_the_operand() -> None:
    with pytest.raises(VerifyError, match=r"actgraph.shift: vector .* does not broadcast"):
        torch_op("shift")(torch.ones(2, 8), torch.ones(7))


def test_training_goes_through_a_joint_graph() -> None:
    """AOTAutograd traces backward through the op (its vjp), and the gradients equal eager ones."""
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch.fx.experimental.proxy_tensor import make_fx

    x, v = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)

    def loss(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (torch_op("shift")(x * 2, v, scale=0.5, norm="restore") ** 2 @ torch.arange(8.0)).sum()

    want = torch.autograd.grad(loss(x, v), (x, v))

    def step(x: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss(x, v), (x, v))

    traced = make_fx(step, tracing_mode="fake")(x, v)
    assert any(op_of(n.target) is get_op("shift") for n in traced.graph.nodes)
    for a, b in zip(traced(x, v), want, strict=True):
        torch.testing.assert_close(a, b)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v = torch.nn.Parameter(v.detach().clone())

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (loss(x, self.v),)

    graphs = []

    def keep(module, inputs):  # type: ignore[no-untyped-def]
        graphs.append(module)
        return module

    net = Net()
    example = x.detach().requires_grad_()
    compiled = aot_module_simplified(torch.fx.symbolic_trace(net), (example,), fw_compiler=keep, bw_compiler=keep)
    inputs = x.detach().clone().requires_grad_()
    compiled(inputs)[0].backward()
    torch.testing.assert_close(inputs.grad, want[0])
    torch.testing.assert_close(net.v.grad, want[1])
    assert len(graphs) == 2


def test_gradients_flow_to_what_asks_for_them_only() -> None:
    x, v = torch.randn(2, 8, requires_grad=True), torch.randn(8)
    y = torch_op("shift")(x, v, None, torch.tensor([True, False]), scale=2.0)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x)) and v.grad is None
    with torch.no_grad():
        assert not torch_op("shift")(x, v).requires_grad
    codes = torch_op("quantize")(x, torch.tensor(0.1))
    assert not codes.requires_grad


def test_double_backward() -> None:
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    v = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, v: torch_op("shift")(x, v, norm="relative"), (x, v))


@pytest.mark.parametrize("op", all_ops(), ids=lambda op: op.name)
def test_types_from_the_rules_are_those_of_the_fake_kernel(op) -> None:  # type: ignore[no-untyped-def]
    """Sizes, dtypes and layout, with a symbolic leading size where the op allows one."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    told = 0
    for index, sample in enumerate(op.samples):
        case = Case(op, index, sample.dtypes[0] if sample.dtypes else DType.F32)
        call = Call(case)
        real = [None if o is None else to_torch(o) for o in case.operands()]
        mode = FakeTensorMode(shape_env=ShapeEnv())
        kinds = [DimDynamic.STATIC if call.shares_rows() or i else DimDynamic.DYNAMIC for i in range(call.first.dim())]
        context = StatelessSymbolicContext(dynamic_sizes=kinds)
        first = mode.from_tensor(call.first, symbolic_context=context)
        fakes = [first, *(None if t is None else mode.from_tensor(t, static_shapes=True) for t in real[1:])]
        if op.inputs[-1].variadic:
            count = len(op.inputs) - 1
            fakes = [*fakes[:count], fakes[count:]]
        with mode:
            expected = torch_op(op.name)(*fakes, **case.attributes)
            found = result_fakes(torch_op(op.name), fakes, dict(case.attributes))
        if found is None:
            continue
        told += 1
        for one, other in zip(*(r if isinstance(r, tuple) else (r,) for r in (found, expected)), strict=True):
            assert (one.dtype, tuple(map(str, one.shape))) == (other.dtype, tuple(map(str, other.shape)))
            assert tuple(map(str, one.stride())) == tuple(map(str, other.stride()))
    assert told, "the rules never tell"
