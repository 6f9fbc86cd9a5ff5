"""onnxruntime-genai on the file of its own model builder, or where that file cannot run on one that actgraph wrote.

options: ``precision``: fp32, int8 or int4, as its model builder names them.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai
from protocol import Run, serve, versions


def opened(source: Path, threads: int) -> Run:
    config = genai.Config(str(source))
    config.overlay(f'{{"model": {{"decoder": {{"session_options": {{"intra_op_num_threads": {threads}}}}}}}}}')
    model = genai.Model(config)

    def run(prompt: list[int], count: int, made: Callable[[], None]) -> list[int]:
        options = genai.GeneratorParams(model)
        options.set_search_options(max_length=len(prompt) + count, min_length=len(prompt) + count, do_sample=False)
        generator = genai.Generator(model, options)
        generator.append_tokens(np.array([prompt], np.int32))
        tokens = []
        for _ in range(count):
            generator.generate_next_token()
            tokens.append(generator.get_next_tokens()[0])
            made()
        return tokens

    return run


def open_runner(folder: Path, options: dict[str, Any], threads: int) -> Run:
    precision = options["precision"]
    own = folder / f"genai-{precision}"
    try:
        if not (own / "genai_config.json").exists():
            build = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(folder), "-o", str(own)]
            build += ["-p", precision, "-e", "cpu", "-c", str(folder / "cache")]
            built = subprocess.run(build, capture_output=True, text=True)
            if built.returncode:
                raise RuntimeError(f"the model builder failed: {built.stderr.strip().splitlines()[-1]}")
        run = opened(own, threads)
        run([3, 4, 5], 2, lambda: None)
        note = "the file of its model builder"
    except Exception as error:  # what it cannot run is found out by running it
        if precision != "fp32":
            raise
        import actgraph as ag
        from actgraph.formats.genai import save_genai

        reason = str(error).strip().splitlines()[-1]
        save_genai(ag.run(ag.load(str(folder)), "kv_cache{graphs=combined}").graph, folder / "genai-actgraph")
        run = opened(folder / "genai-actgraph", threads)
        note = f"a file of actgraph; on that of its model builder: {reason}"
    run.note = f"{versions('onnxruntime-genai')}, {note}"  # type: ignore[attr-defined]
    return run


if __name__ == "__main__":
    serve(open_runner)
