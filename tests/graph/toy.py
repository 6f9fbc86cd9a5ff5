"""A third, minimal container behind ``Graph``: what the shared code may rely on, and a place to break invariants by hand."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actgraph.graph.graph import Array, Graph, Kind, Node, Role, Use, Value
from actgraph.graph.prims import Prim
from actgraph.graph.provenance import Origin
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import TensorType


@dataclass(eq=False)
class V:
    name: str
    kind: Kind
    type: TensorType
    producer: N | None = None
    data: Array | None = None
    hidden_users: list[tuple[N, int]] = field(default_factory=list)  # to break the graph: users that do not read
    forgotten: bool = False  # to break the graph: users are not listed


@dataclass(eq=False)
class N:
    name: str
    op: str
    operands: list[V | None]
    attributes: dict[str, Any]
    outputs: list[V]
    origin: Origin


class ToyGraph(Graph):
    dialect = "toy"

    def __init__(self, name: str = "toy") -> None:
        super().__init__(name)
        self.ins: list[V] = []
        self.params: list[V] = []
        self.body: list[N] = []
        self.outs: list[tuple[str, V]] = []
        self.roles: dict[str, Role] = {}

    # --- building ---
    def add_input(self, name: str, dtype: str = "f32", shape: tuple[Any, ...] = ("batch", 4)) -> Value:
        self.ins.append(V(name, Kind.INPUT, TensorType(DType(dtype), shape)))
        self.roles[name] = Role.USER
        return Value(self, self.ins[-1])

    def add_parameter(self, name: str, data: Any) -> Value:
        return self._add_parameter(name, np.asarray(data), buffer=False)

    def add_node(
        self, op: str, *operands: Value | None, name: str, type: TensorType | None = None, scope: str = "", **attributes: Any
    ) -> Value:
        kind = type if type is not None else next(v.type for v in operands if v is not None)
        node = N(name, op, [v.key if v is not None else None for v in operands], attributes, [], Origin((name,), scope))
        node.outputs.append(V(name, Kind.RESULT, kind, node))
        self.body.append(node)
        return Value(self, node.outputs[0])

    def add_result(self, label: str, value: Value) -> None:
        self._add_output(value, label, Role.USER)

    # --- reading ---
    def inputs(self) -> tuple[Value, ...]:
        return tuple(Value(self, v) for v in self.ins)

    def outputs(self) -> tuple[tuple[str, Value], ...]:
        return tuple((label, Value(self, v)) for label, v in self.outs)

    def role(self, name: str) -> Role:
        return self.roles[name]

    def parameters(self) -> tuple[Value, ...]:
        return tuple(Value(self, v) for v in self.params)

    def aliases(self, parameter: Value) -> tuple[str, ...]:
        return (parameter.key.name,)

    def nodes(self) -> Sequence[Node]:
        return [Node(self, n) for n in self.body]

    def value(self, name: str) -> Value:
        for v in [*self.ins, *self.params, *(o for n in self.body for o in n.outputs)]:
            if v.name == name:
                return Value(self, v)
        raise KeyError(name)

    def value_name(self, value: Value) -> str:
        return str(value.key.name)

    def value_kind(self, value: Value) -> Kind:
        return value.key.kind  # type: ignore[no-any-return]

    def value_type(self, value: Value) -> TensorType:
        return value.key.type  # type: ignore[no-any-return]

    def producer(self, value: Value) -> Node | None:
        return Node(self, value.key.producer) if value.key.producer is not None else None

    def uses(self, value: Value) -> tuple[Use, ...]:
        if value.key.forgotten:
            return ()
        found = [Use(Node(self, n), i) for n in self.body for i, v in enumerate(n.operands) if v is value.key]
        found += [Use(Node(self, n), i) for n, i in value.key.hidden_users]
        return tuple(found + [Use(None, i) for i, (_, v) in enumerate(self.outs) if v is value.key])

    def node_name(self, node: Node) -> str:
        return str(node.key.name)

    def node_op(self, node: Node) -> str:
        return str(node.key.op)

    def operands(self, node: Node) -> tuple[Value | None, ...]:
        return tuple(Value(self, v) if v is not None else None for v in node.key.operands)

    def node_outputs(self, node: Node) -> tuple[Value, ...]:
        return tuple(Value(self, v) for v in node.key.outputs)

    def attributes(self, node: Node) -> dict[str, Any]:
        return dict(node.key.attributes)

    def origin(self, node: Node) -> Origin:
        return node.key.origin  # type: ignore[no-any-return]

    def prim(self, node: Node) -> Prim | None:
        return None

    def read(self, parameter: Value) -> Array:
        return parameter.key.data  # type: ignore[no-any-return]

    # --- changing ---
    def _insert(
        self, op: str, operands: Sequence[Value | None], attributes: Mapping[str, Any], *, after: Node | None,
        before: Node | None, name: str, origin: Origin,
    ) -> Node:  # fmt: skip
        keys = [v.key if v is not None else None for v in operands]
        node = N(name, op, keys, dict(attributes), [], origin)
        node.outputs.append(V(name, Kind.RESULT, next(k.type for k in keys if k is not None), node))
        makers = [k.producer for k in keys if k is not None and k.producer is not None]
        place = max((self.body.index(m) + 1 for m in makers), default=0)
        self.body.insert(place, node)
        return Node(self, node)

    def _redirect(self, old: Value, new: Value, uses: Iterable[Use]) -> None:
        for use in uses:
            if use.node is None:
                self.outs[use.index] = (self.outs[use.index][0], new.key)
            else:
                use.node.key.operands[use.index] = new.key

    def _set_operand(self, node: Node, index: int, value: Value | None) -> None:
        node.key.operands[index] = value.key if value is not None else None

    def _add_parameter(self, name: str, data: Array, *, buffer: bool) -> Value:
        self.params.append(V(name, Kind.PARAMETER, TensorType(DType.of(data.dtype), data.shape), None, data))
        return Value(self, self.params[-1])

    def _set_parameter(self, parameter: Value, data: Array) -> None:
        parameter.key.data = data

    def _add_input(self, name: str, type: TensorType, role: Role, default: Array | None) -> Value:
        self.ins.append(V(name, Kind.INPUT, type))
        self.roles[name] = role
        return Value(self, self.ins[-1])

    def _set_input_type(self, value: Value, type: TensorType) -> None:
        value.key.type = type

    def _add_output(self, value: Value, name: str, role: Role) -> None:
        self.outs.append((name, value.key))
        self.roles[name] = role

    def _remove_output(self, name: str) -> None:
        self.outs = [pair for pair in self.outs if pair[0] != name]

    def _erase_dead(self, only: Collection[str] | None = None) -> list[str]:
        removed: list[str] = []
        for node in reversed(list(self.body)):
            if (only is None or node.name in only) and not any(Value(self, o).uses for o in node.outputs):
                self.body.remove(node)
                removed.append(node.name)
        return removed

    def _copy_node(self, node: Node, operands: Sequence[Value | None], *, origin: Origin) -> Node:
        return self._insert(
            node.op, operands, node.attributes, after=None, before=None, name=f"{node.name}_copy", origin=origin
        )

    def _retype(self, nodes: Iterable[Node]) -> None:
        return None

    def clone(self) -> Graph:
        other = ToyGraph(self.name)
        memo: dict[int, Any] = {id(v.data): v.data for v in self.params}
        other.ins, other.params, other.body, other.outs, other.roles = copy.deepcopy(
            (self.ins, self.params, self.body, self.outs, self.roles), memo
        )
        other.history = list(self.history)
        if self._sites is not None:
            other._sites = self._sites.remap(other, {}, {})
        return other

    def _restore(self, snapshot: Graph) -> None:
        assert isinstance(snapshot, ToyGraph)
        fresh = snapshot.clone()
        assert isinstance(fresh, ToyGraph)
        self.ins, self.params, self.body, self.outs = fresh.ins, fresh.params, fresh.body, fresh.outs
        self._sites = fresh._sites.remap(self, {}, {}) if fresh._sites is not None else None

    def structural_problems(self) -> Iterator[str]:
        return iter(())
