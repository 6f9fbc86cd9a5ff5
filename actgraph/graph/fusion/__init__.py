"""Rewriting: linears, feed-forwards, norms, rotary embeddings and attentions of a graph as the ops that kernels claim whole.

The same rules serve both dialects, over ``Graph``, ``Editor`` and ``Views``. Each fused op computes what its nodes did, up to
the order of sums and to rounding once where they rounded several times (half precision).
"""

from __future__ import annotations

from actgraph.graph.editor import Editor
from actgraph.graph.fusion.attentions import fuse_attentions
from actgraph.graph.fusion.feed_forwards import fuse_feed_forwards
from actgraph.graph.fusion.linears import fuse_linears
from actgraph.graph.fusion.norms import fuse_norms
from actgraph.graph.fusion.rewriter import Chooser, Fused, Rewriter, everything
from actgraph.graph.fusion.rotary import fuse_rotary
from actgraph.graph.fusion.siblings import merge_siblings
from actgraph.graph.graph import Graph

__all__ = ["Chooser", "Fused", "everything", "fuse"]


def fuse(
    target: Editor | Graph,
    *,
    linears: bool = True,
    feed_forwards: bool = True,
    norms: bool = True,
    rotary: bool = True,
    attentions: bool = True,
    dense: bool = False,
    gates: bool = True,
    siblings: bool = False,
    chosen: Chooser = everything,
) -> Fused:
    """Rewrite a graph (in a transaction of its own) or what an editor is open on, by the rules that are switched on.

    dense: linears and feed-forwards that are neither gated nor quantized, too. gates: what is gated goes into linears; without,
    it stays in front of them. siblings: gated linears of the same x become one. chosen: which places; see ``Chooser``.
    Gives how often each rule applied, and where one was asked for and could not be, with the reason.
    """
    if isinstance(target, Graph):
        with target.edit(by="fuse") as editor:
            return fuse(
                editor, linears=linears, feed_forwards=feed_forwards, norms=norms, rotary=rotary, attentions=attentions,
                dense=dense, gates=gates, siblings=siblings, chosen=chosen,
            )  # fmt: skip
    rewriter = Rewriter(target, chosen, dense, gates)
    # projections last: a feed-forward that can be fused as a whole is not taken apart
    rules = (
        (rotary, fuse_rotary), (norms, fuse_norms), (attentions, fuse_attentions), (feed_forwards, fuse_feed_forwards),
        (linears, fuse_linears), (siblings, merge_siblings),
    )  # fmt: skip
    for wanted, rule in rules:
        before = sum(rewriter.result.counts.values())
        if wanted:
            rule(rewriter)
        if sum(rewriter.result.counts.values()) > before:
            target.erase_dead()  # what is read by dead nodes only must look so to the next rule
    return rewriter.result
