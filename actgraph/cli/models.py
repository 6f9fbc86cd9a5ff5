"""Opening what the command line names: models, tokenizers, pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from actgraph.errors import OptionError

if TYPE_CHECKING:
    from actgraph.graph import Graph


def open_model(model: str, tokenizer: Path | None = None, *, quiet: bool = False) -> Graph:
    """Load MODEL, say what was kept static, and attach the tokenizer of ``--tokenizer``."""
    import actgraph as ag
    from actgraph.cli.output import remark, waiting

    with waiting(f"loading {model}", quiet=quiet):
        graph = ag.load(model)
    for note in graph.notes:
        remark(f"note: {note}", quiet=quiet)
    if tokenizer is not None:
        from actgraph.formats.companions import attach_tokenizer

        attach_tokenizer(graph, tokenizer)
    return graph
