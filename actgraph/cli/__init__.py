"""The command line: one file per verb. ``main`` is the console script ``actgraph``.

Exit codes: 0 done, 1 a check failed, 2 bad usage or bad input (one line on standard error says what and how to mend it).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``actgraph *arguments`` (default: those of this process) and return the exit code.

    Never raises for what a user can cause, except with ``--debug``.
    """
    from actgraph.cli.app import run_app

    return run_app(list(sys.argv[1:] if arguments is None else arguments))
