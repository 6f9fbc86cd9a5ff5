"""``actgraph bench``: how fast a model runs, and where the time goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from actgraph.cli import options
from actgraph.cli.options import example

if TYPE_CHECKING:
    from actgraph.runtime.profiling.bench import Bench, Stage

EXAMPLE = example(
    "actgraph bench stories260k -p 'quantize{weights=int8}' --tokens 64",
    "actgraph bench model.onnx --profile --by role --trace trace.json  # open it at https://ui.perfetto.dev",
)
#: Groups of a table that are shown without -v.
_TOP = 20


def bench(
    model: options.Model,
    passes: options.Pipeline = None,
    recipe: options.Recipe = None,
    corpus: options.Corpus = None,
    engine: Annotated[
        str, typer.Option(help="auto (by the kind of MODEL), torch, torch.compile, or onnxruntime (exports a torch graph).")
    ] = "auto",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt, drawn at random.")] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens of each round.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that are timed; one more comes first.")] = 5,
    threads: Annotated[int, typer.Option(min=0, help="Threads that compute; 0: one for each processor.")] = 0,
    stream: Annotated[
        float | None,
        typer.Option(metavar="GB/S", min=1e-3, help="How fast memory can be read; else it is measured.", show_default=False),
    ] = None,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Give a language model without a cache one first, as generate does.")
    ] = True,
    kernels: Annotated[bool, typer.Option("--kernels/--no-kernels", help="Run what has kernels of ours with them.")] = True,
    profile: Annotated[
        bool, typer.Option("--profile", help="Profile one more round: time, bytes and kernels, by site.")
    ] = False,
    by: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHAT",
            help="With --profile: a table by site, role (sites without numbers), op, kernel or node; may be repeated.",
            show_default="role and kernel",
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Write the profile as a Chrome trace, too.", show_default=False),
    ] = None,
    imports: options.Import = None,
    dtype: options.Dtype = None,
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Print whole tables, not the slowest rows only.")] = False,
    debug: options.Debug = False,
) -> None:
    """Time a model: tokens per second of prompts and of single tokens, beside what reading memory allows.

    A language model is given a cache where it has none. What has no cache is timed by whole calls. The figures are medians.
    The read limit is how often memory can be read fast enough for the bytes that a call needs, at most: weights and caches; how
    fast that is is measured first, with as many threads. --profile says which node, op and kernel took how long and read how
    much; the profiled round is slower than the others, and not counted.
    """
    import actgraph as ag
    from actgraph.cli.generate import _with_cache
    from actgraph.cli.models import check_output, open_any, read_pipeline
    from actgraph.cli.output import counting, dump_json, remark
    from actgraph.errors import InputError
    from actgraph.runtime.profiling.bench import bench as run_bench
    from actgraph.runtime.profiling.profile import BY
    from actgraph.runtime.session import ENGINES
    from actgraph.runtime.threads import using_threads

    profile = profile or trace is not None or bool(by)
    wanted = by or ["role", "kernel"]
    for name in wanted:
        if name not in BY:
            raise InputError(f"there is no table by {name!r}", f"choose {', '.join(BY)}")
    if engine not in ("auto", *ENGINES):
        raise InputError(f"there is no engine {engine!r}", f"choose auto, {', '.join(ENGINES)}")
    if trace is not None:
        check_output(trace, (".json",))
    pipeline = read_pipeline(passes, recipe) if passes is not None or recipe is not None else None
    program = open_any(model, dtype=dtype, quiet=quiet)
    if pipeline is not None:
        program = ag.run(program, pipeline, corpus, seed=seed, parity="none", reproducer=False).program
    if cache and any(value.name == "input_ids" for value in next(iter(program)).inputs()):
        program = _with_cache(program, quiet)
    with using_threads(threads):
        compiled = ag.compile(program, engine, kernels=kernels)
        with counting("timing", quiet=quiet) as progress:
            found = run_bench(
                compiled, prompt_tokens=prompt_tokens, tokens=tokens, rounds=rounds, seed=seed, profile=profile,
                stream=True if stream is None else 1e9 * stream, progress=progress,
            )  # fmt: skip
    if trace is not None and found.profile is not None:
        found.profile.save_chrome_trace(trace)
        remark(f"trace: {trace}", quiet=quiet)
    if json:
        dump_json({"model": model, "passes": str(pipeline) if pipeline is not None else ""} | found.to_json())
        return
    _print(found, wanted, top=0 if verbose else _TOP)


def _print(found: Bench, tables: list[str], *, top: int) -> None:
    from actgraph.cli.output import table

    threads = f"{found.threads} thread{'s' if found.threads > 1 else ''}"
    print(f"{found.engine}, {threads}, median of {found.rounds} round{'s' if found.rounds > 1 else ''}")
    stream = f"read limit ({found.stream / 1e9:.1f} GB/s)" if found.stream else "read limit (not measured)"
    table(["", "tokens", "ms", "tokens/s", stream, "reached"], [_row(stage) for stage in found.stages])
    if found.first_token is not None:
        print(f"first token after {1e3 * found.first_token:.2f} ms")
    if found.profile is not None:
        for by in tables:
            print(f"\n{found.profile.table(by, top=top)}")
        for note in found.profile.notes:
            print(f"note: {note}")


def _row(stage: Stage) -> tuple[str, ...]:
    rate = f"{stage.rate:,.1f}" if stage.tokens else f"{stage.rate:,.1f} calls/s"
    limit, reached = "", ""
    if stage.limit and stage.name != "prefill":  # which computes rather than reads
        limit, reached = f"{stage.limit:,.0f}", f"{stage.rate / stage.limit:.1%}"
    return stage.name, str(stage.tokens or ""), f"{1e3 * stage.seconds:.3f}", rate, limit, reached


command = bench
