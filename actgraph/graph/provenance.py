"""Where a node comes from: the source model's nodes and module, and the pass that made it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

#: The key under which FX nodes (``meta["custom"]``) and ONNX metadata hold our data; ONNX keys are ``actgraph.<field>``.
KEY = "actgraph"
#: The fields of an ``Origin`` as they are called there.
FIELDS = ("sources", "scope", "pass", "options", "inlined")


class RecordedNote(str):
    """A note of ``Graph.notes`` that was read from a file of ours: who made the file has been told, so it is not told again."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Origin:
    """The origin of one node.

    sources: names of the nodes of the source model that this node stands for (several after a merge).
    scope: module path in the traced model (``model.layers.3.mlp.act_fn``), empty where unknown.
    created_by: the pass that made the node, empty for nodes of the source model.
    options: the pass as pipeline text (``steer{site=blocks.2.resid_post}``), empty for source nodes.
    inlined: the op of ours whose body the node is a part of (``actgraph.clip``), empty for all others.
    """

    sources: tuple[str, ...] = ()
    scope: str = ""
    created_by: str = ""
    options: str = ""
    inlined: str = ""

    def to_dict(self) -> dict[str, str]:
        """The non-empty fields as text, as written into files."""
        fields = {
            "sources": " ".join(self.sources),
            "scope": self.scope,
            "pass": self.created_by,
            "options": self.options,
            "inlined": self.inlined,
        }
        return {key: value for key, value in fields.items() if value}

    @staticmethod
    def from_dict(data: dict[str, str]) -> Origin:
        return Origin(
            tuple(data.get("sources", "").split()),
            data.get("scope", ""),
            data.get("pass", ""),
            data.get("options", ""),
            data.get("inlined", ""),
        )

    def merged(self, other: Origin) -> Origin:
        """The origin of a node that stands for both."""
        return replace(self, sources=tuple(dict.fromkeys(self.sources + other.sources)))


@dataclass(frozen=True)
class PassRecord:
    """One line of a graph's history: which pass ran, with what options, and what it counted."""

    name: str
    text: str
    counts: dict[str, int] = field(default_factory=dict)
    version: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "text": self.text, "counts": self.counts, "version": self.version}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> PassRecord:
        return PassRecord(data["name"], data["text"], dict(data.get("counts", {})), data.get("version", ""))
