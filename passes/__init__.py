"""The passes, one file each, in a folder per method family."""

from __future__ import annotations

#: Every built-in pass: its name and where its class is. Plain text, so that listing passes imports none of them.
PASSES: dict[str, str] = {
    "ablate": "actgraph.passes.steer.ablate:Ablate",
    "cast": "actgraph.passes.cast.cast:Cast",
    "clip": "actgraph.passes.clip.clip:Clip",
    "cse": "actgraph.passes.cleanup.cse:CommonSubexpressions",
    "dce": "actgraph.passes.cleanup.dce:DeadCode",
    "fold": "actgraph.passes.cleanup.fold:FoldConstants",
    "fuse": "actgraph.passes.fuse.fuse:Fuse",
    "identity": "actgraph.passes.cleanup.identity:RemoveIdentities",
    "kv_cache": "actgraph.passes.cache.kv_cache:KeyValueCache",
    "prune": "actgraph.passes.prune.prune:Prune",
    "quantize": "actgraph.passes.quantize.quantize:Quantize",
    "sparsify": "actgraph.passes.sparsify.sparsify:Sparsify",
    "steer": "actgraph.passes.steer.steer:Steer",
    "tap": "actgraph.passes.tap.tap:Tap",
}
