"""Orthogonalisation: directional ablation in the weights.

Source: Refusal in Language Models Is Mediated by a Single Direction (2024). With every matrix that writes the residual stream
replaced by ``(I - v v^T) W``, and biases by ``b - (v . b) v``, no component of the model can write the direction ``v``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from actgraph.errors import InputError, PassError
from actgraph.formats.vectors import SteeringVector, load_vector
from actgraph.graph import Editor, Graph
from actgraph.graph.graph import Array
from actgraph.passes.steer.of_model import OfModel
from actgraph.passes.steer.rank_one import finished
from actgraph.passes.steer.stream_writers import Refused, Written, stream_writers
from actgraph.passes.steer.weight_edits import stored_refusal, weight_project
from actgraph.pipeline.base import UNBOUNDED, PassContext, PassResult

_HINT = "ablate{direction=... site=[embed, 'blocks.*.attn.out', 'blocks.*.mlp.out']} does the same with nodes in the graph"


class Orthogonalize(OfModel):
    """Remove a direction from all that writes the residual stream: embeddings, output projections, biases.

    The same as ``ablate`` at every place where something is written, at no cost and with no node. A tied embedding is untied
    first, so that the unembedding stays. It is all or nothing: where a writer cannot be edited (a norm between it and the
    stream as in Gemma, post-norm encoders, weights stored as codes) the pass is refused.
    """

    name: ClassVar[str] = "orthogonalize"
    family: ClassVar[str] = "steer"
    repeatable: ClassVar[bool] = True
    off: ClassVar[Mapping[str, Any]] = {"amount": 0.0}

    direction: str | tuple[float, ...] = Field(
        description="A safetensors file with the direction, or its numbers; normalised to unit length.",
        json_schema_extra={"path": True},
    )
    of: str = Field(default="", description="Which site's direction in the file, where it has several.")
    amount: float = Field(
        default=1.0,
        description="Share of the direction that is removed; 2 reflects it, 0 is the identity.",
        allow_inf_nan=False,
    )

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        vector, unit = self._unit()
        self.check_model(vector.model, graph, str(self.direction))
        writers = self._writers(graph, len(unit))
        result = PassResult(expected_change="a direction is removed from the weights", expected_size=UNBOUNDED)
        if self.amount == 0:
            result.counts["identity"] += len(writers)
            return finished(self.name, result)
        with context.edit(graph) as editor:
            for writer in writers:
                edit = _edit_array if writer.linear is None else _edit_linear
                result.details.append(edit(editor, writer, unit, self.amount))
                result.counts[writer.kind] += 1
        result.messages += editor.messages
        return result

    def _unit(self) -> tuple[SteeringVector, Array]:
        """The file's content and the one direction, unit length, float64."""
        given = self.direction
        vector = load_vector(given) if isinstance(given, str) else SteeringVector({"": np.asarray(given, np.float32)})
        if not self.of and len(vector.directions) > 1:
            raise PassError(
                f"orthogonalize: {given} has {len(vector.directions)} directions, and one is removed everywhere",
                f"choose one with of={next(iter(vector.directions))}",
            )
        if self.of and set(vector.directions) - {""} and self.of not in vector.directions:
            raise InputError(f"orthogonalize: {given} has no direction for {self.of}", f"it has {', '.join(vector.directions)}")
        wide = vector.for_site((self.of or next(iter(vector.directions)),)).astype(np.float64)
        norm = float(np.linalg.norm(wide))
        if norm == 0.0 or not np.isfinite(norm):
            raise PassError("orthogonalize: the direction is zero or not finite", "extract it from sets that differ")
        return vector, np.asarray(wide / norm)

    def _writers(self, graph: Graph, width: int) -> list[Written]:
        if not graph.views.blocks():
            raise PassError(f"orthogonalize: {graph.name} has no residual stream", "`actgraph sites MODEL` lists what it has")
        try:
            writers = stream_writers(graph)
        except Refused as refused:
            raise PassError(f"orthogonalize: {refused.place}: {refused.reason}", _HINT) from refused
        for writer in writers:
            size = writer.linear.out_features if writer.linear is not None else _width(writer)
            if size != width:
                raise PassError(
                    f"orthogonalize: the direction has {width} numbers but {writer.name} writes {size}",
                    "use a direction of this model's residual stream",
                )
            reason = stored_refusal(writer.linear) if writer.linear is not None else _array_refusal(writer)
            if reason:
                raise PassError(f"orthogonalize: {reason}", "put it before quantize")
        return writers


def _width(writer: Written) -> object:
    return writer.array.shape[writer.axis] if writer.array is not None and writer.array.shape else None


def _array_refusal(writer: Written) -> str:
    array = writer.array
    assert array is not None
    return "" if array.dtype is not None and array.dtype.is_float else f"{array.name} is stored as {array.dtype}"


def _removed(matrix: Array, unit: Array, amount: float) -> Array:
    """``matrix [width, ...]`` without ``amount`` times its part along ``unit``; float64."""
    return np.asarray(matrix.astype(np.float64) - amount * weight_project(matrix, unit[:, None], "same"))


def _edit_linear(editor: Editor, writer: Written, unit: Array, amount: float) -> dict[str, Any]:
    linear = writer.linear
    assert linear is not None
    weight, bias = linear.read_weight(), linear.read_bias()
    linear.write_weight(editor, _removed(weight, unit, amount).astype(weight.dtype))
    if bias is not None:
        linear.write_bias(editor, _removed(bias, unit, amount).astype(bias.dtype))
    return {"weight": writer.name, "kind": writer.kind, "part along the direction": _share(unit, weight)}


def _edit_array(editor: Editor, writer: Written, unit: Array, amount: float) -> dict[str, Any]:
    array = writer.array
    assert array is not None
    stored = array.graph.read(array)
    columns = np.moveaxis(stored, writer.axis, 0)
    flat = columns.reshape(len(unit), -1)
    edited = np.moveaxis(_removed(flat, unit, amount).reshape(columns.shape), 0, writer.axis)
    editor.set_parameter(array, np.ascontiguousarray(edited).astype(stored.dtype), uses=writer.uses)
    return {"weight": writer.name, "kind": writer.kind, "part along the direction": _share(unit, flat)}


def _share(unit: Array, matrix: Array) -> float:
    """How much of the matrix's norm was along the direction."""
    norm = float(np.linalg.norm(matrix))
    return float(np.linalg.norm(unit @ matrix.astype(np.float64))) / norm if norm else 0.0
