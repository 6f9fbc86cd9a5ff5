"""Steering by latents of a sparse autoencoder (SAE): adding to them, clamping, scaling, zero-ablating.

Sources: Endogenous Resistance to Activation Steering in Language Models (ESR, 2026), whose analyses are in ``esr``; Scaling
Monosemanticity (2024). The activation is encoded, the latents ``f`` of the chosen indices become ``g``, and what they decode to
replaces the reconstruction, while the part that the SAE does not explain stays: ``h' = h + sum_i (g_i - f_i) d_i``. Biases
and all other latents cancel, so only the rows of the edited latents are put into the graph.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from actgraph.errors import PassError
from actgraph.formats.sae import SparseAutoencoder, sae_site
from actgraph.formats.saelens import load_sae
from actgraph.graph import Graph, Site, Value
from actgraph.graph.graph import Array
from actgraph.passes.places import Selector
from actgraph.passes.steer.edit import Edit, FoldingEditPass
from actgraph.passes.steer.runtime_inputs import INPUT
from actgraph.passes.steer.steer import Steer
from actgraph.pipeline.base import ROUNDING, UNBOUNDED, PassContext, PassResult

_LAST = re.compile(r"(?:decoder\.)?blocks\.(\d+)\.resid_post")


class SaeSteer(FoldingEditPass):
    """Edit latents of a sparse autoencoder at its site, for all tokens or those that ``where`` names.

    ``mode=add`` adds ``value`` to each latent (of a latent that does not fire, too), ``clamp`` sets it to ``value``, ``scale``
    multiplies it by ``value``, ``ablate`` sets it to 0. The nonlinearity is not applied again, and the part of the activation
    that the SAE does not explain is kept. The edit has only the rows of ``latents`` (the op ``latent_edit``); tokens of which
    no latent changes stay bit for bit. Adding needs no encoder: it is steering by a constant vector, and folds into a bias
    where that does (see ``steer``).

    All latents of one step are read before any is changed; a second step at the site reads what the first one wrote. So clamp
    first and add after, as the paper does on one code. Ablating does not make a latent read 0 afterwards: directions overlap.

    ``strength=input`` makes the strength an optional input of each row (``sae_steer.strength``, 0 where nobody gives it: the
    unsteered model, bit for bit).

    An SAE in SAELens' layout goes to the site and the model that its ``cfg.json`` names, or is refused. Latents of a top-k SAE
    can be added to; whether they fire depends on all latents, so that the other modes are refused.
    """

    name: ClassVar[str] = "sae_steer"
    change: ClassVar[str] = "latents of an SAE are edited"
    off: ClassVar[Mapping[str, Any]] = {"strength": 0.0}

    sae: str = Field(
        description="A folder in SAELens' layout (cfg.json and sae_weights.safetensors).", json_schema_extra={"path": True}
    )
    latents: tuple[int, ...] = Field(description="Indices of the latents to edit.", min_length=1)
    mode: Literal["add", "clamp", "scale", "ablate"] = Field(description="What is done to the latents.")
    value: float | tuple[float, ...] | None = Field(
        default=None,
        description="How much is added, what they are set to, or multiplied by: one number, or one for each latent.",
    )
    strength: float | Literal["input"] = Field(
        default=1.0, description="Factor on the change that the edit makes, or `input`; 0 is the identity."
    )
    site: Selector = Field(default=(), description="Where; default: the site that the SAE was trained at.")
    undo_at_final_norm: float = Field(
        default=0.0, description="With mode=add: how much of it is taken away again in front of the final norm (1: all).",
        allow_inf_nan=False,
    )  # fmt: skip
    input_scale: float | None = Field(
        default=None, description="The factor on activations of an SAE with normalize_activations=expected_average_only_in."
    )
    other_site: Literal["refuse", "allow"] = Field(
        default="refuse", description="What to do with a site other than the one that the SAE was trained at."
    )

    @field_validator("value", "strength")
    @classmethod
    def _finite(cls, value: float | tuple[float, ...] | str | None) -> float | tuple[float, ...] | str | None:
        if value is not None and value != INPUT and not np.isfinite(np.asarray(value, np.float64)).all():
            raise ValueError("numbers must be finite")
        return value

    def reads_rows(self, edit: Edit) -> bool:
        return self.strength == INPUT

    def targets(self, graph: Graph) -> Selector:
        return self._site(graph, load_sae(self.sae, self.latents, input_scale=self.input_scale)).name

    def _site(self, graph: Graph, sae: SparseAutoencoder, name: str = "") -> Site:
        """The site ``name``, or the one that the SAE was trained at. Raises InputError where the SAE does not fit."""
        allowed = {"other_site": self.other_site == "allow", "other_model": self.other_model == "allow"}
        return sae_site(graph, sae, name, axis=self.axis, **allowed)

    def hook(self, graph: Graph, site: Site, inputs: Mapping[str, Array]) -> Callable[[Array], Array] | None:
        if isinstance(self.strength, str) or self.undo_at_final_norm:  # what is taken away again is at another site
            return None
        sae, values, strength = load_sae(self.sae, self.latents, input_scale=self.input_scale), self._values(), self.strength

        def edited(rows: Array) -> Array:
            found = np.zeros((*rows.shape[:-1], len(values))) if self.mode == "add" else sae.encode(rows)
            wanted = {"add": found + values, "scale": found * values}.get(self.mode, np.broadcast_to(values, found.shape))
            return np.asarray(rows + strength * (sae.decode(wanted, rows) - sae.decode(found, rows)))

        return self.at_tokens(edited, inputs)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        values = self._values()
        sae = load_sae(self.sae, self.latents, input_scale=self.input_scale)
        if sae.k is not None and self.mode != "add":
            raise PassError(
                f"sae_steer: {self.sae} is a top-{sae.k} SAE, and mode={self.mode} must know which latents fire, for which all "
                f"{sae.size} are compared",
                "only mode=add can be done with the rows of some latents; an SAE with ReLU or JumpReLU can do the rest",
            )
        names = [site.name for site in self.select(graph)] if self.site else [""]
        sites = [self._site(graph, sae, name) for name in names]
        neutral = {"add": 0.0, "scale": 1.0}.get(self.mode)
        if self.strength == 0 or (neutral is not None and (values == neutral).all()):
            result = PassResult(expected_size=ROUNDING)
            for site in sites:
                result.counts["identity"] += 1
                result.details.append(self._row(site.name, "identity"))
            return result
        if self.mode == "add" and sae.normalize == "none" and self.strength != INPUT:
            return self._add(graph, context, sites, values @ sae.decoder.astype(np.float64) * self.strength)
        if self.undo_at_final_norm:
            raise PassError(
                "sae_steer: only a constant can be taken away in front of the final norm",
                "undo_at_final_norm goes with mode=add, a given strength, and an SAE that does not normalise its input",
            )
        return self.run_at(graph, context, sae=sae, values=values)

    def _values(self) -> Array:
        """The number of each latent, float64 ``[latents]``."""
        if (self.value is None) != (self.mode == "ablate"):
            what = "takes no value: it sets latents to 0" if self.mode == "ablate" else "needs a value"
            raise PassError(f"sae_steer: mode={self.mode} {what}", "value=4.0, or one number for each latent")
        given = np.asarray(0.0 if self.value is None else self.value, np.float64)
        if given.ndim and given.shape != (len(self.latents),):
            raise PassError(
                f"sae_steer: {given.size} values for {len(self.latents)} latents", "give one, or one for each latent"
            )
        return np.broadcast_to(given, (len(self.latents),))

    def _row(self, site: str, rule: str, **more: Any) -> dict[str, Any]:
        return {"site": site, "rule": rule, "mode": self.mode, "latents": len(self.latents), **more}

    def _add(self, graph: Graph, context: PassContext, sites: list[Site], vector: Array) -> PassResult:
        """Add a constant, and take some of it away again in front of the final norm."""
        places = [(site.name, vector, self.axis) for site in sites]
        if self.undo_at_final_norm:
            places += [(_before_final_norm(graph, site), -self.undo_at_final_norm * vector, -1) for site in sites]
        result = PassResult(expected_change=self.change, expected_size=UNBOUNDED)
        for name, direction, axis in places:
            step = Steer(site=name, vector=tuple(map(float, direction)), where=self.where, fold=self.fold, axis=axis)
            done = step.run(graph, context)
            result.counts += done.counts
            result.declined += done.declined
            result.messages += [message for message in done.messages if message not in result.messages]
            size = float(np.linalg.norm(direction))
            result.details += [self._row(row["site"], row["rule"], norm=size) for row in done.details]
        return result

    def apply(self, edit: Edit, site: Site, width: int) -> str:
        """Insert the edit of the rows of the latents."""
        sae: SparseAutoencoder = edit.shared["sae"]
        values: Array = edit.shared["values"]
        factor = 1.0 if self.strength == INPUT else float(self.strength)
        rows = (np.float32(factor) * sae.decoder).astype(np.float32)
        encoder = (None, None, None) if self.mode == "add" else (sae.encoder, sae.bias, sae.thresholds)
        attributes: dict[str, Any] = {"mode": "set" if self.mode in ("clamp", "ablate") else self.mode, **self.attributes}
        attributes |= {} if sae.normalize == "none" else {"normalize": sae.normalize}
        one = len(set(values.tolist())) == 1 and float(np.float32(values[0])) == values[0]
        attributes |= {"value": float(values[0])} if one else {}
        operands = [rows, *encoder, None if one else values.astype(np.float32), self._weight(edit, site)]
        while operands[-1] is None:
            operands.pop()
        edit.editor.insert_at(site, "actgraph.latent_edit", operands, attributes)
        edit.result.details.append(self._row(site.name, "inserted", strength=self.strength))
        return "inserted"

    def _weight(self, edit: Edit, site: Site) -> Value | None:
        """The factor of each token's change: the clause's, times the strength that the host gives."""
        mask = edit.mask()
        return edit.times(mask, edit.of_rows(site, "sae_steer.strength")) if self.strength == INPUT else mask


def _before_final_norm(graph: Graph, site: Site) -> str:
    """What the final norm reads: the residual stream behind the last block. Raises PassError for a model without one."""
    names = {int(found.group(1)): s.name for s in graph.sites() if (found := _LAST.fullmatch(s.name))}
    if not names or not any(s.name == "final_norm" for s in graph.sites()):
        raise PassError("sae_steer: the model has no final norm", "leave out undo_at_final_norm")
    last = graph.site(names[max(names)])
    if last.type.shape is None or site.type.shape is None or last.type.shape[-1] != site.type.shape[-1]:
        raise PassError(f"sae_steer: what is added at {site.name} is not in {last.name}", "leave out undo_at_final_norm")
    return last.name
