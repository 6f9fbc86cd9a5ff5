"""Sparse autoencoders (SAEs): what one is, whoever trained it.

An SAE explains an activation as a sum of few directions out of many: ``f = act(n encoder^T + bias)``, ``x ~ f decoder +
decoder_bias``. Readers of files (``saelens``) bring every architecture into this one form, in which the op ``latent_edit``
takes the rows of the latents that are edited.

Sources: Cunningham et al., *Sparse Autoencoders Find Highly Interpretable Features in Language Models*, 2023; Rajamanoharan et
al., *Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders*, 2024; Gao et al., *Scaling and
Evaluating Sparse Autoencoders*, 2024 (top-k).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from actgraph.errors import InputError
from actgraph.ops.latent import STD_EPS

if TYPE_CHECKING:
    from actgraph.graph import Graph, Site

Array = np.ndarray[Any, Any]
Normalization = Literal["none", "rescale", "layer_norm"]


@dataclass(frozen=True, eq=False, repr=False)
class SparseAutoencoder:
    """Latents of a sparse autoencoder; arrays are float32.

    encoder, decoder: ``[latents, channels]``, what each latent reads and writes. bias: ``[latents]``, added before the
    nonlinearity (a decoder bias that is taken from the input is in it). thresholds: ``[latents]`` of JumpReLU; ``None``: ReLU.
    k: only so many latents of a token fire, those with the largest sums; ``None``: all that are positive.
    decoder_bias: ``[channels]``. normalize: what is done to the input (and undone to the output), as in ``latent_edit``.
    indices: which latents of the whole autoencoder these are; size: how many the whole one has.
    hook_name: the site that it was trained at, in any spelling; model_name: the model; both may be empty. source: for messages.
    centred: whether it reads activations whose mean over channels was taken away (TransformerLens'
    ``center_writing_weights``); the encoder has that in it, and it is right only for models with layer norms.
    """

    encoder: Array
    decoder: Array
    bias: Array
    decoder_bias: Array
    indices: tuple[int, ...]
    size: int
    thresholds: Array | None = None
    k: int | None = None
    normalize: Normalization = "none"
    hook_name: str = ""
    model_name: str = ""
    source: str = "the SAE"
    centred: bool = False

    def __post_init__(self) -> None:
        count, channels = self.decoder.shape
        shapes = {"encoder": (count, channels), "bias": (count,), "decoder_bias": (channels,)}
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise InputError(
                    f"{self.source}: {name} is {list(getattr(self, name).shape)} beside {count} latents x {channels}"
                )
        if self.thresholds is not None and self.thresholds.shape != (count,):
            raise InputError(f"{self.source}: thresholds are {list(self.thresholds.shape)} for {count} latents")
        if len(self.indices) != count:
            raise InputError(f"{self.source}: {len(self.indices)} indices for {count} latents")

    @staticmethod
    def of(
        encoder: Array,
        decoder: Array,
        bias: Array | None = None,
        decoder_bias: Array | None = None,
        *,
        thresholds: Array | None = None,
        k: int | None = None,
        hook_name: str = "",
        model_name: str = "",
    ) -> SparseAutoencoder:
        """A whole autoencoder of one's own: ``encoder`` and ``decoder`` ``[latents, channels]``, biases 0 where absent."""
        count, channels = np.shape(decoder)
        return SparseAutoencoder(
            encoder=np.asarray(encoder, np.float32),
            decoder=np.asarray(decoder, np.float32),
            bias=np.asarray(np.zeros(count) if bias is None else bias, np.float32),
            decoder_bias=np.asarray(np.zeros(channels) if decoder_bias is None else decoder_bias, np.float32),
            indices=tuple(range(count)),
            size=count,
            thresholds=None if thresholds is None else np.asarray(thresholds, np.float32),
            k=k,
            hook_name=hook_name,
            model_name=model_name,
        )

    def __repr__(self) -> str:
        """One line: how many latents of how many, of which width, where from and for where."""
        kind = f"top {self.k}" if self.k is not None else "ReLU" if self.thresholds is None else "JumpReLU"
        here = f"{len(self.indices)} of {self.size}" if not self.whole else str(self.size)
        place = f", {self.hook_name or 'any site'} of {self.model_name or 'any model'}"
        return f"SparseAutoencoder({here} latents x {self.width}, {kind}{place})"

    @property
    def width(self) -> int:
        """How many channels it reads."""
        return int(self.decoder.shape[1])

    @property
    def whole(self) -> bool:
        """Whether all latents are here, in their order."""
        return self.indices == tuple(range(self.size))

    def chosen(self, latents: Sequence[int]) -> SparseAutoencoder:
        """The latents ``latents`` (indices of the whole autoencoder), in that order. Raises InputError for ones it lacks."""
        check_latents(latents, self.size, self.source)
        places = {index: place for place, index in enumerate(self.indices)}
        missing = [index for index in latents if index not in places]
        if missing:
            raise InputError(f"latent {missing[0]} of {self.source} was not read", "read it with the others")
        rows = [places[index] for index in latents]
        limits = None if self.thresholds is None else self.thresholds[rows]
        return replace(
            self, encoder=self.encoder[rows], decoder=self.decoder[rows], bias=self.bias[rows], thresholds=limits,
            indices=tuple(latents),
        )  # fmt: skip

    def encode(self, x: Array) -> Array:
        """The latents of activations: ``[..., channels]`` to ``[..., latents]`` float32.

        Raises InputError for another width, and for a part of a top-k autoencoder: which latents fire depends on all of them.
        """
        n, _, _ = self._normalized(x)
        f = n @ self.encoder.T + self.bias
        if self.k is not None:
            if not self.whole:
                raise InputError(
                    f"{self.source} is a top-{self.k} SAE: its latents fire by comparison with all others", "read it whole"
                )
            f = np.where(_largest(f, self.k), f, np.float32(0))
        low = np.float32(0) if self.thresholds is None else np.maximum(self.thresholds, np.float32(0))
        return np.where(f <= low, np.float32(0), f)

    def decode(self, latents: Array, x: Array) -> Array:
        """What latents ``[..., latents]`` stand for, ``[..., channels]`` float32; ``x`` is what they were encoded from."""
        _, mean, out = self._normalized(x)
        return np.asarray((latents.astype(np.float32) @ self.decoder + self.decoder_bias) * out + mean)

    def _normalized(self, x: Array) -> tuple[Array, Array | np.float32, Array | np.float32]:
        """What the encoder reads, and the mean and factor that decoding gives back."""
        x = np.asarray(x, np.float32)
        if not x.ndim or x.shape[-1] != self.width:
            raise InputError(
                f"{self.source} reads {self.width} channels, not {list(x.shape)}", "use the site it was trained at"
            )
        if self.normalize == "none":
            return x, np.float32(0), np.float32(1)
        mean = x.mean(-1, keepdims=True) if self.normalize == "layer_norm" else np.zeros((*x.shape[:-1], 1), np.float32)
        centred = x - mean
        degrees = self.width - (self.normalize == "layer_norm")
        out = np.sqrt((centred * centred).sum(-1, keepdims=True) / np.float32(degrees))
        return centred / (out + np.float32(STD_EPS if self.normalize == "layer_norm" else 0)), mean, out


def _largest(f: Array, k: int) -> Array:
    """Where the ``k`` largest of the last axis are; of equal ones the first."""
    if k >= f.shape[-1]:
        return np.ones(f.shape, bool)
    limit = -np.partition(-f, k - 1, axis=-1)[..., k - 1 : k]
    above = f > limit
    level = f == limit
    return np.asarray(above | (level & (np.cumsum(level, -1) <= k - above.sum(-1, keepdims=True))))


def check_latents(latents: Sequence[int], size: int, source: str) -> None:
    """Raise InputError for latents that an autoencoder of ``size`` lacks, for none, and for one named twice."""
    if not latents:
        raise InputError("no latent is named", "name some: latents=[3, 17]")
    outside = [index for index in latents if not 0 <= index < size]
    if outside:
        raise InputError(f"{source} has {size} latents, and no latent {outside[0]}", f"latents go from 0 to {size - 1}")
    twice = [index for index in set(latents) if list(latents).count(index) > 1]
    if twice:
        raise InputError(f"latent {min(twice)} is named twice", "name each latent once")


def sae_site(
    graph: Graph, sae: SparseAutoencoder, site: str = "", *, axis: int = -1, other_site: bool = False, other_model: bool = False
) -> Site:
    """The site of ``graph`` that ``sae`` is for: ``site``, or where it was trained. axis: the channels that it reads.

    Raises SiteError for a site that the graph lacks; InputError where the SAE names none and none is given, for a site or a
    model other than its own (unless ``other_site``, ``other_model``), for another width, and for an SAE of centred activations
    in a model without layer norms.
    """
    if not site and not sae.hook_name:
        raise InputError(f"{sae.source} does not say which site it is for", "say it: site=blocks.2.resid_post")
    found = graph.site(site or sae.hook_name)
    if site and sae.hook_name and not other_site and not _same_place(graph, found, sae.hook_name):
        raise InputError(
            f"{sae.source} was trained at {sae.hook_name}, not at {site}", "leave out site, or say other_site=allow"
        )
    if not other_model and is_for_another_model(sae.model_name, graph):
        raise InputError(
            f"{sae.source} was trained on {sae.model_name}, and the model is {_source(graph)}",
            "use an SAE of this model, or say other_model=allow where it is the same under another name",
        )
    shape = found.type.shape
    if shape is not None and not -len(shape) <= axis < len(shape):
        raise InputError(f"{found.name} is {found.type}: it has no axis {axis}", "set axis to that of the channels")
    if shape is not None and shape[axis] not in (sae.width, None):
        raise InputError(
            f"{sae.source} reads {sae.width} channels, but {found.name} is {found.type}", "use an SAE of this site"
        )
    if sae.centred and not any(norm.kind == "layer_norm" for norm in graph.views.norms()):
        raise InputError(
            f"{sae.source} was trained with center_writing_weights, which needs a model with layer norms",
            "set it to false in cfg.json if the SAE was trained without",
        )
    return found


def _same_place(graph: Graph, site: Site, name: str) -> bool:
    from actgraph.errors import SiteError

    try:
        return graph.site(name).anchor.key == site.anchor.key
    except SiteError:
        return False


def is_for_another_model(model_name: str, graph: Graph) -> bool:
    """Whether a model's name surely stands for another model than ``graph``.

    Names are compared without organisation, revision, case and punctuation, and one may continue the other (``gpt2-small`` is
    ``gpt2``). Nothing can be said of a graph that does not know what it was loaded from.
    """
    wanted = _bare(model_name)
    known = {_bare(name) for name in (_source(graph), str(graph.companions.config.get("_name_or_path") or ""))} - {""}
    return bool(wanted and known) and not any(name.startswith(wanted) or wanted.startswith(name) for name in known)


def _source(graph: Graph) -> str:
    """What the graph was loaded from, where that is a name: no class, no function."""
    source = graph.companions.source
    return "" if ":" in source or (source.isidentifier() and source != source.lower()) else source


def _bare(name: str) -> str:
    last = name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].split("@")[0].removesuffix(".onnx").removesuffix(".pt2")
    return re.sub(r"[^a-z0-9]", "", last.lower())
