"""The store of prefix blocks by itself, against a simple model of it, with sessions that only keep track of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actgraph.errors import InputError, UnsupportedError
from actgraph.graph.slots import Slot
from actgraph.ops.dtypes import DType
from actgraph.runtime.prefix import PrefixCache, PrefixStatistics

BLOCK = 4
BYTES = BLOCK * 8  # of a block: one number for each token


def entry(key: str, tokens: list[int]) -> float:
    """What the cache of graph ``key`` holds at the last of ``tokens``: it depends on all of them."""
    digest = hashlib.sha256(f"{key}{tokens}".encode()).digest()
    return float(np.frombuffer(digest[:4], np.uint32)[0])


def compiled(key: str = "graph", inputs: tuple[str, ...] = ("input_ids",), update: str = "append") -> Any:
    slots = (Slot("kv", DType.F64, ("batch", 1, "past", 1), update=update),) if update else ()
    return SimpleNamespace(key=key, inputs=dict.fromkeys(inputs), slots=slots)


@dataclass
class Session:
    """A session as ``PrefixCache.feed`` uses one; ``computed`` counts tokens."""

    compiled: Any
    inputs: Any = field(default_factory=lambda: SimpleNamespace(digest=bytes))
    tokens: list[int] = field(default_factory=list)
    entries: list[float] = field(default_factory=list)
    computed: int = 0

    @property
    def length(self) -> int:
        return len(self.tokens)

    def feed(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        assert tokens.shape[1] > 0
        self.computed += tokens.shape[1]
        self._extend(tokens)
        return {"logits": np.asarray([[self.entries[-1]]])}

    def _extend(self, tokens: np.ndarray) -> None:
        for token in tokens[0].tolist():
            self.tokens.append(token)
            self.entries.append(entry(self.compiled.key, self.tokens))

    def read(self, start: int, stop: int) -> dict[str, np.ndarray]:
        return {"kv": np.asarray(self.entries[start:stop]).reshape(1, 1, -1, 1)}

    def load(self, contents: Mapping[str, np.ndarray], tokens: np.ndarray) -> None:
        assert not self.tokens
        self._extend(tokens)
        assert contents["kv"].reshape(-1).tolist() == self.entries, "not the entries of these tokens"


def feed(cache: PrefixCache, tokens: list[int], **options: Any) -> int:
    """How many tokens were computed."""
    session = Session(compiled(**options))
    results = cache.feed(session, np.asarray([tokens]))  # type: ignore[arg-type]
    assert results["logits"][0, 0] == entry(session.compiled.key, tokens)
    return session.computed


def test_what_is_known_is_not_computed() -> None:
    cache = PrefixCache(block=BLOCK)
    prompt = list(range(11))
    assert feed(cache, prompt) == 11
    assert feed(cache, prompt) == 3
    assert feed(cache, [*prompt[:6], 99, 100, 101]) == 5
    assert feed(cache, [7, *prompt[1:]]) == 11, "one early token"
    assert feed(cache, [*prompt, 11, 12]) == 5
    assert feed(cache, [*prompt, 11, 12]) == 1
    assert cache.statistics == PrefixStatistics(hits=8, misses=6, tokens=32, blocks=6, bytes=6 * BYTES)


@pytest.mark.parametrize("length", range(1, 14))
def test_the_last_token_is_always_computed(length: int) -> None:
    cache, prompt = PrefixCache(block=BLOCK), list(range(length))
    feed(cache, prompt)
    assert feed(cache, prompt) == length - (length - 1) // BLOCK * BLOCK >= 1


def test_graphs_do_not_mix() -> None:
    cache, prompt = PrefixCache(block=BLOCK), list(range(9))
    assert [feed(cache, prompt, key=key) for key in ("one", "two", "one", "two")] == [9, 9, 1, 1]


def test_a_graph_that_is_told_the_prompt_length_finds_prompts_of_that_length() -> None:
    cache, prompt = PrefixCache(block=BLOCK), list(range(9))
    inputs = ("input_ids", "prompt_lengths")
    assert [feed(cache, prompt[:n], inputs=inputs) for n in (9, 8, 9)] == [9, 8, 1]


def test_blocks_cannot_be_written_to() -> None:
    cache, session = PrefixCache(block=BLOCK), Session(compiled())
    held = np.zeros((1, 1, 8, 1))
    session.read = lambda start, stop: {"kv": held[:, :, start:stop]}  # type: ignore[method-assign]
    cache.feed(session, np.arange(8)[None])  # type: ignore[arg-type]
    held[:] = 7.0
    for block in cache._blocks.values():
        assert (block.arrays["kv"] == 0).all(), "the memory of the session"
        with pytest.raises(ValueError, match="read-only"):
            block.arrays["kv"][:] = 1.0


@pytest.mark.parametrize("update", ["replace", "ring", ""])
def test_other_state_is_refused(update: str) -> None:
    with pytest.raises(UnsupportedError, match=f"kv \\({update}\\) does not keep" if update else "no cache of keys"):
        feed(PrefixCache(), [1, 2], update=update)


def test_one_new_prompt_at_a_time() -> None:
    cache, used = PrefixCache(), Session(compiled())
    used.feed(np.asarray([[1]]))
    for session, tokens in ((used, [[1]]), (Session(compiled()), [[1], [2]])):
        with pytest.raises(InputError, match="one prompt in a new session"):
            cache.feed(session, np.asarray(tokens))  # type: ignore[arg-type]


def test_bad_options() -> None:
    with pytest.raises(InputError, match="max_bytes is -1"):
        PrefixCache(-1)
    with pytest.raises(InputError, match="block is 0"):
        PrefixCache(block=0)


def test_nothing_is_kept_without_room() -> None:
    cache = PrefixCache(max_bytes=BYTES - 1, block=BLOCK)
    assert [feed(cache, [1] * 9) for _ in range(2)] == [9, 9]
    assert cache.statistics.blocks == cache.statistics.bytes == 0


@dataclass
class Model:
    """The rules, plainly: blocks with a count of holders and the time at which the last let go."""

    room: int
    blocks: dict[tuple[int, ...], list[int]] = field(default_factory=dict)  # prefix -> [holders, time]
    time: int = 0

    def known(self, tokens: tuple[int, ...]) -> list[tuple[int, ...]]:
        chain = [tokens[:end] for end in range(BLOCK, len(tokens), BLOCK)]
        return [prefix for n, prefix in enumerate(chain) if all(p in self.blocks for p in chain[: n + 1])]

    def hold(self, prefixes: list[tuple[int, ...]]) -> None:
        for prefix in prefixes:
            self.blocks[prefix][0] += 1

    def release(self, prefixes: list[tuple[int, ...]]) -> None:
        self.time += 1
        for prefix in prefixes:
            self.blocks[prefix][0] -= 1
            if not self.blocks[prefix][0]:
                self.blocks[prefix][1] = self.time

    def store(self, tokens: tuple[int, ...]) -> None:
        held = []
        for end in range(BLOCK, len(tokens) + 1, BLOCK):
            prefix = tokens[:end]
            if prefix not in self.blocks:
                if len(self.blocks) == self.room:
                    free = [(time, -len(p), p) for p, (holders, time) in self.blocks.items() if not holders]
                    if not free:
                        break
                    del self.blocks[min(free)[2]]
                self.blocks[prefix] = [0, 0]
            self.hold([prefix])
            held.append(prefix)
        self.release(held)


@given(
    room=st.integers(1, 9),
    actions=st.lists(
        st.tuples(st.sampled_from(["store", "hold", "release"]), st.lists(st.integers(0, 1), min_size=1, max_size=4)),
        max_size=60,
    ),
)
@settings(max_examples=200, deadline=None)
def test_what_stays_is_what_the_rules_say(room: int, actions: list[tuple[str, list[int]]]) -> None:
    """Least recently used first, the longest prefix among equals; never what is held, never a block before its successor."""
    cache, model = PrefixCache(max_bytes=room * BYTES, block=BLOCK), Model(room)
    root, holders = b"root", []
    for action, choices in actions:
        tokens = tuple(choice for choice in choices for _ in range(BLOCK))
        if action == "store":
            cache.store(root, tokens, lambda a, b, t=tokens: {"kv": np.asarray(t[a:b], np.int64).reshape(1, 1, -1, 1)})
            model.store(tokens)
        elif action == "hold":
            expected = model.known((*tokens, 9))
            model.hold(expected)
            prefix = cache.lookup(root, [*tokens, 9])
            holders.append((prefix, expected))
            assert prefix.length == len(expected) * BLOCK
            assert not expected or prefix.contents()["kv"].reshape(-1).tolist() == list(expected[-1])
        elif holders:
            prefix, held = holders.pop(choices[0] % len(holders))
            prefix.release()
            model.release(held)
        keys = {prefix: key for prefix in model.blocks for key in [list(cache._keys(root, prefix))[-1]]}
        assert set(keys.values()) == set(cache._blocks)
        assert all(cache._blocks[keys[prefix]].users == users for prefix, (users, _) in model.blocks.items())
        statistics = cache.statistics
        assert statistics.blocks == len(model.blocks) and statistics.bytes == len(model.blocks) * BYTES <= cache.max_bytes
    for prefix, _ in holders:
        prefix.release()
    cache.clear()
    assert not cache._blocks and not cache.statistics.bytes


def test_threads_share_one_cache() -> None:
    """Few blocks, many prompts that begin alike: every session checks what it is given."""
    cache = PrefixCache(max_bytes=12 * BYTES, block=BLOCK)
    random = np.random.default_rng(0)
    prompts = [[*np.repeat(random.integers(0, 2, 6), BLOCK).tolist(), 5] for _ in range(400)]
    with ThreadPoolExecutor(8) as pool:
        computed = sum(pool.map(lambda prompt: feed(cache, prompt, key=str(prompt[-2])), prompts))
    statistics = cache.statistics
    assert computed == sum(map(len, prompts)) - statistics.tokens
    assert statistics.tokens and statistics.evictions
    assert all(block.users == 0 for block in cache._blocks.values())
    assert statistics.bytes == sum(block.bytes for block in cache._blocks.values()) <= cache.max_bytes
