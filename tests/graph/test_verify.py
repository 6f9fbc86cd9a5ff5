"""The verifier: a sound graph passes, and each invariant, broken by hand, is found and named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from actgraph.errors import VerifyError
from actgraph.graph.graph import Kind, Node, Role
from actgraph.graph.provenance import Origin
from actgraph.graph.verify import LISTED, problems, verify
from actgraph.ops import registry
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import Attribute, OpDef, Operand
from actgraph.ops.shapes import TensorType
from tests.graph.toy import ToyGraph, V


@pytest.fixture(autouse=True)
def op(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registered op of two float operands of one dtype, an optional third and one attribute."""

    def same(types: Sequence[TensorType | None], attributes: Any) -> list[TensorType]:
        assert types[0] is not None
        return [types[0]]

    definition = OpDef(
        "toy_blend", "for tests", (Operand("x", ""), Operand("y", "", same_as="x"), Operand("z", "", optional=True)), ("out",),
        same, lambda x, y, z=None: x, lambda b, v, a: v[:1], (Attribute("weight", "float", "how much"),),
    )  # fmt: skip
    registry.all_ops()
    monkeypatch.setitem(registry._OPS, "toy_blend", definition)


def sound() -> ToyGraph:
    g = ToyGraph()
    x = g.add_input("x")
    w = g.add_parameter("w", np.ones(4, np.float32))
    a = g.add_node("toy.a", x, w, name="a")
    b = g.add_node("actgraph.toy_blend", a, x, name="b", weight=0.5)
    c = g.add_node("toy.c", b, name="c")
    g.add_result("y", c)
    return g


def test_a_sound_graph_passes() -> None:
    g = sound()
    assert list(problems(g)) == []
    g.verify()
    verify(g, nodes=g.nodes())


def reorder(g: ToyGraph) -> None:
    g.body.reverse()


def read_a_stranger(g: ToyGraph) -> None:
    g.body[2].operands[0] = V("stranger", Kind.RESULT, TensorType(DType.F32, (4,)))


def dangling_user(g: ToyGraph) -> None:
    g.body[0].outputs[0].hidden_users.append((g.body[2], 1))


def forgotten_user(g: ToyGraph) -> None:
    g.body[0].outputs[0].forgotten = True


def same_value_name(g: ToyGraph) -> None:
    g.body[1].outputs[0].name = "a"


def same_node_name(g: ToyGraph) -> None:
    g.body[1].name = "a"


def no_value_name(g: ToyGraph) -> None:
    g.body[1].outputs[0].name = ""


def defined_twice(g: ToyGraph) -> None:
    g.body[2].outputs.append(g.body[0].outputs[0])


def input_defined_by_a_node(g: ToyGraph) -> None:
    g.ins.append(g.body[0].outputs[0])
    g.roles["a"] = Role.USER


def no_provenance(g: ToyGraph) -> None:
    g.body[1].origin = Origin()


def no_outputs(g: ToyGraph) -> None:
    g.outs.clear()


def output_of_nothing(g: ToyGraph) -> None:
    g.outs[0] = ("y", V("ghost", Kind.RESULT, TensorType(DType.F32, (4,))))


def two_outputs_of_one_name(g: ToyGraph) -> None:
    g.outs.append(("y", g.body[0].outputs[0]))


def no_role(g: ToyGraph) -> None:
    g.roles.pop("y")


def untyped_input(g: ToyGraph) -> None:
    g.ins[0].type = TensorType(None, None)


def unknown_op(g: ToyGraph) -> None:
    g.body[1].op = "actgraph.no_such_op"


def unknown_attribute(g: ToyGraph) -> None:
    g.body[1].attributes["wieght"] = 1.0


def missing_attribute(g: ToyGraph) -> None:
    g.body[1].attributes.clear()


def ill_typed_attribute(g: ToyGraph) -> None:
    g.body[1].attributes["weight"] = "half"


def missing_operand(g: ToyGraph) -> None:
    g.body[1].operands[1] = None


def too_many_operands(g: ToyGraph) -> None:
    g.body[1].operands.extend([g.ins[0], g.ins[0]])


def illegal_dtype(g: ToyGraph) -> None:
    g.ins[0].type = TensorType(DType.I64, ("batch", 4))


def mixed_dtypes(g: ToyGraph) -> None:
    g.body[0].outputs[0].type = TensorType(DType.F16, ("batch", 4))
    g.body[1].outputs[0].type = TensorType(DType.F16, ("batch", 4))


def wrong_output_shape(g: ToyGraph) -> None:
    g.body[1].outputs[0].type = TensorType(DType.F32, ("batch", 5))


def wrong_output_rank(g: ToyGraph) -> None:
    g.body[1].outputs[0].type = TensorType(DType.F32, (4,))


def wrong_output_dtype(g: ToyGraph) -> None:
    g.body[1].outputs[0].type = TensorType(DType.F64, ("batch", 4))


def too_many_results(g: ToyGraph) -> None:
    g.body[1].outputs.append(V("extra", Kind.RESULT, TensorType(DType.F32, (4,)), g.body[1]))


def untyped_output(g: ToyGraph) -> None:
    g.body[1].outputs[0].type = TensorType(None, ("batch", 4))


BROKEN: dict[Callable[[ToyGraph], None], str] = {
    reorder: "defined after the node",
    read_a_stranger: "defined nowhere",
    dangling_user: "does not read it",
    forgotten_user: "does not list it as a user",
    same_value_name: "two values are called %a",
    same_node_name: "two nodes are called a",
    no_value_name: "has no name",
    defined_twice: "defined twice",
    input_defined_by_a_node: "defined twice",
    no_provenance: "no provenance",
    no_outputs: "no output",
    output_of_nothing: "which nothing in the graph defines",
    two_outputs_of_one_name: "two outputs are called 'y'",
    no_role: "no role",
    untyped_input: "no element type",
    unknown_op: "no op 'actgraph.no_such_op'",
    unknown_attribute: "no attribute 'wieght'",
    missing_attribute: "'weight' of actgraph.toy_blend is missing",
    ill_typed_attribute: "must be float",
    missing_operand: "actgraph.toy_blend needs its operand 'y'",
    too_many_operands: "takes 3 operands, not 4",
    illegal_dtype: "cannot be i64",
    mixed_dtypes: "'y' is f32 but 'x' is f16",
    wrong_output_shape: "makes f32[batch, 4]",
    wrong_output_rank: "makes f32[batch, 4]",
    wrong_output_dtype: "makes f32",
    too_many_results: "has 1 outputs, not 2",
    untyped_output: "has no element type, though",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_each_broken_invariant_is_found(damage: Callable[[ToyGraph], None]) -> None:
    g = sound()
    damage(g)
    with pytest.raises(VerifyError) as error:
        g.verify()
    assert BROKEN[damage] in error.value.message


def test_local_form_sees_the_nodes_given_and_no_others() -> None:
    g = sound()
    unknown_attribute(g)
    nodes: dict[str, Node] = {n.name: n for n in g.nodes()}
    verify(g, nodes=[nodes["a"], nodes["c"]])
    with pytest.raises(VerifyError, match="wieght"):
        verify(g, nodes=[nodes["b"]])
    g = sound()
    forgotten_user(g)
    with pytest.raises(VerifyError, match="does not list it"):
        verify(g, nodes=[n for n in g.nodes() if n.name == "b"])


def test_ten_problems_are_listed_and_the_rest_counted_as_more() -> None:
    g = sound()
    x = g.inputs()[0]
    for i in range(30):
        g.add_node("toy.f", x, name=f"f{i}")
        g.body[-1].origin = Origin()
    with pytest.raises(VerifyError) as error:
        g.verify()
    assert error.value.message.count("no provenance") == LISTED and error.value.message.endswith("and more")


def test_dialect_problems_are_included(monkeypatch: pytest.MonkeyPatch) -> None:
    g = sound()
    monkeypatch.setattr(g, "structural_problems", lambda: iter(["relu_ writes to its operand"]))
    with pytest.raises(VerifyError, match="relu_"):
        g.verify()
