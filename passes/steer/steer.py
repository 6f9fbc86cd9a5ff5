"""Steering: add a vector to an activation.

Sources: Steering Language Models With Activation Engineering (ActAdd, 2023); Steering Llama 2 via Contrastive Activation
Addition (CAA, 2023). ``h' = h + scale * v`` at every token, or at those that ``where`` names (CAA steers all tokens behind the
prompt, ActAdd the first ones). With ``norm=restore`` each token keeps its norm, with ``norm=relative`` the shift is a fraction
of the token's norm (Physics Steering, 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, ValidationInfo, field_validator, model_validator

from actgraph.errors import OptionError, PassError
from actgraph.formats.vectors import SteeringVector, load_vector, name_sites, vector_messages
from actgraph.graph import Graph, Site, Value
from actgraph.graph.graph import Array
from actgraph.ops.dtypes import DType
from actgraph.passes.places import Selector
from actgraph.passes.steer.edit import Edit, FoldingEditPass
from actgraph.passes.steer.runtime_inputs import INPUT, looked_up, not_zero, per_channel, per_token, row_input
from actgraph.pipeline.base import PassContext, PassResult


class Steer(FoldingEditPass):
    """Add ``scale`` times a vector at each site, for all tokens or those that ``where`` names.

    Positions of a clause count the real tokens of each row from 0, and never padding. A token is generated when as many tokens
    as the prompt has stand before it; sessions tell the lengths of prompts, and where nobody does (the input ``prompt_lengths``
    is optional) all tokens are prompt. A clause means the same with and without a cache, which may be inserted before or after.
    It needs sites of [batch, seq, channels].

    Several vectors, each with its scale, are one: their sum. ``scale=input`` makes the strength an optional input of each row
    (``steer.scale``, 0 where nobody gives it: the unsteered model, bit for bit), ``vector=input`` the vector (``steer.vector``,
    times ``scale``), and ``pick=row`` lets each row pick one of the vectors by number (``steer.index``: 0 none, 1 the first).

    Vectors at one site, value or edge, with one clause merge into one. Where the site's value is written by a linear, a norm or
    a convolution, directly or through residual adds, and nothing else reads what that writes, the shift folds into its bias and
    costs nothing (see ``fold_edits``; ``unfold`` takes it out again); the sites that lie between the two are then gone (their
    values contain the shift), which a later pass that names them is told. A shift at some tokens only, one that keeps norms and
    one that is given at run time do not fold: they stay nodes.
    """

    name: ClassVar[str] = "steer"
    off: ClassVar[Mapping[str, Any]] = {"scale": 0.0}

    site: Selector = Field(default=(), description="Where to add the vector; default: the sites named in the vector's file.")
    vector: str | tuple[str, ...] | tuple[float, ...] = Field(
        description="A file with a vector (see `actgraph extract-vector`), several, the numbers themselves, or `input`.",
        json_schema_extra={"path": True},
    )
    scale: float | tuple[float, ...] | Literal["input"] = Field(
        default=1.0, description="Factor on the vector (on each of several), or `input`; 0 is the identity."
    )
    norm: Literal["none", "restore", "relative"] = Field(
        default="none", description="restore: tokens keep their norm. relative: the shift is scale times the token's norm."
    )
    pick: Literal["none", "row"] = Field(default="none", description="row: each row picks one vector by the input steer.index.")

    @field_validator("scale")
    @classmethod
    def _one(cls, scale: float | str | tuple[float, ...], info: ValidationInfo) -> float | str | tuple[float, ...]:
        """A list of one scale is that number where there is one vector."""
        vector = info.data.get("vector")
        several = isinstance(vector, tuple) and len(vector) > 1 and isinstance(vector[0], str)
        return scale[0] if isinstance(scale, tuple) and len(scale) == 1 and not several else scale

    @model_validator(mode="after")
    def _consistent(self) -> Steer:
        scales = self.scale if isinstance(self.scale, tuple) else (self.scale,)
        if not all(scale == INPUT or np.isfinite(scale) for scale in scales):
            raise OptionError(f"steer: scale is {self.scale}", "give finite numbers")
        if isinstance(self.scale, tuple) and len(self.scale) != len(self._files):
            raise OptionError(f"steer: there are {len(self._files)} vectors and {len(self.scale)} scales", "give one for each")
        if self.pick == "row" and not self._files:
            raise OptionError("steer: pick=row needs vectors to pick from", "name files: vector=[a.safetensors, b.safetensors]")
        if len(self._files) > 1 and self.norm != "none" and self.pick == "none":
            raise OptionError(
                f"steer: with norm={self.norm} it matters which vector comes first", "use a steer for each, in the order wanted"
            )
        return self

    @property
    def _files(self) -> tuple[str, ...]:
        """The files with vectors."""
        if isinstance(self.vector, str):
            return () if self.vector == INPUT else (self.vector,)
        return tuple(name for name in self.vector if isinstance(name, str))

    @property
    def _at_run_time(self) -> bool:
        return INPUT in (self.vector, self.scale) or self.pick == "row"

    def reads_rows(self, edit: Edit) -> bool:
        return self._at_run_time

    def vectors(self, graph: Graph) -> list[SteeringVector]:
        """The vectors of the option, with the names that ``graph`` has for their sites. Raises InputError for others."""
        if self.vector == INPUT:
            return []
        found = [name_sites(load_vector(name), graph) for name in self._files]
        for name, vector in zip(self._files, found, strict=True):
            self.check_origin(vector, graph, name)
            if vector.scale == "relative" and (self.norm != "none" or len(found) > 1):
                raise OptionError(f"steer: {name} is in units of the activation's norm", "use it alone, with norm=none")
        return found or [SteeringVector({"": np.asarray(self.vector, np.float32)})]

    def targets(self, graph: Graph) -> Selector:
        return tuple(dict.fromkeys(name for vector in self.vectors(graph) for name in vector.directions if name))

    def hook(self, graph: Graph, site: Site, inputs: Mapping[str, Array]) -> Callable[[Array], Array] | None:
        if self._at_run_time:
            return None
        names, vectors = (site.name, *site.aliases), self.vectors(graph)
        total, norm = self._sum([vector.for_site(names).astype(np.float64) for vector in vectors]), self._norm(vectors)

        def edited(rows: Array) -> Array:
            sizes = np.linalg.norm(rows, axis=-1, keepdims=True)
            if norm == "relative":  # a vector in units of the activation's norm, or one of which only the direction counts
                unit = 1.0 if self.norm == "none" else np.linalg.norm(total) / abs(float(self.scale))  # type: ignore[arg-type]
                return np.asarray(rows + sizes * total / unit)
            shifted = rows + total
            return np.asarray(
                shifted * sizes / np.linalg.norm(shifted, axis=-1, keepdims=True) if norm == "restore" else shifted
            )

        return self.at_tokens(edited, inputs)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        vectors = self.vectors(graph)
        result = self.run_at(graph, context, vectors=vectors)
        for name, vector in zip(self._files, vectors, strict=False):
            result.messages += vector_messages(vector, graph, called=name, where=self.where, factor=self.scale)
        if self.where != "all" and self.fold and result.counts["inserted"]:
            result.messages.insert(0, f"not folded: a bias is added to every token, and the shift is where={self.where}")
        return result

    def _sum(self, directions: Sequence[Array]) -> Array:
        """The directions, each times its scale, as one."""
        scales = self.scale if isinstance(self.scale, tuple) else (self.scale,) * len(directions)
        return np.asarray(sum(d * float(s) for d, s in zip(directions, scales, strict=True)))

    def apply(self, edit: Edit, site: Site, width: int) -> str:
        assert site.type.dtype is not None and site.type.shape is not None
        vectors: Sequence[SteeringVector] = edit.shared["vectors"]
        directions = [vector.for_site((site.name, *site.aliases)).astype(np.float64) for vector in vectors]
        for direction in directions:
            if len(direction) != width:
                raise PassError(
                    f"steer: the vector has {len(direction)} numbers but {site.name} is {site.type}",
                    "use a vector extracted at this site, or set axis",
                )
        if self._at_run_time:
            operands, factor = self._given(edit, site, directions, width)
        else:
            total = self._sum(directions)
            edit.result.details.append({"site": site.name, "scale": self.scale, "norm": float(np.linalg.norm(total))})
            rule = self._constant(edit, site, total)
            edit.result.details[-1]["rule"] = rule
            return rule
        attributes = self._shift(vectors, directions)
        attributes |= {} if factor == 1 else {"scale": factor * attributes.get("scale", 1.0)}
        edit.editor.insert_at(site, "actgraph.shift", operands, attributes)
        edit.result.details.append({"site": site.name, "rule": "inserted", "scale": self.scale})
        return "inserted"

    def _norm(self, vectors: Sequence[SteeringVector]) -> str:
        """What the shift does about norms: a vector in units of the activation's norm is a relative shift."""
        return "relative" if any(vector.scale == "relative" for vector in vectors) else self.norm

    def _shift(self, vectors: Sequence[SteeringVector], directions: Sequence[Array]) -> dict[str, Any]:
        """The attributes of a shift by what is given at run time."""
        attributes = self.attributes | ({} if self._norm(vectors) == "none" else {"norm": self._norm(vectors)})
        if any(vector.scale == "relative" for vector in vectors):
            attributes["scale"] = float(np.linalg.norm(directions[0]))
        return attributes

    def _constant(self, edit: Edit, site: Site, total: Array) -> str:
        """Add ``total`` at one site: nothing, merged into what is there, folded, or as a node."""
        assert site.type.dtype is not None
        if not total.any():
            return "identity"
        norm = self._norm(edit.shared["vectors"])
        attributes: dict[str, Any] = {**self.attributes, **({} if norm == "none" else {"norm": norm})}
        data = total
        if norm == "relative":  # of a vector in units of the activation's norm the length counts, else its direction alone
            assert isinstance(self.scale, float)
            size = abs(self.scale) if self.norm == "relative" else float(np.linalg.norm(total))
            attributes["scale"], data = size, total / size
        mask, stored = edit.mask(), data.astype(site.type.dtype.numpy)
        operands = [stored, None, mask] if mask is not None else [stored]
        return edit.place(site, "actgraph.shift", operands, attributes, fold=self.fold)

    def _given(
        self, edit: Edit, site: Site, directions: Sequence[Array], width: int
    ) -> tuple[list[Value | Array | None], float]:
        """The operands of a shift by what the host gives, and its constant factor."""
        assert site.type.dtype is not None and site.type.shape is not None
        editor, graph, rank = edit.editor, edit.graph, len(site.type.shape)
        dtype, factor = site.type.dtype.numpy, self.scale if isinstance(self.scale, float) else 1.0
        strengths: list[Value] = []
        if self.scale == INPUT:
            strengths.append(edit.of_rows(site, "steer.scale"))
        vector: Value | Array
        if self.vector == INPUT:
            given = row_input(editor, graph, f"steer.vector.{site.name}", width=width)
            vector = per_channel(editor, given, rank, self.axis)
            if self.scale != INPUT:  # which is 0 where nobody gives it
                strengths.append(per_token(editor, not_zero(editor, given), rank - 1))
        elif self.pick == "row":
            scales = self.scale if isinstance(self.scale, tuple) else (factor,) * len(directions)
            index = edit.once("index", lambda: row_input(editor, graph, "steer.index", dtype=DType.I64))
            strengths.append(
                edit.once(("pick", rank), lambda: per_token(editor, looked_up(editor, [0, *scales], index), rank - 1))
            )
            table = np.stack([np.zeros(width), *directions]).astype(dtype)
            vector = per_channel(editor, editor.insert("gather", [table, index], {"axis": 0}).output, rank, self.axis)
            factor = 1.0
        else:
            scales = self.scale if isinstance(self.scale, tuple) else (1.0,) * len(directions)
            vector = np.asarray(sum(d * float(s) for d, s in zip(directions, scales, strict=True)), dtype)
        strength = strengths[0]
        for other in strengths[1:]:
            strength = editor.insert("mul", [strength, other]).output
        return [vector, strength, edit.mask()], factor
