"""``actgraph generate``: text from a causal language model."""

from __future__ import annotations

from typing import Annotated

import typer

from actgraph.cli import options
from actgraph.cli.options import example

EXAMPLE = example(
    "actgraph generate stories260k 'Once upon a time' -n 40",
    "actgraph generate steered.onnx --temperature 0.8 --seed 7",
)


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue; the start token alone if empty.")] = "",
    max_new_tokens: Annotated[int, typer.Option("-n", "--max-new-tokens", min=0, help="How many tokens at most.")] = 60,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token; above, tokens are drawn.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw among the k most likely tokens; 0 means all.")] = 0,
    seed: options.Seed = 0,
    tokenizer: options.Tokenizer = None,
    dtype: options.Dtype = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Continue a text.

    The whole sequence is computed again at each step, in torch or in onnxruntime by the kind of MODEL.
    """
    import actgraph as ag
    from actgraph.cli.models import open_model
    from actgraph.cli.output import dump_json
    from actgraph.errors import InputError

    graph = open_model(model, tokenizer, dtype=dtype, quiet=quiet)
    if not any(value.name == "input_ids" for value in graph.inputs()):
        takes = ", ".join(f"{value.name} {value.type}" for value in graph.inputs())
        raise InputError(f"{model} is no language model: it takes {takes}", "generate needs an input input_ids")
    if json:
        result = ag.generate(graph, prompt, max_new_tokens, temperature=temperature, top_k=top_k, seed=seed)
        dump_json(
            {
                "prompt": prompt,
                "text": result.text,
                "prompt_tokens": result.prompt_tokens,
                "tokens": result.tokens,
                "stopped_by": result.reason,
            }
        )
        return
    steps = ag.stream(graph, prompt, max_new_tokens, temperature=temperature, top_k=top_k, seed=seed)
    print(prompt, end="", flush=True)
    for step in steps:
        print(step.text, end="", flush=True)
    print()


command = generate
