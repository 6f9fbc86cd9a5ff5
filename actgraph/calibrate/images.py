"""Images as model inputs (needs Pillow): resized, scaled and normalised as the model's own preprocessor settings say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actgraph.errors import InputError

if TYPE_CHECKING:
    from actgraph.calibrate.encode import Signature
    from actgraph.graph import Graph

Array = np.ndarray[Any, Any]


def read_image(graph: Graph, signature: Signature, path: Path) -> dict[str, Array]:
    """The graph's image input, ``[channels, height, width]`` float32.

    Settings are those of ``preprocessor_config.json`` (``rescale_factor``, ``image_mean``, ``image_std``); without them pixels
    are scaled to 0..1. Raises InputError when the graph takes no image, Pillow is missing or the file is no image.
    """
    floats = [v for v in signature.inputs if v.dtype is not None and v.dtype.is_float]
    found = [v for v in floats if v.shape is not None and len(v.shape) == 4]
    if len(found) != 1:
        raise InputError(f"{graph.name} takes no image", f"inputs are {', '.join(repr(v) for v in signature.inputs)}")
    shape = found[0].shape or ()
    channels, height, width = shape[1:]
    try:
        from PIL import Image  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise InputError("a folder of images needs Pillow", "pip install pillow") from error
    settings = _settings(graph)
    size = settings.get("size") or {}
    if not isinstance(height, int) or not isinstance(width, int):
        side = size.get("shortest_edge") or size.get("height") if isinstance(size, dict) else size
        height, width = (side, size.get("width", side)) if isinstance(size, dict) else (side, side)
        if not isinstance(height, int) or not isinstance(width, int):
            raise InputError(f"the image size that {graph.name} takes is not known", "give the images as a .npz file of arrays")
    try:
        with Image.open(path) as image:
            picture = image.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.BILINEAR)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no image that can be read: {error}") from error
    pixels = np.asarray(picture, np.float32)
    pixels = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0)
    pixels = pixels * np.float32(settings.get("rescale_factor", 1 / 255))
    mean, std = settings.get("image_mean"), settings.get("image_std")
    if settings.get("do_normalize", True) and mean is not None and std is not None:
        pixels = (pixels - np.asarray(mean, np.float32)[:, None, None]) / np.asarray(std, np.float32)[:, None, None]
    return {found[0].name: pixels}


def _settings(graph: Graph) -> dict[str, Any]:
    data = graph.companions.tokenizer_files.get("preprocessor_config.json")
    try:
        settings = json.loads(data) if data else {}
    except ValueError as error:
        raise InputError(f"the preprocessor_config.json of {graph.name} is not JSON: {error}") from error
    return settings if isinstance(settings, dict) else {}
