"""Selective Steering: a rotation in a plane that keeps norms, in the blocks that tell the two sets apart.

Source: Selective Steering: Norm-Preserving Control Through Discriminative Layer Selection (2026): ``h' = h - P h + V h`` with
``P = b1 b1' + b2 b2'`` and ``V = cos t P + sin t (b2 b1' - b1 b2')``. Relative: 0 degrees leave activations as they are, and
angles add up. The plane and the blocks come from ``actgraph.passes.steer.plane.extract_plane``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from actgraph.errors import OptionError
from actgraph.graph import Graph, Site
from actgraph.graph.graph import Array
from actgraph.ops.dtypes import DType
from actgraph.passes.steer.edit import Edit, FoldingEditPass
from actgraph.passes.steer.plane import load_plane
from actgraph.passes.steer.plane_edit import RADIANS, PlanePass, finite
from actgraph.passes.steer.runtime_inputs import INPUT

if TYPE_CHECKING:
    from actgraph.graph import Value


class SelectiveSteer(PlanePass, FoldingEditPass):
    """Turn tokens in the plane by an angle, at the outputs of the norms of the blocks that tell the two sets apart.

    ``angle=input`` makes the angle an optional input of each row (``selective_steer.angle``, degrees; 0 where nobody gives it:
    the unsteered model, bit for bit). ``mode=reflect`` mirrors at the first axis of the plane, ``h - 2 s (h . b1) b1``, and
    ``mode=ablate`` takes it out, ``h - s (h . b1) b1``; there ``scale=input`` gives ``s`` at run time
    (``selective_steer.scale``).

    The map is linear, and the outputs of norms are read by linears alone: it folds into their weights and costs nothing (see
    ``fold_edits``; ``unfold`` takes it out). Where only some tokens turn, or the angle is given at run time, a node stays.
    """

    name: ClassVar[str] = "selective_steer"
    off: ClassVar[Mapping[str, Any]] = {"scale": 0.0}

    layers: Literal["selected", "all"] = Field(
        default="selected", description="Which sites of the file: those of the blocks that tell the two sets apart, or all."
    )
    mode: Literal["rotate", "reflect", "ablate"] = Field(default="rotate", description="What is done in the plane.")
    angle: float | Literal["input"] | None = Field(
        default=None,
        description="mode=rotate: degrees, from the first axis towards the second, or `input`.",
    )
    scale: float | Literal["input"] = Field(
        default=1.0, description="Factor on the angle (rotate) or on the change (reflect, ablate); 0 is the identity."
    )

    _finite = field_validator("angle", "scale")(finite)

    @model_validator(mode="after")
    def _consistent(self) -> SelectiveSteer:
        if (self.angle is None) == (self.mode == "rotate"):
            if self.mode == "rotate":
                raise OptionError("selective_steer needs an angle", "say angle=30 (degrees)")
            raise OptionError(f"selective_steer has no angle with mode={self.mode}", "leave out angle")
        if self.mode == "rotate" and self.scale == INPUT:
            raise OptionError("selective_steer: a rotation is given at run time by its angle", "say angle=input")
        return self

    def reads_rows(self, edit: Edit) -> bool:
        return INPUT in (self.angle, self.scale)

    def hook(self, graph: Graph, site: Site, inputs: Mapping[str, Array]) -> Callable[[Array], Array] | None:
        if INPUT in (self.angle, self.scale):
            return None
        basis, scale = load_plane(self.plane).basis.astype(np.float64), float(self.scale)
        if self.mode == "rotate":
            assert self.angle is not None
            angle = np.deg2rad(float(self.angle) * scale)
            turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
            return self.at_tokens(lambda rows: rows + (rows @ basis) @ (turn - np.eye(2)) @ basis.T, inputs)
        first, factor = basis[:, :1], scale * (2 if self.mode == "reflect" else 1)
        return self.at_tokens(lambda rows: rows - factor * (rows @ first) @ first.T, inputs)

    def apply(self, edit: Edit, site: Site, width: int) -> str:
        self.check_width(edit, site, width)
        if self.scale == 0:
            return "identity"
        on: Value | None = None
        matrix: Value | Array
        if self.mode != "rotate":
            matrix = edit.shared.get("second", np.array([[-2.0 if self.mode == "reflect" else -1.0]], np.float32))
        elif isinstance(self.angle, str):
            matrix, on = self._given(edit, edit.of_rows(site, "selective_steer.angle"))
        else:
            assert self.angle is not None and not isinstance(self.scale, str)
            turn = turning(self.angle * self.scale)
            if not turn.any():
                return "identity"
            matrix = edit.shared.get("second", turn)
        mask = self.mask(edit, site, 1.0 if self.mode == "rotate" else self.scale, on)
        columns = 2 if self.mode == "rotate" else 1
        rule = self.insert(edit, site, "actgraph.lowrank_map", [self.basis(edit, columns), matrix, mask], fold=self.fold)
        edit.result.details.append({"site": site.name, "rule": rule, "angle": self.angle, "scale": self.scale})
        return rule

    def _given(self, edit: Edit, degrees: Value) -> tuple[Value, Value]:
        """The matrices of the angle ``degrees [batch, 1]``, ``[batch, 1, 2, 2]``, and where it is not 0, ``[batch, 1]``."""
        assert not isinstance(self.scale, str) and degrees.shape is not None
        if ("matrix", degrees) not in edit.shared:
            editor, tokens = edit.editor, len(degrees.shape)
            radians = editor.insert("mul", [degrees, RADIANS * self.scale]).output
            square = editor.insert("reshape", [radians], {"shape": (-1, *[1] * (tokens + 1))}).output
            cosine = editor.insert("sub", [editor.insert("cos", [square]).output, 1.0]).output
            along = editor.insert("mul", [cosine, np.eye(2, dtype=np.float32)]).output
            across = editor.insert("mul", [editor.insert("sin", [square]).output, _ACROSS]).output
            matrices = editor.insert("add", [along, across]).output
            turned = editor.insert("cast", [degrees], {"to": DType.BOOL}).output
            edit.shared["matrix", degrees] = matrices, editor.insert("cast", [turned], {"to": DType.F32}).output
        found: tuple[Value, Value] = edit.shared["matrix", degrees]
        return found


_ACROSS = np.array([[0, 1], [-1, 0]], np.float32)


def turning(degrees: float) -> Array:
    """``(R - I)^T`` of the rotation by ``degrees``, ``[2, 2]`` float32: what ``lowrank_map`` does to rows in the plane."""
    angle = np.deg2rad(degrees % 360)
    matrix: Array = (np.cos(angle) - 1) * np.eye(2) + np.sin(angle) * _ACROSS
    return matrix.astype(np.float32)
