"""Perplexity and log-likelihoods of texts under a causal language model, in either dialect.

Each document is encoded alone with its special tokens and cut at the model's length; every token but the first is predicted
from those before it; perplexity is ``exp`` of the mean negative log-likelihood over all predicted tokens of all documents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from actgraph.calibrate.batches import batches
from actgraph.calibrate.corpora import Corpus
from actgraph.calibrate.encode import Signature, samples
from actgraph.calibrate.engine import limited
from actgraph.calibrate.progress import progress_bar
from actgraph.errors import InputError
from actgraph.graph.context import logits_output
from actgraph.graph.executor import executor_for
from actgraph.graph.program import Program
from actgraph.graph.slots import places, slots_of, with_initial_slots

if TYPE_CHECKING:
    from actgraph.graph import Graph

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Likelihoods:
    """Log-likelihoods in nats, one of each document: ``totals [documents]`` over ``counts [documents]`` predicted tokens."""

    totals: Array
    counts: Array

    @property
    def tokens(self) -> int:
        """How many tokens were predicted."""
        return int(self.counts.sum())

    @property
    def mean(self) -> Array:
        """Mean log-likelihood of a token of each document; NaN for documents of one token."""
        with np.errstate(invalid="ignore"):
            return np.asarray(self.totals / self.counts)

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean negative log-likelihood of all predicted tokens."""
        if not self.tokens:
            raise InputError("no token is predicted: every document has a single token", "use longer documents")
        mean = -math.fsum(self.totals.tolist()) / self.tokens
        return math.exp(mean) if mean < 700 else math.inf


def log_likelihoods(
    model: Graph | Program,
    corpus: Any = None,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
) -> Likelihoods:
    """The log-likelihood of each document of ``corpus``, in its order.

    Logits are turned into log-probabilities in float64. A graph of fixed length gets documents padded on the right, which a
    causal model does not see. A cache starts empty for each document, and of a program the graph that takes prompts is asked.
    Raises InputError when the graph is no causal language model, or gives the logits of the last token only.
    """
    graph = model.graphs[model.driver.graph_at(0)] if isinstance(model, Program) else model
    opened = Corpus.of(corpus)
    signature = _signature(graph)
    if "input_ids" not in signature.by_name() or any(name.endswith("decoder_input_ids") for name in signature.by_name()):
        names = ", ".join(signature.by_name())
        raise InputError(f"{graph.name} is no causal language model: it takes {names}", "log-likelihoods are defined for those")
    output = logits_output(graph)
    length = signature.fixed_length()
    axis = (signature.by_name()["input_ids"].shape or (None,))[-1]
    limit = min((n for n in (length, max_length, places(graph)) if n is not None), default=None)
    source = samples(graph, opened, limit=limit, pack=False)
    runner = executor_for(graph).open(graph)
    totals: dict[int, float] = {}
    counts: dict[int, int] = {}
    with progress_bar("perplexity", len(opened), progress) as advance:
        for batch in batches(signature, limited(source, max_tokens, 0, None), batch_size=batch_size):
            logits = runner(with_initial_slots(graph, batch.inputs))[output]
            ids = batch.inputs["input_ids"]
            if logits.ndim != 3 or logits.shape[:2] != ids.shape:
                given = f"{output} is {list(logits.shape)} for input_ids {list(ids.shape)}: no logits per token"
                raise InputError(given, "leave last_logits of kv_cache out" if slots_of(graph) else "")
            mask = batch.masks[axis]
            for row, index in enumerate(batch.indices):
                valid = int(mask[row].sum())
                totals[index] = _total(logits[row, : valid - 1], ids[row, 1:valid])
                counts[index] = max(0, valid - 1)
            advance(batch.rows)
    order = sorted(totals)
    return Likelihoods(np.asarray([totals[i] for i in order]), np.asarray([counts[i] for i in order], np.int64))


def perplexity(model: Graph | Program, corpus: Any = None, **options: Any) -> float:
    """The perplexity of ``corpus`` (default: the packaged sample text); options as in ``log_likelihoods``."""
    return log_likelihoods(model, corpus, **options).perplexity


def _signature(graph: Graph) -> Signature:
    """What one forward of whole documents takes: nothing sees padding on the right, also where the mask covers a cache."""
    signature = Signature.of(graph).causal()
    shape = signature.by_name()["input_ids"].shape if slots_of(graph) and "input_ids" in signature.by_name() else None
    return signature if not shape else replace(signature, padded=signature.padded | {shape[-1]})


def _total(logits: Array, labels: Array) -> float:
    """Sum of the log-probabilities of ``labels [n]`` under ``logits [n, vocabulary]``."""
    if not len(labels):
        return 0.0
    scores = logits.astype(np.float64)
    top = scores.max(1, keepdims=True)
    normaliser = top[:, 0] + np.log(np.exp(scores - top).sum(1))
    return float((scores[np.arange(len(labels)), labels] - normaliser).sum())
