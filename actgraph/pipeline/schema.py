"""JSON Schema of recipes, so that editors complete and check them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from actgraph.pipeline.base import Pass
from actgraph.pipeline.recipe import VERSION
from actgraph.pipeline.registry import all_passes

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def options_schema(cls: type[Pass]) -> dict[str, Any]:
    """The JSON Schema of a pass's options: descriptions, units, ranges, defaults; unknown keys are not allowed."""
    schema = cls.model_json_schema()
    schema["title"] = cls.name
    return schema


def recipe_schema(passes: Mapping[str, type[Pass]] | None = None) -> dict[str, Any]:
    """The JSON Schema of a whole recipe over ``passes`` (default: every pass there is)."""
    chosen = all_passes() if passes is None else passes
    definitions: dict[str, Any] = {}
    bare: list[str] = []
    entries: dict[str, Any] = {}
    for name, cls in sorted(chosen.items()):
        schema = options_schema(cls)
        for inner, definition in schema.pop("$defs", {}).items():
            definitions[f"{name}.{inner}"] = _renamed(definition, name)
        definitions[name] = _renamed(schema, name)
        optional = not schema.get("required")
        entries[name] = {"anyOf": [{"$ref": f"#/$defs/{name}"}, {"type": "null"}]} if optional else {"$ref": f"#/$defs/{name}"}
        if optional:
            bare.append(name)
    step: dict[str, Any] = {
        "anyOf": [
            {"type": "object", "properties": entries, "additionalProperties": False, "minProperties": 1, "maxProperties": 1},
            {"type": "string", "enum": bare},
        ]
    }
    return {
        "$schema": _DIALECT,
        "title": "actgraph recipe",
        "description": "A pipeline of passes over a model's activations.",
        "type": "object",
        "properties": {
            "actgraph": {"const": VERSION, "description": "Version of the format."},
            "passes": {"type": ["array", "null"], "items": step, "description": "The passes, in the order in which they run."},
        },
        "required": ["actgraph"],
        "additionalProperties": False,
        "$defs": definitions,
    }


def _renamed(schema: Any, name: str) -> Any:
    """``schema`` with its inner references pointed at this pass's definitions."""
    if isinstance(schema, dict):
        return {
            key: f"#/$defs/{name}.{str(value).rsplit('/', 1)[-1]}" if key == "$ref" else _renamed(value, name)
            for key, value in schema.items()
        }
    if isinstance(schema, Iterable) and not isinstance(schema, str):
        return [_renamed(item, name) for item in schema]
    return schema
