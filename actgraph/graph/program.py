"""Programs: one or more named graphs over one shared weight store and one set of slots.

A model that is run in stages (prefill, then decode; a full step, then cheap ones) is several graphs. Parameters of the same
name are the same weight in all of them. A ``Driver`` says which graph runs at which step. A program of one behaves like its
graph: users of single graphs never see the difference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from actgraph.errors import InputError, PassError, VerifyError
from actgraph.graph.diff import Change, GraphDiff, diff
from actgraph.graph.graph import Graph, Value
from actgraph.graph.slots import Slot, slots_of
from actgraph.graph.text import data_hash

R = TypeVar("R")


@dataclass(frozen=True)
class Case:
    """``graph`` runs at ``steps``, or at every step that is a multiple of ``every``."""

    graph: str
    steps: tuple[int, ...] = ()
    every: int = 0

    def applies(self, step: int) -> bool:
        return step in self.steps or (self.every > 0 and step % self.every == 0)

    def __str__(self) -> str:
        when = [f"step {', '.join(map(str, self.steps))}"] if self.steps else []
        when += [f"every {self.every} steps"] if self.every else []
        return f"{' and '.join(when)} -> {self.graph}"


@dataclass(frozen=True)
class Driver:
    """Which graph runs at which step: the first case that applies, else ``otherwise``. Data, not code: it is saved as such."""

    otherwise: str
    cases: tuple[Case, ...] = ()

    @staticmethod
    def single(graph: str) -> Driver:
        return Driver(graph)

    @staticmethod
    def prefill_then_decode(prefill: str = "prefill", decode: str = "decode") -> Driver:
        """The first step runs ``prefill`` on the prompt, every other one ``decode`` on one token."""
        return Driver(decode, (Case(prefill, steps=(0,)),))

    def graph_at(self, step: int) -> str:
        """The name of the graph that runs at ``step`` (from 0)."""
        return next((case.graph for case in self.cases if case.applies(step)), self.otherwise)

    @property
    def graphs(self) -> tuple[str, ...]:
        """Every graph that may run."""
        return tuple(dict.fromkeys([*(case.graph for case in self.cases), self.otherwise]))

    def __str__(self) -> str:
        return "; ".join([*map(str, self.cases), f"else -> {self.otherwise}"]) if self.cases else self.otherwise

    def to_dict(self) -> dict[str, Any]:
        cases = [{"graph": case.graph, "steps": list(case.steps), "every": case.every} for case in self.cases]
        return {"otherwise": self.otherwise, "cases": cases}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Driver:
        cases = tuple(Case(case["graph"], tuple(case["steps"]), int(case["every"])) for case in data["cases"])
        return Driver(data["otherwise"], cases)


@dataclass
class Program:
    """``graphs`` by name, what drives them, and their slots (those of all graphs; equal names are one slot)."""

    graphs: dict[str, Graph]
    driver: Driver
    name: str = ""
    slots: dict[str, Slot] = field(init=False)

    def __post_init__(self) -> None:
        missing = [name for name in self.driver.graphs if name not in self.graphs]
        if missing or not self.graphs:
            raise InputError(f"the driver names the graph {missing[:1] or ['']!r}, which the program lacks", "name its graphs")
        dialects = {graph.dialect for graph in self.graphs.values()}
        if len(dialects) > 1:
            raise InputError(f"the graphs of a program have one dialect, not {' and '.join(sorted(dialects))}", "export first")
        self.name = self.name or next(iter(self.graphs.values())).name
        self.slots = {}
        for graph in self.graphs.values():
            self.slots.update(slots_of(graph))

    @staticmethod
    def of(graph: Graph) -> Program:
        """The program of one graph."""
        return Program({graph.name: graph}, Driver.single(graph.name), graph.name)

    @property
    def graph(self) -> Graph:
        """The only graph. Raises InputError where there are several."""
        if len(self.graphs) != 1:
            names = ", ".join(self.graphs)
            hint = f"choose one of {names}; kv_cache{{graphs=combined}} makes one graph of prefill and decode"
            raise InputError(f"{self.name} is a program of {len(self.graphs)} graphs", hint)
        return next(iter(self.graphs.values()))

    def __iter__(self) -> Iterator[Graph]:
        return iter(self.graphs.values())

    def __len__(self) -> int:
        return len(self.graphs)

    def __repr__(self) -> str:
        return f"<Program {self.name}: {', '.join(self.graphs)}; {self.driver}>" if len(self) > 1 else repr(self.graph)

    # --- what a graph has, too --------------------------------------------------------------------------------------------

    def text(self, *, sites: bool = True, provenance: bool = True) -> str:
        """The canonical text: of the graph, or of the driver, the slots and each graph."""
        if len(self) == 1:
            return self.graph.text(sites=sites, provenance=provenance)
        lines = [f"program {self.name} {{", f"  driver {self.driver}"]
        lines += [f"  slot {self.slots[name]}" for name in sorted(self.slots)]
        lines += [f"  shared {name}" for name in self.shared()]
        parts = [f"# {name}\n{graph.text(sites=sites, provenance=provenance)}" for name, graph in self.graphs.items()]
        return "\n".join([*lines, "}\n", *parts])

    def __str__(self) -> str:
        return self.text()

    def content_hash(self) -> str:
        """The graph's own hash, or one over driver, slots and the hashes of all graphs; 16 hexadecimal digits."""
        if len(self) == 1:
            return self.graph.content_hash()
        parts = [str(self.driver), *(str(self.slots[name]) for name in sorted(self.slots))]
        parts += [f"{name} {graph.content_hash()}" for name, graph in sorted(self.graphs.items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def verify(self) -> None:
        """Check every graph, that equal slots are one in all of them, and that shared weights agree. Raises VerifyError."""
        for graph in self:
            graph.verify()
        problems = [*self._slot_problems(), *self._weight_problems()]
        if problems:
            raise VerifyError(f"{self.name}: {'; '.join(problems[:10])}")

    def _slot_problems(self) -> Iterator[str]:
        for name, graph in self.graphs.items():
            for slot in slots_of(graph).values():
                if slot != self.slots[slot.name]:
                    yield f"slot {slot.name} is {slot} in {name} and {self.slots[slot.name]} elsewhere"

    def _weight_problems(self) -> Iterator[str]:
        for name, holders in self.shared().items():
            if len({data_hash(value) for value in holders.values()}) > 1:
                yield f"weight {name} differs between {' and '.join(holders)}"

    def clone(self) -> Program:
        """An independent copy that shares tensor data."""
        return Program({name: graph.clone() for name, graph in self.graphs.items()}, self.driver, self.name)

    def save(self, path: str | Path, **options: Any) -> Path:
        """Write the only graph to a file, or several to a folder: manifest, one ``.onnx`` each, one file of weights.

        Raises InputError for several graphs and the name of a file, or a folder that holds something else.
        """
        if len(self) == 1:
            return self.graph.save(path, **options)
        from actgraph.formats.program_file import save_program

        return save_program(self, Path(path), **options)

    # --- weights and edits ------------------------------------------------------------------------------------------------

    def shared(self) -> dict[str, dict[str, Value]]:
        """Parameters that several graphs have: name -> graph -> value."""
        found: dict[str, dict[str, Value]] = {}
        for name, graph in self.graphs.items():
            for parameter in graph.parameters():
                found.setdefault(parameter.name, {})[name] = parameter
        return {name: holders for name, holders in sorted(found.items()) if len(holders) > 1}

    def apply(self, edit: Callable[[Graph], R]) -> dict[str, R]:
        """Run ``edit`` (a pass) on every graph: graph edits happen in each, weight edits once.

        Each graph sees the weights as they were before, so that a change relative to the old weight is not made twice;
        afterwards all graphs hold the one result. Raises PassError, with everything rolled back, when the graphs do not
        agree on it; errors of ``edit`` roll back everything as well.
        """
        before = self.clone()
        slots = dict(self.slots)
        try:
            results = {name: edit(graph) for name, graph in self.graphs.items()}
            for problem in self._weight_problems():
                raise PassError(problem, "the pass edits a shared weight differently in each graph")
            self._unify()
        except Exception:
            for name, graph in self.graphs.items():
                graph._restore(before.graphs[name])
            self.slots = slots
            raise
        for graph in self:
            self.slots.update(slots_of(graph))
        return results

    def map(self, transform: Callable[[Graph], Graph]) -> Program:
        """A new program of the transformed graphs, whose weights are shared again: ``map(lambda g: ag.run(g, text).graph)``.

        This program is left as it is. Raises PassError when the graphs do not agree on a shared weight.
        """
        result = Program({name: transform(graph) for name, graph in self.graphs.items()}, self.driver, self.name)
        for problem in result._weight_problems():
            raise PassError(problem, "the pass edits a shared weight differently in each graph")
        result._unify()
        return result

    def _unify(self) -> None:
        """Make all holders of a shared weight hold the memory of the first."""
        for holders in self.shared().values():
            first, *others = holders.values()
            store = first.graph.stored(first)[0]
            for other in others:
                if other.graph.stored(other)[0] is not store:
                    other.graph._set_parameter(other, first.graph.read(first))


def diff_programs(left: Program, right: Program) -> GraphDiff:
    """What changed from ``left`` to ``right``: driver, slots, graphs added or removed, and each graph's own differences."""
    if len(left) == 1 and len(right) == 1:
        return diff(left.graph, right.graph)
    changes: list[Change] = []
    if left.driver != right.driver:
        changes.append(Change("driver", "driver", str(left.driver), str(right.driver)))
    for kind, old, new in (
        ("slot", {n: str(s) for n, s in left.slots.items()}, {n: str(s) for n, s in right.slots.items()}),
        ("graph", {n: n for n in left.graphs}, {n: n for n in right.graphs}),
    ):
        names = list(dict.fromkeys([*old, *new]))
        changes += [Change(kind, name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)]
    scope = "structure"
    for name, graph in left.graphs.items():
        if name in right.graphs:
            found = diff(graph, right.graphs[name])
            scope = found.scope
            changes += [Change(f"{name}: {c.kind}", c.name, c.old, c.new) for c in found]
    return GraphDiff(left.name, right.name, scope, tuple(changes))
