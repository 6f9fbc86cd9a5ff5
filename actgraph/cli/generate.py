"""``actgraph generate``: text from a causal language model."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actgraph.cli import options
from actgraph.cli.options import example

if TYPE_CHECKING:
    from actgraph.graph.program import Program
    from actgraph.runtime.session import Compiled

EXAMPLE = example(
    "actgraph generate stories260k --prompt 'Once upon a time' -n 40",
    "actgraph generate steered.onnx 'Once upon a time' --input steer.scale=2",
    "actgraph generate steered.onnx 'Once upon a time' --temperature 0.8 --top-p 0.9 --seed 7 --stop '\\n\\n'",
)


_ESCAPE = re.compile(r"\\(?:([nrt\\])|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8}))")
_LETTERS = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}


def unescaped(text: str) -> str:
    r"""``text`` with ``\n``, ``\r``, ``\t``, ``\\`` and ``\x41``, ``\u0041``, ``\U00000041`` as what they stand for.

    A shell passes these as they are written. A backslash before anything else is itself.
    """

    def meant(match: re.Match[str]) -> str:
        letter, *codes = match.groups()
        if letter:
            return _LETTERS[letter]
        code = int(next(filter(None, codes)), 16)
        return chr(code) if code <= sys.maxunicode else match.group()

    return _ESCAPE.sub(meant, text)


def generate(
    model: options.Model,
    prompt: Annotated[str | None, typer.Argument(help="The text to continue; the start token alone if empty.")] = None,
    text: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="The same, as an option.")] = None,
    max_new_tokens: Annotated[int, typer.Option("-n", "--max-new-tokens", min=0, help="How many tokens at most.")] = 60,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token; above, tokens are drawn.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw among the k most likely tokens; 0 means all.")] = 0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw among the most likely tokens that have this probability together.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop before this text, where \\n is a new line; several may be given.")
    ] = None,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Compute each token once, with a cache inserted where MODEL has none.")
    ] = True,
    engine: Annotated[
        str, typer.Option(help="auto (by the kind of MODEL), torch, torch.compile, or onnxruntime (exports a torch graph).")
    ] = "auto",
    given: options.Inputs = [],  # noqa: B006  # typer takes a list
    adapter: Annotated[
        Path | None, typer.Option(metavar="FILE", help="An .onnx_adapter file with such values.", show_default=False)
    ] = None,
    seed: options.Seed = 0,
    tokenizer: options.Tokenizer = None,
    dtype: options.Dtype = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Tell how long opening takes, and the kind of cache.")
    ] = False,
    debug: options.Debug = False,
) -> None:
    """Continue a text, in torch or in onnxruntime.

    A model without a cache is given one first (the pass kv_cache, which makes a program of a graph for the prompt and one for
    single tokens). Where that cannot be, a note says why, and the whole sequence is computed again at each step. At the end
    the speed is told on standard error; --json tells the seconds from the prompt to the last token, and tokens over these.
    """
    import actgraph as ag
    from actgraph.cli.input_values import read_inputs
    from actgraph.cli.models import open_any
    from actgraph.cli.output import dump_json, remark
    from actgraph.errors import InputError
    from actgraph.runtime.session import ENGINES

    if prompt is not None and text is not None:
        raise typer.BadParameter("give the prompt once")
    engines = ("auto", *ENGINES)
    if engine not in engines:
        raise InputError(f"there is no engine {engine!r}", f"choose {', '.join(engines)}")
    start = prompt if prompt is not None else text or ""
    values: dict[str, Any] = {"inputs": read_inputs(given), "adapter": adapter}
    sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    sampling["stop"] = [unescaped(each) for each in stop or ()]
    program = open_any(model, tokenizer, dtype=dtype, quiet=quiet)
    graph = next(iter(program))
    if not any(value.name == "input_ids" for value in graph.inputs()):
        takes = ", ".join(f"{value.name} {value.type}" for value in graph.inputs())
        raise InputError(f"{model} is no language model: it takes {takes}", "generate needs an input input_ids")
    if cache:
        program = _with_cache(program, quiet)
    elif program.slots:
        remark("note: --no-cache changes nothing: the model has its cache in the file", quiet=quiet)
    begun = time.perf_counter()
    compiled = _opened(program, engine)
    if verbose and not quiet:
        kept = f"{len(compiled.slots)} slots" if compiled.slots else "no cache"
        print(f"opened for {compiled.engine} in {time.perf_counter() - begun:.2f} s, {kept}", file=sys.stderr)
    begun = time.perf_counter()
    if json:
        result = ag.generate(compiled, start, max_new_tokens, **sampling, **values)
        seconds = time.perf_counter() - begun
        dump_json(
            {
                "prompt": start,
                "text": result.text,
                "prompt_tokens": result.prompt_tokens,
                "tokens": result.tokens,
                "stopped_by": result.reason,
                "engine": compiled.engine,
                "seconds": seconds,
                "tokens_per_second": len(result.tokens) / max(seconds, 1e-9),
            }
        )
        return
    steps = ag.stream(compiled, start, max_new_tokens, **sampling, **values)
    print(start, end="", flush=True)
    count, first = 0, begun
    for step in steps:
        print(step.text, end="", flush=True)
        count += step.token is not None
        first = time.perf_counter() if count == 1 else first
    print()
    if not quiet and count > 1:
        rate = (count - 1) / max(time.perf_counter() - first, 1e-9)
        print(f"{count} tokens: first token after {first - begun:.2f} s, then {rate:.0f} tokens/s", file=sys.stderr)


def _opened(program: Program, engine: str) -> Compiled:
    """``program`` compiled, with its graphs opened, so that the first token does not wait for that."""
    import actgraph as ag

    compiled = ag.compile(program, engine)
    compiled.session()
    if compiled.lowering == "explicit":
        for stage in compiled.program.graphs:
            compiled.runner(stage)
    return compiled


def _with_cache(program: Program, quiet: bool) -> Program:
    """``program`` with a cache; as it is where it has state already or cannot have a cache, which a note says."""
    import actgraph as ag

    if program.slots or len(program) > 1:
        return program
    reason = ""
    for cache in ("kv_cache{last_logits=true}", "kv_cache"):  # logits that something else reads are computed for every token
        try:
            return ag.run(program, cache, parity="none", reproducer=False).program
        except ag.ActgraphError as error:
            reason = error.message
    if not quiet:
        print(f"note: without a cache: {reason}", file=sys.stderr)
    return program


command = generate
