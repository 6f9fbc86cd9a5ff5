"""Extracting steering vectors from contrasting texts.

Source: Steering Llama 2 via Contrastive Activation Addition (CAA, 2023): ``v = mean h(positive) - mean h(negative)`` at the
last token of each text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from actgraph.calibrate.corpora import Corpus
from actgraph.calibrate.engine import collect
from actgraph.calibrate.statistics import Request, Tokens
from actgraph.errors import InputError, SiteError
from actgraph.formats.vectors import SteeringVector, model_fingerprint
from actgraph.graph import Graph, Site


def extract_vector(
    graph: Graph,
    positive: Any,
    negative: Any,
    *,
    site: str | Sequence[str],
    method: Literal["mean_difference"] = "mean_difference",
    position: Literal["last"] = "last",
    batch_size: int = 8,
    progress: bool = True,
) -> SteeringVector:
    """The direction from ``negative`` to ``positive`` at each site.

    positive, negative: corpora (a file with a text a line, a list of texts ...); they need not be of one size.
    site: one selector or several; the vector holds a ``[width]`` float32 direction for each site matched.
    method, position: the mean difference of the last token's activation, the padding of a batch excluded.
    progress: show a progress bar on a terminal.

    The sums are float64 and do not depend on the batch size. Raises InputError when the two sets cannot be told apart, and
    SiteError when ``site`` matches nothing or a place whose last axis has no fixed size (attention probabilities).
    """
    if method != "mean_difference" or position != "last":
        raise InputError(f"there is no extraction {method} at {position}", "use mean_difference at the last token")
    sites = graph.sites(site)
    for s in sites:
        _check_width(s)
    requests = [Request(s.name, "mean", axis=-1, tokens=Tokens.LAST) for s in sites]
    means = [
        collect(graph, requests, Corpus.of(source), batch_size=batch_size, progress=progress) for source in (positive, negative)
    ]
    directions = {}
    for s, request in zip(sites, requests, strict=True):
        difference = means[0].array(request) - means[1].array(request)
        if not np.any(difference):
            raise InputError(f"positive and negative texts give the same mean at {s.name}", "use sets that differ")
        directions[s.name] = difference.astype(np.float32)
    counts = {"positive": str(means[0].documents), "negative": str(means[1].documents)}
    return SteeringVector(directions, model_fingerprint(graph), method, position, counts)


def _check_width(site: Site) -> None:
    """A direction has one number for each channel, so the last axis must have one size for all texts."""
    shape = site.type.shape
    if shape is not None and (not shape or isinstance(shape[-1], str)):
        axis = f"its last axis is {shape[-1]}" if shape else "it is a single number"
        raise SiteError(f"site {site.name} has no fixed width: {axis}", "choose one such as blocks.1.resid_post")
