"""Pipeline: a list of passes, in three forms that round-trip: objects, one line of text, and a YAML recipe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actgraph.errors import OptionError
from actgraph.pipeline import text as syntax
from actgraph.pipeline.base import Pass
from actgraph.pipeline.options import build, pass_text


@dataclass(frozen=True)
class Pipeline:
    """Passes in the order in which they run."""

    passes: tuple[Pass, ...] = ()

    def __init__(self, passes: Iterable[Pass] = ()) -> None:
        object.__setattr__(self, "passes", tuple(passes))
        for step in self.passes:
            if not isinstance(step, Pass):
                raise OptionError(f"{step!r} is not a pass", "use Pipeline.parse for text")

    @staticmethod
    def parse(text: str) -> Pipeline:
        """The pipeline that ``text`` describes. Raises OptionError naming the position and the nearest name."""
        return Pipeline(_from_entry(text, entry) for entry in syntax.parse(text))

    @staticmethod
    def of(source: PipelineLike) -> Pipeline:
        """A pipeline from anything that describes one: itself, text, a recipe's path (``Path``), passes, or one pass.

        Raises OptionError for anything else.
        """
        if isinstance(source, Pipeline):
            return source
        if isinstance(source, Pass):
            return Pipeline([source])
        if isinstance(source, str):
            return Pipeline.parse(source)
        if isinstance(source, Path):
            return Pipeline.read(source)
        if isinstance(source, type) and issubclass(source, Pass):
            raise OptionError(f"{source.__name__} is the class of a pass", f"make one: {source.__name__}(...)")
        if isinstance(source, (Mapping, bytes)) or not isinstance(source, Iterable):
            raise OptionError(f"{source!r} is not a pass", "give passes, their text, a Pipeline, or the Path of a recipe")
        return Pipeline(step for item in source for step in Pipeline.of(item).passes)

    @staticmethod
    def from_yaml(text: str, base: str | Path | None = None) -> Pipeline:
        """The pipeline of a recipe's text; paths in it are relative to the folder ``base``. Raises OptionError."""
        from actgraph.pipeline import recipe

        return Pipeline(recipe.read_text(text, None if base is None else Path(base)))

    @staticmethod
    def read(path: str | Path) -> Pipeline:
        """The pipeline of a recipe file. Raises InputError when it cannot be read, OptionError for what is in it."""
        from actgraph.pipeline import recipe

        return Pipeline(recipe.read_file(Path(path)))

    def to_yaml(self, base: str | Path | None = None) -> str:
        """The pipeline as a recipe; paths inside the folder ``base`` become relative to it."""
        from actgraph.pipeline import recipe

        return recipe.write_text(self.passes, None if base is None else Path(base))

    def write(self, path: str | Path) -> Path:
        """Write the recipe to a file (whole or not at all)."""
        from actgraph.pipeline import recipe

        return recipe.write_file(self.passes, Path(path))

    def to_text(self) -> str:
        """One line of canonical text: options equal to their defaults are left out, the others in the order of definition.

        Raises OptionError when an option holds data that has no text form.
        """
        return ", ".join(pass_text(step, strict=True) for step in self.passes)

    def __str__(self) -> str:
        return ", ".join(pass_text(step) for step in self.passes)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    def __getitem__(self, index: slice) -> Pipeline:
        return Pipeline(self.passes[index])

    def __add__(self, other: Pipeline) -> Pipeline:
        return Pipeline(self.passes + other.passes)


PipelineLike = Pipeline | Pass | str | Path | Sequence[Any]


def _from_entry(text: str, entry: syntax.Entry) -> Pass:
    def where(option: str) -> str:
        return f"pipeline text, {syntax.place(text, entry.positions.get(option, entry.position))}: "

    return build(entry.name, entry.options, where)
