"""What passes that turn activations in a plane share: the file, the sites, and angles that are given at run time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from actgraph.errors import PassError
from actgraph.graph import Graph, Site
from actgraph.graph.graph import Array
from actgraph.passes.places import Selector
from actgraph.passes.steer.edit import Edit, EditPass
from actgraph.passes.steer.plane import SteeringPlane, load_plane
from actgraph.pipeline.base import PassContext, PassResult

if TYPE_CHECKING:
    from actgraph.graph import Value

#: Degrees to radians.
RADIANS = float(np.pi / 180)


def finite(value: float | str | None) -> float | str | None:
    """Refuse infinite and NaN options that may be texts, too."""
    if isinstance(value, float) and not np.isfinite(value):
        raise ValueError("must be a finite number")
    return value


class PlanePass(EditPass):
    """A pass that turns activations in the plane of a file (see ``actgraph.passes.steer.plane.extract_plane``)."""

    site: Selector = Field(default=(), description="Where to turn; default: the sites of the plane's file, see layers.")
    plane: str = Field(
        description="A file with the plane, written by extract_plane(...).save.", json_schema_extra={"path": True}
    )
    layers: Literal["selected", "all"] = Field(
        default="all", description="Which sites of the file: those of the blocks that tell the two sets apart, or all."
    )

    def targets(self, graph: Graph) -> Selector:
        plane = load_plane(self.plane)
        return plane.selected if self.layers == "selected" else tuple(site.name for site in plane.sites)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        plane = load_plane(self.plane)
        self.check_model(plane.model, graph, self.plane)
        if not self.site and plane.sites and not self.targets(graph):
            raise PassError(
                f"{self.name}: no block of {self.plane} tells the two sets apart", "say layers=all, or where with site=..."
            )
        return self.run_at(graph, context, plane=plane)

    def check_width(self, edit: Edit, site: Site, width: int) -> None:
        """Raises PassError for a plane of another width."""
        plane: SteeringPlane = edit.shared["plane"]
        if len(plane.basis) != width:
            raise PassError(
                f"{self.name}: the plane has {len(plane.basis)} channels but {site.name} is {site.type}",
                "use a plane extracted at this site, or set axis",
            )

    def basis(self, edit: Edit, columns: int = 2) -> Value | Array:
        """The first ``columns`` of the basis: an array for the first site, and the parameter made of it for the others."""
        plane: SteeringPlane = edit.shared["plane"]
        kept: Value | Array = edit.shared.get("basis", plane.basis[:, :columns])
        return kept

    def insert(
        self,
        edit: Edit,
        site: Site,
        op: str,
        operands: list[Value | Array | None],
        attributes: Mapping[str, str | float] | None = None,
        *,
        fold: bool = False,
    ) -> str:
        """Put the op at the site as ``Edit.place`` does; the stored operands of a node that stays are those of the next one."""
        node = edit.editor.insert_at(site, op, operands, {**(attributes or {}), **self.attributes}).producer
        assert node is not None
        basis, second = node.operands[1:3]
        rule = edit.settle(site, node, fold=fold)
        if rule == "inserted":
            edit.shared["basis"], edit.shared["second"] = basis, second
        else:  # the operands may have gone with the node
            edit.shared.pop("basis", None)
            edit.shared.pop("second", None)
        return rule

    def mask(self, edit: Edit, site: Site, scale: float | str, on: Value | None = None) -> Value | Array | None:
        """The mask of the clause times the scale, which is a number or the input ``scale``, and ``on`` (0 or 1)."""
        assert site.type.shape is not None
        editor, mask = edit.editor, edit.mask()
        key = ("factor", len(site.type.shape))
        if key not in edit.shared:
            factors: list[Value | Array] = [value for value in (mask, on) if value is not None]
            if isinstance(scale, str):
                factors.append(edit.of_rows(site, f"{self.name}.scale"))
            elif scale != 1:
                factors.append(np.asarray([scale], np.float32))
            product: Value | Array | None = factors[0] if factors else None
            for factor in factors[1:]:
                product = editor.insert("mul", [product, factor]).output
            edit.shared[key] = product
        kept: Value | Array | None = edit.shared[key]
        return kept
