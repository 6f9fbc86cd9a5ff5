"""Opening corpora, and what is wrong with those that do not open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actgraph.calibrate.corpora import Corpus
from actgraph.errors import InputError


def test_the_default_corpus_is_the_packaged_sample() -> None:
    corpus = Corpus.of()
    assert len(corpus) == 19
    assert str(corpus.documents[0]).startswith("once upon a time there was a little girl")


def test_text_is_a_document_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\n\n  \ntwo\u2028still two\n".encode())
    assert Corpus.of(path).documents == ("one", "two\u2028still two")
    assert Corpus.of(str(path)).name == "a.txt"


def test_json_lines_hold_texts_or_messages(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    messages = [{"role": "user", "content": "hi"}]
    path.write_text("\n".join(json.dumps(item) for item in ({"text": "one"}, "two", {"messages": messages})) + "\n")
    assert Corpus.of(path).documents == ("one", "two", tuple(messages))


def test_arrays_come_from_npz_safetensors_and_dicts(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    arrays = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}
    np.savez(tmp_path / "a.npz", **arrays)
    save_file(arrays, tmp_path / "a.safetensors")
    hashes = set()
    for source in (tmp_path / "a.npz", tmp_path / "a.safetensors", arrays, [arrays]):
        corpus = Corpus.of(source)
        np.testing.assert_array_equal(corpus.documents[0]["x"], arrays["x"])  # type: ignore[index,call-overload]
        hashes.add(corpus.content_hash())
    assert len(hashes) == 1


def test_the_hash_is_of_the_content_alone(tmp_path: Path) -> None:
    assert Corpus.of(["a", "b"]).content_hash() == Corpus("other", ("a", "b")).content_hash()
    different = [["a", "b"], ["ab"], ["b", "a"], [{"x": np.zeros(2)}], [{"x": np.zeros((2, 1))}], [{"y": np.zeros(2)}]]
    assert len({Corpus.of(documents).content_hash() for documents in different}) == len(different)


def _write(path: Path, content: Any) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "is empty"),
        ("a.txt", "\n \n", "is empty"),
        ("a.txt", b"\xff\xfe\xff", "not UTF-8"),
        ("a.jsonl", "{oops\n", "line 1: not JSON"),
        ("a.jsonl", '{"text": "x"}\n{"body": "x"}\n', "line 2: neither"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}\n', "line 1: a message is no role"),
        ("a.npz", "not a zip", "cannot read the corpus"),
        ("a.safetensors", "short", "cannot read the corpus"),
        ("a.parquet", "PAR1", "is no corpus"),
        ("a.npy", "", r"a.npy has no names for its array \(np.savez\('data.npz', INPUT=np.load\('a.npy'\)\) gives it one"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = _write(tmp_path / name, content)
    with pytest.raises(InputError, match=message) as caught:
        Corpus.of(path)
    assert "\n" not in caught.value.message
    assert name in caught.value.message


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([{"evil": 1}], dtype=object))
    with pytest.raises(InputError, match="cannot read the corpus"):
        Corpus.of(tmp_path / "a.npz")


@pytest.mark.parametrize("source", [[], (), {}, [3], 7, [{"x": object()}], "nowhere.txt"])
def test_what_is_no_corpus_is_an_error(source: Any) -> None:
    with pytest.raises(InputError):
        Corpus.of(source)


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no images"):
        Corpus.of(tmp_path)
