"""Values of inputs on the command line: ``name=2``, ``name=[0.5, 2]``, ``name=vector.safetensors``, ``name=array.npy``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from actgraph.errors import InputError

if TYPE_CHECKING:
    from actgraph.graph.input_values import InputValue


def read_inputs(given: Sequence[str]) -> dict[str, InputValue]:
    """``name=value`` texts as values by name. Raises InputError for what cannot be read, and for a name given twice."""
    found: dict[str, InputValue] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise InputError(f"--input {text} is no name=value", "write --input steer.scale=2")
        if name in found:
            raise InputError(f"--input {name} is given twice", "give it once")
        found[name] = _read(name, value)
    return found


def _read(name: str, text: str) -> InputValue:
    suffix = Path(text).suffix
    if suffix == ".npy":
        return _array(text)
    if suffix == ".safetensors":
        from actgraph.formats.vectors import load_vector

        site = name.partition(".vector.")[2]
        return load_vector(text).for_site((site or name,))
    try:
        value: InputValue = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"--input {name}={text} is no number, list of numbers, .npy or .safetensors file",
            "write 2, [0.5, 2] or v.safetensors",
        ) from error
    if not isinstance(value, (int, float, list)):
        raise InputError(f"--input {name}={text} is no number or list of numbers", "write 2 or [0.5, 2]")
    return value


def _array(path: str) -> InputValue:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as an array: {error}", "write it with numpy.save") from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path} holds several arrays", "write one with numpy.save")
    return array
