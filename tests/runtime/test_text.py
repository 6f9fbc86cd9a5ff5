"""Text as tokens come: what was said piece by piece is what the tokenizer decodes at once, and costs no more than that."""

from __future__ import annotations

import functools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import actgraph as ag
from actgraph.runtime.text import TextStream, continuation
from tests import zoo

Ids = list[int]
WORDS = ["▁", "▁the", "▁a", "s", "ing", ".", "▁日本", "é", "▁▁"]


@functools.cache
def tokenizer(kind: str) -> Tokenizer:
    """byte_level: as GPT-2. sentencepiece: as Llama, with tokens of single bytes. metaspace: as T5. wordpiece: as BERT."""
    if kind == "stories":
        return zoo.captured("stories260k").companions.tokenizer
    if kind == "byte_level":
        pairs = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("æ", "Ĺ"), ("ð", "Ł"), ("Ł", "ĺ")]
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = [*alphabet, *("".join(pair) for pair in pairs)]
        made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, pairs))
        made.decoder = decoders.ByteLevel()
        made.add_special_tokens(["<end>"])
    elif kind == "sentencepiece":
        words = ["<unk>", "<s>", *(f"<0x{i:02X}>" for i in range(256)), *WORDS]
        made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        made.decoder = decoders.Sequence(parts)
        made.add_special_tokens(["<unk>", "<s>"])
    elif kind == "metaspace":
        made = Tokenizer(models.Unigram([(word, 0.0) for word in ("<unk>", *WORDS)], 0))
        made.decoder = decoders.Metaspace()
    else:
        words = ["[UNK]", "do", "not", "##ing", ".", "'", "s", "n't", "ca"]
        made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
        made.decoder = decoders.WordPiece()
    return made


def pieces(made: Tokenizer, prompt: Ids, tokens: Ids) -> list[str]:
    stream = TextStream(made, prompt)
    return [*(stream.push(token) for token in tokens), stream.finish()]


def at_once(made: Tokenizer, prompt: Ids, tokens: Ids) -> str:
    start, whole = made.decode(prompt), made.decode([*prompt, *tokens])
    return whole[len(start) :] if whole.startswith(start) else made.decode(tokens)


def ids(kind: str) -> st.SearchStrategy[Ids]:
    return st.lists(st.integers(0, tokenizer(kind).get_vocab_size() - 1), max_size=40)


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "wordpiece"])
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_the_pieces_are_what_is_decoded_at_once(kind: str, data: st.DataObject) -> None:
    """Any tokens whatever: characters cut into bytes, bytes that are none, special tokens."""
    made, prompt, tokens = tokenizer(kind), data.draw(ids(kind)), data.draw(ids(kind))
    if kind == "byte_level":  # a prompt ends with a whole character; see below for others
        prompt = [token for token in prompt if "\ufffd" not in made.decode([token])]
    found = "".join(pieces(made, prompt, tokens))
    assert found == at_once(made, prompt, tokens) == continuation(made, prompt, tokens)


def _encoded(made: Tokenizer, text: str) -> Ids:
    """Words where the vocabulary has them, bytes else: what an encoder with byte fallback does."""
    result, vocabulary = [], made.get_vocab()
    for character in text.replace(" ", "▁"):
        whole = vocabulary.get(character)
        result += [whole] if whole is not None else [vocabulary[f"<0x{byte:02X}>"] for byte in character.encode()]
    return result


@given(start=st.text(max_size=12), text=st.text(max_size=40), words=st.lists(st.integers(258, 266), max_size=4))
@settings(max_examples=80, deadline=None)
def test_characters_of_several_byte_tokens(start: str, text: str, words: Ids) -> None:
    made = tokenizer("sentencepiece")
    prompt, tokens = [1, *_encoded(made, start)], [*_encoded(made, text), *words, *_encoded(made, text)]
    found = pieces(made, prompt, tokens)
    assert "".join(found) == at_once(made, prompt, tokens) == continuation(made, prompt, tokens)


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_text_that_is_out_stays_whatever_bytes_follow(data: st.DataObject) -> None:
    """Also where the decoder would take back a character; the text made at the end is the streamed one."""
    made, prompt, tokens = (tokenizer("sentencepiece"), *(data.draw(ids("sentencepiece")) for _ in range(2)))
    assert "".join(pieces(made, prompt, tokens)) == continuation(made, prompt, tokens)


def test_a_character_that_is_out_is_not_taken_back() -> None:
    made = tokenizer("sentencepiece")
    sun, broken, word = _encoded(made, "日"), [2 + 0xFF], [made.token_to_id("▁a")]
    assert made.decode([*sun, *broken, *word]) == "\ufffd" * 4 + " a"
    assert pieces(made, [], [*sun, *broken, *word]) == ["", "", "日", "", "\ufffd a", ""]


def test_a_piece_comes_with_the_last_byte_of_its_character() -> None:
    made = tokenizer("sentencepiece")
    assert pieces(made, [1], [*_encoded(made, "é日"), made.token_to_id("<0x0A>")]) == ["é", "", "", "日", "\n", ""]
    made = tokenizer("byte_level")
    smile = [made.token_to_id(token) for token in ("ð", "Ł", "ĺ", "Ģ")]
    assert pieces(made, [], smile) == ["", "", "", "😀", ""]
    assert pieces(made, smile[:1], smile[1:]) == ["", "", "", "\ufffd" * 3], "the prompt ends within a character"
    assert pieces(made, [], smile[:2]) == ["", "", "\ufffd"]


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, made: Tokenizer) -> None:
        self.made, self.count = made, 0

    def decode(self, tokens: Ids) -> str:
        self.count += len(tokens)
        return str(self.made.decode(tokens))


@pytest.mark.parametrize("what", ["text", "no characters", "no text", "anything"])
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "stories"])
def test_the_work_is_linear(kind: str, what: str) -> None:
    made, draw = tokenizer(kind), random.Random(0)
    bad = {"byte_level": "ÿ", "sentencepiece": "<0xFF>", "stories": "<0xFF>"}[kind]
    special = {"byte_level": "<end>", "sentencepiece": "<s>", "stories": "<s>"}[kind]
    ordinary = [i for i in range(made.get_vocab_size()) if "\ufffd" not in made.decode([i])]
    tokens = {
        "text": draw.choices(ordinary, k=2000),
        "no characters": [made.token_to_id(bad)] * 2000,
        "no text": [made.token_to_id(special)] * 2000,
        "anything": draw.choices(range(made.get_vocab_size()), k=2000),
    }[what]
    counting = Counting(made)
    pieces(counting, ordinary[:50], tokens)  # type: ignore[arg-type]
    assert counting.count < 150 * len(tokens)
    assert what != "text" or counting.count < 8 * len(tokens)


def test_what_was_held_back_comes_when_the_context_is_full() -> None:
    """Text that may be the beginning of a stop string is told at the end, whatever the end is."""
    graph = zoo.captured("stories260k")
    whole = ag.generate(graph, "Once upon a time", 4, stop_at_end=False)
    places = len(whole.prompt_tokens) + 3
    graph.companions.config = {**graph.companions.config, "max_position_embeddings": places}
    steps = list(ag.stream(graph, "Once upon a time", 9, stop=whole.text[-2:] + "#", stop_at_end=False))
    assert [step.token for step in steps] == [*whole.tokens, None]
    assert "".join(step.text for step in steps) == whole.text and steps[-1].text == whole.text[-2:]
