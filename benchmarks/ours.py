"""The side of actgraph: a pipeline, run once, opened in one or more engines. See ``peers/protocol.py``.

options: ``engine``, ``pipeline`` (text), ``calibrate`` (whether some pass looks at data), ``inputs`` (values of its run-time
inputs). A prompt of several rows is fed to a session of that many rows.
"""

from __future__ import annotations

import contextlib
import functools
import time
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

    def run(prompt: list[Any], count: int) -> tuple[float, float, list[int]]:
        if rows_of(prompt) is prompt:
            return run_rows(compiled, prompt, count, inputs)
        start = time.perf_counter()
        steps = ag.stream(compiled, prompt, count, stop_at_end=False, inputs=inputs)
        tokens = [next(steps).token]
        first = time.perf_counter()
        tokens += [step.token for step in steps]
        end = time.perf_counter()
        return first - start, end - first, [token for token in tokens if token is not None]

    run.note = f"{options['pipeline']}; {versions('torch', 'onnxruntime')}"  # type: ignore[attr-defined]
    return run


def run_rows(compiled: Any, rows: list[list[int]], count: int, inputs: Any) -> tuple[float, float, list[int]]:
    """Greedy tokens of all rows at once, those of one row behind the other's."""
    import numpy as np

    from actgraph.graph.context import logits_output

    name = logits_output(compiled.graph)
    start = time.perf_counter()
    session = compiled.session(len(rows), inputs=inputs)
    made = [session.feed(np.array(rows))[name][:, -1].argmax(-1)]
    first = time.perf_counter()
    for _ in range(count - 1):
        made.append(session.feed(made[-1][:, None])[name][:, -1].argmax(-1))
    end = time.perf_counter()
    return first - start, end - first, np.stack(made, axis=1).ravel().tolist()


if __name__ == "__main__":
    serve(open_runner)
