"""``actgraph verify``: do two models agree, and does a pipeline keep what it promises."""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actgraph.cli import options
from actgraph.cli.options import example

if TYPE_CHECKING:
    from actgraph.graph import Graph
    from actgraph.graph.program import Program
    from actgraph.pipeline import Pass, PassManager, Pipeline

EXAMPLE = example(
    "actgraph verify stories260k stories.onnx",
    "actgraph verify stories260k -p 'steer{vector=happy.safetensors scale=2}, quantize'",
)

#: How much of what a pass declares may come back between two engines when the pass makes quantizers of activations. Engines
#: differ in the last place, and a number that lies on the border of two codes then gets the other one: that moves it by a whole
#: step, as much as quantizing it did. What the pass declares is for all numbers at once, and few lie on one. Measured: none
#: to a few codes a run, which move the logits of the packaged model by up to 0.023 where ``quantize`` declares 1.
FLIPPED_CODES = 1 / 20

#: What rounds to codes, in either dialect.
_QUANTIZERS = frozenset({"actgraph.fake_quant", "actgraph.quantize", "onnx.QuantizeLinear", "onnx.DynamicQuantizeLinear"})


@dataclass(frozen=True)
class Check:
    """One comparison. ``change`` is the largest relative difference of any output; ``None`` where nothing could be compared.

    checked: false where nothing was learned, which is not ok (or, where the check does not apply, is). seconds: how long it
    took.
    """

    what: str
    ok: bool
    change: float | None = None
    detail: str = ""
    checked: bool = True
    seconds: float | None = None

    @property
    def verdict(self) -> str:
        """In words, for the table."""
        if not self.checked:
            return "-" if self.ok else "NOT CHECKED"
        return "ok" if self.ok else "FAILED"


def verify(
    model: options.Model,
    other: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="Another model that should give the same outputs.", show_default=False),
    ] = None,
    passes: options.Pipeline = None,
    recipe: options.Recipe = None,
    corpus: options.Corpus = None,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="How far outputs may differ, relative to the largest number of each.")
    ] = 1e-4,
    inputs: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Compare on the arrays of this .npz file, by input name.")
    ] = None,
    tokenizer: options.Tokenizer = None,
    seed: options.Seed = 0,
    imports: options.Import = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Compare two models, or check a pipeline on one. The exit code is 1 when a check fails.

    With two models their outputs are compared on drawn inputs of several sizes (or on --inputs); where one has a cache,
    also the logits of each token when they are fed one by one. With passes, the pipeline runs, each pass must move the
    outputs by no more than it declares, each that has an off setting must be the identity there and each that adds inputs
    where nobody gives them, bit for bit, each that has another way to compute the same must agree with it, an edit of
    activations must equal its formula in Python functions at its sites, and the result must give the same outputs when
    exported to ONNX with its functions kept and inlined. Of a causal language model rows of a padded batch must equal rows
    alone, padding on the left that on the right, tokens behind a cache those without, and a prompt in chunks the whole one.
    The seconds that each check took stand beside it, and last what the passes cost. Where a pass quantizes activations,
    exports may differ by a twentieth of what it declares, because rounding in the last place flips single codes. A check in
    which no numbers could be compared counts as failed.
    """
    from actgraph.cli.models import open_any, read_pipeline
    from actgraph.cli.output import dump_json, table

    if other is not None and (passes is not None or recipe is not None):
        raise typer.BadParameter("give either a second model or passes")
    pipeline = read_pipeline(passes, recipe) if other is None else None
    program = open_any(model, tokenizer, quiet=quiet)
    arrays = None if inputs is None else [_read_inputs(inputs)]
    if other is not None:
        right = open_any(other, quiet=quiet)
        checks = list(check_programs(f"{model} = {other}", program, right, arrays, tolerance, seed))
    else:
        assert pipeline is not None
        checks = list(_timed(check_pipeline(program, pipeline, corpus, arrays, tolerance, seed=seed, quiet=quiet)))
    ok = all(check.ok for check in checks)
    if json:
        dump_json({"ok": ok, "tolerance": tolerance, "checks": [asdict(check) for check in checks]})
    elif not quiet:
        rows = [(c.verdict, c.what, _shown(c.change, ".2g"), _shown(c.seconds, ".1f"), c.detail) for c in checks]
        table(["", "check", "difference", "seconds", ""], rows)
    if not ok:
        raise typer.Exit(1)


def _shown(number: float | None, form: str) -> str:
    return "" if number is None else format(number, form)


def _timed(checks: Iterator[Check]) -> Iterator[Check]:
    """Each check with the seconds since the former one, where it does not say how long it took."""
    begun = time.perf_counter()
    for check in checks:
        now = time.perf_counter()
        yield check if check.seconds is not None or not check.checked else replace(check, seconds=now - begun)
        begun = time.perf_counter()


def sample_sets(graph: Graph, seed: int = 0, longest: int | None = None) -> list[dict[str, Any]]:
    """Inputs of several sizes up to ``longest`` tokens, with padding on either side (where the graph has a mask)."""
    import actgraph as ag

    middle, long = (min(length, longest or length) for length in (7, 16))
    return [
        ag.sample_inputs(graph, batch=1, seq=1, seed=seed),
        ag.sample_inputs(graph, batch=2, seq=middle, seed=seed + 1, padding="right"),
        ag.sample_inputs(graph, batch=3, seq=long, seed=seed + 2, padding="left"),
    ]


def check_programs(
    what: str, left: Program, right: Program, inputs: Sequence[dict[str, Any]] | None, tolerance: float, seed: int = 0
) -> Iterator[Check]:
    """Two models, graph by graph. Of a program and one graph, the graph for prompts is compared, with empty slots.

    Where one of them has slots, tokens are then fed one by one to both, which runs the graph for single tokens, too.

    Raises InputError where they have other graphs.
    """
    from actgraph.cli.verify_sessions import check_sessions, takes_tokens
    from actgraph.errors import InputError
    from actgraph.graph.slots import places

    if 1 in (len(left), len(right)):
        one, other = (side.graphs[side.driver.graph_at(0)] for side in (left, right))
        program, pair = max(left, right, key=len), what
        if len(program) > 1:
            what = f"{what}: {program.driver.graph_at(0)}, with empty slots"
            _refuse_last_logits(one, other)
        plain = one if len(left) == 1 else other
        longest = min((size for size in (places(one), places(other)) if size is not None), default=None)
        sets = inputs or sample_sets(plain, seed, longest)
        yield compared(what, one, other, sets, tolerance)
        if (left.slots or right.slots) and "input_ids" in sets[-1] and takes_tokens(left) and takes_tokens(right):
            yield check_sessions(f"{pair}: tokens one by one, with their slots", left, right, sets[-1], tolerance)
        return
    if set(left.graphs) != set(right.graphs):
        sides = [f"a program of {', '.join(side.graphs)}" for side in (left, right)]
        raise InputError(f"{sides[0]} cannot be compared with {sides[1]}", "kv_cache{graphs=combined} makes one graph")
    for name, graph in left.graphs.items():
        yield compared(f"{what}: {name}", graph, right.graphs[name], inputs or sample_sets(graph, seed), tolerance)


def _refuse_last_logits(left: Graph, right: Graph) -> None:
    """Raises InputError where one graph gives an output of all tokens and the other of the last one only."""
    from actgraph.errors import InputError

    others = dict(right.outputs())
    for name, value in left.outputs():
        both = (value.shape, others[name].shape if name in others else None)
        sizes = {shape[1] for shape in both if shape is not None and len(shape) == 3}
        if len(sizes) > 1 and 1 in sizes:
            raise InputError(f"{name} is of all tokens in one model and of the last one in the other", "leave last_logits out")


def check_pipeline(
    source: Graph | Program,
    pipeline: Pipeline,
    corpus: str | None,
    inputs: Sequence[dict[str, Any]] | None,
    tolerance: float,
    *,
    seed: int = 0,
    quiet: bool = False,
) -> Iterator[Check]:
    """Run ``pipeline`` pass by pass and yield what is found, for each graph where there are several.

    Promises are checked on the last of ``inputs`` (default: drawn for each graph).
    """
    from actgraph.cli.verify_ladder import check_defaults, check_hooks, check_ladder, cost
    from actgraph.graph.program import Program
    from actgraph.pipeline import PassManager

    program = begun = source if isinstance(source, Program) else Program.of(source)
    calibration = {"progress": not quiet}
    flips = dict.fromkeys(program.graphs, 0.0)
    for index, step in enumerate(pipeline):
        made: dict[str, Graph | Program] = {}
        for name, before in program.graphs.items():
            label = f"{name}: " if len(program) > 1 else ""
            arrays = inputs or sample_sets(before, seed, step.token_limit)
            manager = PassManager(
                pipeline, corpus, verify="each", parity="each", seed=seed, calibration=calibration, inputs=arrays[-1],
                reproducer=False,
            )  # fmt: skip
            made[name], check, declared = _promise(manager, before, index)
            yield replace(check, what=f"{label}{check.what}")
            after = made[name]
            if isinstance(after, Program):
                continue
            if declared is not None and activation_quantizers(after) > activation_quantizers(before):
                flips[name] += FLIPPED_CODES * min(declared, 1.0)
            for found in check_hooks(step, before, after, tolerance, seed):
                yield replace(found, what=f"{label}{found.what}")
            for found in check_defaults(step, before, after, partial(_at, manager, step, before), arrays):
                yield replace(found, what=f"{label}{found.what}")
            for what, setting, reference in (("off", step.off, before), ("oracle", step.oracle, after)):
                given = what == "off" and any(getattr(step, key) == "input" for key in setting)  # then its default is off
                if setting and not given and any(getattr(step, key) != value for key, value in setting.items()):
                    found = _variant(manager, index, step, what, dict(setting), before, reference, arrays, tolerance)
                    yield replace(found, what=f"{label}{found.what}")
        split = next((each for each in made.values() if isinstance(each, Program)), None)
        if split is not None:  # of one graph several
            program, flips, inputs = split, dict.fromkeys(split.graphs, max(flips.values())), None
        else:
            program = Program({key: each for key, each in made.items() if not isinstance(each, Program)}, program.driver)
            program.verify()
    for name, graph in program.graphs.items():
        label = f"{name}: " if len(program) > 1 else ""
        with tempfile.TemporaryDirectory(prefix="actgraph-") as folder:
            for check in check_exports(graph, Path(folder), inputs or sample_sets(graph, seed), tolerance, flips[name]):
                yield replace(check, what=f"{label}{check.what}")
        for check in check_ladder(graph, tolerance + flips[name], seed):
            yield replace(check, what=f"{label}{check.what}")
    if len(begun) == len(program) == 1:
        yield Check("what the passes cost", True, None, cost(begun.graph, program.graph, seed), checked=False)


def activation_quantizers(graph: Graph) -> int:
    """How many nodes round values that are no parameters to codes."""
    found = [node for node in graph.nodes() if node.op in _QUANTIZERS and node.operands and node.operands[0] is not None]
    return sum(not node.operands[0].is_parameter for node in found if node.operands[0] is not None)


def _promise(manager: PassManager, graph: Graph, index: int) -> tuple[Graph | Program, Check, float | None]:
    """What the pass at ``index`` makes of ``graph``, whether the outputs moved by no more than it declares, and that size.

    The size is ``None`` where the pass knows none, or was not seen to keep it.
    """
    from actgraph.errors import ParityError, UnsupportedError

    what = f"{manager.pipeline.passes[index]}: keeps its promise"
    try:
        result = manager.run(graph, start=index, stop=index + 1)
    except (ParityError, UnsupportedError) as error:  # it moved too far, or the engine cannot run what it made
        unchecked = copy.copy(manager)  # go on, so that the checks behind this one are seen as well
        unchecked.parity = "none"
        return unchecked.run(graph, start=index, stop=index + 1).rewritten, Check(what, False, None, str(error)), None
    row = result.report[0]
    what, change = f"{what} ({row.expected_change})", row.change
    if change is None or not change.compared:
        why = f"no output of before is left: {', '.join(change.missing)}" if change else result.report.parity
        return result.rewritten, Check(what, False, None, why, checked=False), None
    bound = "finite (no bound is known)" if change.tolerance is None else f"declared: <= {change.tolerance:.1g}"
    return result.rewritten, Check(what, True, change.relative, bound), change.tolerance


def _variant(
    manager: PassManager,
    index: int,
    step: Pass,
    what: str,
    options: dict[str, Any],
    before: Graph,
    reference: Graph,
    inputs: Sequence[dict[str, Any]],
    tolerance: float,
) -> Check:
    """The pass with other options, on the graph that it ran on, against the graph that it should equal: what is off bit for
    bit.
    """
    import actgraph as ag
    from actgraph.errors import UnsupportedError

    shown = " ".join(f"{name}={value}" for name, value in options.items() if value is not None)
    try:
        graph = _at(manager, step, before, options)
    except ag.ActgraphError as error:
        return Check(f"{step.name} at {shown}", False, None, str(error))
    relation = "is the identity" if what == "off" else "gives the same outputs"
    try:
        allowed = 0.0 if what == "off" else tolerance
        return compared(f"{step.name} at {shown} {relation}", reference, graph, inputs, allowed)
    except UnsupportedError as error:  # the engine cannot run one of them
        return Check(f"{step.name} at {shown} {relation}", False, None, str(error))


def _at(manager: PassManager, step: Pass, before: Graph, options: dict[str, Any]) -> Graph:
    """What the pass makes of ``before`` with other options."""
    import actgraph as ag

    changed = type(step)(**{**{name: getattr(step, name) for name in type(step).model_fields}, **options})
    return ag.run(before, changed, manager.corpus, seed=manager.seed, parity="none", calibration=manager.calibration).graph


def check_exports(
    graph: Graph, folder: Path, inputs: Sequence[dict[str, Any]], tolerance: float, flips: float = 0.0
) -> Iterator[Check]:
    """The graph against its ONNX files in onnxruntime, with functions kept and inlined.

    flips: what codes that flip may add, see ``FLIPPED_CODES``; a check that needs it says so.
    """
    import actgraph as ag

    engine = "torch" if graph.dialect == "fx" else "onnxruntime"
    for inline, name in (("none", "functions kept"), ("all", "inlined")):
        what = f"{engine} = exported ONNX, {name}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the export warns of is what fails here
            path = graph.save(folder / f"{inline}.onnx", inline=inline)
        try:
            check = compared(what, graph, ag.load(path), inputs, tolerance + flips)
        except ag.ActgraphError as error:  # a file that does not open has failed the check
            check = Check(what, False, None, str(error))
        if check.ok and check.change is not None and check.change > tolerance:
            check = replace(check, detail=f"allowed: <= {tolerance + flips:.2g}, codes of quantized activations may flip")
        yield check


def compared(what: str, left: Graph, right: Graph, inputs: Sequence[dict[str, Any]], tolerance: float) -> Check:
    """``compare`` as a Check; bit for bit (tolerance 0) without the engine's own rewrites, which round in their own order."""
    import actgraph as ag

    report = ag.compare(left, right, inputs, rtol=tolerance, optimize=tolerance > 0)
    checked = any(pair.compared or pair.problem for pair in report.outputs)
    return Check(what, report.ok, report.max_rel if checked else None, report.problem, checked=checked)


def _read_inputs(path: Path) -> dict[str, Any]:
    import numpy as np

    from actgraph.errors import InputError

    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path} is not an .npz file", "make one with numpy.savez") from error


command = verify
