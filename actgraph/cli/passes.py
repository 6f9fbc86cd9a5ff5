"""``actgraph passes``: which passes there are and what options they take."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actgraph.cli import options
from actgraph.cli.options import example

if TYPE_CHECKING:
    from actgraph.pipeline.base import Pass

EXAMPLE = example("actgraph passes", "actgraph passes sparsify", "actgraph passes steer --json")


def passes(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One pass, with its options.", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the JSON Schema of the options.")] = False,
    imports: options.Import = None,
    debug: options.Debug = False,
) -> None:
    """List the passes, or the options of one.

    --json prints the JSON Schema that editors complete recipes from (of whole recipes, without a name).
    """
    from actgraph.cli.output import dump_json, table
    from actgraph.pipeline.registry import all_passes, get_pass_class
    from actgraph.pipeline.schema import options_schema, recipe_schema

    if name is None:
        if json:
            dump_json(recipe_schema())
        else:
            found = all_passes()
            table(["pass", "family", "what it does"], [(key, cls.family, summary(cls)) for key, cls in found.items()])
        return
    cls = get_pass_class(name)
    if json:
        dump_json(options_schema(cls))
        return
    print(f"{name} ({cls.family})\n\n{inspect.getdoc(cls)}\n\ndialects: {', '.join(sorted(cls.dialects))}\n")
    table(["option", "type", "default", "what it means"], option_rows(cls))


def summary(cls: type[Pass]) -> str:
    """The first sentence of a pass's documentation."""
    paragraph = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
    return paragraph


def option_rows(cls: type[Pass]) -> list[tuple[str, str, str, str]]:
    """Name, type, default and description of each option, in the order of definition."""
    schema = cls.model_json_schema()
    definitions = schema.get("$defs", {})
    rows = []
    for name, field in schema.get("properties", {}).items():
        required = name in schema.get("required", ())
        default = "required" if required else _text(field.get("default"))
        rows.append((name, _type(field, definitions), default, " ".join(field.get("description", "").split())))
    return rows


def _text(value: Any) -> str:
    from actgraph.pipeline.text import write_value

    return write_value(value)


def _type(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A JSON Schema type as a few words: ``number in [0, 1)``, ``one of teal, cats``."""
    if "$ref" in field:
        return _type(definitions[field["$ref"].rsplit("/", 1)[-1]], definitions)
    if "allOf" in field:
        return _type(field["allOf"][0], definitions)
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(option, definitions) for option in field["anyOf"]))
    if "enum" in field:
        return "one of " + ", ".join(str(choice) for choice in field["enum"])
    if "const" in field:
        return _text(field["const"])
    if field.get("type") == "array":
        return f"list of {_type(field['items'], definitions)}" if field.get("items") else "list"
    return f"{field.get('type', 'any')}{_range(field)}"


def _range(field: dict[str, Any]) -> str:
    low = (
        [("[", field["minimum"])]
        if "minimum" in field
        else [("(", field["exclusiveMinimum"])]
        if "exclusiveMinimum" in field
        else []
    )
    high = (
        [("]", field["maximum"])]
        if "maximum" in field
        else [(")", field["exclusiveMaximum"])]
        if "exclusiveMaximum" in field
        else []
    )
    if not low and not high:
        return ""
    opening, bottom = low[0] if low else ("(", "-inf")
    closing, top = high[0] if high else (")", "inf")
    return f" in {opening}{bottom}, {top}{closing}"


command = passes
