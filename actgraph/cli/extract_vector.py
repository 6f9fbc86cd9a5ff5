"""``actgraph extract-vector``: a steering vector from two sets of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actgraph.cli import options
from actgraph.cli.options import example

EXAMPLE = example(
    "actgraph extract-vector stories260k --positive happy.txt --negative sad.txt --site blocks.2.resid_post -o v.safetensors",
    "actgraph run stories260k -p 'steer{vector=v.safetensors site=blocks.2.resid_post scale=2}' -o steered.onnx",
)


def extract_vector(
    model: options.Model,
    positive: Annotated[str, typer.Option(metavar="FILE", help="Texts that show what to steer towards, one a line.")],
    negative: Annotated[str, typer.Option(metavar="FILE", help="Texts that show the opposite, one a line.")],
    site: Annotated[list[str], typer.Option(metavar="SELECTOR", help="Where (may be repeated): one direction for each site.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The .safetensors file to write.")],
    tokenizer: options.Tokenizer = None,
    dtype: options.Dtype = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Extract a steering vector from texts.

    The vector is the mean activation of the last token over the positive texts minus that over the negative ones.
    """
    import numpy as np

    import actgraph as ag
    from actgraph.calibrate.corpora import Corpus
    from actgraph.cli.models import check_output, open_model
    from actgraph.cli.output import dump_json, remark
    from actgraph.errors import InputError
    from actgraph.graph.slots import slots_of

    check_output(output, (".safetensors",))
    corpora = [Corpus.of(positive), Corpus.of(negative)]  # a bad file is said before the model is loaded
    graph = open_model(model, tokenizer, dtype=dtype, quiet=quiet)
    if slots_of(graph):
        raise InputError(f"{model} has state (a cache), which texts do not fill", "extract from the model without a cache")
    vector = ag.extract_vector(graph, *corpora, site=site, progress=not quiet)
    vector.save(output)
    norms = {name: float(np.linalg.norm(direction)) for name, direction in vector.directions.items()}
    if json:
        dump_json({"file": str(output), "method": vector.method, "position": vector.position, "norms": norms, **vector.notes})
        return
    for name, norm in norms.items():
        remark(f"{name}: norm {norm:.4g}", quiet=quiet)
    print(output)


command = extract_vector
