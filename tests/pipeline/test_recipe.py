"""Recipes: the YAML form, paths in it, its errors, and the schema that editors use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings

from actgraph.errors import InputError, OptionError
from actgraph.pipeline import Pipeline, all_passes
from actgraph.pipeline.schema import options_schema, recipe_schema
from tests.pipeline.test_text import _options
from tests.pipeline.toys import Options, Scale, Tidy


@settings(max_examples=150, deadline=None)
@given(step=_options)
def test_recipes_read_back_and_fit_their_schema(step: Options) -> None:
    pipeline = Pipeline([step, Tidy()])
    text = pipeline.to_yaml()
    assert Pipeline.from_yaml(text) == pipeline
    assert str(Pipeline.from_yaml(text)) == str(pipeline)


def test_the_three_forms_are_one_pipeline() -> None:
    objects = Pipeline([Scale(factor=4, site="blocks.2.resid_post"), Tidy(), Options(either=("*.mlp.*",), number=1e-5)])
    text = "toy_scale{factor=4 site=blocks.2.resid_post}, toy_tidy, toy_options{either=['*.mlp.*'] number=1e-5}"
    recipe = """
    actgraph: 1
    passes:
      - toy_scale: {factor: 4, site: blocks.2.resid_post}
      - toy_tidy
      - toy_options: {either: ["*.mlp.*"], number: 1e-5}
    """
    assert Pipeline.parse(text) == objects == Pipeline.from_yaml(recipe)
    assert Pipeline.parse(objects.to_text()) == Pipeline.from_yaml(objects.to_yaml()) == objects


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "here.bin").write_bytes(b"x")
    (folder / "r.yaml").write_text("actgraph: 1\npasses:\n  - toy_options: {path: p.bin, source: here.bin, text: here.bin}\n")
    (step,) = Pipeline.read(folder / "r.yaml").passes
    assert isinstance(step, Options)
    assert step.path == folder / "p.bin"  # a path, whether or not a file is there
    assert step.source == str(folder / "here.bin")  # a file is there
    assert step.text == "here.bin"  # no path at all
    (named,) = Pipeline.from_yaml("actgraph: 1\npasses: [toy_options: {source: packaged}]", folder).passes
    assert isinstance(named, Options)
    assert named.source == "packaged"  # no such file: a name
    assert Pipeline.read(Pipeline([step]).write(folder / "again.yaml")) == Pipeline([step])
    assert "path: p.bin, source: here.bin" in (folder / "again.yaml").read_text()
    assert Pipeline.of(folder / "r.yaml") == Pipeline([step])


HEAD = "actgraph: 1\npasses:\n"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            HEAD + "  - toy_scal: {factor: 2}\n",
            "recipe, line 3, character 5 (at 'toy_scal: {factor: 2}'): there is no pass 'toy_scal' (did you mean toy_scale",
        ),
        (
            HEAD + "  - toy_scale:\n      site: a\n      facto: 2\n",
            "recipe, line 5, character 7 (at 'facto: 2'): toy_scale has no option 'facto'",
        ),
        (
            HEAD + "  - toy_scale:\n      site: a\n      factor: x\n",
            "line 5, character 7 (at 'factor: x'): option 'factor' of toy_scale must be a number",
        ),
        ("actgraph: 1\npasses:\n  - toy_scale: {factor: '2'}\n", 'must be a number, not "2"'),
        (
            "actgraph: 1\npasses:\n  - toy_scale: {factor: 2, factor: 3}\n",
            "line 3, character 28 (at 'factor: 3}'): 'factor' is given twice",
        ),
        (
            "actgraph: 1\npasses:\n  - toy_scale: 4\n",
            "line 3, character 5 (at 'toy_scale: 4'): the options of toy_scale are not a mapping",
        ),
        (
            "actgraph: 1\npasses:\n  - {toy_scale: {}, toy_tidy: {}}\n",
            "line 3, character 5 (at '{toy_scale: {}, toy_tidy: {}}'): a pass is written",
        ),
        ("actgraph: 1\npasses: toy_scale\n", "`passes` is not a list"),
        ("actgraph: 2\npasses: []\n", "format version is 2, not 1"),
        ("actgraph: true\npasses: []\n", "format version is True"),
        ("passes: []\n", "format version is None"),
        ("actgraph: 1\npases: []\n", "there is no key 'pases' (did you mean passes"),
        ("- a\n", "it is not a mapping"),
        ("", "it is not a mapping"),
        ("actgraph: 1\npasses: [\n", "recipe, line 3, at its end: expected the node content, but found the end"),
        # Flow style: what stands where, and where the bracket was opened.
        ("actgraph: 1\npasses: [{toy_scale: {facto: 2}}, toy_tidy]\n", "line 2, character 23 (at 'facto: 2}}, toy_tidy]')"),
        ("actgraph: 1\npasses: [{toy_scale: {factor: 2}, toy_tidy]\n", "in the { of line 2, character 10 (at '{toy_scale: {f"),
        (HEAD + "  - toy_scale: {site: *.down:in}\n", "(at '.down:in}'): expected alphabetic"),
        (HEAD + "  - toy_scale: {site: [*.down:in]}\n", 'goes in quotes: "*.down:in"'),
        (HEAD + "  - toy_scale: {site: blocks.{1..2}.x}\n", 'goes in quotes: "blocks.{1..2}.x"'),
        (HEAD + "  - toy_scale: {factor=2}\n", "(at 'factor=2}'): 'factor=2' is no option of toy_scale (write factor: 2)"),
        (HEAD + "  - toy_scale{factor=2}\n", "is pipeline text (in a recipe a pass is written"),
        (HEAD + "\t- toy_scale\n", "(indent with spaces)"),
        (
            HEAD + "  - toy_options: {source: !!python/object/apply:os.getcwd []}\n",
            "(at '!!python/object/apply:os.getcwd []}'): could not determine a constructor",
        ),
    ],
)
def test_errors_name_the_line(recipe: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        Pipeline.from_yaml(recipe)
    assert message in str(caught.value)
    assert "\n" not in caught.value.message


def test_files_that_cannot_be_read_or_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the recipe"):
        Pipeline.read(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("actgraph: 1\npasses: [nope]\n")
    with pytest.raises(OptionError, match=r"bad\.yaml: recipe, line 2"):
        Pipeline.read(tmp_path / "bad.yaml")
    with pytest.raises(InputError, match="cannot write the recipe"):
        Pipeline().write(tmp_path / "no" / "folder.yaml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.yaml"]


@pytest.mark.parametrize(
    ("document", "fits"),
    [
        ({"actgraph": 1, "passes": [{"toy_scale": {"factor": 2}}, "toy_tidy", {"toy_tidy": None}]}, True),
        ({"actgraph": 1}, True),
        ({"actgraph": 1, "passes": [{"toy_scale": {"facto": 2}}]}, False),
        ({"actgraph": 1, "passes": [{"toy_scale": {"factor": "2"}}]}, False),
        ({"actgraph": 1, "passes": [{"toy_options": {"count": 10}}]}, False),
        ({"actgraph": 1, "passes": [{"toy_options": {"choice": "three"}}]}, False),
        ({"actgraph": 1, "passes": [{"toy_scale": {}, "toy_tidy": {}}]}, False),
        ({"actgraph": 1, "passes": ["steer"]}, False),  # it needs a vector
        ({"actgraph": 1, "passes": [{"unknown": {}}]}, False),
        ({"actgraph": 2}, False),
        ({"passes": []}, False),
    ],
)
def test_the_schema_accepts_what_parses_and_nothing_else(document: dict[str, Any], fits: bool) -> None:
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert jsonschema.Draft202012Validator(schema).is_valid(document) == fits
    text = yaml.safe_dump(document)
    if fits:
        Pipeline.from_yaml(text)
    else:
        with pytest.raises(OptionError):
            Pipeline.from_yaml(text)


def test_every_option_of_every_pass_is_described() -> None:
    for name, cls in all_passes().items():
        schema = options_schema(cls)
        assert schema["title"] == name
        assert schema["additionalProperties"] is False
        assert cls.__doc__, name
        for option, field in schema.get("properties", {}).items():
            assert field.get("description"), f"{name}.{option} has no description"
