"""Steering vectors: directions and bases by site, what they were made from, and how they are meant.

On disk a steering vector is a safetensors file with a manifest (JSON in the file's metadata), or a GGUF control vector
(``actgraph.formats.gguf_vectors``). A direction is a tensor ``[width]``, a basis (a plane, a subspace) a tensor ``[k, width]``
whose rows span it. A bare safetensors file with one 1-D tensor is a steering vector too: it has no site of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np

from actgraph.errors import InputError
from actgraph.formats.fingerprints import (
    is_of_another_model,
    is_of_another_tokenizer,
    model_fingerprint,
    tokenizer_fingerprint,
)

if TYPE_CHECKING:
    from actgraph.graph import Graph, Site

__all__ = [
    "Number", "Scale", "SteeringVector", "check_origin", "check_vector", "is_of_another_model", "is_of_another_tokenizer",
    "load_vector", "model_fingerprint", "name_sites", "tokenizer_fingerprint", "vector_messages",
]  # fmt: skip

Array = np.ndarray[Any, Any]
Number = float | np.floating[Any] | np.integer[Any]

#: What a number in front of the vector means. ``raw``: the vector is added as it was extracted, ``h + scale * v``. ``unit``: so
#: too, and the vector has length 1, so that ``scale`` is a length in the activation's own unit. ``relative``: the vector is in
#: units of the activation's norm, ``h + scale * |h| * v``.
Scale = Literal["raw", "unit", "relative"]


@dataclass(frozen=True)
class SteeringVector:
    """Directions and bases by site.

    directions: site name -> ``[width]`` float32 (``vector.directions["blocks.2.resid_post"]``); the name is empty for a vector
        without a site.
    model: fingerprint of the model that it was extracted from (``model_fingerprint``), empty when unknown.
    method, position: how it was extracted (``mean_difference``, ``last``).
    notes: anything else that is worth keeping, as text.
    bases: site name -> ``[k, width]`` float32: several directions of one site, for methods that turn activations in a plane
        or act in a subspace. Methods that need one direction do not take them.
    tokenizer: fingerprint of the tokenizer (``tokenizer_fingerprint``), empty when unknown.
    model_type: the architecture as Hugging Face calls it (``llama``), empty when unknown.
    where: the tokens that the vector is meant for: a clause such as ``all`` or ``generated``, as a suggestion.
    scale: what a factor on the vector means, ``raw``, ``unit`` or ``relative`` (see ``Scale``).
    recommended_scale: a factor that its maker found to work, if any.

    Vectors are added and subtracted, multiplied and divided by numbers (``0.8 * happy - 0.2 * loud``): see
    ``actgraph.formats.vector_algebra``. Raises InputError for arrays of a wrong rank and for unknown scale semantics.
    """

    directions: Mapping[str, Array]
    model: str = ""
    method: str = ""
    position: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)
    bases: Mapping[str, Array] = field(default_factory=dict)
    tokenizer: str = ""
    model_type: str = ""
    where: str = "all"
    scale: Scale = "raw"
    recommended_scale: float | None = None

    #: numpy numbers leave arithmetic to us: ``np.float32(2) * vector``.
    __array_ufunc__: ClassVar[None] = None

    def __post_init__(self) -> None:
        for what, arrays, rank in (("direction", self.directions, 1), ("basis", self.bases, 2)):
            for name, array in arrays.items():
                if np.ndim(array) != rank:
                    shape = "[width]" if rank == 1 else "[k, width]"
                    raise InputError(
                        f"the {what} of {name or '(any site)'} has shape {list(np.shape(array))}, not {shape}",
                        "directions are [width], bases [k, width]",
                    )
        if self.scale not in get_args(Scale):
            raise InputError(f"a steering vector's scale is not {self.scale!r}", f"it is {', '.join(get_args(Scale))}")
        if self.recommended_scale is not None and not math.isfinite(self.recommended_scale):
            raise InputError(f"the recommended scale {self.recommended_scale} is no finite number", "give a number or None")

    @staticmethod
    def extracted(
        graph: Graph,
        directions: Mapping[str, Array],
        *,
        bases: Mapping[str, Array] | None = None,
        method: str = "",
        position: str = "",
        where: str = "all",
        scale: Scale = "raw",
        recommended_scale: float | None = None,
        notes: Mapping[str, str] | None = None,
    ) -> SteeringVector:
        """A vector extracted from ``graph``: the fingerprints of its model and tokenizer and its architecture are filled in."""
        return SteeringVector(
            directions, model_fingerprint(graph), method, position, notes or {}, bases or {}, tokenizer_fingerprint(graph),
            _model_type(graph), where, scale, recommended_scale,
        )  # fmt: skip

    def __repr__(self) -> str:
        """One line: the sites with their widths and norms, and where the vector comes from."""
        shown = [f"{name or '(any site)'} [{len(v)}] norm {np.linalg.norm(v):.4g}" for name, v in self.directions.items()]
        shown += [f"{name or '(any site)'} basis {list(np.shape(b))}" for name, b in self.bases.items()]
        more = [f"{len(shown) - 4} more"] if len(shown) > 4 else []
        facts = [("method", self.method), ("position", self.position)]
        facts += [("where", self.where if self.where != "all" else ""), ("scale", self.scale if self.scale != "raw" else "")]
        how = [f"{key}={value!r}" for key, value in facts if value]
        return f"SteeringVector({', '.join([*shown[:4], *more, *how])})"

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that are named, those of directions first, each once."""
        return tuple(name for name in dict.fromkeys([*self.directions, *self.bases]) if name)

    def for_site(self, names: tuple[str, ...]) -> Array:
        """The direction for a site known under ``names``; a vector without a site, or with a single one, serves any site.

        Raises InputError where there is none, or only a basis of several directions.
        """
        for name in names:
            if name in self.directions:
                return self.directions[name]
        basis = next((self.bases[name] for name in names if name in self.bases), None)
        if basis is None and len(self.directions) == 1:
            return next(iter(self.directions.values()))
        if basis is None and not self.directions and len(self.bases) == 1:
            basis = next(iter(self.bases.values()))
        if basis is not None:
            raise InputError(
                f"the steering vector holds a basis of {len(basis)} directions for {names[0]}, and one direction is needed",
                "use a pass that takes a plane or a subspace, or save one of its rows as a direction",
            )
        raise InputError(
            f"the steering vector has no direction for {names[0]}", f"it has directions for {', '.join(self.directions)}"
        )

    def basis_for_site(self, names: tuple[str, ...]) -> Array:
        """The basis ``[k, width]`` for a site known under ``names``: what it holds for it, a direction being a basis of one.

        A vector with a single entry serves any site. Raises InputError where there is none.
        """
        found = next((self.bases[name] for name in names if name in self.bases), None)
        if found is None:
            found = next((self.directions[name][None] for name in names if name in self.directions), None)
        if found is None and len(self.bases) + len(self.directions) == 1:
            found = next(iter(self.bases.values()), None)
            found = next(iter(self.directions.values()))[None] if found is None else found
        if found is None:
            listed = ", ".join(dict.fromkeys([*self.bases, *self.directions]))
            raise InputError(f"the steering vector has no basis for {names[0]}", f"it is for {listed}")
        return found

    def select(self, keep: Sequence[str]) -> SteeringVector:
        """The same vector for the sites ``keep`` only, given by the names it uses. Raises InputError for one it lacks."""
        missing = [name for name in keep if name not in self.directions and name not in self.bases]
        if missing or not keep:
            raise InputError(f"the steering vector is not for {', '.join(missing) or 'no site'}", f"it is for {self._listed()}")
        kept = set(keep)
        return replace(
            self,
            directions={name: v for name, v in self.directions.items() if name in kept},
            bases={name: b for name, b in self.bases.items() if name in kept},
        )

    def _listed(self) -> str:
        return ", ".join(name or "(any site)" for name in dict.fromkeys([*self.directions, *self.bases]))

    def save(self, path: str | Path) -> Path:
        """Write the file (beside, then renamed): a GGUF control vector for ``.gguf``, else safetensors with a manifest.

        Equal vectors give equal bytes. Raises InputError for NaN and infinite values, for a target that cannot be written,
        and for what GGUF cannot express (``actgraph.formats.gguf_vectors.write_gguf``).
        """
        path = Path(path)
        for name, array in [*self.directions.items(), *self.bases.items()]:
            if not np.isfinite(np.asarray(array, np.float32)).all():
                place = name or "(any site)"
                raise InputError(f"the steering vector for {place} holds NaN or infinite values", "extract it again")
        if path.suffix == ".gguf":
            from actgraph.formats.gguf_vectors import write_gguf

            return write_gguf(self, path)
        from actgraph.formats.safetensors_vectors import write_safetensors

        return write_safetensors(self, path)

    # --- algebra: see actgraph.formats.vector_algebra -------------------------------------------------------------------

    def __add__(self, other: SteeringVector) -> SteeringVector:
        return _combined(self, other, 1.0)

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        return _combined(self, other, -1.0)

    def __mul__(self, factor: Number) -> SteeringVector:
        return _scaled(self, factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Number) -> SteeringVector:
        from actgraph.formats.vector_algebra import divided, is_number

        return divided(self, divisor) if is_number(divisor) else NotImplemented

    def __neg__(self) -> SteeringVector:
        return _scaled(self, -1.0)

    def normalized(self) -> SteeringVector:
        """Every direction at length 1, with ``scale="unit"``. Raises InputError for a direction of zeros."""
        from actgraph.formats.vector_algebra import normalized

        return normalized(self)


def _combined(one: SteeringVector, other: SteeringVector, factor: float) -> SteeringVector:
    from actgraph.formats.vector_algebra import combined

    return combined(one, other, factor) if isinstance(other, SteeringVector) else NotImplemented


def _scaled(vector: SteeringVector, factor: Number) -> SteeringVector:
    from actgraph.formats.vector_algebra import is_number, scaled

    return scaled(vector, factor) if is_number(factor) else NotImplemented


def load_vector(path: str | Path, *, bases: bool = False) -> SteeringVector:
    """Read a steering vector: safetensors, or a GGUF control vector (``.gguf``, needs the extra ``gguf``).

    bases: whether a file that holds bases alone, ``[k, width]``, will do; without it such a file is refused.

    Raises InputError for a missing, corrupt or unsuitable file.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no steering vector {path}", "make one with `actgraph extract-vector`")
    if path.suffix == ".gguf":
        from actgraph.formats.gguf_vectors import read_gguf

        return read_gguf(path)
    from actgraph.formats.safetensors_vectors import read_safetensors

    vector = read_safetensors(path)
    if not bases and not vector.directions:
        name, basis = next(iter(vector.bases.items()))
        raise InputError(
            f"{path} holds a basis of {len(basis)} directions for {name or 'any site'}, and one direction is needed",
            "use a pass that takes a plane or a subspace (in Python: load_vector(path, bases=True))",
        )
    return vector


def check_vector(
    vector: SteeringVector, graph: Graph, site: Site | str, *, axis: int = -1, called: str = "the steering vector"
) -> None:
    """Refuse a vector that does not fit: of another width than the site, from another model or for another tokenizer.

    site: where it is to be applied; axis: the axis of the site that it lies along. called: what the message calls the vector,
    such as the name of its file.

    Where a fingerprint is unknown, or the embeddings are stored in another type now, nothing is claimed about the model.
    Raises InputError.
    """
    where = graph.site(site) if isinstance(site, str) else site
    check_origin(vector, graph, called=called)
    given = [site] if isinstance(site, str) else []
    names = [*given, where.name, *where.aliases]
    arrays = [held[name] for held in (vector.directions, vector.bases) for name in names if name in held]
    if not arrays:
        arrays = [*vector.directions.values(), *vector.bases.values()]
        if len(arrays) != 1:  # a single one serves any site
            raise InputError(f"{called} has nothing for {where.name}", f"it is for {vector._listed()}")
    shape = where.type.shape
    for array in arrays:
        width = array.shape[-1]
        if shape is not None and (not -len(shape) <= axis < len(shape) or shape[axis] != width):
            raise InputError(
                f"{called} has {width} numbers but {where.name} is {where.type}",
                "use a vector extracted at this site" + ("" if len(shape) < 4 else ", or say along which axis it lies"),
            )


def check_origin(vector: SteeringVector, graph: Graph, *, called: str = "the steering vector") -> None:
    """Refuse a vector that surely comes from another model or tokenizer than ``graph``; see ``check_vector``.

    Raises InputError, which names both fingerprints.
    """
    mend = "extract it from this model; where you know that they fit: `actgraph convert-vector OLD --any-model -o NEW`"
    if is_of_another_model(vector.model, graph):
        raise InputError(
            f"{called} was extracted from another model than {graph.name}, or before its embeddings were changed: "
            f"{vector.model} is not {model_fingerprint(graph)}",
            mend,
        )
    if is_of_another_tokenizer(vector.tokenizer, graph):
        raise InputError(
            f"{called} was extracted with another tokenizer than that of {graph.name}: "
            f"{vector.tokenizer} is not {tokenizer_fingerprint(graph)}",
            mend,
        )


def name_sites(vector: SteeringVector, graph: Graph) -> SteeringVector:
    """The same vector with every site under the name that ``graph`` has for it, whatever spelling the vector uses.

    A vector made elsewhere may say ``blocks.5.hook_resid_post``; here it becomes ``blocks.5.resid_post``. Role names of this
    graph stay as they are. Raises SiteError for a site that the graph lacks, InputError where two names are one site.
    """
    table = graph.site_table
    roles = {name: name if name in table.role_names else graph.site(name).name for name in vector.sites}
    if len(set(roles.values())) < len(roles):
        raise InputError(
            f"the steering vector names one site of {graph.name} twice: {', '.join(roles)}", "keep one of them (vector.select)"
        )
    return replace(
        vector,
        directions={roles.get(name, name): direction for name, direction in vector.directions.items()},
        bases={roles.get(name, name): basis for name, basis in vector.bases.items()},
    )


def vector_messages(
    vector: SteeringVector, graph: Graph, *, called: str = "the steering vector", where: str = "", factor: object = None
) -> list[str]:
    """What whoever applies the vector to ``graph`` should be told: how a foreign file was read, an architecture that differs,
    other tokens or another factor than it is meant for (where, factor: those in use, if any).

    These are no errors: model hints in GGUF files are free text, and a clause and a scale are suggestions.
    """
    messages = [f"{called}: {vector.notes['mapping']}"] if "mapping" in vector.notes else []
    own = _model_type(graph)
    if vector.model_type and own and _plain(vector.model_type) != _plain(own):
        messages.append(f"{called} is for the architecture {vector.model_type}, and {graph.name} is {own}")
    if where and not _same_tokens(vector.where, where):
        messages.append(f"{called} is meant for where={vector.where}, and acts at where={where}")
    if vector.recommended_scale is not None and isinstance(factor, float) and factor not in (0.0, vector.recommended_scale):
        messages.append(f"{called} was found to work with scale={vector.recommended_scale:g}, and has {factor:g}")
    return messages


def _same_tokens(one: str, other: str) -> bool:
    from actgraph.graph.where import Where

    try:
        return Where.parse(one) == Where.parse(other)
    except InputError:  # the clause of a file may be anybody's words
        return one == other


def _model_type(graph: Graph) -> str:
    return str(graph.companions.config.get("model_type") or "")


def _plain(architecture: str) -> str:
    """``gemma3_text``, ``gemma3`` and ``Gemma-3`` alike: Hugging Face and llama.cpp spell architectures in their own ways."""
    return "".join(c for c in architecture.lower().removesuffix("_text") if c.isalnum())
