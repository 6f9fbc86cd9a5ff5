"""Passes that take a file made from a model: one made from another model is refused, unless it is allowed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from actgraph.errors import InputError, PassError
from actgraph.formats.vectors import SteeringVector, check_origin, is_of_another_model
from actgraph.graph import Graph
from actgraph.pipeline.base import Pass


class OfModel(Pass):
    """A pass whose options name a file with what was found in a model."""

    other_model: Literal["refuse", "allow"] = Field(
        default="refuse", description="What to do with a file that was made from another model."
    )

    def check_model(self, fingerprint: str, graph: Graph, file: str) -> None:
        """Raises PassError where ``file`` was surely made from another model than ``graph`` (see ``is_of_another_model``)."""
        if self.other_model == "refuse" and is_of_another_model(fingerprint, graph):
            raise PassError(
                f"{self.name}: {file} was made from another model than {graph.name}, or before its embeddings were changed",
                "make it from this model, or say other_model=allow",
            )

    def check_origin(self, vector: SteeringVector, graph: Graph, file: str) -> None:
        """The same for a steering vector, of which the tokenizer may be known, too."""
        if self.other_model == "refuse":
            try:
                check_origin(vector, graph, called=file)
            except InputError as error:
                raise PassError(f"{self.name}: {error.message}", f"{error.hint}, or say other_model=allow") from error
