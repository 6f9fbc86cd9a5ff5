"""``actgraph extract-vector``: a steering vector from two sets of texts."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from actgraph.cli import options
from actgraph.cli.options import example

EXAMPLE = example(
    "actgraph extract-vector stories260k --positive happy.txt --negative sad.txt --site blocks.2.resid_post -o v.safetensors",
    "actgraph extract-vector MODEL --positive yes.jsonl --negative no.jsonl --site 'blocks.*.resid_post' "
    "--method pca --position response -o v.safetensors",
    "actgraph run stories260k -p 'steer{vector=v.safetensors site=blocks.2.resid_post scale=2}' -o steered.onnx",
)


class Method(enum.StrEnum):
    """The methods of ``actgraph.passes.steer.methods.extract``."""

    MEAN_DIFFERENCE = "mean_difference"
    PCA = "pca"
    PCA_OF_DIFFERENCES = "pca_of_differences"
    LOGISTIC = "logistic"
    ANGULAR = "angular"
    SELECTIVE = "selective"
    AUSTEER = "austeer"
    STEER2EDIT = "steer2edit"
    KIF = "kif"


def extract_vector(
    model: options.Model,
    positive: Annotated[str, typer.Option(metavar="FILE", help="Texts that show what to steer towards, one a line.")],
    negative: Annotated[str, typer.Option(metavar="FILE", help="Texts that show the opposite, one a line.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The .safetensors file to write.")],
    site: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SELECTOR", help="Where (may be repeated); methods that choose sites have a default.", show_default=False
        ),
    ] = None,
    method: Annotated[
        Method, typer.Option(help="How: a vector by one of the first four, or the file of the method's own pass.")
    ] = Method.MEAN_DIFFERENCE,
    position: Annotated[
        str | None,
        typer.Option(
            metavar="WHICH",
            help="Tokens that a text is judged by: last (the default), mean, response, span or first:K.",
            show_default=False,
        ),
    ] = None,
    where: Annotated[str, typer.Option(metavar="CLAUSE", help="Which of those tokens count (see the pass steer).")] = "all",
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in one forward; results do not depend on it.")] = 8,
    max_length: Annotated[int | None, typer.Option(min=1, help="Cut texts to that many tokens.", show_default=False)] = None,
    tokenizer: options.Tokenizer = None,
    dtype: options.Dtype = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Extract a steering vector from texts.

    By default the vector is the mean activation of the last token over the positive texts minus that over the negative ones.
    Vectors by other methods are as long as that, and point to the positive texts. angular, selective (planes), austeer (units),
    steer2edit (weights) and kif (a subject's signature; the negative texts are controls) write what their own passes take.
    Files are .txt, a text a line, or .jsonl with "text", "messages", "prompt" and "response", or "text" and "span".
    """
    import numpy as np

    import actgraph as ag
    from actgraph.calibrate.corpora import Corpus
    from actgraph.cli.models import check_output, open_model
    from actgraph.cli.output import dump_json, remark
    from actgraph.errors import InputError
    from actgraph.graph.slots import slots_of
    from actgraph.passes.steer.methods import OTHERS, extract

    check_output(output, (".safetensors",))
    corpora = [Corpus.of(positive), Corpus.of(negative)]  # a bad file is said before the model is loaded
    graph = open_model(model, tokenizer, dtype=dtype, quiet=quiet)
    if slots_of(graph):
        raise InputError(f"{model} has state (a cache), which texts do not fill", "extract from the model without a cache")
    options = {"where": where, "batch_size": batch_size, "max_length": max_length, "progress": not quiet}
    if position is not None:
        options["position"] = position
    found = extract(graph, *corpora, method=method.value, site=site or (), **options)
    found.save(output)
    if isinstance(found, ag.SteeringVector):
        norms = {name: float(np.linalg.norm(direction)) for name, direction in found.directions.items()}
        if json:
            dump_json({"file": str(output), "method": found.method, "position": found.position, "norms": norms, **found.notes})
            return
        for name, norm in norms.items():
            remark(f"{name}: norm {norm:.4g}", quiet=quiet)
    else:
        rows = found.table() if hasattr(found, "table") else []
        if json:
            dump_json({"file": str(output), "method": method.value, "table": rows, "pass": OTHERS[method.value][1]})
            return
        for row in rows:
            remark(
                ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()),
                quiet=quiet,
            )
        remark(f"for {OTHERS[method.value][1]}", quiet=quiet)
    print(output)


command = extract_vector
