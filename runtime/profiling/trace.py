"""A profile in the Trace Event Format of Chrome, which Perfetto reads as well."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actgraph.formats.atomic import atomic_file
from actgraph.runtime.profiling.record import OUTSIDE

if TYPE_CHECKING:
    from actgraph.runtime.profiling.profile import Profile

#: The one process, and its rows: steps above the nodes executed in them.
PROCESS, STEPS, NODES = 1, 1, 2
_MICROSECONDS = 1e-3


def trace(profile: Profile) -> dict[str, Any]:
    """The JSON object: complete events (phase X) with ``ts`` and ``dur`` in microseconds, and names (phase M)."""
    other = {"engine": profile.engine, "threads": profile.threads, "stream_bytes_per_second": profile.stream}
    return {"traceEvents": list(_events(profile)), "displayTimeUnit": "ms", "otherData": other}


def _events(profile: Profile) -> Iterator[dict[str, Any]]:
    for event, thread, name in (
        ("process_name", STEPS, f"actgraph, {profile.engine}"),
        ("thread_name", STEPS, "steps"),
        ("thread_name", NODES, "nodes"),
    ):
        yield {"ph": "M", "pid": PROCESS, "tid": thread, "name": event, "args": {"name": name}}
    start = min((step.begin for step in profile.steps), default=0)

    def complete(thread: int, name: str, category: str, begin: int, time: int, args: dict[str, Any]) -> dict[str, Any]:
        return {
            "ph": "X", "pid": PROCESS, "tid": thread, "name": name, "cat": category, "args": args,
            "ts": (begin - start) * _MICROSECONDS, "dur": time * _MICROSECONDS,
        }  # fmt: skip

    for number, step in enumerate(profile.steps):
        about: dict[str, Any] = {"step": number, "tokens": step.tokens}
        about |= {f"{name}_us": time * _MICROSECONDS for name, time in (*step.rest.items(), (OUTSIDE, step.outside))}
        yield complete(STEPS, step.stage, "step", step.begin, step.time, about)
        for call in step.calls:
            node = call.node
            about = {"site": node.site, "op": node.op, "kernel": node.kernel, "stage": step.stage, "step": number}
            about |= {"weights": call.bytes.weights, "caches": call.bytes.caches, "activations": call.bytes.activations}
            about["bytes"] = call.bytes.all
            if call.time and call.bytes.all:
                about["GB/s"] = float(f"{call.bytes.all / call.time:.4g}")
            about |= {"why": node.why} if node.why else {}
            about |= {"bytes_are": "at most"} if node.at_most else {}
            yield complete(NODES, node.name, node.kernel, call.begin, call.time, about)


def save(profile: Profile, path: Path) -> Path:
    """Write the trace, whole or not at all."""
    text = json.dumps(trace(profile), allow_nan=False)
    with atomic_file(path) as file:
        file.write(text.encode())
    return path
