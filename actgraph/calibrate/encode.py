"""From documents to samples: the arrays of one row, as the graph's inputs want them, without a batch axis and without padding.

Texts go through the graph's own tokenizer, special tokens included (so a document begins with its BOS where the model was
trained so), and are cut at the model's length. ``attention_mask``, ``position_ids`` and ``token_type_ids`` are filled in,
and the decoder of an encoder-decoder reads the text itself, shifted right behind its start token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actgraph.calibrate.corpora import Corpus, Marked, Messages, Prompted
from actgraph.errors import InputError
from actgraph.graph.context import context_length
from actgraph.graph.graph import Role, Value
from actgraph.graph.parity import is_optional
from actgraph.ops.shapes import Dim

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from actgraph.graph import Graph

Array = np.ndarray[Any, Any]
Sample = dict[str, Array]

#: What samples hold beside inputs: the number of prompt tokens of a document with a response, and which tokens are marked.
PROMPT_LENGTH, SPAN = "prompt_lengths", "marked span"

_FILLED = ("attention_mask", "position_ids", "token_type_ids")


@dataclass(frozen=True)
class Signature:
    """The user inputs of a graph, read once.

    batch: the dimension that counts rows (``None``: the graph has no batch axis).
    padded: sequence dimensions that may be padded without a mask, because nothing that is read depends on the padding (right
    padding under a causal model).
    decoder_start: the token that decoder inputs begin with, for an encoder-decoder whose configuration names one.
    """

    inputs: tuple[Value, ...]
    batch: Dim
    padded: frozenset[Dim] = frozenset()
    decoder_start: int | None = None

    @staticmethod
    def of(graph: Graph) -> Signature:
        users = tuple(v for v in graph.inputs() if graph.role(v.name) in (Role.USER, Role.CONTEXT))
        leading = [v.shape[0] for v in users if v.shape is not None and len(v.shape) > 1]
        named = next((size for size in leading if isinstance(size, str)), None)
        if named is not None:
            return Signature(users, named, decoder_start=_decoder_start(graph))
        same = len(set(leading)) == 1 and len(leading) == len(users)
        return Signature(users, leading[0] if same else None, decoder_start=_decoder_start(graph))

    def by_name(self) -> dict[str, Value]:
        return {value.name: value for value in self.inputs}

    def has_batch(self, value: Value) -> bool:
        """Whether the first axis of an input counts rows."""
        return self.batch is not None and bool(value.shape) and value.shape is not None and value.shape[0] == self.batch

    def maskable(self) -> set[Dim]:
        """The dimensions that may be padded, because an attention mask says which positions count (or nothing looks)."""
        masks = [value for value in self.inputs if value.name.endswith("attention_mask")]
        return {mask.shape[1] for mask in masks if mask.shape is not None and len(mask.shape) == 2} | self.padded

    def causal(self) -> Signature:
        """The same for a causal language model of which only outputs before the padding are read."""
        length = self.fixed_length()
        return self if length is None else replace(self, padded=frozenset({length}))

    def fixed_length(self) -> int | None:
        """The number of tokens of a graph that takes exactly that many (``None``: any number)."""
        shape = self.by_name()["input_ids"].shape if "input_ids" in self.by_name() else None
        size = shape[-1] if shape else None
        return size if isinstance(size, int) else None

    def check(self, name: str, array: Array) -> None:
        """Raises InputError when a sample's array cannot be the input ``name``."""
        value = self.by_name()[name]
        if value.shape is None:
            return
        want = value.shape[1:] if self.has_batch(value) else value.shape
        may_be_shorter = self.maskable()
        fits = len(want) == array.ndim and all(
            not isinstance(size, int) or actual == size or (actual < size and size in may_be_shorter)
            for size, actual in zip(want, array.shape, strict=True)
        )
        if not fits:
            raise InputError(f"the corpus gives {name} as {list(array.shape)} for one sample, and the graph takes {value.type}")


def _decoder_start(graph: Graph) -> int | None:
    """The first token of a decoder, looked up as transformers does: the configuration's, else the padding or BOS token."""
    sources = (graph.companions.generation_config, graph.companions.config, graph.companions.config.get("text_config") or {})
    for key in ("decoder_start_token_id", "pad_token_id", "bos_token_id"):
        for source in sources:
            if isinstance(token := source.get(key), int) and token >= 0:
                return token
    return None


def max_length(graph: Graph, limit: int | None = None) -> int | None:
    """The most tokens that a document may have: the smallest of ``limit``, the model's and the tokenizer's."""
    found = [length for length in (limit, context_length(graph)) if length is not None]
    settings = _json_companion(graph, "tokenizer_config.json")
    length = settings.get("model_max_length")
    if isinstance(length, (int, float)) and 0 < length < 1e9:
        found.append(int(length))
    return min(found) if found else None


def _json_companion(graph: Graph, name: str) -> dict[str, Any]:
    data = graph.companions.tokenizer_files.get(name)
    if not data:
        return {}
    try:
        settings = json.loads(data)
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}


def samples(graph: Graph, corpus: Corpus, *, limit: int | None = None, pack: bool = True) -> Iterator[Sample]:
    """One sample after the other. Raises InputError for what the graph cannot take.

    limit: cut texts to that many tokens. pack: for a graph of fixed length, join the texts and cut the stream into windows of
    that length (what is left over at the end is not used), so that nothing is padded; without it texts stay whole, and shorter
    than the graph takes (see ``Signature.causal``).
    """
    signature = Signature.of(graph) if pack else Signature.of(graph).causal()
    reads_text = "input_ids" in signature.by_name()
    longest = max_length(graph, limit)
    window = signature.fixed_length() if pack else None
    pending: list[int] = []
    packed = 0
    for document in corpus:
        if isinstance(document, Mapping):
            yield from rows(signature, document)
        elif isinstance(document, Path):
            from actgraph.calibrate.images import read_image

            yield complete(signature, {**read_image(graph, signature, document)})
        elif not reads_text:
            raise _takes_no_text(graph, signature, corpus)
        elif window is None:
            yield complete(signature, text_sample(graph, document, longest))
        else:
            pending += text_sample(graph, document, limit)["input_ids"].tolist()
            while len(pending) >= window:
                yield complete(signature, {"input_ids": np.asarray(pending[:window], np.int64)})
                pending, packed = pending[window:], packed + 1
    if pending and not packed:
        raise InputError(f"{graph.name} takes {window} tokens at a time, and the corpus has {len(pending)}", "use a larger one")


def _takes_no_text(graph: Graph, signature: Signature, corpus: Corpus) -> InputError:
    takes = ", ".join(f"{value.name} {value.type}" for value in signature.inputs)
    names = ", ".join(value.name for value in signature.inputs if not is_optional(graph, value))
    images = ", or a folder of images" if "pixel_values" in signature.by_name() else ""
    return InputError(
        f"{graph.name} takes {takes} and no text, and the corpus {corpus.name} is text",
        f"give samples of its inputs: --corpus data.npz with the arrays {names}{images} (Python: corpus={{name: array}})",
    )


def text_sample(graph: Graph, document: str | Messages | Prompted | Marked, longest: int | None = None) -> Sample:
    """The ids ``[n]`` of a document of text, cut to ``longest``, and what it tells of them.

    A chat that ends with a message of the assistant has that as its response. Raises InputError where nothing of a response or
    of a span is left.
    """
    told: Sample = {}
    if isinstance(document, Prompted):
        prompt, ids = _prompted(graph, document)
        if not prompt or len(ids) == len(prompt):
            what = "prompt" if not prompt else "response"
            raise InputError(f"a document has no token of a {what}: {document}", "leave it out")
        told[PROMPT_LENGTH] = np.asarray(len(prompt))
    elif isinstance(document, Marked):
        encoded = _tokenizer(graph).encode(document.text)
        ids, begins = list(encoded.ids), [match.start() for match in re.finditer(re.escape(document.span), document.text)]
        marked = [any(s < at + len(document.span) and e > at for at in begins) for s, e in encoded.offsets]
        told[SPAN] = np.asarray(marked[:longest])
        if not told[SPAN].any():
            raise InputError(
                f"the span {document.span!r} is not in the text {document.text[:60]!r}", "spans are parts of texts"
            )
    else:
        ids = token_ids(graph, document)
        if not isinstance(document, str) and len(document) > 1 and document[-1].get("role") == "assistant":
            prompt = list(_tokenizer(graph).encode(_chat(graph, document[:-1], True), add_special_tokens=False).ids)
            told[PROMPT_LENGTH] = np.asarray(min(len(prompt), len(ids)))
    if PROMPT_LENGTH in told and longest is not None and int(told[PROMPT_LENGTH]) >= longest:
        raise InputError(
            f"a prompt has {int(told[PROMPT_LENGTH])} tokens, and documents are cut to {longest}", "use shorter prompts"
        )
    return {"input_ids": np.asarray(ids[:longest], np.int64), **told}


def _prompted(graph: Graph, document: Prompted) -> tuple[list[int], list[int]]:
    """The ids of the prompt, and those of both, which are read as one text (a tokenizer may begin a text of its own with a
    space): a token that is not wholly of the prompt is of the response.
    """
    prompt, response = document.prompt, document.response
    if isinstance(prompt, tuple) or isinstance(response, tuple):
        if isinstance(prompt, str) or isinstance(response, str):
            raise InputError("of a document one part is text and the other is not", "give texts, or token ids")
        return list(prompt), [*prompt, *response]
    encoded = _tokenizer(graph).encode(prompt + response)
    begun = next((place for place, (_, end) in enumerate(encoded.offsets) if end > len(prompt)), len(encoded.ids))
    return list(encoded.ids[:begun]), list(encoded.ids)


def _tokenizer(graph: Graph) -> Tokenizer:
    tokenizer: Tokenizer | None = graph.companions.tokenizer
    if tokenizer is None:
        raise InputError(f"{graph.name} has no tokenizer to read texts with", "give one (--tokenizer DIR), or input arrays")
    return tokenizer


def token_ids(graph: Graph, document: str | Messages, longest: int | None = None) -> list[int]:
    """The ids of one text or chat, special tokens included, cut to ``longest``.

    A chat whose last message is not the assistant's ends where the assistant would begin (the template's generation prompt), as
    it does when the model is asked. Raises InputError without a tokenizer.
    """
    tokenizer = _tokenizer(graph)
    if isinstance(document, str):
        ids = list(tokenizer.encode(document).ids)
    else:
        chat = _chat(graph, document, document[-1].get("role") != "assistant")
        ids = list(tokenizer.encode(chat, add_special_tokens=False).ids)
    return ids if longest is None else ids[:longest]


def _chat(graph: Graph, messages: Messages, ask: bool = False) -> str:
    """The text of a chat by the tokenizer's own template, up to where the assistant begins with ``ask``.

    Raises InputError when it has none.
    """
    settings = _json_companion(graph, "tokenizer_config.json")
    template = settings.get("chat_template")
    if template is None and "chat_template.jinja" in graph.companions.tokenizer_files:
        template = graph.companions.tokenizer_files["chat_template.jinja"].decode()
    if not isinstance(template, str):
        raise InputError(f"the tokenizer of {graph.name} has no chat template for `messages`", "give the documents as `text`")
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def text(token: Any) -> str:
        return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")

    try:
        environment: Any = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        special = {key: text(settings.get(key)) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        return str(environment.from_string(template).render(messages=list(messages), add_generation_prompt=ask, **special))
    except TemplateError as error:
        raise InputError(f"the chat template of {graph.name} failed: {error}") from error


def rows(signature: Signature, arrays: Mapping[str, Array]) -> Iterator[Sample]:
    """The samples of a batch of arrays: its rows, each without its padding."""
    known = signature.by_name()
    unknown = sorted(set(arrays) - set(known))
    if unknown:
        raise InputError(f"the corpus holds {unknown[0]!r}, which is no input of the graph", f"inputs are {', '.join(known)}")
    batched = [name for name in arrays if signature.has_batch(known[name])]
    if not batched:
        yield complete(signature, dict(arrays))
        return
    counts = {arrays[name].shape[0] if arrays[name].ndim else 0 for name in batched}
    if len(counts) != 1:
        shapes = ", ".join(f"{name} {list(arrays[name].shape)}" for name in batched)
        raise InputError(f"the arrays of the corpus have different numbers of rows: {shapes}")
    for row in range(counts.pop()):
        sample = {name: array[row] if name in batched else array for name, array in arrays.items()}
        yield complete(signature, _unpadded(signature, sample))


def _unpadded(signature: Signature, sample: Sample) -> Sample:
    """``sample`` without the positions that its attention masks exclude."""
    known = signature.by_name()
    for name in [name for name in sample if name.endswith("attention_mask")]:
        shape, mask = known[name].shape, sample[name].astype(bool)
        if shape is None or len(shape) != 2 or mask.ndim != 1 or mask.all():
            continue
        for other, array in sample.items():
            axes = [axis - 1 for axis, size in enumerate(known[other].shape or ()) if axis and size == shape[1]]
            for axis in axes:
                if array.shape[axis] == len(mask):
                    sample[other] = array = np.compress(mask, array, axis=axis)
    return sample


def complete(signature: Signature, sample: Sample) -> Sample:
    """``sample`` with the dtypes of the graph's inputs and what can be derived filled in. Raises InputError for what cannot."""
    result: Sample = {}
    for value in signature.inputs:
        name = value.name
        if name in sample:
            array = np.asarray(sample[name])
        elif (ids := _ids_beside(name, {**result, **sample})) is not None:
            array = _filled(name, len(ids))
        elif name.endswith("decoder_input_ids") and signature.decoder_start is not None and "input_ids" in sample:
            array = shifted_right(np.asarray(sample["input_ids"]), signature.decoder_start)
        elif is_optional(value.graph, value):
            continue
        else:
            raise InputError(f"the graph takes {value!r}, which the corpus does not give", "give a .npz file with all inputs")
        result[name] = array.astype(value.dtype.numpy, copy=False) if value.dtype is not None else array
        signature.check(name, result[name])
    return {**{name: sample[name] for name in (PROMPT_LENGTH, SPAN) if name in sample}, **result}


def shifted_right(ids: Array, start: int) -> Array:
    """Decoder inputs ``[n]`` that make the decoder read the text ``ids [n]``: ``start``, then all but the last of them.

    What transformers does for labels (``shift_tokens_right``, ``_shift_right``), and for a bare text in BART.
    """
    return np.concatenate([np.asarray([start], ids.dtype), ids[:-1]])


def _ids_beside(name: str, sample: Sample) -> Array | None:
    """The ids that the derived input ``name`` goes with: ``decoder_attention_mask`` goes with ``decoder_input_ids``."""
    stem = next((name.removesuffix(ending) for ending in _FILLED if name.endswith(ending)), None)
    return None if stem is None else sample.get(f"{stem}input_ids")


def _filled(name: str, length: int) -> Array:
    """A sample without padding attends everywhere, counts positions from 0 and is one segment."""
    if name.endswith("position_ids"):
        return np.arange(length)
    return np.ones(length, np.int64) if name.endswith("attention_mask") else np.zeros(length, np.int64)
