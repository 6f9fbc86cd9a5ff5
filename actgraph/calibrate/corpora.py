"""Corpora: what models are calibrated and measured on.

A corpus is a list of documents: texts (a line of ``.txt``, or of ``.jsonl`` with ``text``, ``messages``, ``prompt`` and
``response``, or ``text`` and ``span``), named arrays (``.npz``, ``.safetensors``, dicts of arrays) or images. Opening one reads
texts and arrays into memory; images are read as they are used.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actgraph.errors import InputError

Array = np.ndarray[Any, Any]

#: A chat: a list of ``{"role": ..., "content": ...}``.
Messages = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Prompted:
    """A prompt and the response to it, both as text or both as token ids (special tokens included)."""

    prompt: str | tuple[int, ...]
    response: str | tuple[int, ...]


@dataclass(frozen=True)
class Marked:
    """A text in which the places of ``span`` are what matters."""

    text: str
    span: str


#: A text, a chat, a prompt with its response, a text with a span, a batch of named arrays (leading axis: samples), or an image.
Document = str | Messages | Prompted | Marked | Mapping[str, Array] | Path

_IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".ppm", ".tif", ".tiff"})
_SAMPLE = "tinystories_sample.txt"


@dataclass(frozen=True)
class Corpus:
    """Documents under a name. Raises InputError on opening when there are none."""

    name: str
    documents: tuple[Document, ...]

    def __post_init__(self) -> None:
        if not self.documents:
            raise InputError(f"the corpus {self.name} is empty", "give a file with at least one document")

    def __len__(self) -> int:
        return len(self.documents)

    def __iter__(self) -> Iterator[Document]:
        return iter(self.documents)

    @property
    def unit(self) -> str:
        """What one document is called in reports: ``document``, ``sample`` (of arrays) or ``image``."""
        first = self.documents[0]
        return "sample" if isinstance(first, Mapping) else "image" if isinstance(first, Path) else "document"

    @staticmethod
    def of(source: Any = None) -> Corpus:
        """The corpus that ``source`` describes.

        A path (``.txt``, ``.jsonl``, ``.npz``, ``.safetensors``, a folder of images), a dict of arrays, an iterable of texts or
        of dicts of arrays, a Corpus, or ``None`` for the packaged sample text. Raises InputError when it cannot be read.
        """
        if isinstance(source, Corpus):
            return source
        if source is None:
            data = importlib.resources.files("actgraph").joinpath("data", _SAMPLE)
            return Corpus(_SAMPLE, _lines(data.read_text(encoding="utf-8")))
        if isinstance(source, (str, Path)):
            return _open(Path(source))
        if isinstance(source, Mapping):
            return Corpus("arrays", (_arrays(source, "the corpus"),))
        if isinstance(source, Iterable):
            return Corpus("documents", tuple(_document(item, number) for number, item in enumerate(source)))
        raise InputError(f"a {type(source).__name__} is no corpus", "give a file, texts, or dicts of arrays")

    def content_hash(self) -> str:
        """sha256 over all documents, 16 hexadecimal digits. The name is not part of it."""
        digest = hashlib.sha256()
        for document in self.documents:
            for part in _parts(document):
                digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()[:16]


def _open(path: Path) -> Corpus:
    if path.is_dir():
        images = sorted(p for p in path.rglob("*") if p.suffix.lower() in _IMAGES and p.is_file())
        if not images:
            raise InputError(f"there are no images in the folder {path}", f"looked for {', '.join(sorted(_IMAGES))}")
        return Corpus(path.name, tuple(images))
    if not path.is_file():
        raise InputError(f"there is no corpus {path}", "give a .txt, .jsonl, .npz or .safetensors file, or a folder of images")
    suffix = path.suffix.lower()
    try:
        if suffix in (".txt", ".text", ""):
            return Corpus(path.name, _lines(path.read_text(encoding="utf-8")))
        if suffix in (".jsonl", ".ndjson"):
            return Corpus(path.name, _json_lines(path))
        if suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return Corpus(path.name, (_arrays({key: file[key] for key in file.files}, str(path)),))
        if suffix == ".safetensors":
            from safetensors.numpy import load_file

            return Corpus(path.name, (_arrays(load_file(path), str(path)),))
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except Exception as error:  # numpy and safetensors raise many kinds for a corrupt file
        raise InputError(f"cannot read the corpus {path}: {str(error).splitlines()[0] if str(error) else error!r}") from error
    if suffix == ".npy":
        raise InputError(
            f"{path} has no names for its array", f"np.savez('data.npz', INPUT=np.load('{path.name}')) gives it one"
        )
    raise InputError(f"{path} is no corpus", "corpora are .txt, .jsonl, .npz or .safetensors files, or folders of images")


def _lines(text: str) -> tuple[str, ...]:
    """Non-empty lines. Only newlines end a document (``splitlines`` would also break at separators inside of a text)."""
    return tuple(line.removesuffix("\r") for line in text.split("\n") if line.strip())


def _json_lines(path: Path) -> tuple[Document, ...]:
    documents: list[Document] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not JSON: {error.msg}") from error
        if isinstance(item, str):
            documents.append(item)
        elif isinstance(item, dict) and (told := _told(item, f"{path}, line {number}")) is not None:
            documents.append(told)
        elif isinstance(item, dict) and isinstance(item.get("text"), str):
            documents.append(item["text"])
        elif isinstance(item, dict) and isinstance(item.get("messages"), list):
            documents.append(_messages(item["messages"], f"{path}, line {number}"))
        else:
            raise InputError(f"{path}, line {number}: neither `text` nor `messages`", 'a line is {"text": "..."}')
    return tuple(documents)


def _told(item: Mapping[str, Any], where: str) -> Prompted | Marked | None:
    """A document of ``prompt`` and ``response``, or of ``text`` and ``span``. Raises InputError where half of it is there."""
    for kind, first, second in ((Prompted, "prompt", "response"), (Marked, "text", "span")):
        if second in item:
            if not isinstance(item.get(first), str) or not isinstance(item[second], str) or not item[second]:
                raise InputError(f"{where}: {second!r} without a {first!r}, or no text", f"both are texts: {first}, {second}")
            return kind(item[first], item[second])
    return None


def _pair(prompt: Any, response: Any) -> Prompted | None:
    """A prompt and a response given as a pair of texts or of token ids."""
    if isinstance(prompt, str) and isinstance(response, str):
        return Prompted(prompt, response)
    ids = [np.asarray(part) for part in (prompt, response) if not isinstance(part, (str, Mapping))]
    if len(ids) == 2 and all(part.ndim == 1 and part.dtype.kind in "iu" for part in ids):
        return Prompted(*(tuple(part.tolist()) for part in ids))
    return None


def _messages(items: Sequence[Any], where: str) -> Messages:
    for item in items:
        if not (isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)):
            raise InputError(f"{where}: a message is no role and content", 'write {"role": "user", "content": "..."}')
    return tuple(items)


def _document(item: Any, number: int) -> Document:
    if isinstance(item, (str, Path, Prompted, Marked)):
        return item
    if isinstance(item, Mapping) and all(isinstance(value, str) for value in item.values()):
        told = _told(item, f"document {number}")
        if told is not None:
            return told
    if isinstance(item, Mapping):
        return _arrays(item, f"document {number}")
    if isinstance(item, tuple) and len(item) == 2 and (pair := _pair(*item)) is not None:
        return pair
    if isinstance(item, (list, tuple)) and item and all(isinstance(message, Mapping) for message in item):
        return _messages(item, f"document {number}")
    raise InputError(f"document {number} of the corpus is a {type(item).__name__}", "documents are texts or dicts of arrays")


def _arrays(item: Mapping[str, Any], where: str) -> dict[str, Array]:
    arrays = {}
    for key, value in item.items():
        array = value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)
        if array.dtype.kind == "O":
            raise InputError(f"{where}: {key!r} is no array of numbers")
        arrays[str(key)] = array
    if not arrays:
        raise InputError(f"{where} holds no arrays")
    return arrays


def _parts(document: Document) -> Iterator[bytes]:
    if isinstance(document, str):
        yield b"text"
        yield document.encode()
    elif isinstance(document, (Prompted, Marked)):
        yield type(document).__name__.lower().encode()
        yield from (str(value).encode() for value in asdict(document).values())
    elif isinstance(document, Path):
        yield b"file"
        yield document.read_bytes()
    elif isinstance(document, Mapping):
        for key in sorted(document):
            array = np.ascontiguousarray(document[key])
            yield f"array {key} {array.dtype} {array.shape}".encode()
            yield array.tobytes()
    else:
        yield b"messages"
        yield json.dumps(document, sort_keys=True).encode()
