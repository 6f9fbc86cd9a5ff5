"""FxGraph: the torch dialect, over an unlifted, functional GraphModule of ATen ops.

Parameters are accessed by name (one access per storage), inputs are placeholders, every other node is a functional call.
Joint graphs of AOTAutograd, whose parameters are inputs, fit the same form (``FxGraph.from_joint``); roles tell them apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from actgraph.errors import InputError
from actgraph.graph import fx_build, fx_check, fx_edit, fx_ops
from actgraph.graph.fx_args import attributes_of, is_branch, operand_paths
from actgraph.graph.fx_types import DimNames, array_of
from actgraph.graph.graph import Array, Graph, Kind, Node, Role, Use, Value
from actgraph.graph.provenance import KEY, Origin
from actgraph.ops.shapes import TensorType

if TYPE_CHECKING:
    from actgraph.graph.prims import Prim


class FxGraph(Graph):
    """A torch graph. Build one with ``actgraph.trace`` or ``actgraph.load``, or from a GraphModule of ATen ops.

    graph: the native graph. root: the modules that hold its tensors. module: both as one GraphModule.
    output_names, output_roles, input_roles: the signature; ``public`` names inputs whose name is no identifier.
    defaults: values of optional inputs. dim_names: the user's names of torch's size symbols.
    dim_ranges: the smallest and largest size allowed, by dimension name.
    """

    dialect: ClassVar[str] = "fx"
    _native: fx.GraphModule | None = None

    def __init__(
        self,
        graph: fx.Graph,
        root: nn.Module,
        name: str,
        *,
        output_names: Sequence[str] = (),
        input_roles: Mapping[str, Role] | None = None,
        output_roles: Mapping[str, Role] | None = None,
        dim_names: DimNames | None = None,
        fake_mode: FakeTensorMode | None = None,
    ) -> None:
        super().__init__(name)
        self.graph = graph
        self.root = root
        self.fake_mode = fake_mode if fake_mode is not None else fx_build.normalise(graph, root)
        count = len(graph.output_node().args[0])  # type: ignore[arg-type]
        default_names = ["output", *(f"output_{i}" for i in range(1, count))]
        self.output_names: list[str] = list(output_names) or default_names[:count]
        self.input_roles: dict[str, Role] = dict(input_roles or {})
        self.output_roles: dict[str, Role] = dict(output_roles or {})
        self.public: dict[str, str] = {}
        self.defaults: dict[str, Array] = {}
        self.dims = dim_names or DimNames()
        self.dim_ranges: dict[str, tuple[int | None, int | None]] = {}
        self._index()

    @staticmethod
    def from_graph_module(gm: fx.GraphModule, name: str = "", **signature: Any) -> FxGraph:
        """The graph of any GraphModule of ATen ops, lifted or not, decomposed or not (its nodes are copied, tensors shared).

        signature: ``output_names``, ``input_roles``, ``output_roles`` and ``dim_names`` as in the constructor.
        """
        root = fx_build.import_tensors(gm)
        return FxGraph(fx_build.copy_graph(gm.graph), root, name or type(gm).__name__, **signature)

    @staticmethod
    def from_joint(gm: fx.GraphModule, signature: Any = None, *, forward_outputs: int = 1, name: str = "joint") -> FxGraph:
        """An AOTAutograd joint graph of forward and backward, whose parameters are inputs.

        signature: the ``GraphSignature`` that ``aot_export_module`` returned. Without one the graph is read as
        ``aot_export_joint_simple`` makes it: inputs ``primals_*`` and ``tangents_*``, then ``forward_outputs`` outputs and one
        gradient (or ``None``) for each primal. Gradients are called ``grad.<input>``.
        """
        from actgraph.graph.fx_joint import read_signature

        found = read_signature(gm, signature, forward_outputs)
        result = FxGraph.from_graph_module(
            gm, name, output_names=found.output_names, input_roles=found.input_roles, output_roles=found.output_roles
        )
        result.public = found.public
        result._index()
        return result

    @property
    def module(self) -> fx.GraphModule:
        """The native GraphModule, whose forward takes the inputs in order and returns a tuple."""
        if self._native is None:
            self._native = fx.GraphModule(self.root, self.graph, class_name="Graph")
        return self._native

    @property
    def dim_names(self) -> dict[Any, str]:
        """torch's size symbols and the user's names for them."""
        return self.dims.names

    # --- caches -------------------------------------------------------------------------------------------------------

    def _index(self) -> None:
        """Read the native graph anew (after anything but an edit through the methods below)."""
        self._native = None
        self._nodes: list[Node] | None = None
        self._by_name: dict[str, fx.Node] | None = None
        self._operands: dict[fx.Node, tuple[Value | None, ...]] = {}
        self._types: dict[fx.Node, TensorType] = {}
        self._inputs: dict[str, fx.Node] = {}
        self._parameters: dict[str, fx.Node] = {}
        aliases: dict[Any, list[str]] = {}
        for path, tensor in fx_build.named_tensors(self.root):
            aliases.setdefault(fx_build.storage_key(tensor), []).append(path)
        self._aliases: dict[str, tuple[str, ...]] = {}
        self._canonical: dict[str, str] = {}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self._inputs[self.public.get(node.name, node.name)] = node
            elif node.op == "get_attr":
                found = fx_build.lookup(self.root, str(node.target))
                if isinstance(found, torch.Tensor):
                    path = str(node.target)
                    self._parameters[path] = node
                    others = [alias for alias in aliases[fx_build.storage_key(found)] if alias != path]
                    self._aliases[path] = (path, *others)
                    self._canonical.update(dict.fromkeys(others, path))

    def _changed(self, *nodes: fx.Node, order: bool = False) -> None:
        """Forget what is cached about ``nodes``; with ``order`` also which nodes there are."""
        self._native = None
        for node in nodes:
            self._operands.pop(node, None)
            self._types.pop(node, None)
        if order:
            self._nodes = None
            self._by_name = None

    def _value(self, node: fx.Node) -> Value:
        return Value(self, node)

    # --- reading ------------------------------------------------------------------------------------------------------

    def inputs(self) -> tuple[Value, ...]:
        return tuple(map(self._value, self._inputs.values()))

    def outputs(self) -> tuple[tuple[str, Value], ...]:
        return tuple(zip(self.output_names, map(self._value, self._output_nodes()), strict=True))

    def _output_nodes(self) -> tuple[fx.Node, ...]:
        return self.graph.output_node().args[0]  # type: ignore[return-value]

    def role(self, name: str) -> Role:
        if name in self._inputs:
            return self.input_roles.get(name, Role.USER)
        return self.output_roles.get(name, Role.USER)

    def parameters(self) -> tuple[Value, ...]:
        return tuple(map(self._value, self._parameters.values()))

    def aliases(self, parameter: Value) -> tuple[str, ...]:
        return self._aliases[parameter.key.target]

    def nodes(self) -> Sequence[Node]:
        if self._nodes is None:
            calls = ("call_function", "call_module", "call_method")
            self._nodes = [Node(self, n) for n in self.graph.nodes if n.op in calls and not fx_build.is_item(n)]
        return self._nodes

    def value(self, name: str) -> Value:
        if name in self._inputs:
            return self._value(self._inputs[name])
        path = name.removeprefix("self.")
        if path in self._parameters:
            return self._value(self._parameters[path])
        if path in self._canonical:
            return self._value(self._parameters[self._canonical[path]])
        if self._by_name is None:
            self._by_name = {n.name: n for n in self.graph.nodes if n.op not in ("placeholder", "get_attr", "output")}
        node = self._by_name.get(name)
        if node is None:
            raise KeyError(f"no value {name!r} in {self.name}")
        if fx_build.is_multiple(node):
            return self.node_outputs(Node(self, node))[0]
        return self._value(node)

    def value_name(self, value: Value) -> str:
        return self._native_name(value.key)

    def _native_name(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            return self.public.get(node.name, node.name)
        if node.op == "get_attr":
            path = str(node.target)
            return f"self.{path}" if path in self._inputs else path
        return node.name

    def value_kind(self, value: Value) -> Kind:
        if value.key.op == "placeholder":
            return Kind.INPUT
        return Kind.PARAMETER if value.key.op == "get_attr" else Kind.RESULT

    def value_type(self, value: Value) -> TensorType:
        node = value.key
        if node not in self._types:
            self._types[node] = self.dims.type_of(node.meta.get("val"))
        return self._types[node]

    def producer(self, value: Value) -> Node | None:
        node = value.key
        if node.op in ("placeholder", "get_attr"):
            return None
        return Node(self, node.args[0] if fx_build.is_item(node) else node)

    def uses(self, value: Value) -> tuple[Use, ...]:
        found: list[Use] = []
        users = [user for user in value.key.users if user.op != "output"]
        for user in sorted(users) if len(users) > 1 else users:
            node = Node(self, user)
            found += [Use(node, i) for i, operand in enumerate(self.operands(node)) if operand == value]
        if len(users) != len(value.key.users):
            found += [Use(None, i) for i, output in enumerate(self._output_nodes()) if output is value.key]
        return tuple(found)

    def node_name(self, node: Node) -> str:
        return str(node.key.name)

    def node_op(self, node: Node) -> str:
        return fx_ops.op_name(node.key.target)

    def operands(self, node: Node) -> tuple[Value | None, ...]:
        key = node.key
        if key not in self._operands:
            self._operands[key] = tuple(self._value(n) if n is not None else None for _, n in operand_paths(key))
        return self._operands[key]

    def node_outputs(self, node: Node) -> tuple[Value, ...]:
        key = node.key
        if not fx_build.is_multiple(key):
            return (self._value(key),)
        items = sorted((user for user in key.users if fx_build.is_item(user)), key=lambda user: user.args[1])
        return tuple(map(self._value, items))

    def attributes(self, node: Node) -> dict[str, Any]:
        return attributes_of(node.key, self._attribute_name)

    def _attribute_name(self, node: fx.Node) -> str:
        """How attributes refer to a node: a branch by its path and a hash of what it does."""
        if not is_branch(node):
            return self._native_name(node)
        body = str(fx_build.lookup(self.root, str(node.target)).graph)
        return f"{node.target} #{hashlib.sha256(body.encode()).hexdigest()[:12]}"

    def origin(self, node: Node) -> Origin:
        return Origin.from_dict((node.key.meta.get("custom") or {}).get(KEY, {}))

    def prim(self, node: Node) -> Prim | None:
        from actgraph.graph.fx_prims import describe

        return describe(self, node)

    def tensor(self, parameter: Value) -> torch.Tensor:
        """The data of a parameter as torch holds it (native reading, for dialect-specific code)."""
        found: torch.Tensor = fx_build.lookup(self.root, parameter.key.target)
        return found

    def read(self, parameter: Value) -> Array:
        if parameter.key.op != "get_attr":
            raise InputError(f"%{parameter.name} has no stored data", "it is computed, or an input of a lifted graph")
        return array_of(self.tensor(parameter))

    def stored(self, parameter: Value) -> tuple[object, int]:
        tensor = self.tensor(parameter)
        return tensor, tensor._version

    def default(self, name: str) -> Array | None:
        return self.defaults.get(name)

    def structural_problems(self) -> Iterator[str]:
        return fx_check.problems(self)

    # --- changing (see fx_edit) -----------------------------------------------------------------------------------------

    def _insert(
        self,
        op: str,
        operands: Sequence[Value | None],
        attributes: Mapping[str, Any],
        *,
        after: Node | None,
        before: Node | None,
        name: str,
        origin: Origin,
    ) -> Node:
        return fx_edit.insert(self, op, operands, attributes, after=after, before=before, name=name, origin=origin)

    def _copy_node(self, node: Node, operands: Sequence[Value | None], *, origin: Origin) -> Node:
        return fx_edit.copy_node(self, node, operands, origin=origin)

    def _redirect(self, old: Value, new: Value, uses: Iterable[Use]) -> None:
        fx_edit.redirect(self, new, uses)

    def _set_operand(self, node: Node, index: int, value: Value | None) -> None:
        fx_edit.set_operands(self, node.key, {index: value.key if value is not None else None})

    def _add_parameter(self, name: str, data: Array, *, buffer: bool) -> Value:
        return fx_edit.add_parameter(self, name, data, buffer=buffer)

    def _set_parameter(self, parameter: Value, data: Array) -> None:
        fx_edit.set_parameter(self, parameter, data)

    def _add_input(self, name: str, type: TensorType, role: Role, default: Array | None) -> Value:
        return fx_edit.add_input(self, name, type, role, default)

    def _set_input_type(self, value: Value, type: TensorType) -> None:
        fx_edit.set_input_type(self, value, type)

    def _add_output(self, value: Value, name: str, role: Role) -> None:
        output = self.graph.output_node()
        output.args = ((*self._output_nodes(), value.key),)
        self.output_names.append(name)
        if role is not Role.USER:
            self.output_roles[name] = role
        self._changed()

    def _remove_output(self, name: str) -> None:
        index = self.output_names.index(name)
        nodes = list(self._output_nodes())
        del nodes[index], self.output_names[index]
        self.graph.output_node().args = (tuple(nodes),)
        self.output_roles.pop(name, None)
        self._changed()

    def _erase_dead(self, only: Collection[str] | None = None) -> list[str]:
        return fx_edit.erase_dead(self, only)

    def _retype(self, nodes: Iterable[Node], *, propagate: bool = True) -> None:
        fx_edit.retype(self, [node.key for node in nodes], propagate=propagate)

    def clone(self) -> FxGraph:
        twin = FxGraph(
            fx_build.copy_graph(self.graph),
            fx_build.share_module(self.root),
            self.name,
            output_names=self.output_names,
            input_roles=self.input_roles,
            output_roles=self.output_roles,
            dim_names=self.dims.copy(),
            fake_mode=self.fake_mode,
        )
        twin.public, twin.defaults, twin.dim_ranges = dict(self.public), dict(self.defaults), dict(self.dim_ranges)
        twin.history, twin.notes, twin.metadata = list(self.history), list(self.notes), dict(self.metadata)
        twin.folds = list(self.folds)
        twin.companions = fx_build.copy_companions(self.companions)
        twin._index()
        twin._parameters = {path: twin._parameters[path] for path in self._parameters}
        twin._aliases = {path: self._aliases[path] for path in self._parameters}
        if self._sites is not None:
            twin._sites = self._sites.remap(twin, {}, {})
        return twin

    def _restore(self, snapshot: Graph) -> None:
        """Handles on nodes and values taken before are invalid afterwards; names and sites are as in the snapshot."""
        assert isinstance(snapshot, FxGraph)
        twin = snapshot.clone()
        sites = twin._sites
        self.__dict__.update(twin.__dict__)
        self._sites = sites.remap(self, {}, {}) if sites is not None else None

    def to_torch(self) -> nn.Module:
        """The graph as an ``nn.Module``: forward takes the inputs by position or name.

        It returns what the source model's forward returned in shape: a bare tensor for one unnamed output, a tuple for
        several unnamed ones, else a dict by output name. ``state_dict`` has the names of the source model.
        """
        from actgraph.graph.fx_module import as_module

        return as_module(self)
