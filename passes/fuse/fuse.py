"""Fuse linears, feed-forwards, norms, rotary embeddings and reads of caches into single ops, which files carry as functions.

Sources: *Deja Vu* (2023), *CATS* (2024) and *TEAL* (2024) for linears that skip the weights of dropped activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from actgraph.errors import PassError
from actgraph.graph import Graph, Use, Value
from actgraph.graph.fusion import fuse
from actgraph.passes.linears import Places
from actgraph.passes.places import Selector
from actgraph.pipeline.base import ROUNDING, Declined, Pass, PassContext, PassResult

#: How far outputs may move, relative: sums in another order, and in half precision one rounding in place of several.
_HALF = 0.1


class Fuse(Pass):
    """Make the ops that kernels claim: ``actgraph.linear``, ``feed_forward``, ``rms_norm``, ``layer_norm``, ``rotary``; and
    let ``actgraph.attention`` read a cache of 8 or 16 bits as it is stored.

    A gate on the input of a linear and the dequantization of its weight go into the linear; the weight of a gated linear is
    stored by input channel, so that what belongs to dropped inputs is not read. A gate on an activation goes into the
    feed-forward. Sites of values that exist no more are removed; those that do stay. Put it behind the passes that gate
    and quantize.
    """

    name: ClassVar[str] = "fuse"
    family: ClassVar[str] = "fuse"
    preserves: ClassVar[frozenset[str]] = frozenset({"values"})

    linears: bool = Field(default=True, description="Gated and quantized linears (and all others with dense).")
    feed_forwards: bool = Field(default=True, description="Feed-forwards that are gated inside or quantized (dense: all).")
    norms: bool = Field(default=True, description="RMS norms and layer norms over the last axis.")
    rotary: bool = Field(default=True, description="Rotary embeddings of queries and keys.")
    attentions: bool = Field(default=True, description="Attentions over caches that are stored in int8 or float16.")
    dense: bool = Field(default=False, description="Linears and feed-forwards that are neither gated nor quantized, too.")
    site: Selector = Field(default=(), description="Which places (their output or input sites); default: all.")
    ignore: Selector = Field(default=(), description="Places to leave as they are.")

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        wanted, unwanted = Places.of(graph, self.site), Places.ignored(graph, self.ignore)

        def chosen(values: Sequence[Value], edges: Sequence[Use]) -> bool:
            return (not self.site or _covers(wanted, values, edges)) and not _covers(unwanted, values, edges)

        half = any(value.dtype is not None and value.dtype.is_float and value.dtype.bits < 32 for value in _computed(graph))
        with context.edit(graph) as editor:
            fused = fuse(
                editor, linears=self.linears, feed_forwards=self.feed_forwards, norms=self.norms, rotary=self.rotary,
                attentions=self.attentions, dense=self.dense, chosen=chosen,
            )  # fmt: skip
            messages = list(editor.messages)
        declined = [Declined(name, reason) for name, reason in fused.declined]
        if not fused.counts:
            reason = f"{declined[0].site}: {declined[0].reason}" if declined else "nothing that it knows is there"
            raise PassError(f"fuse changed nothing: {reason}", "dense=true fuses what is neither gated nor quantized, too")
        return PassResult(
            counts=fused.counts,
            declined=declined,
            messages=messages,
            expected_change="half precision is rounded once in place of several times" if half else "exact",
            expected_size=_HALF if half else ROUNDING,
        )


def _covers(places: Places, values: Sequence[Value], edges: Sequence[Use]) -> bool:
    return any(value in places.values for value in values) or any((edge.node, edge.index) in places.edges for edge in edges)


def _computed(graph: Graph) -> list[Value]:
    return [output for node in graph.nodes() for output in node.outputs]
