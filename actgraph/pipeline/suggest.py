"""Names near to a misspelt one, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint that names the closest of ``names``, or all of them when none is close."""
    everything = sorted(names)
    close = difflib.get_close_matches(name, everything, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    return "there are " + ", ".join(everything) if everything else "there are none"
