"""The selector language, without a graph."""

from __future__ import annotations

import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actgraph.errors import SiteError
from actgraph.graph.selectors import compile_selector, expand_braces

NAMES = [
    *(f"blocks.{i}.{part}" for i in range(12) for part in ("resid_pre", "mlp.hidden", "attn.q", "resid_post")),
    *(f"linear.{i}{suffix}" for i in range(5) for suffix in ("", ":in")),
    "attention.0", "attention.0:in[0]", "attention.0:in[1]", "embed", "logits",
]  # fmt: skip


def select(selector: str) -> list[str]:
    patterns = list(compile_selector(selector, lambda: NAMES))
    return [name for name in NAMES if any(pattern.matches(name) for pattern in patterns)]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("embed", ["embed"]),
        ("embed:out", ["embed"]),
        ("blocks.{2..4}.mlp.hidden", [f"blocks.{i}.mlp.hidden" for i in (2, 3, 4)]),
        ("blocks.{8..2..3}.attn.q", [f"blocks.{i}.attn.q" for i in (2, 5, 8)]),
        (
            "blocks.{0,3}.{attn.q,mlp.hidden}",
            ["blocks.0.mlp.hidden", "blocks.0.attn.q", "blocks.3.mlp.hidden", "blocks.3.attn.q"],
        ),
        ("blocks.1?.attn.q", ["blocks.10.attn.q", "blocks.11.attn.q"]),
        ("blocks.-1.resid_post", ["blocks.11.resid_post"]),
        ("linear.*", [f"linear.{i}" for i in range(5)]),
        ("linear.*:in", [f"linear.{i}:in" for i in range(5)]),
        ("linear.0:*", ["linear.0", "linear.0:in"]),
        ("linear.-2:in", ["linear.3:in"]),
        ("attention.0:in[1]", ["attention.0:in[1]"]),
        ("*:in[?]", ["attention.0:in[0]", "attention.0:in[1]"]),
        (r"re:blocks\.1\d?\.attn\.q", ["blocks.1.attn.q", "blocks.10.attn.q", "blocks.11.attn.q"]),
        ("re:.*logits", ["logits"]),
        ("re:logit", []),  # the whole name has to match
        ("*.{{1..2},{4,5}}.resid_post", [f"blocks.{i}.resid_post" for i in (1, 2, 4, 5)]),
    ],
)
def test_selects_exactly(selector: str, expected: list[str]) -> None:
    assert select(selector) == expected


@pytest.mark.parametrize(
    "selector", ["", "  ", "blocks.{1..2", "blocks.1}", "re:(", "a.{1..3..0}", "a.{1..999999999}", "blocks.-13.attn.q"]
)
def test_malformed_selectors_are_errors(selector: str) -> None:
    with pytest.raises(SiteError):
        list(compile_selector(selector, lambda: NAMES))


@given(st.text(alphabet="abl.ocks*?0123:in", min_size=1, max_size=12))
def test_globs_agree_with_fnmatch_within_one_suffix(pattern: str) -> None:
    """On names without a suffix a pattern without one is an ordinary shell glob."""
    if ":" in pattern or "-" in pattern:
        return
    plain = [name for name in NAMES if ":" not in name]
    assert [name for name in select(pattern) if ":" not in name] == fnmatch.filter(plain, pattern)


@given(st.integers(0, 40), st.integers(0, 40))
def test_a_range_is_every_number_between_its_ends(first: int, last: int) -> None:
    low, high = sorted((first, last))
    assert sorted(map(int, expand_braces(f"{{{first}..{last}}}"))) == list(range(low, high + 1))
