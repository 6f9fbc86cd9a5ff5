"""``actgraph run``: a pipeline on a model, written to a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actgraph.cli import options
from actgraph.cli.options import example

if TYPE_CHECKING:
    from actgraph.graph import Graph
    from actgraph.graph.program import Program
    from actgraph.pipeline import Pipeline

EXAMPLE = example(
    "actgraph run stories260k -p 'sparsify{method=teal sparsity=0.4}, quantize{weights=int8}' -o small.onnx",
    "actgraph run model.onnx -r recipe.yaml --corpus texts.txt --inline all -o out.onnx",
    "actgraph run stories260k -p 'quantize{weights=int8}, kv_cache' -o cached  # a folder: prefill.onnx, decode.onnx",
)
SUFFIXES = (".onnx", ".pt2")


def run(
    model: options.Model,
    passes: options.Pipeline = None,
    recipe: options.Recipe = None,
    output: options.Output = None,
    corpus: options.Corpus = None,
    inline: options.Inline = "none",
    external_data: options.ExternalData = False,
    genai: options.Genai = False,
    tokenizer: options.Tokenizer = None,
    dtype: options.Dtype = None,
    seed: options.Seed = 0,
    verify: Annotated[
        str, typer.Option(metavar="WHEN", help="Check the graph's invariants: none, boundary or each (pass).")
    ] = "boundary",
    parity: Annotated[
        str, typer.Option(metavar="WHEN", help="Measure how far the outputs move: none, boundary, each (pass), or auto.")
    ] = "auto",
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as JSON.")] = None,
    reproducer: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="If a pass fails, leave a new folder in DIR with all that shows it again."),
    ] = None,
    dry_run: options.DryRun = False,
    imports: options.Import = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Run passes on a model and write the result.

    A pass that makes several graphs of one (kv_cache) gives a folder: a manifest, one .onnx file each, and the weights once.
    The report says what each pass did. Calibration data is the packaged sample text unless --corpus is given. -v also
    lists every place that a pass changed.
    """
    from actgraph.cli.models import check_output, check_output_folder, check_save, open_any, read_pipeline
    from actgraph.formats import kind_of

    pipeline = read_pipeline(passes, recipe)
    if output is None and not dry_run:
        raise typer.BadParameter("say where to write the result: -o OUT.onnx or -o OUT.pt2 (or --dry-run)")
    if output is not None:
        several = kind_of(model) == "program" or any(step.makes_program for step in pipeline)
        check_save(output, SUFFIXES, inline=inline, external_data=external_data, several=several, genai=genai)
    if report is not None:
        check_output(report, (".json",))
    if reproducer is not None:
        check_output_folder(reproducer)
    if corpus is not None:
        from actgraph.calibrate.corpora import Corpus

        Corpus.of(corpus)  # a bad file is said before the model is loaded
    program = open_any(model, tokenizer, dtype=dtype, quiet=quiet)
    if dry_run:
        _plan(next(iter(program)), pipeline, corpus, json=json)
        return
    assert output is not None
    from json import dumps, loads

    import actgraph as ag
    from actgraph.cli.output import dump_json, write_text

    result = ag.run(
        program,
        pipeline,
        corpus,
        seed=seed,
        verify=verify,
        parity=parity,
        reproducer=reproducer if reproducer is not None else True,
        progress=not quiet,
        calibration={"progress": not quiet},
    )
    made = with_cache(result.program) if genai else result.program
    save(made, output, inline=inline, external_data=external_data, genai=genai, quiet=quiet)
    reports = {name: loads(each.to_json()) for name, each in result.reports.items()}
    single = len({id(each) for each in result.reports.values()}) == 1
    facts = loads(result.report.to_json()) if single else reports
    if report is not None:
        write_text(report, dumps(facts, indent=2) + "\n")
    if json:
        dump_json({"output": str(output), "report" if single else "reports": facts})
        return
    if not quiet:
        for name, each in [("", result.report)] if single else list(result.reports.items()):
            print(f"# {name}\n{each}" if name else each)
            if verbose:
                print("\n" + each.details())
    print(output)


def with_cache(program: Program) -> Program:
    """``program`` with a growing cache in one graph, if it has no state yet. Raises PassError where it cannot have one."""
    import actgraph as ag

    return (
        program
        if program.slots
        else ag.Program.of(ag.run(program.graph, "kv_cache{graphs=combined}", parity="none", reproducer=False).graph)
    )


def save(program: Program, path: Path, *, inline: str, external_data: bool, genai: bool = False, quiet: bool = False) -> None:
    """Write ``program`` as the suffix of ``path`` says (a folder without one), with a note of what cannot run the file.

    ``check_save`` has refused what does not go together.
    """
    import warnings

    from actgraph.cli.output import remark

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        if genai:
            from actgraph.formats.genai import save_genai

            save_genai(program.graph, path)
        elif path.suffix == ".onnx":
            program.save(path, inline=inline, external_data=external_data or None)  # None: as the size asks for
        else:
            program.save(path)
    for warning in told:
        if warning.category is UserWarning:
            remark(f"note: {warning.message}", quiet=quiet)


def _plan(graph: Graph, pipeline: Pipeline, corpus: str | None, *, json: bool) -> None:
    """What ``run`` would do, as far as it can be known without running: the passes, and the statistics that they need first."""
    from actgraph.calibrate.corpora import Corpus
    from actgraph.cli.output import dump_json
    from actgraph.errors import ActgraphError

    steps: list[dict[str, Any]] = []
    for step in pipeline:
        try:
            needs: int | str = len(step.requests(graph))
        except ActgraphError as error:
            needs = f"unknown before the passes in front of it ran: {error}"
        steps.append({"pass": str(step), "statistics": needs})
    if json:
        dump_json({"model": repr(graph), "passes": steps, "recipe": pipeline.to_yaml()})
        return
    print(repr(graph))
    for number, row in enumerate(steps, 1):
        need = f"  (needs {row['statistics']} statistics)" if row["statistics"] else ""
        print(f"  {number}. {row['pass']}{need}")
    if any(row["statistics"] for row in steps):
        print(f"calibration corpus: {Corpus.of(corpus).name}")
    print("nothing was run or written")


command = run
