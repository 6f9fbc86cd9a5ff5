"""Pipeline text: what it means, that it round-trips, and what its errors say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actgraph.errors import OptionError
from actgraph.pipeline import Pipeline
from actgraph.pipeline.text import Entry, parse, write
from tests.pipeline.toys import Options, Scale

_globs = st.from_regex(r"[a-z.*{},:%\[\]=]+", fullmatch=True)
_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | _globs,
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
_names = st.from_regex(r"[A-Za-z][A-Za-z0-9_-]{0,8}", fullmatch=True)
_keys = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
_entries = st.lists(st.builds(Entry, _names, st.dictionaries(_keys, _values, max_size=4)), max_size=4)


def same(left: Any, right: Any) -> bool:
    """Equal, types included (1 is neither 1.0 nor true)."""
    if isinstance(left, list):
        return isinstance(right, list) and len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and bool(left == right)


@settings(max_examples=200, deadline=None)
@given(entries=_entries)
def test_what_is_written_reads_back_and_is_canonical(entries: list[Entry]) -> None:
    text = write(entries)
    found = parse(text)
    assert [entry.name for entry in found] == [entry.name for entry in entries]
    for left, right in zip(entries, found, strict=True):
        assert list(left.options) == list(right.options)
        assert all(same(left.options[key], right.options[key]) for key in left.options)
    assert write(found) == text
    assert "\n" not in text


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=" \n{}[]=,\"'\\abc1.-:*", max_size=24))
def test_any_text_parses_or_gives_one_clear_line(text: str) -> None:
    try:
        found = parse(text)
    except OptionError as error:
        assert error.message.startswith("pipeline text, ")
        assert "\n" not in error.message
    else:
        assert parse(write(found)) == found


_options = st.builds(
    Options,
    text=st.text(), number=st.floats(allow_nan=False), count=st.integers(1, 9), flag=st.booleans(),
    choice=st.sampled_from(["one", "two"]), maybe=st.none() | st.floats(allow_nan=False),
    either=st.text() | st.lists(st.text(), max_size=3).map(tuple),
    numbers=st.lists(st.floats(allow_nan=False), max_size=3).map(tuple),
    grid=st.lists(st.lists(st.integers(), max_size=2).map(tuple), max_size=2).map(tuple),
    path=st.none() | st.sampled_from(["a/b.txt", "/c d.bin"]),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(passes=st.lists(_options, max_size=3))
def test_pipelines_read_back_from_their_text(passes: list[Options]) -> None:
    pipeline = Pipeline(passes)
    assert Pipeline.parse(str(pipeline)) == pipeline
    assert str(Pipeline.parse(str(pipeline))) == str(pipeline)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("p", {}),
        ("p{}", {}),
        (" p { a = 1  b=two } ", {"a": 1, "b": "two"}),
        ("p{a=blocks.{2..4}.mlp.hidden b=x.{1,2}.y}", {"a": "blocks.{2..4}.mlp.hidden", "b": "x.{1,2}.y"}),
        ("p{a=re:.*lm_head b=%47 c=*.down_proj:in}", {"a": "re:.*lm_head", "b": "%47", "c": "*.down_proj:in"}),
        ("p{a=[x, 'y z', 3, true, [1.5]]}", {"a": ["x", "y z", 3, True, [1.5]]}),
        ("p{a=[]}", {"a": []}),
        ('p{a="q\\"uo\\\\te" b=\'it\\\'s "so"\'}', {"a": 'q"uo\\te', "b": 'it\'s "so"'}),
        ("p{a=1e-5 b=-3 c=.5 d=inf}", {"a": 1e-5, "b": -3, "c": 0.5, "d": float("inf")}),
        ("p{e=null f='null' g='1'}", {"e": None, "f": "null", "g": "1"}),
        ("p{a=1.2.3 b=1e c=--x d=True}", {"a": "1.2.3", "b": "1e", "c": "--x", "d": "True"}),
        ("p{\n  a=1\n}", {"a": 1}),
    ],
)  # fmt: skip
def test_what_values_mean(text: str, options: dict[str, Any]) -> None:
    (entry,) = parse(text)
    assert entry.name == "p"
    assert entry.options.keys() == options.keys()
    assert all(same(entry.options[key], options[key]) for key in options)


def test_empty_text_is_an_empty_pipeline() -> None:
    assert parse("  \n") == []
    assert Pipeline.parse("") == Pipeline()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("toy_scale{factor=2", "character 10 (at '{factor=2'): the '{' of toy_scale is never closed"),
        ("toy_scale{factor}", "character 17 (at '}'): expected '=' after 'factor', found '}'"),
        ("toy_scale{factor=}", "expected a value, found '}'"),
        ("toy_scale{factor=2 factor=3}", "character 20 (at 'factor=3}'): option 'factor' of toy_scale is given twice"),
        ("toy_scale{factor=2,site=a}", "unexpected ',' after the value of 'factor' (a list is written [a, b]; options are"),
        ("toy_scale toy_tidy", "character 11 (at 'toy_tidy'): expected ',' between passes"),
        ("toy_scale,", "expected the name of a pass, found the end"),
        ("toy_scale,,toy_tidy", "expected the name of a pass, found ','"),
        ("toy_tidy,\n  9", "line 2, character 3 (at '9'): expected the name of a pass"),
        ("toy_scale{site='x}", "the quotes are never closed"),
        ("toy_scale{site=[a}", "expected ',' or ']' in a list, found '}'"),
        ("toy_scale{site=[a,]}", "expected a value after ',', found ']'"),
        (
            "toy_scale{site=a & :40}",
            "of toy_scale, found '&' (quote a value that has spaces: site='...')",
        ),
        ("toy_scale{site=a=b}", "unexpected '=' after the value of 'site' (put the value in quotes)"),
        ("toy_scal{factor=2}", "character 1 (at 'toy_scal{factor=2}'): there is no pass 'toy_scal' (did you mean toy_scale"),
        ("toy_tidy, toy_scale{facto=2}", "character 21 (at 'facto=2}'): toy_scale has no option 'facto' (did you mean factor"),
        ("toy_tidy{x=1}", "toy_tidy has no option 'x' (toy_tidy takes no options)"),
        ("toy_scale{factor=big}", "option 'factor' of toy_scale must be a number, not big"),
        ("toy_scale{site=4}", "option 'site' of toy_scale must be text, not 4 (put it in quotes: site=\"4\")"),
        ("toy_options{flag=1}", "option 'flag' of toy_options must be true or false, not 1"),
        ("toy_options{count=1.5}", "option 'count' of toy_options"),
        ("toy_options{count=12}", "option 'count' of toy_options is 12: input should be less than or equal to 9"),
        ("toy_options{choice=three}", "option 'choice' of toy_options is three: input should be 'one' or 'two'"),
        ("toy_options{either=[1]}", "option 'either' of toy_options must be text or a list of text, not [1]"),
        ("toy_options{numbers='1'}", "option 'numbers' of toy_options must be a list of numbers, not \"1\""),
    ],
)
def test_errors_say_where_and_what(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        Pipeline.parse(text)
    assert message in str(caught.value)
    assert "\n" not in caught.value.message


def test_a_missing_option_is_named() -> None:
    with pytest.raises(OptionError, match="steer needs the option 'vector'"):
        Pipeline.parse("steer{scale=2}")


def test_canonical_text_leaves_defaults_out_and_keeps_the_order_of_definition() -> None:
    assert str(Scale(site="embed", factor=2)) == "toy_scale{factor=2.0 site=embed}"
    assert str(Scale(factor=1.0)) == "toy_scale"
    assert Pipeline.parse("toy_scale{site=linear.0 factor=1}") == Pipeline([Scale()])


def test_arrays_have_no_text_but_a_name_for_provenance() -> None:
    class Vector(Scale):
        vector: Any = None

    step = Vector(vector=np.arange(3, dtype=np.float32))
    other = Vector(vector=np.arange(3, dtype=np.float32) + 1)
    assert str(step).startswith('toy_scale{vector="array:float32[3]:')
    assert str(step) != str(other)
    with pytest.raises(OptionError, match="holds ndarray data"):
        Pipeline([step]).to_text()
    with pytest.raises(OptionError, match="holds ndarray data"):
        Pipeline([step]).to_yaml()


def test_pipelines_are_built_from_anything_that_describes_one() -> None:
    wanted = Pipeline([Scale(factor=2), Scale(factor=3)])
    assert Pipeline.of("toy_scale{factor=2}, toy_scale{factor=3}") == wanted
    assert Pipeline.of([Scale(factor=2), "toy_scale{factor=3}"]) == wanted
    assert Pipeline.of(Scale(factor=2)) + Pipeline.of(Scale(factor=3)) == wanted
    assert Pipeline.of(wanted) is wanted
    assert wanted[:1] == Pipeline([Scale(factor=2)])
    with pytest.raises(OptionError, match="is not a pass"):
        Pipeline([3])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([Scale(), Pipeline], "<class 'actgraph.pipeline.pipeline.Pipeline'> is not a pass (give passes, their text"),
        ([Scale(), Scale], "Scale is the class of a pass (make one: Scale(...))"),
        (Scale, "Scale is the class of a pass"),
        (["toy_scale", 3], "3 is not a pass"),
        (None, "None is not a pass"),
        ({"toy_scale": {"factor": 2}}, "{'toy_scale': {'factor': 2}} is not a pass"),
    ],
)
def test_what_describes_no_pipeline_is_an_error(source: Any, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        Pipeline.of(source)
    assert message in str(caught.value)
