"""Text from tokens, a token at a time, in time that is linear in their number.

Decoding all tokens anew for each one is quadratic. What is decoded here is a window: tokens whose text is out, as the left
context that decoders need (they treat a leading space unlike an inner one), and behind them those whose text is not complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

INCOMPLETE = "\ufffd"  # what decoders give for bytes that are no character, or not yet
#: So many tokens without a complete character are no character in the making (of four bytes at most).
_PATIENCE = 16


class Tokenizer(Protocol):
    """What generation needs of a tokenizer (``tokenizers.Tokenizer`` has it)."""

    def decode(self, ids: list[int]) -> str:
        """The text of tokens."""
        ...


class TextStream:
    """The text that follows ``prompt``, as tokens come.

    The pieces that ``push`` and ``finish`` return, together, are the continuation that the tokenizer decodes from prompt and
    tokens. One case differs: where tokens of single bytes go on, behind a complete character, with bytes that are none,
    decoders that fall back to bytes turn the character into replacement characters too. Here what is out stays.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._decode = tokenizer.decode
        self._context = list(prompt)  # tokens whose text is out ...
        self._before: str | None = None  # ... and that text
        self._waiting: list[int] = []
        self._seen: tuple[str, int] | None = None  # the text of the waiting tokens, and how many they were

    @property
    def pending(self) -> str:
        """The text of the tokens since the last piece, which may change still."""
        if self._seen is None or self._seen[1] != len(self._waiting):
            self._seen = (self._text(self._waiting), len(self._waiting))
        return self._seen[0]

    def push(self, token: int) -> str:
        """The text that is complete with ``token``; empty while a character is not."""
        self._waiting.append(token)
        text = self.pending
        if text and not text.endswith(INCOMPLETE):
            return self._put_out(text, len(self._waiting))
        if len(self._waiting) >= _PATIENCE:
            return self._split()
        return ""

    def finish(self) -> str:
        """The rest, be it complete or not."""
        return self._put_out(self.pending, len(self._waiting)) if self._waiting else ""

    def _text(self, tokens: list[int]) -> str:
        if not tokens:
            return ""
        if self._before is None:
            self._before = str(self._decode(self._context))
        whole = str(self._decode([*self._context, *tokens]))
        if not whole.startswith(self._before):  # the last bytes that are out and the next ones are no character together
            return str(self._decode(tokens))
        return whole[len(self._before) :]

    def _put_out(self, text: str, count: int) -> str:
        self._context, self._waiting = self._waiting[:count], self._waiting[count:]
        self._before, self._seen = None, None
        return text

    def _split(self) -> str:
        """Of many tokens that end in no character, all but the last few, which may be the beginning of one."""
        text, count = self.pending, len(self._waiting)
        if not text:  # tokens without text, such as special ones
            self._waiting, self._seen = self._waiting[-1:], None
            return ""
        for end in range(count - 1, count - 4, -1):
            first = self._text(self._waiting[:end])
            if first and first + str(self._decode(self._waiting[end:])) == text:
                return self._put_out(first, end)
        return ""


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of ``tokens`` behind ``prompt``: what a ``TextStream`` makes of them, at once."""
    if not tokens:
        return ""
    start, whole = str(tokenizer.decode(list(prompt))), str(tokenizer.decode([*prompt, *tokens]))
    if whole.startswith(start) and INCOMPLETE not in whole:
        return whole[len(start) :]
    stream = TextStream(tokenizer, prompt)
    return "".join([*(stream.push(token) for token in tokens), stream.finish()])
