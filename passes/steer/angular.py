"""Angular Steering: every token is sent to one angle in a plane.

Source: Angular Steering (2025): ``h' = h - P h + |P h| (cos a b1 + sin a b2)`` with the plane ``b1, b2`` and ``P`` the
projection onto it; adaptive: only tokens with ``h . b1 > t``. The angle is absolute: no angle leaves activations as they are
(for a relative rotation see ``selective``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from actgraph.graph import Graph, Site
from actgraph.graph.graph import Array
from actgraph.passes.steer.edit import Edit
from actgraph.passes.steer.plane import load_plane
from actgraph.passes.steer.plane_edit import RADIANS, PlanePass, finite
from actgraph.passes.steer.runtime_inputs import INPUT

if TYPE_CHECKING:
    from actgraph.graph import Value


class AngularSteer(PlanePass):
    """Send tokens to an angle in the plane, keeping their length there, and so their norm.

    ``angle=input`` makes the angle an optional input of each row (``angular_steer.angle``, degrees). Every angle changes the
    model, so no default of it could leave the model as it is: a second input ``angular_steer.scale`` says whether a row is
    steered (1, or a fraction of the way), and is 0 where nobody gives it: the unsteered model, bit for bit. ``angle=input
    scale=1`` has the angle alone, which is 0 degrees (all the way to the positive set) where nobody gives it.
    """

    name: ClassVar[str] = "angular_steer"
    off: ClassVar[Mapping[str, Any]] = {"scale": 0.0}

    angle: float | Literal["input"] = Field(description="Degrees in the plane, 0 is towards the positive set, or `input`.")
    scale: float | Literal["input"] | None = Field(
        default=None,
        description="How much of the way, 1 is all of it (the default for an angle), or `input` (the default for angle=input).",
    )
    adaptive: bool = Field(default=False, description="Turn only tokens whose part along the first axis exceeds threshold.")
    threshold: float = Field(default=0.0, description="See adaptive; in the activation's own unit.", allow_inf_nan=False)

    _finite = field_validator("angle", "scale")(finite)

    @property
    def _scale(self) -> float | str:
        return self.scale if self.scale is not None else INPUT if self.angle == INPUT else 1.0

    @property
    def at_defaults(self) -> Mapping[str, Any]:
        return {"angle": 0.0} if self.angle == INPUT and self._scale != INPUT else {}

    def reads_rows(self, edit: Edit) -> bool:
        return INPUT in (self.angle, self._scale)

    def hook(self, graph: Graph, site: Site, inputs: Mapping[str, Array]) -> Callable[[Array], Array] | None:
        if INPUT in (self.angle, self._scale):
            return None
        basis, angle, scale = load_plane(self.plane).basis.astype(np.float64), np.deg2rad(float(self.angle)), float(self._scale)

        def edited(rows: Array) -> Array:
            part = rows @ basis
            goal = np.linalg.norm(part, axis=-1, keepdims=True) * np.array([np.cos(angle), np.sin(angle)])
            turned = rows + scale * (goal - part) @ basis.T
            return np.where(part[..., :1] > self.threshold, turned, rows) if self.adaptive else np.asarray(turned)

        return self.at_tokens(edited, inputs)

    def apply(self, edit: Edit, site: Site, width: int) -> str:
        self.check_width(edit, site, width)
        if self._scale == 0:
            return "identity"
        angle: Value | Array
        if isinstance(self.angle, str):
            degrees = edit.of_rows(site, "angular_steer.angle")
            angle = edit.once(("radians", degrees), lambda: edit.editor.insert("mul", [degrees, RADIANS]).output)
        else:
            angle = edit.shared.get("second", np.asarray(np.deg2rad(self.angle % 360), np.float32))
        when: dict[str, str | float] = {"when": "above", "threshold": self.threshold} if self.adaptive else {}
        operands: list[Value | Array | None] = [self.basis(edit), angle, self.mask(edit, site, self._scale)]
        rule = self.insert(edit, site, "actgraph.target_angle", operands, when)
        edit.result.details.append({"site": site.name, "rule": rule, "angle": self.angle, "scale": self._scale})
        return rule
