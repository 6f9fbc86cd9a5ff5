"""Fingerprints of models and tokenizers: short texts by which a file made from one model is refused by another.

A fingerprint is ``kind[sizes]:digest``. Two of them that name different kinds of things (weights stored in another type, a
tokenizer known by other files) cannot be compared, and nothing is claimed then.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import TensorType

if TYPE_CHECKING:
    from actgraph.graph import Graph
    from actgraph.graph.graph import Value

_DIGITS = 16
#: The files that hold the vocabulary of a tokenizer that has no tokenizer.json.
_VOCABULARIES = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "added_tokens.json")


def model_fingerprint(graph: Graph) -> str:
    """A fingerprint of the model: type, sizes and sha256 of its token embeddings, such as ``f32[512,64]:116b84d59ccdfc6a``.

    The token embeddings are the largest table of rank 2 that rows are gathered from; without one it is the weight of the
    first linear layer as ``[out, in]``; empty for a model that has neither. Both dialects give the same, and edits of
    activations do not change it.
    """
    from actgraph.graph.graph import parameter_bytes
    from actgraph.graph.text import array_hash, data_hash

    tables: dict[Value, int] = {}
    for node in graph.nodes():
        prim = node.prim
        table = prim.operands[0] if prim is not None and prim.op == "gather" and prim.operands else None
        if table is not None and not isinstance(table, (int, float)) and table.is_parameter and len(table.shape or ()) == 2:
            tables[table] = parameter_bytes(table)
    if tables:
        largest = max(tables, key=lambda table: tables[table])  # the first of equal ones
        return _fingerprint(largest.type, data_hash(largest))
    for linear in graph.views.linears():
        weight = linear.read_weight()
        return _fingerprint(TensorType(DType.of(weight.dtype), weight.shape), array_hash(weight))
    return ""


def _fingerprint(kind: TensorType, digest: str) -> str:
    return f"{str(kind).replace(' ', '')}:{digest[:_DIGITS]}"


def tokenizer_fingerprint(graph: Graph) -> str:
    """A fingerprint of the tokenizer that travels with the graph, such as ``tokenizer.json[512]:c0ffee0123456789``.

    It covers what says which text a token id stands for: the vocabulary with its size, the merges and the added tokens. How
    the file is laid out, padding, truncation and the templates of special tokens do not matter, so a tokenizer that another
    version of its library saved again keeps its fingerprint. Empty where the graph carries no tokenizer.
    """
    companions = graph.companions
    data = companions.tokenizer_files.get("tokenizer.json")
    if data is None and companions.tokenizer is not None:
        data = companions.tokenizer.to_str().encode()
    if data is not None:
        return _of_tokenizer_json(data)
    files = [(name, companions.tokenizer_files[name]) for name in _VOCABULARIES if name in companions.tokenizer_files]
    if not files:
        return ""
    digest = hashlib.sha256()
    for name, content in files:
        digest.update(f"{name} {len(content)} ".encode() + content)
    return f"{'+'.join(name for name, _ in files)}:{digest.hexdigest()[:_DIGITS]}"


@functools.lru_cache(maxsize=4)
def _of_tokenizer_json(data: bytes) -> str:
    try:
        whole = json.loads(data)
        model = whole["model"]
        vocabulary = model["vocab"]
        added = {str(token["content"]): int(token["id"]) for token in whole.get("added_tokens") or ()}
        # A Unigram model lists pairs of a piece and its score; scores are written with other digits by other versions.
        pieces = dict(vocabulary) if isinstance(vocabulary, Mapping) else {row[0]: i for i, row in enumerate(vocabulary)}
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or ()]
        content: list[Any] = [model.get("type"), sorted(pieces.items()), merges, sorted(added.items())]
    except (ValueError, KeyError, TypeError, IndexError):
        # A file that we cannot read is still a file: equal bytes are the same tokenizer.
        return f"tokenizer.json bytes:{hashlib.sha256(data).hexdigest()[:_DIGITS]}"
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
    return f"tokenizer.json[{len(pieces | added)}]:{hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]}"


def surely_differ(one: str, other: str) -> bool:
    """Whether two fingerprints are surely of different things.

    False where one is unknown (empty or of an unknown form), and where they are of different kinds: embeddings of the same
    sizes stored in another type, tokenizers known by other files.
    """
    (kind, colon, digest), (other_kind, other_colon, other_digest) = one.rpartition(":"), other.rpartition(":")
    if not colon or not other_colon:
        return False
    (name, _, sizes), (other_name, _, other_sizes) = kind.partition("["), other_kind.partition("[")
    if bool(sizes) != bool(other_sizes):
        return False
    return sizes != other_sizes or (name == other_name and digest != other_digest)


def is_of_another_model(fingerprint: str, graph: Graph) -> bool:
    """Whether what has ``fingerprint`` surely comes from another model than ``graph``.

    Where the fingerprint is unknown, or the embeddings are stored in another type now, nothing can be said.
    """
    return bool(fingerprint) and surely_differ(fingerprint, model_fingerprint(graph))


def is_of_another_tokenizer(fingerprint: str, graph: Graph) -> bool:
    """Whether what has ``fingerprint`` surely comes from another tokenizer than the one that travels with ``graph``."""
    return bool(fingerprint) and surely_differ(fingerprint, tokenizer_fingerprint(graph))
