"""Graph: one face over two native containers.

A ``Graph`` wraps an unlifted, functional FX ``GraphModule`` (``FxGraph``) or an ``onnx_ir.Model`` (``OnnxGraph``). It
never copies them into a third representation: ``Value`` and ``Node`` are thin handles on the native objects. Reading is
free; every change goes through ``Editor`` (``graph.edit(...)``), which keeps types, provenance and sites right.

The abstract methods of ``Graph`` are all that a dialect has to supply. Those that begin with ``_`` change the graph and
are called by the editor only.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from actgraph.graph.provenance import Origin, PassRecord
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import Shape, TensorType

if TYPE_CHECKING:
    from actgraph.graph.editor import Editor
    from actgraph.graph.folds import FoldRecord
    from actgraph.graph.prims import Prim
    from actgraph.graph.sites import Site, SiteTable
    from actgraph.graph.views import Views

Array = np.ndarray[Any, Any]


class Kind(enum.Enum):
    """What a value is."""

    INPUT = "input"
    PARAMETER = "parameter"  # weights, buffers and constants: anything with stored data
    RESULT = "result"


class Role(enum.StrEnum):
    """What an input or output is for. Nothing may assume where parameters live: lifted graphs take them as inputs."""

    USER = "user"
    CONTEXT = "context"
    PARAMETER = "parameter"
    BUFFER = "buffer"
    SLOT = "slot"
    TANGENT = "tangent"
    SAVED = "saved"
    GRADIENT = "gradient"
    TAP = "tap"


class Value:
    """A handle on one value of a graph: an input, a parameter or a result of a node."""

    __slots__ = ("graph", "key")

    def __init__(self, graph: Graph, key: Any) -> None:
        self.graph = graph
        self.key = key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Value) and other.key is self.key

    def __hash__(self) -> int:
        return id(self.key)

    def __repr__(self) -> str:
        return f"%{self.name}: {self.type}"

    @property
    def name(self) -> str:
        """The native name, unique in the graph (parameters: their path, ``model.embed_tokens.weight``)."""
        return self.graph.value_name(self)

    @property
    def kind(self) -> Kind:
        return self.graph.value_kind(self)

    @property
    def type(self) -> TensorType:
        return self.graph.value_type(self)

    @property
    def dtype(self) -> DType | None:
        return self.type.dtype

    @property
    def shape(self) -> Shape | None:
        return self.type.shape

    @property
    def producer(self) -> Node | None:
        """The node that computes the value; ``None`` for inputs and parameters."""
        return self.graph.producer(self)

    @property
    def uses(self) -> tuple[Use, ...]:
        """Every operand and graph output that reads the value, in topological order, graph outputs last."""
        return self.graph.uses(self)

    @property
    def is_parameter(self) -> bool:
        return self.kind is Kind.PARAMETER


class Node:
    """A handle on one operation."""

    __slots__ = ("graph", "key")

    def __init__(self, graph: Graph, key: Any) -> None:
        self.graph = graph
        self.key = key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Node) and other.key is self.key

    def __hash__(self) -> int:
        return id(self.key)

    def __repr__(self) -> str:
        return f"<{self.op} {self.name}>"

    @property
    def name(self) -> str:
        return self.graph.node_name(self)

    @property
    def op(self) -> str:
        """``aten.linear``, ``onnx.MatMul``, ``com.microsoft.Gelu`` or ``actgraph.shift``."""
        return self.graph.node_op(self)

    @property
    def operands(self) -> tuple[Value | None, ...]:
        """Tensor operands in the order of the op's schema; ``None`` marks an absent optional one."""
        return self.graph.operands(self)

    @property
    def outputs(self) -> tuple[Value, ...]:
        return self.graph.node_outputs(self)

    @property
    def output(self) -> Value:
        """The only (or first) output."""
        return self.outputs[0]

    @property
    def attributes(self) -> dict[str, Any]:
        """Everything that is not a tensor operand, by name, as plain Python values."""
        return self.graph.attributes(self)

    @property
    def origin(self) -> Origin:
        return self.graph.origin(self)

    @property
    def prim(self) -> Prim | None:
        """The node in the vocabulary shared by both dialects; ``None`` for what the vocabulary does not have."""
        return self.graph.prim(self)


class Use(NamedTuple):
    """One place that reads a value: operand ``index`` of ``node``, or graph output ``index`` when ``node`` is None."""

    node: Node | None
    index: int  # type: ignore[assignment]  # the operand, not tuple.index


@dataclass
class Companions:
    """What travels with a graph and is not part of it. Saving puts it beside the file; loading finds it there."""

    tokenizer: Any = None  # a tokenizers.Tokenizer
    tokenizer_files: dict[str, bytes] = field(default_factory=dict)  # file name -> content, copied verbatim
    config: dict[str, Any] = field(default_factory=dict)  # the model's config.json
    generation_config: dict[str, Any] = field(default_factory=dict)
    source: str = ""  # what it was loaded from: a path, a hub id with revision, a class name
    sample_inputs: dict[str, Array] = field(default_factory=dict)


class Graph(abc.ABC):
    """A model as a graph. See the module docstring.

    name: used as file stem and printed in canonical text.
    history: the passes that ran, oldest first.
    notes: loud facts about the graph, such as a dimension kept static and why.
    folds: the edits that were moved into weights and can be taken out again, oldest first.
    """

    dialect: ClassVar[str]  # "fx" or "onnx"

    def __init__(self, name: str) -> None:
        self.name = name
        self.history: list[PassRecord] = []
        self.notes: list[str] = []
        self.folds: list[FoldRecord] = []
        self.companions = Companions()
        self.metadata: dict[str, str] = {}  # free-form, saved with the graph
        self._sites: SiteTable | None = None

    # --- reading -------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def inputs(self) -> tuple[Value, ...]:
        """Graph inputs in order (in lifted graphs also parameters; see ``role``)."""

    @abc.abstractmethod
    def outputs(self) -> tuple[tuple[str, Value], ...]:
        """Graph outputs in order, each with its public name (``logits``). A value may be output twice."""

    @abc.abstractmethod
    def role(self, name: str) -> Role:
        """The role of the graph input or output called ``name``."""

    @abc.abstractmethod
    def parameters(self) -> tuple[Value, ...]:
        """All values with stored data, one per storage (tied weights are one value), in a stable order."""

    @abc.abstractmethod
    def aliases(self, parameter: Value) -> tuple[str, ...]:
        """Every name under which the parameter is known (tied weights have several)."""

    @abc.abstractmethod
    def nodes(self) -> Sequence[Node]:
        """All nodes in topological order, without bookkeeping nodes (tuple access, parameter access)."""

    def subgraph_nodes(self) -> Sequence[Node]:
        """Nodes of bodies (If, Loop, functions) under path names, which ``nodes`` leaves out."""
        return ()

    def function_signatures(self) -> Sequence[str]:
        """The functions of a model that are not our ops, each as ``domain::name(inputs) {defaults} -> (outputs)``."""
        return ()

    @abc.abstractmethod
    def value(self, name: str) -> Value:
        """The value of that native name. Raises KeyError."""

    @abc.abstractmethod
    def value_name(self, value: Value) -> str: ...

    @abc.abstractmethod
    def value_kind(self, value: Value) -> Kind: ...

    @abc.abstractmethod
    def value_type(self, value: Value) -> TensorType: ...

    @abc.abstractmethod
    def producer(self, value: Value) -> Node | None: ...

    @abc.abstractmethod
    def uses(self, value: Value) -> tuple[Use, ...]: ...

    @abc.abstractmethod
    def node_name(self, node: Node) -> str: ...

    @abc.abstractmethod
    def node_op(self, node: Node) -> str: ...

    @abc.abstractmethod
    def operands(self, node: Node) -> tuple[Value | None, ...]: ...

    @abc.abstractmethod
    def node_outputs(self, node: Node) -> tuple[Value, ...]: ...

    @abc.abstractmethod
    def attributes(self, node: Node) -> dict[str, Any]: ...

    @abc.abstractmethod
    def origin(self, node: Node) -> Origin: ...

    @abc.abstractmethod
    def prim(self, node: Node) -> Prim | None: ...

    @abc.abstractmethod
    def read(self, parameter: Value) -> Array:
        """The data of a parameter as a numpy array, without a copy where the container allows it. Read-only by contract."""

    def stored(self, parameter: Value) -> tuple[object, int]:
        """The object that holds a parameter's data and its version: while both are equal, the data is unchanged.

        Dialects whose ``read`` makes a new array at each call return their own tensor object, so that hashes are kept.
        """
        return self.read(parameter), 0

    def default(self, name: str) -> Array | None:
        """The default of an optional input (shape [1]); ``None`` for the others."""
        return None

    # --- changing: called by Editor only ----------------------------------------------------------------------------

    @abc.abstractmethod
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
        """Insert one node and infer its output types.

        op: a registry op (``actgraph.shift``) or a name of the shared vocabulary (``add``, ``mul``, ``cast`` ...).
        after/before: where in the order; with neither, right after the last producer among the operands.
        """

    @abc.abstractmethod
    def _redirect(self, old: Value, new: Value, uses: Iterable[Use]) -> None:
        """Make each of ``uses`` (uses of ``old``) read ``new``."""

    @abc.abstractmethod
    def _set_operand(self, node: Node, index: int, value: Value | None) -> None: ...

    @abc.abstractmethod
    def _add_parameter(self, name: str, data: Array, *, buffer: bool) -> Value:
        """Add stored data under a unique name derived from ``name``."""

    @abc.abstractmethod
    def _set_parameter(self, parameter: Value, data: Array) -> None:
        """Replace the data (shape and dtype may change) for all uses and aliases."""

    @abc.abstractmethod
    def _add_input(self, name: str, type: TensorType, role: Role, default: Array | None) -> Value:
        """Append a graph input. ``default`` (shape [1]) makes it optional."""

    @abc.abstractmethod
    def _set_input_type(self, value: Value, type: TensorType) -> None:
        """Declare the type of a graph input; sizes may be new names. Types that depend on it are inferred by ``_retype``."""

    @abc.abstractmethod
    def _add_output(self, value: Value, name: str, role: Role) -> None: ...

    @abc.abstractmethod
    def _remove_output(self, name: str) -> None: ...

    @abc.abstractmethod
    def _erase_dead(self, only: Collection[str] | None = None) -> list[str]:
        """Remove nodes and parameters that nothing reads (side-effect free ones); returns the names removed.

        only: the names of those that may go; ``None``: all of them.
        """

    @abc.abstractmethod
    def _copy_node(self, node: Node, operands: Sequence[Value | None], *, origin: Origin) -> Node:
        """A copy of ``node`` reading ``operands``, placed after the last of them and after ``node``."""

    @abc.abstractmethod
    def _retype(self, nodes: Iterable[Node], *, propagate: bool = True) -> None:
        """Infer output types again for ``nodes`` and, with ``propagate``, everything downstream whose types change."""

    @abc.abstractmethod
    def clone(self) -> Graph:
        """An independent copy that shares tensor data. Site table, history and companions are copied."""

    @abc.abstractmethod
    def _restore(self, snapshot: Graph) -> None:
        """Become ``snapshot`` (a clone of an earlier state) again."""

    @abc.abstractmethod
    def structural_problems(self) -> Iterator[str]:
        """Dialect-specific broken invariants (see ``verify``), one line each."""

    # --- shared -----------------------------------------------------------------------------------------------------

    def input(self, name: str) -> Value:
        """The graph input called ``name``. Raises KeyError naming the inputs there are."""
        for value in self.inputs():
            if value.name == name:
                return value
        raise KeyError(f"no input {name!r}; inputs are {', '.join(v.name for v in self.inputs())}")

    def edit(self, by: str = "", options: str = "") -> Editor:
        """A transaction: ``with graph.edit("steer") as editor: ...``. An exception inside rolls everything back."""
        from actgraph.graph.editor import Editor

        return Editor(self, by=by, options=options)

    @property
    def site_table(self) -> SiteTable:
        """The sites, assigned on first use and carried by edits ever after."""
        if self._sites is None:
            from actgraph.graph.recognize import assign_sites

            self._sites = assign_sites(self)
        return self._sites

    def sites(self, selector: str | Sequence[str] | None = None, ignore: str | Sequence[str] = ()) -> list[Site]:
        """The sites that ``selector`` matches, in topological order; all of them without a selector.

        Raises SiteError when a selector matches nothing (naming the nearest sites) or names a removed site.
        """
        return self.site_table.select(self, selector, ignore)

    def site(self, name: str) -> Site:
        """The one site of that name or spelling. Raises SiteError when there is none or more than one."""
        return self.site_table.one(self, name)

    @property
    def views(self) -> Views:
        """Typed readings of the graph as it is now: ``views.linears()``, ``norms()``, ``attentions()``, ``blocks()`` ..."""
        from actgraph.graph.views import Views

        return Views(self)

    def text(self, *, sites: bool = True, provenance: bool = True) -> str:
        """The canonical text."""
        from actgraph.graph.text import print_graph

        return print_graph(self, sites=sites, provenance=provenance)

    def content_hash(self) -> str:
        """sha256 over canonical text and weights, 16 hexadecimal digits."""
        from actgraph.graph.text import content_hash

        return content_hash(self)

    def verify(self) -> None:
        """Check every invariant. Raises VerifyError listing what is broken."""
        from actgraph.graph.verify import verify

        verify(self)

    def save(self, path: str | Path, **options: Any) -> Path:
        """Write the graph as ``.onnx`` or ``.pt2`` by the suffix; see ``actgraph.formats.save`` for the options."""
        from actgraph import formats

        return formats.save(self, path, **options)

    def to_torch(self) -> Any:
        """The graph as an ``nn.Module`` (FX only). Raises UnsupportedError on an ONNX graph."""
        from actgraph.errors import UnsupportedError

        raise UnsupportedError(
            f"{self.name} is an ONNX graph and has no torch form", "load the torch model instead, or run it with onnxruntime"
        )

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once with the plain engine of the dialect; outputs by name."""
        from actgraph.graph.executor import executor_for

        return executor_for(self).open(self)(inputs)

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        size = sum(parameter_bytes(p) for p in self.parameters())
        done = ", ".join(r.name for r in self.history) or "none"
        return f"<{type(self).__name__} {self.name}: {len(self.nodes())} nodes, {size / 1e6:.1f} MB, passes: {done}>"


def parameter_bytes(parameter: Value) -> int:
    """Size of a parameter in bytes, from its type alone."""
    kind = parameter.type
    if kind.shape is None or kind.dtype is None:
        return 0
    count = 1
    for size in kind.shape:
        count *= size if isinstance(size, int) else 0
    return (count * kind.dtype.bits + 7) // 8
