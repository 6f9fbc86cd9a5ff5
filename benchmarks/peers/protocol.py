"""How a benchmark talks to a runner in a process, which may be of another environment: JSON lines over stdin and stdout.

The first line that comes in is ``{"folder", "threads", "runners": {name: options}}``; for each name one line goes out,
``{"ready": name, "note": ...}`` or ``{"failed": name, "error": ...}``. Then each ``{"runner", "prompt", "count"}`` is answered
by ``{"first", "rest", "tokens"}`` (seconds to the first token, seconds for the others, what was generated) or ``{"error"}``.
A prompt may be several rows of the same length: then the tokens are those of all rows, one row behind the other.
Needs the standard library alone.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Given a prompt and how many tokens to make: seconds to the first token, seconds for the rest, the tokens.
Run = Callable[[list[int], int], tuple[float, float, list[int]]]
#: Opens the Hugging Face folder with the runner's options and a number of threads.
Open = Callable[[Path, dict[str, Any], int], Run]


def versions(*packages: str) -> str:
    """``name version`` of each, for the notes of a run."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


def rows_of(prompt: list[Any]) -> list[list[int]]:
    """A prompt as rows of tokens."""
    return prompt if prompt and isinstance(prompt[0], list) else [prompt]


def greedy(step: Callable[[list[int]], int]) -> Run:
    """A runner from ``step``: takes the tokens that are new and gives the next one; ``step.restart()`` begins a new text."""

    def run(prompt: list[int], count: int) -> tuple[float, float, list[int]]:
        step.restart()  # type: ignore[attr-defined]
        start = time.perf_counter()
        tokens = [step(prompt)]
        first = time.perf_counter()
        for _ in range(count - 1):
            tokens.append(step(tokens[-1:]))
        end = time.perf_counter()
        return first - start, end - first, tokens

    return run


def serve(open_runner: Open) -> None:
    """Answer requests until stdin ends."""
    # What libraries print must not get between the lines.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr

    def answer(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")

    job = json.loads(sys.stdin.readline())
    runners: dict[str, Run] = {}
    for name, options in job["runners"].items():
        try:
            runners[name] = open_runner(Path(job["folder"]), options, job["threads"])
            answer(ready=name, note=getattr(runners[name], "note", ""))
        except Exception as error:  # whatever goes wrong in a library becomes one line of the report
            answer(failed=name, error=_line(error))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            first, rest, tokens = runners[request["runner"]](request["prompt"], request["count"])
            expected = request["count"] * len(rows_of(request["prompt"]))
            if len(tokens) != expected:
                raise RuntimeError(f"{len(tokens)} tokens instead of {expected}")
            answer(first=first, rest=rest, tokens=[int(token) for token in tokens])
        except Exception as error:
            answer(error=_line(error))
    with contextlib.suppress(OSError):
        out.close()
    os._exit(0)  # libraries that hang or crash when they are taken down


def _line(error: Exception) -> str:
    import traceback

    traceback.print_exc()
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
