"""Activation addition: the difference of two prompts, position by position, added at the beginning of the stream.

Source: Steering Language Models With Activation Engineering (ActAdd, 2023). ``h'[p] = h[p] + scale * (h+[p] - h-[p])`` for the
positions ``p`` of the pair, ``start`` tokens later; the shorter prompt is filled up with spaces, as the paper does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from actgraph.calibrate.encode import token_ids
from actgraph.errors import InputError, PassError
from actgraph.formats.artifacts import Artifact, load_artifact
from actgraph.formats.vectors import model_fingerprint
from actgraph.graph import Graph, Site, Value
from actgraph.graph.context import graph_context, token_dims
from actgraph.graph.executor import executor_for
from actgraph.graph.graph import Array
from actgraph.graph.where_mask import where_mask
from actgraph.passes.places import Selector
from actgraph.passes.steer.edit import Edit, EditPass, stored_for, token_axes
from actgraph.pipeline.base import PassContext, PassResult

KIND = "actadd_prompts"
_MADE_BY = "make one with actgraph.passes.steer.actadd.prompt_difference"


@dataclass(frozen=True)
class PromptDifference:
    """``h+ - h-`` by position: site -> ``[positions, width]`` float32; its first row, of the begin token, is zero."""

    rows: Mapping[str, Array]
    prompts: tuple[str, str]
    model: str = ""

    def save(self, path: str | Path) -> Path:
        """Write what the pass ``actadd`` reads."""
        return Artifact(KIND, dict(self.rows), {"prompts": list(self.prompts)}, self.model).save(path)


def prompt_difference(graph: Graph, positive: str, negative: str, *, site: str | Sequence[str]) -> PromptDifference:
    """The activations of ``positive`` minus those of ``negative`` at each position.

    The shorter prompt gets spaces at its end until both have as many tokens. Raises InputError where that cannot be, or
    where the two are the same.
    """
    ids = [token_ids(graph, text) for text in (positive, negative)]
    length = max(map(len, ids))
    filled = [_filled(graph, text, length) for text in (positive, negative)]
    values = {each.name: each.value for each in graph.sites(site)}
    runner = executor_for(graph).open(graph, list(values.values()))
    batch = np.asarray(filled, np.int64)
    known = {"input_ids": batch, "attention_mask": np.ones_like(batch), "position_ids": np.arange(length)[None].repeat(2, 0)}
    found = runner({name: array for name, array in known.items() if name in {value.name for value in graph.inputs()}})
    rows = {name: (found[value.name][0] - found[value.name][1]).astype(np.float32) for name, value in values.items()}
    if not any(each.any() for each in rows.values()):
        raise InputError("the two prompts give the same activations", "use prompts that differ")
    return PromptDifference(rows, (positive, negative), model_fingerprint(graph))


def _filled(graph: Graph, text: str, length: int) -> list[int]:
    for spaces in range(4 * length + 4):
        ids = token_ids(graph, text + " " * spaces)
        if len(ids) == length:
            return ids
        if len(ids) > length:
            break
    raise InputError(f"{text!r} cannot be filled up to {length} tokens with spaces", "use prompts of equally many tokens")


class ActAdd(EditPass):
    """Add the difference of two prompts, position by position, at the first tokens of each row (from ``start`` on).

    A row's tokens count without padding, so a cache, chunks and padding change nothing. ``where`` restricts it further.
    """

    name: ClassVar[str] = "actadd"
    off: ClassVar[Mapping[str, Any]] = {"scale": 0.0}

    prompts: str = Field(description=f"The file of a pair of prompts: {_MADE_BY}.", json_schema_extra={"path": True})
    site: Selector = Field(default=(), description="Where; default: the sites of the file.")
    scale: float = Field(default=1.0, allow_inf_nan=False, description="Factor on the difference; 0 is the identity.")
    start: int = Field(default=0, ge=0, description="The position of a row that the first position of the pair is added at.")

    def targets(self, graph: Graph) -> Selector:
        return tuple(self._file().arrays)

    def _file(self) -> Artifact:
        return load_artifact(self.prompts, KIND, _MADE_BY)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        file = self._file()
        self.check_model(file.model, graph, self.prompts)
        return self.run_at(graph, context, file=file)

    def hook(self, graph: Graph, site: Site, inputs: Mapping[str, Array]) -> Callable[[Array], Array] | None:
        rows = stored_for(self._file(), site, 2, by="actadd", what="prompts").astype(np.float64)
        positions = inputs["position_ids"] - self.start
        place, inside = np.clip(positions, 0, len(rows) - 1), (positions >= 0) & (positions < len(rows))
        return self.at_tokens(lambda h: h + self.scale * rows[place] * inside[..., None], inputs)

    def apply(self, edit: Edit, site: Site, width: int) -> str:
        rows = stored_for(edit.shared["file"], site, 2, by="actadd", what="prompts")
        if rows.shape[1] != width:
            raise PassError(
                f"actadd: the prompts have {rows.shape[1]} channels, and {site.name} is {site.type}", "use their site"
            )
        if self.scale == 0:
            return "identity"
        assert site.type.dtype is not None and site.type.shape is not None
        last = self.axis in (-1, len(site.type.shape) - 1)
        if not last or token_axes(site.type.shape, self.axis) != token_dims(edit.graph):
            return edit.declined(site, f"{site.type} is not [batch, seq, channels]")
        editor = edit.editor
        if "place" not in edit.shared:
            edit.shared["place"], edit.shared["inside"] = self._places(edit, len(rows))
        table = (rows * np.float32(self.scale)).astype(site.type.dtype.numpy)
        vector = editor.insert("gather", [table, edit.shared["place"]], {"axis": 0}).output
        editor.insert_at(site, "actgraph.shift", [vector, None, edit.shared["inside"]])
        edit.result.details.append({"site": site.name, "rule": "inserted", "positions": len(rows), "scale": self.scale})
        return "inserted"

    def _places(self, edit: Edit, count: int) -> tuple[Value, Value]:
        """The row of the table for each token, and 1 for the tokens that have one."""
        editor = edit.editor
        positions = graph_context(edit.graph, editor, "positions")
        if self.start:
            positions = editor.insert("sub", [positions, np.asarray(self.start)]).output
        place = editor.insert("clip", [positions, np.asarray(0), np.asarray(count - 1)]).output
        inside = where_mask(editor, edit.graph, f"{self.start}:{self.start + count}")
        mask = edit.mask()
        assert inside is not None
        return place, inside if mask is None else editor.insert("mul", [inside, mask]).output
