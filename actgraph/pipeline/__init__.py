"""Pipelines: what a pass is, how pipelines are written down, how they run."""

from actgraph.pipeline.base import ROUNDING, UNBOUNDED, Declined, Pass, PassContext, PassResult
from actgraph.pipeline.manager import PassManager, RunResult
from actgraph.pipeline.pipeline import Pipeline
from actgraph.pipeline.registry import all_passes, get_pass_class, pass_names, register
from actgraph.pipeline.report import PassRow, Report

__all__ = [
    "ROUNDING", "UNBOUNDED", "Declined", "Pass", "PassContext", "PassManager", "PassResult", "PassRow", "Pipeline", "Report",
    "RunResult", "all_passes", "get_pass_class", "pass_names", "register",
]  # fmt: skip
