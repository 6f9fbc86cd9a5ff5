"""What all edits of activations share: where they act, and what they say about it."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, field_validator

from actgraph.errors import PassError
from actgraph.formats.artifacts import Artifact
from actgraph.graph import Editor, Graph, Node, Role, Site, SiteKind, Value
from actgraph.graph.context import token_dims
from actgraph.graph.graph import Array
from actgraph.graph.where import Where
from actgraph.graph.where_mask import where_mask
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import Dim, Shape
from actgraph.passes.places import WHERE, Selector, SitePass
from actgraph.passes.steer.folding import fold_edit
from actgraph.passes.steer.merging import merge_edits
from actgraph.passes.steer.of_model import OfModel
from actgraph.passes.steer.runtime_inputs import per_token, row_input, why_no_rows
from actgraph.pipeline.base import ROUNDING, UNBOUNDED, Declined, PassContext, PassResult


@dataclass
class Edit:
    """One run of an edit pass: the transaction, what it found, and what its sites share."""

    graph: Graph
    editor: Editor
    where: Where
    result: PassResult
    shared: dict[Any, Any] = field(default_factory=dict)  # values and arrays that the sites of a pass have in common

    def mask(self) -> Value | None:
        """The mask of the clause, made when it is first asked for; ``None``: all tokens."""
        if "mask" not in self.shared:
            self.shared["mask"] = where_mask(self.editor, self.graph, self.where)
        mask: Value | None = self.shared["mask"]
        return mask

    def place(
        self,
        site: Site,
        op: str,
        operands: Sequence[Value | Array | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        fold: bool = False,
        keep: Sequence[Node] = (),
    ) -> str:
        """Put ``op(x, *operands)`` at ``site``: merged into the same edit before it, folded into weights, or as a node.

        fold: whether it may fold. Returns the rule: ``merged``, ``folded`` or ``inserted``.
        """
        node = self.editor.insert_at(site, op, operands, attributes, keep=keep).producer
        assert node is not None
        return self.settle(site, node, fold=fold)

    def settle(self, site: Site, node: Node, *, fold: bool = False) -> str:
        """Merge or fold the edit that ``node`` makes at ``site``, see ``place``.

        Maps fold at values and edges, shifts at values. Where neither is exact the node stays as it is.
        """
        if site.kind is SiteKind.VIRTUAL:
            return "inserted"
        if merge_edits(self.graph, self.editor, node) is not None:
            return "merged"
        folds = fold and (node.op != "actgraph.shift" or site.kind is SiteKind.VALUE)
        return "folded" if folds and fold_edit(self.graph, self.editor, node, site=site.name).folded else "inserted"

    def of_rows(self, site: Site, name: str) -> Value:
        """The optional input ``name``, one number for each row and 0 where nobody gives it, to be broadcast to the tokens of
        ``site``.
        """
        assert site.type.shape is not None
        tokens = len(site.type.shape) - 1
        rows = self.once(name, lambda: row_input(self.editor, self.graph, name))
        return self.once((name, tokens), lambda: per_token(self.editor, rows, tokens))

    def times(self, mask: Value | None, factor: Value) -> Value:
        """``mask * factor`` for each token, made once."""
        if mask is None:
            return factor
        return self.once(("times", mask, factor), lambda: self.editor.insert("mul", [mask, factor]).output)

    def once(self, key: object, make: Callable[[], Value]) -> Value:
        """A value that sites share, made when it is first asked for."""
        if key not in self.shared:
            self.shared[key] = make()
        found: Value = self.shared[key]
        return found

    def declined(self, site: Site, reason: str) -> str:
        """Note that nothing is done at ``site``, and return the empty rule."""
        self.result.declined.append(Declined(site.name, reason))
        return ""


class EditPass(OfModel, SitePass):
    """A pass that inserts ops of ours at sites, at the tokens that a clause names."""

    family: ClassVar[str] = "steer"
    repeatable: ClassVar[bool] = True
    #: Why the outputs change, for reports and checks.
    change: ClassVar[str] = "the outputs are steered"

    where: str = Field(default="all", description=WHERE)
    axis: int = Field(default=-1, description="The axis of the site that the vector lies along (1 for NCHW images).")

    @field_validator("where")
    @classmethod
    def _readable(cls, clause: str) -> str:
        Where.parse(clause)
        return clause

    @abc.abstractmethod
    def apply(self, edit: Edit, site: Site, width: int) -> str:
        """Edit one site, whose channel axis has ``width`` channels, and return the rule that was used; empty when declined."""

    def targets(self, graph: Graph) -> Selector:
        """Where the pass acts when the option ``site`` is not given: what its file names."""
        return ()

    def select(self, graph: Graph) -> list[Site]:
        selector = self.site or self.targets(graph)
        if not selector:
            raise PassError(
                f"{self.name}: no site is named, neither by the file nor by options", "say site=blocks.2.resid_post"
            )
        return graph.sites(selector, self.ignore)

    def reads_rows(self, edit: Edit) -> bool:
        """Whether the host gives something for each row of the batch: only sites whose first axis is the batch are edited."""
        return False

    def hook(self, graph: Graph, site: Site, inputs: Mapping[str, Array]) -> Callable[[Array], Array] | None:
        """The edit as a plain function of a site's value, by the method's formula, for `actgraph verify`; ``None``: there is
        none.

        inputs: those of the run, which say where tokens stand. What is given at run time is not among them.
        """
        return None

    def at_tokens(self, formula: Callable[[Array], Array], inputs: Mapping[str, Array]) -> Callable[[Array], Array]:
        """``formula`` of float64 rows ``[..., channels]`` as a hook, for the tokens of the clause and any channel axis."""
        where, tokens = Where.parse(self.where), None
        if not where.everywhere:
            told = inputs.get("prompt_lengths"), inputs["input_ids"], inputs.get("row_index")
            tokens = where.mask(inputs["position_ids"], *told)

        def hooked(h: Array) -> Array:
            rows = np.moveaxis(h.astype(np.float64), self.axis, -1)
            made = formula(rows)
            return np.moveaxis(made if tokens is None else np.where(tokens[..., None], made, rows), -1, self.axis)

        return hooked

    def run_at(self, graph: Graph, context: PassContext, **shared: Any) -> PassResult:
        """Apply the edit at each site.

        shared: what ``apply`` finds in ``Edit.shared``. Raises PassError where nothing could be done.
        """
        where = Where.parse(self.where)
        result = PassResult(expected_change=self.change, expected_size=UNBOUNDED)
        known = {value.name for value in graph.inputs()}
        with context.edit(graph) as editor:
            edit = Edit(graph, editor, where, result, dict(shared))
            for site in self.select(graph):
                rule = self._checked(edit, site)
                if rule:
                    result.counts[rule] += 1
        result.messages += where.assumptions() if set(result.counts) - {"identity"} else []
        given = [value for value in graph.inputs() if value.name not in known and graph.role(value.name) is Role.USER]
        result.messages += [f"new optional input {value.name} {value.type}" for value in given]
        result.messages += editor.messages
        if set(result.counts) == {"identity"}:
            result.expected_change, result.expected_size = "exact", ROUNDING
        if not result.counts:
            raise PassError(f"{self.name} changed nothing: {result.declined[0].site}: {result.declined[0].reason}")
        return result

    def _checked(self, edit: Edit, site: Site) -> str:
        """``apply`` where the site has channels and, with a clause, tokens."""
        shape = site.type.shape
        if site.type.dtype is None or not shape or not -len(shape) <= self.axis < len(shape):
            return edit.declined(site, f"its type {site.type} has no known axis {self.axis}")
        width = shape[self.axis]
        if not isinstance(width, int):
            return edit.declined(site, f"its channels are not of a fixed number: {site.type}")
        if not edit.where.everywhere and token_axes(shape, self.axis) != token_dims(edit.graph):
            return edit.declined(site, f"where={self.where} is about tokens, and {site.type} has other axes")
        no_rows = why_no_rows(edit.graph, shape, self.axis) if self.reads_rows(edit) else ""
        return edit.declined(site, no_rows) if no_rows else self.apply(edit, site, width)

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes of an op of ours that says its axis."""
        return {} if self.axis == -1 else {"axis": self.axis}


class FoldingEditPass(EditPass):
    """An edit pass whose fixed edits fold (see ``Edit.place``)."""

    oracle: ClassVar[Mapping[str, Any]] = {"fold": False}

    fold: bool = Field(default=True, description="Move the edit into weights and biases where that is exact: with where=all.")


def edit_dtype(site: Site) -> Any:
    """The NumPy type that edits at ``site`` are computed in, in which their bases and matrices are stored: float32, or float64
    beside float64.
    """
    return np.dtype(np.float64 if site.type.dtype is DType.F64 else np.float32)


def stored_for(file: Artifact, site: Site, rank: int, *, by: str, what: str, any_site: bool = True) -> Array:
    """The array of ``file`` for ``site``, by one of its names; with ``any_site`` the only array of a file serves any site.

    Raises PassError where there is none; by: the pass. what: what the array holds, for the message.
    """
    name = next((name for name in (site.name, *site.aliases) if name in file.arrays), "")
    if not name and not (any_site and len(file.arrays) == 1):
        raise PassError(f"{by}: the file has no {what} for {site.name}", f"it has {', '.join(file.arrays)}")
    return file.array(name or next(iter(file.arrays)), rank)


def token_axes(shape: Shape, axis: int) -> tuple[Dim, ...]:
    """The axes of ``shape`` but for the channel axis."""
    place = axis % len(shape)
    return (*shape[:place], *shape[place + 1 :])
