"""What a pass is: a frozen, validated options object with ``run(graph, context) -> PassResult``.

A pass changes the graph through ``context.edit(graph)`` only, contains no printing and no timing (the manager's
instruments do that), and says what it did in its result. One pass a file, under ``passes/<family>/``; see CONTRIBUTING.md
("add a pass").
"""

from __future__ import annotations

import abc
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from actgraph.calibrate.statistics import Request, Statistics
    from actgraph.graph import Editor, Graph
    from actgraph.graph.program import Program


#: The sizes of change that a pass may declare besides a number of its own: other sums in the same precision, and no bound.
ROUNDING = 1e-5
UNBOUNDED = math.inf


@dataclass(frozen=True)
class Declined:
    """A place where the pass was asked to act and did not, and why."""

    site: str
    reason: str


@dataclass
class PassResult:
    """What one pass did.

    ``counts`` are per rule (``{"inserted": 4, "folded": 1}``): how a pass says what it did, in reports and in the history of
    the file. All zero means that nothing matched, which is an error unless the pass may do nothing.

    expected_change: ``"exact"``, or why the outputs change. expected_size: how far any output may move at most, as the largest
    absolute difference over the largest magnitude of that output before; ``UNBOUNDED`` where no bound is known. A pass that
    says nothing promises rounding. The parity instrument enforces the size on every output of floats (of a pass that declares
    a change, an index or a flag may flip), and that no finite number becomes NaN or infinite, whatever the size.
    """

    counts: Counter[str] = field(default_factory=Counter)
    declined: list[Declined] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)  # one row per place, for the report's table
    messages: list[str] = field(default_factory=list)
    expected_change: str = "exact"
    expected_size: float = ROUNDING


@dataclass
class PassContext:
    """What the manager gives a running pass.

    statistics: the results of the requests that the pass made, collected on the graph as the former passes left it.
    """

    seed: int = 0
    statistics: Statistics | None = None
    text: str = ""  # the running pass as pipeline text, recorded as provenance
    name: str = ""
    _editors: list[Editor] = field(default_factory=list, init=False, repr=False)

    def edit(self, graph: Graph) -> Editor:
        """The transaction through which the pass changes ``graph``."""
        editor = graph.edit(self.name, self.text)
        self._editors.append(editor)
        return editor

    @property
    def edited(self) -> bool:
        """Whether the pass has changed anything so far."""
        return any(count for editor in self._editors for count in editor.counts.values())


class Pass(BaseModel, abc.ABC):
    """Base class. Fields are the options; their descriptions, units and ranges become the JSON Schema and the docs.

    ``preserves`` holds what other passes may rely on: ``"values"`` (every surviving site keeps its numbers, so statistics
    collected before the pass still hold after it).

    An option that may name a file says so with ``json_schema_extra={"path": True}`` (or has type ``pathlib.Path``): in a recipe
    it is relative to the recipe file when a file is there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: ClassVar[str]
    family: ClassVar[str]
    dialects: ClassVar[frozenset[str]] = frozenset({"fx", "onnx"})
    preserves: ClassVar[frozenset[str]] = frozenset()
    #: A pass that may run twice in one pipeline with equal options (``steer`` twice is composition). Others are the
    #: identity, or an error, when found in the graph's history with the same options.
    repeatable: ClassVar[bool] = False
    #: A pass that may find nothing to do without that being an error (``dce``, ``cse``, ``fold``, ``identity``), and that
    #: may run again on its own output, where it is the identity.
    may_do_nothing: ClassVar[bool] = False
    #: Options at which the pass is the identity, and options under which it computes the same in another way. What they say
    #: is checked by `actgraph verify`.
    off: ClassVar[Mapping[str, Any]] = {}
    oracle: ClassVar[Mapping[str, Any]] = {}

    @property
    def at_defaults(self) -> Mapping[str, Any]:
        """Options that do what the pass does where nobody gives the inputs that it adds; empty: the model stays as it is."""
        return {}

    def requests(self, graph: Graph) -> Sequence[Request]:
        """The statistics that the pass needs on ``graph``; empty when it needs no calibration."""
        return ()

    @abc.abstractmethod
    def run(self, graph: Graph, context: PassContext) -> PassResult:
        """Rewrite ``graph`` in place. Raises PassError when what was asked for matches nothing."""

    @property
    def makes_program(self) -> bool:
        """Whether ``program`` gives one, as far as the options tell."""
        return False

    @property
    def token_limit(self) -> int | None:
        """The most tokens that the graph takes behind the pass, as far as the options tell; ``None``: as many as before."""
        return None

    def program(self, graph: Graph, result: PassResult) -> Program | None:
        """The program of several graphs that ``graph``, as ``run`` left it, becomes; ``None``: it stays one graph.

        Asked for after everything that watches the pass has accepted ``graph``. The graphs of the program must compute what
        ``graph`` does, which the pass shows by running them (and may say in ``result.messages``). Later passes of the pipeline
        run on each of them.
        """
        return None

    def __str__(self) -> str:
        """The pass as pipeline text, with the options that differ from their defaults: ``sparsify{sparsity=0.4}``."""
        from actgraph.pipeline.options import pass_text

        return pass_text(self)
