"""``actgraph bisect``: which pass breaks the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actgraph.cli import options
from actgraph.cli.options import example

EXAMPLE = example(
    "actgraph bisect stories260k -p 'quantize, sparsify{sparsity=0.9}, cast{dtype=f16}' --perplexity 6",
    "actgraph bisect model.onnx -r recipe.yaml --tolerance 0.01",
)


def bisect(
    model: options.Model,
    passes: options.Pipeline = None,
    recipe: options.Recipe = None,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0.0, help="Good while outputs differ by no more, relative to the largest number of each."),
    ] = None,
    perplexity: Annotated[
        float | None, typer.Option(metavar="BOUND", help="Good while the perplexity of the corpus is no higher.")
    ] = None,
    corpus: options.Corpus = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Write the last good and the first bad graph here, as files that run and as text.",
        ),
    ] = None,
    tokenizer: options.Tokenizer = None,
    dtype: options.Dtype = None,
    seed: options.Seed = 0,
    imports: options.Import = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Find the first pass of a pipeline that breaks the model.

    Without --tolerance or --perplexity a graph is bad when it fails to verify, to run, or to give finite outputs. The
    corpus is what passes calibrate on and what perplexity is measured on. The exit code is 1 when a bad pass is
    found.
    """
    from actgraph.cli.models import check_output_folder, open_model, read_pipeline
    from actgraph.cli.output import dump_json
    from actgraph.pipeline import bisect as module

    pipeline = read_pipeline(passes, recipe)
    if tolerance is not None and perplexity is not None:
        raise typer.BadParameter("give either --tolerance or --perplexity")
    if folder is not None:
        check_output_folder(folder)
    if corpus is not None:
        from actgraph.calibrate.corpora import Corpus

        Corpus.of(corpus)  # a bad file is said before the model is loaded
    graph = open_model(model, tokenizer, dtype=dtype, quiet=quiet)
    if tolerance is not None:
        predicate = module.parity(graph, tolerance, seed=seed)
    elif perplexity is not None:
        predicate = module.perplexity_below(perplexity, corpus, progress=not quiet)
    else:
        predicate = module.runs(graph, seed=seed)
    report = module.bisect(graph, pipeline, predicate, corpus, seed=seed, calibration={"progress": not quiet}, folder=folder)
    if json:
        dump_json(report.to_dict())
    else:
        print(report)
    if report.found:
        raise typer.Exit(1)


command = bisect
