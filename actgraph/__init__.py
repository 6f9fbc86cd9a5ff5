"""actgraph: the compiler for neural-network activations.

Capture a model as a graph, rewrite it by passes, prove what they did, and ship the result::

    import actgraph as ag

    graph = ag.load("stories260k")  # or a Hugging Face directory, m.onnx, m.pt2, package.module:factory
    graph.sites("blocks.*.mlp.hidden")
    out = ag.run(graph, "sparsify{method=teal sparsity=0.4}, quantize{weights=int8}")
    print(out.report)
    out.graph.save("model.onnx")

Everything here is imported when it is first used; torch, onnxruntime and transformers only by what needs them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actgraph.errors import ActgraphError
from actgraph.graph.executor import install_executor

if TYPE_CHECKING:
    from actgraph.calibrate.corpora import Corpus
    from actgraph.calibrate.perplexity import log_likelihoods, perplexity
    from actgraph.formats import load
    from actgraph.formats.adapters import load_adapter, save_adapter
    from actgraph.formats.trace import trace
    from actgraph.formats.vectors import SteeringVector, load_vector
    from actgraph.graph import Graph, Site
    from actgraph.graph.diff import GraphDiff, diff
    from actgraph.graph.parity import ParityReport, compare, sample_inputs
    from actgraph.graph.program import Driver, Program
    from actgraph.passes.steer.extract import extract_vector
    from actgraph.pipeline import Pass, PassManager, Pipeline, Report, RunResult, register
    from actgraph.pipeline.bisect import bisect
    from actgraph.pipeline.instruments import Instrument
    from actgraph.pipeline.pipeline import PipelineLike
    from actgraph.runtime.generate import Generation, Step, generate, stream
    from actgraph.runtime.prefix import PrefixCache
    from actgraph.runtime.profiling.profile import Profile
    from actgraph.runtime.session import Compiled, Session, compile

__version__ = "0.1.0"

__all__ = [
    "ActgraphError", "Compiled", "Corpus", "Driver", "Generation", "Graph", "GraphDiff", "ParityReport", "Pass", "PassManager",
    "Pipeline", "PrefixCache", "Profile", "Program", "Report", "RunResult", "Session", "Site", "SteeringVector", "Step",
    "bisect", "compare", "compile", "diff", "extract_vector", "generate", "load", "load_adapter", "load_vector",
    "log_likelihoods", "perplexity", "register", "run", "sample_inputs", "save_adapter", "stream", "trace",
]  # fmt: skip

install_executor("fx", "actgraph.runtime.torch_engine:TorchExecutor")
install_executor("onnx", "actgraph.runtime.ort_engine:OrtExecutor")

#: Where the public names are.
_HOMES = {
    "actgraph.calibrate.corpora": ("Corpus",),
    "actgraph.calibrate.perplexity": ("log_likelihoods", "perplexity"),
    "actgraph.formats": ("load",),
    "actgraph.formats.adapters": ("load_adapter", "save_adapter"),
    "actgraph.formats.trace": ("trace",),
    "actgraph.formats.vectors": ("SteeringVector", "load_vector"),
    "actgraph.graph": ("Graph", "Site"),
    "actgraph.graph.diff": ("GraphDiff", "diff"),
    "actgraph.graph.parity": ("ParityReport", "compare", "sample_inputs"),
    "actgraph.graph.program": ("Driver", "Program"),
    "actgraph.passes.steer.extract": ("extract_vector",),
    "actgraph.pipeline": ("Pass", "PassManager", "Pipeline", "Report", "RunResult", "register"),
    "actgraph.pipeline.bisect": ("bisect",),
    "actgraph.runtime.generate": ("Generation", "Step", "generate", "stream"),
    "actgraph.runtime.prefix": ("PrefixCache",),
    "actgraph.runtime.profiling.profile": ("Profile",),
    "actgraph.runtime.session": ("Compiled", "Session", "compile"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'actgraph' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def run(
    graph: Graph | Program,
    pipeline: PipelineLike,
    corpus: Any = None,
    *,
    seed: int = 0,
    verify: str = "boundary",
    parity: str = "auto",
    inputs: Mapping[str, Any] | None = None,
    calibration: dict[str, Any] | None = None,
    reproducer: bool | str | Path = True,
    progress: bool = False,
    instruments: Sequence[Instrument] = (),
) -> RunResult:
    """Run the passes of ``pipeline`` on a copy of ``graph``; the result has ``.graph`` and ``.report``.

    graph: a ``Program`` gives a ``Program`` back, in ``.program``; of several graphs each goes through the pipeline, weights
    stay shared, and there is a report for each, in ``.reports``.
    pipeline: text (``"sparsify{sparsity=0.4}, quantize"``), a recipe's ``Path``, passes, or a ``Pipeline``.
    corpus: what passes calibrate on: a file, a folder of images, texts, or dicts of arrays; default: the packaged sample text.
    seed: of everything that is drawn at random. verify: ``"none"``, ``"boundary"`` or ``"each"`` (pass).
    parity: how far the outputs move is measured after ``"each"`` pass, at the ``"boundary"``, not at all (``"none"``), or
    ``"auto"``: after each unless the model is large; inputs: the arrays that it is measured on (default: drawn).
    calibration: options of the calibration run (``batch_size``, ``max_tokens`` ...). progress: a line a pass, on a terminal.
    reproducer: where a pass that breaks leaves a folder with all that is needed to see it break again (``True``: the default
    place; ``False``: nowhere). instruments: more observers.

    Raises OptionError for a pipeline that does not parse, SiteError and PassError for one that does not fit the graph,
    VerifyError and ParityError when a pass did not keep what it promises.
    """
    from actgraph.pipeline.manager import PassManager

    manager = PassManager(
        pipeline, corpus, verify=verify, parity=parity, seed=seed, progress=progress, instruments=instruments,
        calibration=calibration, inputs=inputs, reproducer=reproducer,
    )  # fmt: skip
    return manager.run(graph)
