"""Profiles of experts on disk: how much each expert of a model is used by classes of prompts.

``.safetensors`` (arrays, with a manifest in the metadata) or ``.json`` (the same as lists), by the ending of the name.

Source: functional token resonance imaging, in *Mixture of Tunable Experts*, 2025.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from actgraph.errors import InputError
from actgraph.formats.atomic import atomic_file

Array = np.ndarray[Any, Any]
FORMAT = "actgraph.expert_profile/1"
Measure = Literal["selections", "weights"]
_ARRAYS = ("selections", "weights", "selection_rates", "weight_rates")
_SUFFIXES = (".safetensors", ".json")


@dataclass(frozen=True)
class ExpertUsage:
    """What the prompts of one class use. All arrays are ``[blocks, experts]``, sums over the prompts, float64.

    documents, tokens: how many prompts there are, and real tokens in them.
    selections, weights: how often each expert was chosen, and the sum of its weights.
    selection_rates, weight_rates: the same, each prompt's divided by its number of tokens.
    """

    documents: int
    tokens: int
    selections: Array
    weights: Array
    selection_rates: Array
    weight_rates: Array

    def mean(self, measure: Measure, per_token: bool) -> Array:
        """The mean over the prompts, ``[blocks, experts]``."""
        if measure == "selections":
            total = self.selection_rates if per_token else self.selections
        else:
            total = self.weight_rates if per_token else self.weights
        return np.asarray(total / self.documents)


@dataclass(frozen=True)
class RankedExpert:
    """One expert of a ranking. target, others: its mean in the target class, and the mean of the other classes' means."""

    block: str
    expert: int
    score: float
    target: float
    others: float


@dataclass(frozen=True)
class ExpertProfile:
    """The usage of every expert by class of prompts.

    blocks: the blocks with experts (``blocks.3``), the rows of all arrays; experts: how many each block has (arrays are as wide
    as the widest block, with zeros behind). classes: label -> usage; the class ``target`` is the one that experts are
    distinctive for. measure, per_token: what scores are made of. model: a fingerprint, empty when unknown.
    """

    blocks: tuple[str, ...]
    experts: tuple[int, ...]
    classes: Mapping[str, ExpertUsage]
    measure: Measure = "selections"
    per_token: bool = True
    model: str = ""

    def difference(self) -> Array:
        """The differential map ``D = M_target - mean of the other classes' M``, ``[blocks, experts]`` float64."""
        target, others = self._means()
        return np.asarray(target - others)

    def ranking(self, top: int | None = None) -> list[RankedExpert]:
        """The most distinctive experts, highest score first; equal ones in the order of blocks and experts."""
        target, others = self._means()
        # equal up to the rounding of sums is equal: a ranking must not depend on how prompts were batched
        score = np.round(target - others, 12)
        places = [(row, expert) for row, count in enumerate(self.experts) for expert in range(count)]
        places.sort(key=lambda place: -score[place])
        return [
            RankedExpert(self.blocks[row], expert, *(float(a[row, expert]) for a in (score, target, others)))
            for row, expert in places[:top]
        ]

    def table(self, top: int = 10) -> str:
        """The ranking as lines of text."""
        unit = f"{self.measure} per token" if self.per_token else f"{self.measure} per prompt"
        lines = [f"{'block':<12} {'expert':>6} {'score':>9} {'target':>9} {'others':>9}   ({unit})"]
        lines += [
            f"{row.block:<12} {row.expert:>6} {row.score:>+9.4f} {row.target:>9.4f} {row.others:>9.4f}"
            for row in self.ranking(top)
        ]
        return "\n".join(lines)

    def save(self, path: str | Path) -> Path:
        """Write the file (beside, then renamed). Raises InputError for a name that ends otherwise."""
        from safetensors.numpy import save

        path = Path(path)
        manifest = {
            "format": FORMAT, "model": self.model, "measure": self.measure, "per_token": self.per_token,
            "blocks": list(self.blocks), "experts": list(self.experts),
            "classes": {label: {"documents": use.documents, "tokens": use.tokens} for label, use in self.classes.items()},
        }  # fmt: skip
        arrays = {f"{label}/{name}": getattr(use, name) for label, use in self.classes.items() for name in _ARRAYS}
        if _kind(path) == ".json":
            data = {**manifest, "arrays": {name: array.tolist() for name, array in arrays.items()}}
            content = json.dumps(data, sort_keys=True).encode()
        else:
            tensors = {name: np.ascontiguousarray(array, np.float64) for name, array in arrays.items()}
            content = save(tensors, metadata={"actgraph": json.dumps(manifest, sort_keys=True)})
        with atomic_file(path) as stream:
            stream.write(content)
        return path

    def _means(self) -> tuple[Array, Array]:
        means = {label: use.mean(self.measure, self.per_token) for label, use in self.classes.items()}
        return means["target"], np.mean([mean for label, mean in means.items() if label != "target"], axis=0)


def load_profile(path: str | Path) -> ExpertProfile:
    """Read a profile. Raises InputError for a missing, damaged or other file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no expert profile {path}", "make one with profile_experts(graph, target, others)")
    manifest, arrays = _read_json(path) if _kind(path) == ".json" else _read_safetensors(path)
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path} is no expert profile", "make one with profile_experts(graph, target, others)")
    try:
        classes = {
            label: ExpertUsage(int(use["documents"]), int(use["tokens"]), *(arrays[f"{label}/{name}"] for name in _ARRAYS))
            for label, use in manifest["classes"].items()
        }
        profile = ExpertProfile(
            tuple(map(str, manifest["blocks"])), tuple(map(int, manifest["experts"])), classes, manifest["measure"],
            bool(manifest["per_token"]), str(manifest["model"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"the expert profile {path} is damaged: {error!r}", "make it again") from error
    problem = _problem(profile)
    if problem:
        raise InputError(f"the expert profile {path} is damaged: {problem}", "make it again")
    return profile


def _problem(profile: ExpertProfile) -> str:
    shape = (len(profile.blocks), max(profile.experts, default=0))
    if len(profile.experts) != len(profile.blocks) or not profile.blocks:
        return "it names no blocks, or not the experts of each"
    if "target" not in profile.classes or len(profile.classes) < 2:
        return "it needs the class target and another one"
    if profile.measure not in ("selections", "weights"):
        return f"it measures {profile.measure!r}"
    for label, use in profile.classes.items():
        arrays = [np.asarray(getattr(use, name)) for name in _ARRAYS]
        if use.documents < 1 or any(a.shape != shape or not np.isfinite(a).all() for a in arrays):
            return f"the usage of the class {label} is not {list(shape)} numbers"
    return ""


def _kind(path: Path) -> str:
    if path.suffix not in _SUFFIXES:
        raise InputError(f"{path} is no name of an expert profile", f"end it with {' or '.join(_SUFFIXES)}")
    return path.suffix


def _read_json(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            return {}, {}
        return data, {name: np.asarray(values, np.float64) for name, values in data.get("arrays", {}).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path} is not an expert profile: {error}", "make it again") from error


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            manifest = json.loads((file.metadata() or {}).get("actgraph", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is not an expert profile: {error}", "make it again") from error
    return (manifest if isinstance(manifest, dict) else {}), arrays
