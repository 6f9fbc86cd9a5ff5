"""The side of actgraph: a pipeline, run once, opened in one or more engines. See ``peers/protocol.py``.

options: ``engine``, ``pipeline`` (text), ``calibrate`` (whether some pass looks at data), ``inputs`` (values of its run-time
inputs). A prompt of several rows is fed to a session of that many rows.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common  # noqa: F401  # finds actgraph
from peers.protocol import Run, rows_of, serve, versions

_KEPT = contextlib.ExitStack()


@functools.cache
def program_of(folder: Path, pipeline: str, calibrate: bool) -> Any:
    import numpy as np

    import actgraph as ag

    graph = ag.load(str(folder))
    if "stories" not in folder.name:
        graph.companions.tokenizer = None  # tokens mean nothing here, and have no text
    corpus = None
    if calibrate and graph.companions.tokenizer is None:
        rows = np.random.default_rng(7).integers(3, graph.companions.config["vocab_size"], (8, 1, 64))
        corpus = [{"input_ids": row} for row in rows]
    return ag.run(graph, pipeline, corpus, parity="none", verify="boundary", reproducer=False).program


def open_runner(folder: Path, options: dict[str, Any], threads: int) -> Run:
    import torch  # noqa: F401  # its threads are set only where it is there

    import actgraph as ag
    from actgraph.runtime.threads import using_threads

    _KEPT.enter_context(using_threads(threads))  # also what sessions of onnxruntime open later
    program = program_of(folder, options["pipeline"], options["calibrate"])
    compiled = ag.compile(program, options["engine"], **options.get("compile", {}))

    inputs = options.get("inputs")

    def run(prompt: list[Any], count: int, made: Callable[[], None]) -> list[int]:
        if rows_of(prompt) is prompt:
            return run_rows(compiled, prompt, count, inputs, made)
        tokens = []
        for step in ag.stream(compiled, prompt, count, stop_at_end=False, inputs=inputs):
            if step.token is not None:
                tokens.append(step.token)
                made()
        return tokens

    pipeline = options["pipeline"].replace(f"{folder}/", "")
    run.note = f"{pipeline}; {versions('torch', 'onnxruntime')}"  # type: ignore[attr-defined]
    return run


def run_rows(compiled: Any, rows: list[list[int]], count: int, inputs: Any, each: Callable[[], None]) -> list[int]:
    """Greedy tokens of all rows at once, those of one row behind the other's."""
    import numpy as np

    from actgraph.graph.context import logits_output

    name = logits_output(compiled.graph)
    session = compiled.session(len(rows), inputs=inputs)
    made = [session.feed(np.array(rows))[name][:, -1].argmax(-1)]
    each()
    for _ in range(count - 1):
        made.append(session.feed(made[-1][:, None])[name][:, -1].argmax(-1))
        each()
    tokens: list[int] = np.stack(made, axis=1).ravel().tolist()
    return tokens


if __name__ == "__main__":
    serve(open_runner)
