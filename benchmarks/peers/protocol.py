"""How a benchmark talks to a runner in a process, which may be of another environment: JSON lines over stdin and stdout.

The first line that comes in is ``{"folder", "threads", "runners": {name: options}}``; for each name one line goes out,
``{"ready": name, "note": ...}`` or ``{"failed": name, "error": ...}``. Then each ``{"runner", "prompt", "count", "pause"}`` is
answered by ``{"seconds", "tokens"}`` (of each step, that of the prompt first, and what was generated) or ``{"error"}``. With
``pause`` > 0 there are lines ``{"paused": steps}`` before it, after the prompt and then after so many steps each; the runner
waits for a line before it goes on (``{}``, or ``{"stop": true}``: then an error is the answer), and that time counts for none.
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

#: Given a prompt, how many tokens to make, and what to call as soon as each of them is there: the tokens.
Run = Callable[[list[Any], int, Callable[[], None]], list[int]]
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

    def run(prompt: list[int], count: int, made: Callable[[], None]) -> list[int]:
        step.restart()  # type: ignore[attr-defined]
        tokens = [step(prompt)]
        made()
        for _ in range(count - 1):
            tokens.append(step(tokens[-1:]))
            made()
        return tokens

    return run


class Clock:
    """Called after each step: ``seconds`` of each; ``pause`` is called with their number after every ``every`` (0: never)."""

    def __init__(self, every: int, pause: Callable[[int], None]) -> None:
        self.seconds: list[float] = []
        self._every, self._pause = every, pause
        self._last = time.perf_counter()

    def __call__(self) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        if self._every and (len(self.seconds) - 1) % self._every == 0:
            self._pause(len(self.seconds))
            now = time.perf_counter()
        self._last = now


def serve(open_runner: Open) -> None:
    """Answer requests until stdin ends."""
    # What libraries print must not get between the lines.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr

    def answer(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")

    def pause(steps: int) -> None:
        answer(paused=steps)
        line = sys.stdin.readline()
        if not line:
            os._exit(0)  # nobody is there any more
        if json.loads(line).get("stop"):
            raise RuntimeError("the rest is not wanted")

    job = json.loads(sys.stdin.readline())
    runners: dict[str, Run] = {}
    for name, options in job["runners"].items():
        try:
            runners[name] = open_runner(Path(job["folder"]), options, job["threads"])
            answer(ready=name, note=getattr(runners[name], "note", ""))
        except Exception as error:  # whatever goes wrong in a library becomes one line of the report
            answer(failed=name, error=_line(error))
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        count, prompt = request["count"], request["prompt"]
        clock = Clock(request["pause"], pause)
        try:
            tokens = runners[request["runner"]](prompt, count, clock)
            if (steps := len(clock.seconds)) != count or len(tokens) != count * len(rows_of(prompt)):
                raise RuntimeError(f"{len(tokens)} tokens in {steps} steps instead of {count} for each row")
            answer(seconds=clock.seconds, tokens=[int(token) for token in tokens])
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
