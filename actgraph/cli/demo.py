"""``actgraph demo``: a tour on the embedded model, with every number measured as it is printed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from actgraph.cli import options
from actgraph.cli.options import example

if TYPE_CHECKING:
    from actgraph.graph import Graph

EXAMPLE = example("actgraph demo", "actgraph demo --keep demo-files")

SITE = "blocks.1.resid_post"
_BRIGHT = ("happy", "smile", "smiled", "laugh", "laughed", "fun", "love", "loved")
_GLOOMY = ("sad", "cry", "cried", "scared", "hurt", "angry", "mad", "afraid")
#: How the embedded model continues its start token, as documented where it comes from (actgraph/data/README.md).
DOCUMENTED = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red "
    "ball. She wanted to play with it, but it was too high.\nLily's mom said, \"Lily, let's go to the park.\""
)
#: Largest difference between torch and onnxruntime, relative to the largest logit.
TOLERANCE = 1e-4


def demo(
    keep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the files that are written, in a new folder.", show_default=False)
    ] = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Take a tour on the embedded model.

    Captures a small language model, rewrites it, proves what happened and writes the result as ONNX. Takes less than
    half a minute and needs no network. The exit code is 1 if a proof fails.
    """
    from actgraph.cli.models import check_output_folder
    from actgraph.errors import InputError

    if keep is not None:
        check_output_folder(keep)
        if keep.is_dir() and any(keep.iterdir()):
            raise InputError(f"the folder {keep} is not empty", "name a new one")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for so small a model more threads only wait for each other
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="actgraph-demo-") as folder:
        with contextlib.chdir(folder):  # so that the pipeline reads as a user would write it
            ok = _tour()
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            for path in Path(folder).iterdir():
                shutil.copy(path, keep)
            print(f"\nfiles kept in {keep}")
    print(f"\n{time.perf_counter() - started:.0f} seconds in all")
    if not ok:
        raise typer.Exit(1)


def _tour() -> bool:
    import actgraph as ag

    _title("1. capture")
    started = time.perf_counter()
    graph = ag.load("stories260k")
    print(f"{graph!r}  ({time.perf_counter() - started:.1f} s)")
    print("a Llama of 260 thousand parameters, captured by torch.export; the same passes also take ONNX files")

    _title("2. sites: names for activations, the same for every architecture")
    for site in graph.sites("blocks.2.*"):
        if "." in site.name:
            print(f"  {site.name:26} {site.type}")
    print(f"  ... {len(graph.sites())} in all")

    _title("3. a steering vector: sentences of the sample text with bright words against gloomy ones")
    bright, gloomy = _sentences()
    vector = ag.extract_vector(graph, bright, gloomy, site=SITE, progress=False)
    vector.save("bright.safetensors")
    print(f"{len(bright)} sentences such as {bright[0]!r}")
    print(f"{len(gloomy)} sentences such as {gloomy[0]!r}")

    _title("4. a pipeline of three families")
    steer = f"steer{{vector=bright.safetensors site={SITE} scale=2}}"
    pipeline = f"{steer}, sparsify{{method=teal sparsity=0.25}}, quantize{{weights=int8}}"
    print(pipeline)
    result = ag.run(graph, pipeline, calibration={"progress": False})
    print(result.report)

    _title("5. proof: torch, and the exported ONNX files in onnxruntime")
    ok, exported = _prove(result.graph)

    _title("6. perplexity on the sample text")
    int8 = ag.run(graph, "quantize{weights=int8}", parity="none").graph
    steered = ag.run(graph, steer, parity="none").graph
    before = ag.perplexity(graph, progress=False)
    for what, candidate in (("int8 weights alone", int8), ("steered alone", steered), ("the whole pipeline", result.graph)):
        value = ag.perplexity(candidate, progress=False)
        print(f"  {what:20} {before:.4f} -> {value:.4f}  ({value / before - 1:+.2%})")

    _title("7. the model's text before and after (greedy)")
    length = len(graph.companions.tokenizer.encode(DOCUMENTED).ids) - 1
    graph.save("plain.onnx")
    plain = ag.generate(graph, "", length)
    documented = plain.text == DOCUMENTED and ag.generate(ag.load("plain.onnx"), "", length).tokens == plain.tokens
    tokens = {"torch": ag.generate(result.graph, "", length)} | {
        name: ag.generate(candidate, "", length) for name, candidate in exported.items()
    }
    print(f"before: {_flat(plain.text)}")
    print(f"after:  {_flat(tokens['torch'].text)}")
    print(f"{_verdict(documented)}: before is the documented text of the model, in torch and in onnxruntime")
    same = len({generation.tokens for generation in tokens.values()}) == 1
    print(f"{_verdict(same)}: after is the same tokens in {', '.join(tokens)}")
    return ok and documented and same


def _prove(graph: Graph) -> tuple[bool, dict[str, Graph]]:
    """Export twice and compare each file with torch; returns whether they agree, and the graphs loaded back."""
    import actgraph as ag
    from actgraph.cli.verify import compared, sample_sets

    ok, loaded = True, {}
    for name, path, inline in (
        ("ONNX with functions", Path("demo-functions.onnx"), "none"),
        ("ONNX of standard ops", Path("demo-standard.onnx"), "all"),
    ):
        graph.save(path, inline=inline)
        loaded[name] = ag.load(path)
        check = compared(name, graph, loaded[name], sample_sets(graph), TOLERANCE)
        size = f"{path.stat().st_size / 1e6:.2f} MB"
        print(f"{_verdict(check.ok)}: torch = {name}, {size}: difference {check.change:.1e} (<= {TOLERANCE:.0e})")
        told = [record.text for record in loaded[name].history] == [record.text for record in graph.history]
        ok = ok and check.ok and told
    print(f"{_verdict(told)}: the file names the {len(graph.history)} passes that made it (`actgraph inspect` shows them)")
    return ok, loaded


def _sentences() -> tuple[list[str], list[str]]:
    """Sentences of the sample text with bright words only, and with gloomy words only."""
    import actgraph as ag

    stories = [document for document in ag.Corpus.of(None) if isinstance(document, str)]
    sentences = [s.strip() for story in stories for s in re.split(r'(?<=[.!?])"?\s+', story) if 20 < len(s) < 160]

    def has(sentence: str, words: tuple[str, ...]) -> bool:
        return re.search(rf"\b({'|'.join(words)})\b", sentence, re.IGNORECASE) is not None

    bright = [s for s in sentences if has(s, _BRIGHT) and not has(s, _GLOOMY)]
    gloomy = [s for s in sentences if has(s, _GLOOMY) and not has(s, _BRIGHT)]
    return bright, gloomy


def _title(text: str) -> None:
    print(f"\n== {text}")


def _verdict(ok: bool) -> str:
    return "ok" if ok else "FAILED"


def _flat(text: str) -> str:
    return " ".join(text.split())


command = demo
