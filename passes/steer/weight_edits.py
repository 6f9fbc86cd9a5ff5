"""Edits of stored weights: rank-1 updates, in the weight or beside it, and projections of updates.

A rank-1 update ``W + u k^T`` of a linear ``y = W x + b`` is merged into the weight, or kept as a branch ``y + (x . k) u`` of
two nodes, which leaves the weight as it is (quantized, shared, read-only) and can be off, bit for bit. All arithmetic is
float64 and rounded once, when the weight is stored.

Sources: Steer2Edit: From Activation Steering to Component-Level Editing, 2026 (rank-1 updates); Safety Subspaces are Not
Distinct, 2025 (projections).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from actgraph.errors import InputError, OptionError, PassError
from actgraph.formats.atomic import atomic_file
from actgraph.graph import Editor, Graph, Value
from actgraph.graph.context import token_dims
from actgraph.graph.graph import Array
from actgraph.graph.views import Linear
from actgraph.graph.where_mask import where_mask
from actgraph.passes.linears import input_value
from actgraph.passes.steer.runtime_inputs import per_token, row_input
from actgraph.pipeline.base import Declined, PassResult

Mode = Literal["merge", "side_branch"]
Projection = Literal["same", "orth", "opp"]
FORMAT = "actgraph.rank_one_edits/1"


@dataclass(frozen=True)
class RankOneEdit:
    """``W + outer(write, read)``: inputs are measured along ``read [in_features]``, and ``write [out_features]`` is added."""

    write: Array
    read: Array

    @property
    def norm(self) -> float:
        """The Frobenius norm of the update."""
        return float(np.linalg.norm(self.write) * np.linalg.norm(self.read))

    def update(self) -> Array:
        """The update as a matrix, ``[out_features, in_features]`` float64."""
        return np.outer(self.write.astype(np.float64), self.read.astype(np.float64))


# --- one linear -------------------------------------------------------------------------------------------------------


def stored_refusal(linear: Linear) -> str:
    """Why the stored weight cannot be replaced by an edited one; empty when it can."""
    if linear.matrix is None or not linear.weight.is_parameter:
        return f"its weight {linear.weight.name} is stored as codes"
    if linear.weight.dtype is None or not linear.weight.dtype.is_float:
        return f"its weight {linear.weight.name} is {linear.weight.dtype}"
    return ""


def merge_refusal(linear: Linear) -> str:
    """Why an update cannot be added to the stored weight; empty when it can."""
    reason = stored_refusal(linear)
    return f"{reason}: keep the edit beside it with mode=side_branch" if reason else ""


def branch_refusal(linear: Linear) -> str:
    """Why no branch can be put beside the linear; empty when one can."""
    x, y = input_value(linear), linear.output
    if x.shape is None or y.shape is None or x.shape[:-1] != y.shape[:-1]:
        return f"its input {x.type} and output {y.type} have different tokens"
    return ""


def check_sizes(linear: Linear, edit: RankOneEdit, name: str) -> None:
    """Raises PassError when the edit is not of the linear's size or not finite."""
    if (len(edit.write), len(edit.read)) != (linear.out_features, linear.in_features):
        raise PassError(
            f"the edit of {name} is [{len(edit.write)}, {len(edit.read)}], and its weight is "
            f"[{linear.out_features}, {linear.in_features}]",
            "use an edit that was made for this model",
        )
    if not (np.isfinite(edit.write).all() and np.isfinite(edit.read).all()):
        raise PassError(f"the edit of {name} holds NaN or infinite values", "make it again")


def merge(editor: Editor, linear: Linear, edit: RankOneEdit) -> dict[str, float]:
    """Add the update to the stored weight of this linear; what it is and what rounding left of it.

    ``update``: Frobenius norm. ``of weight``: that over the weight's. ``rounding``: the norm of what the weight's element type
    lost, over the update's (1e-6 in float32; in bfloat16 an update much smaller than the weight is mostly lost).
    """
    stored = linear.read_weight()
    weight = stored.astype(np.float64)
    wanted = weight + edit.update()
    with np.errstate(over="ignore"):
        rounded = wanted.astype(stored.dtype)
    if not np.isfinite(rounded.astype(np.float64)).all():
        raise PassError(f"the edited weight {linear.weight.name} is not finite in {linear.weight.dtype}", "use a smaller scale")
    linear.write_weight(editor, rounded)
    lost = float(np.linalg.norm(rounded.astype(np.float64) - wanted))
    return {**_sizes(edit, weight), "rounding": lost / edit.norm if edit.norm else 0.0}


def insert_branch(editor: Editor, linear: Linear, edit: RankOneEdit, mask: Value | None = None) -> dict[str, float]:
    """Add ``(x . read) write`` to the output: a product and a shift. mask: which tokens, as ``actgraph.shift`` takes it.

    Tokens where the mask is 0 keep the output bit for bit.
    """
    x, y = input_value(linear), linear.output
    x_dtype, y_dtype = (v.dtype.numpy if v.dtype is not None else np.dtype(np.float32) for v in (x, y))
    along = editor.insert("matmul", [x, edit.read.astype(x_dtype)]).output
    node = editor.insert("actgraph.shift", [y, edit.write.astype(y_dtype), along, mask], after=along.producer)
    editor.redirect(y, node.output)
    return _sizes(edit, linear.read_weight().astype(np.float64))


def _sizes(edit: RankOneEdit, weight: Array) -> dict[str, float]:
    norm = float(np.linalg.norm(weight))
    return {"update": edit.norm, "of weight": edit.norm / norm if norm else float("inf")}


@dataclass(frozen=True)
class Place:
    """A linear to edit, and the site that names it."""

    name: str
    linear: Linear


def apply_edits(
    graph: Graph, editor: Editor, edits: Sequence[tuple[Place, RankOneEdit]], result: PassResult, *, mode: Mode, where: str,
    scale: float | str, by: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """Make each edit, ``scale`` times, and count and decline in ``result``; a row for each that was made: the manifest.

    ``scale = "input"`` makes the branches follow an input of the graph called ``{by}.scale``. Raises OptionError for what only
    branches can do, PassError for edits of other sizes.
    """
    if mode == "merge" and (where.strip() != "all" or scale == "input"):
        raise OptionError(f"{by}: merged weights act on every token, always", "use mode=side_branch for where and scale=input")
    for place, edit in edits:
        check_sizes(place.linear, edit, place.name)
    if scale == 0:
        result.counts["identity"] += len(edits)
        return []
    refusals = [merge_refusal(place.linear) if mode == "merge" else branch_refusal(place.linear) for place, _ in edits]
    result.declined += [Declined(place.name, why) for (place, _), why in zip(edits, refusals, strict=True) if why]
    chosen = [pair for pair, why in zip(edits, refusals, strict=True) if not why]
    mask = branch_mask(editor, graph, where, scale, f"{by}.scale") if chosen and mode == "side_branch" else None
    rows = []
    for place, edit in chosen:
        dims = (place.linear.output.shape or ())[:-1]
        if mask is not None and dims != token_dims(graph):
            result.declined.append(Declined(place.name, f"where and scale=input are about tokens; it has {list(dims)}"))
            continue
        factor = 1.0 if isinstance(scale, str) else scale
        scaled = RankOneEdit(edit.write.astype(np.float64) * factor, edit.read.astype(np.float64))
        found = merge(editor, place.linear, scaled) if mode == "merge" else insert_branch(editor, place.linear, scaled, mask)
        result.counts["merged" if mode == "merge" else "branches"] += 1
        rows.append({"site": place.name, "weight": place.linear.weight.name, "mode": mode, **found})
    return rows


def branch_mask(editor: Editor, graph: Graph, where: str, scale: float | str, name: str) -> Value | None:
    """The mask of all branches of one pass: the tokens of ``where``, times a run-time input where ``scale`` is ``"input"``.

    The input, ``[batch]`` and called ``name``, is optional; without it the branches are off. ``None``: always on, everywhere.
    """
    mask = where_mask(editor, graph, where)
    if scale != "input":
        return mask
    factor = per_token(editor, row_input(editor, graph, name), 2)
    return factor if mask is None else editor.insert("mul", [mask, factor]).output


# --- projections ------------------------------------------------------------------------------------------------------


def weight_project(update: Array, basis: Array, mode: Projection) -> Array:
    """A part of an update of a weight (``[out, in]`` or ``[out]``), with ``basis [out, r]`` of orthonormal columns; float64.

    ``same``: the part in the span of the basis, ``L L^T U``. ``orth``: what is left, ``U - L L^T U`` (with the weight itself as
    update: directional ablation of what it writes). ``opp``: ``- L L^T U``.
    """
    if mode not in get_args(Projection):
        raise OptionError(f"a projection cannot be {mode!r}", f"one of {', '.join(get_args(Projection))}")
    wide, columns = update.astype(np.float64), basis.astype(np.float64)
    if columns.ndim != 2 or not wide.ndim or columns.shape[0] != wide.shape[0]:
        raise InputError(f"a basis {list(basis.shape)} does not fit an update {list(update.shape)}", "give [out, rank]")
    if not np.allclose(columns.T @ columns, np.eye(columns.shape[1]), atol=1e-6):
        raise InputError("the columns of the basis are not orthonormal", "orthonormalise them first (numpy.linalg.qr)")
    inside = columns @ (columns.T @ wide)
    return np.asarray(wide - inside if mode == "orth" else inside if mode == "same" else -inside)


# --- files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankOneEdits:
    """Rank-1 edits by the site that names their linear: its output, or its input where nothing else reads that.

    model: fingerprint of the model that they were made for. method, notes: how they were made.
    """

    edits: Mapping[str, RankOneEdit]
    model: str = ""
    method: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file: two float32 vectors for each edit, ``{site}:write`` and ``{site}:read``, and a manifest."""
        from safetensors.numpy import save

        tensors: dict[str, Array] = {}
        for name, edit in self.edits.items():
            tensors[f"{name}:write"] = np.ascontiguousarray(edit.write, np.float32)
            tensors[f"{name}:read"] = np.ascontiguousarray(edit.read, np.float32)
        manifest = {"format": FORMAT, "model": self.model, "method": self.method, "notes": dict(self.notes)}
        with atomic_file(Path(path)) as stream:
            stream.write(save(tensors, metadata={"actgraph": json.dumps(manifest, sort_keys=True)}))
        return Path(path)


def load_edits(path: str | Path) -> RankOneEdits:
    """Read what ``RankOneEdits.save`` wrote. Raises InputError for a missing, corrupt or unsuitable file."""
    tensors, manifest = read_safetensors(path, FORMAT, "rank-1 edits")
    names = dict.fromkeys(key.rpartition(":")[0] for key in tensors)
    if not names or set(tensors) != {f"{name}:{part}" for name in names for part in ("write", "read")}:
        raise InputError(f"{path} holds no rank-1 edits", "each is two vectors, SITE:write and SITE:read")
    if any(tensor.ndim != 1 for tensor in tensors.values()):
        raise InputError(f"{path} holds no rank-1 edits", "its tensors must be 1-D")
    edits = {name: RankOneEdit(tensors[f"{name}:write"], tensors[f"{name}:read"]) for name in sorted(names)}
    return RankOneEdits(edits, str(manifest.get("model", "")), str(manifest.get("method", "")), manifest.get("notes", {}))


def read_safetensors(path: str | Path, form: str, what: str) -> tuple[dict[str, Array], dict[str, Any]]:
    """The finite tensors of a file of ours and its manifest. Raises InputError for any other file."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise InputError(f"there is no file {path} with {what}")
    try:
        with safe_open(str(path), framework="numpy") as file:
            manifest = json.loads((file.metadata() or {}).get("actgraph", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a safetensors file: {error}", f"{what} are safetensors files") from error
    if not isinstance(manifest, dict) or manifest.get("format") != form:
        raise InputError(f"{path} holds no {what}", f"its manifest must say {form}")
    if not all(np.isfinite(np.asarray(t, np.float64)).all() for t in tensors.values()):
        raise InputError(f"{path} holds NaN or infinite values", "make it again")
    return tensors, manifest
