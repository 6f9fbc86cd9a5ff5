"""``actgraph convert-vector``: a steering vector in another format, for fewer sites, or named for a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from actgraph.cli import options
from actgraph.cli.options import example

if TYPE_CHECKING:
    from actgraph.formats.vectors import SteeringVector
    from actgraph.graph import Graph

EXAMPLE = example(
    "actgraph convert-vector repeng.gguf -o happy.safetensors --model stories260k",
    "actgraph convert-vector happy.safetensors --site 'blocks.{1..3}.resid_post' -o llama-cpp.gguf",
)


def convert_vector(
    vector: Annotated[Path, typer.Argument(metavar="VECTOR", help="A .safetensors file, or a .gguf control vector.")],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="FILE", help="What to write: the suffix says the format, .safetensors or .gguf."
        ),
    ],
    site: Annotated[
        list[str] | None,
        typer.Option(metavar="SELECTOR", help="Keep these sites of the vector only (may be repeated).", show_default=False),
    ] = None,
    at: Annotated[
        str | None, typer.Option(metavar="SITE", help="The site of a vector that has none.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A model that the vector must fit. Its site names are used, and what the vector does not say about its "
            "model (fingerprints, architecture) is filled in.",
            show_default=False,
        ),
    ] = None,
    model_hint: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The architecture to write, such as llama or qwen3.", show_default=False),
    ] = None,
    layer_base: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="For a .gguf VECTOR: the number that its writer gave to the first block."),
    ] = 0,
    any_model: Annotated[
        bool, typer.Option("--any-model", help="Drop the fingerprints, so that the vector is accepted for any model it fits.")
    ] = False,
    dtype: options.Dtype = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Convert a steering vector between formats.

    A GGUF control vector (repeng, llama.cpp) holds directions of block outputs: its direction.n is blocks.n.resid_post, counted
    from 0. llama.cpp cannot steer the first block, so blocks.0.resid_post cannot be written to one.
    """
    import numpy as np

    from actgraph.cli.models import check_output, open_model
    from actgraph.cli.output import dump_json, remark
    from actgraph.formats.vectors import vector_messages

    check_output(output, (".safetensors", ".gguf"))
    converted = _selected(_read(vector, layer_base), site, at)
    if any_model:
        converted = replace(converted, model="", tokenizer="")
    messages: list[str] = []
    if model is not None:
        graph = open_model(model, dtype=dtype, quiet=quiet)
        messages = vector_messages(converted, graph, called=str(vector))
        converted = _fitted(converted, graph, str(vector), fill=not any_model)
    elif "mapping" in converted.notes:
        messages = [f"{vector}: {converted.notes['mapping']}"]
    if model_hint is not None:
        converted = replace(converted, model_type=model_hint)
    converted.save(output)
    if json:
        norms = {name: float(np.linalg.norm(direction)) for name, direction in converted.directions.items()}
        bases = {name: list(basis.shape) for name, basis in converted.bases.items()}
        dump_json({"file": str(output), "norms": norms, "bases": bases, "messages": messages})
        return
    for message in messages:
        remark(message, quiet=quiet)
    remark(repr(converted), quiet=quiet)
    print(output)


def _read(path: Path, layer_base: int) -> SteeringVector:
    from actgraph.errors import InputError
    from actgraph.formats.gguf_vectors import read_gguf
    from actgraph.formats.vectors import load_vector

    if layer_base == 0 or not path.is_file():
        return load_vector(path, bases=True)
    if path.suffix != ".gguf":
        raise InputError("--layer-base is for .gguf files", f"leave it out: {path} names its sites")
    return read_gguf(path, layer_base=layer_base)


def _selected(vector: SteeringVector, selectors: Sequence[str] | None, at: str | None) -> SteeringVector:
    """The vector for the sites asked for, named ``at`` where it has no site of its own. Raises InputError."""
    from actgraph.errors import InputError
    from actgraph.graph.selectors import compile_selector

    if at is not None:
        if vector.sites:
            raise InputError(
                f"the vector has sites of its own: {', '.join(vector.sites)}", "--at is for a vector that has none"
            )
        vector = replace(
            vector,
            directions={name or at: direction for name, direction in vector.directions.items()},
            bases={name or at: basis for name, basis in vector.bases.items()},
        )
    if not selectors:
        return vector
    patterns = [pattern for selector in selectors for pattern in compile_selector(selector, lambda: vector.sites)]
    keep = [name for name in vector.sites if any(pattern.matches(name) for pattern in patterns)]
    if not keep:
        raise InputError(f"--site {' '.join(selectors)} selects nothing of the vector", f"it is for {', '.join(vector.sites)}")
    return vector.select(keep)


def _fitted(vector: SteeringVector, graph: Graph, called: str, *, fill: bool) -> SteeringVector:
    """The vector with the graph's own site names, checked against it. Raises InputError where it does not fit."""
    from actgraph.formats.vectors import check_origin, check_vector, model_fingerprint, name_sites, tokenizer_fingerprint

    check_origin(vector, graph, called=called)
    for name in vector.sites:
        check_vector(vector, graph, name, called=called)
    named = replace(
        name_sites(vector, graph), model_type=vector.model_type or str(graph.companions.config.get("model_type") or "")
    )
    if not fill:
        return named
    return replace(
        named,
        model=vector.model or model_fingerprint(graph),
        tokenizer=vector.tokenizer or tokenizer_fingerprint(graph),
    )


command = convert_vector
