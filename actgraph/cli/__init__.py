"""The command line: one file per verb. ``main`` is the console script ``actgraph``.

Exit codes: 0 done, 1 a check failed, 2 bad usage or bad input (one line on standard error says what and how to mend it).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

__all__ = ["main", "run"]


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run ``actgraph *arguments`` and return the exit code. Never raises for what a user can cause, except with --debug."""
    from actgraph.cli.app import run_app

    return run_app(list(arguments))
