"""The passes, one file each, in a folder per method family."""

from __future__ import annotations

#: Every built-in pass: its name and where its class is. Plain text, so that listing passes imports none of them.
PASSES: dict[str, str] = {
    "ablate": "actgraph.passes.steer.ablate:Ablate",
    "actadd": "actgraph.passes.steer.actadd:ActAdd",
    "angular_steer": "actgraph.passes.steer.angular:AngularSteer",
    "austeer": "actgraph.passes.steer.austeer:AUSteer",
    "cast": "actgraph.passes.cast.cast:Cast",
    "ci_parametric": "actgraph.passes.steer.ci_parametric:CiParametric",
    "clip": "actgraph.passes.clip.clip:Clip",
    "cse": "actgraph.passes.cleanup.cse:CommonSubexpressions",
    "dce": "actgraph.passes.cleanup.dce:DeadCode",
    "fold": "actgraph.passes.cleanup.fold:FoldConstants",
    "fold_edits": "actgraph.passes.steer.fold_edits:FoldEdits",
    "fuse": "actgraph.passes.fuse.fuse:Fuse",
    "guardit": "actgraph.passes.steer.guardit:Guardit",
    "guiding_giants": "actgraph.passes.steer.guiding_giants:GuidingGiants",
    "identity": "actgraph.passes.cleanup.identity:RemoveIdentities",
    "kif": "actgraph.passes.steer.kif:Kif",
    "kv_cache": "actgraph.passes.cache.kv_cache:KeyValueCache",
    "mote": "actgraph.passes.steer.mote:Mote",
    "orthogonalize": "actgraph.passes.steer.orthogonalize:Orthogonalize",
    "physics_steer": "actgraph.passes.steer.physics:PhysicsSteer",
    "prune": "actgraph.passes.prune.prune:Prune",
    "quantize": "actgraph.passes.quantize.quantize:Quantize",
    "rank_one": "actgraph.passes.steer.rank_one:RankOne",
    "sae_steer": "actgraph.passes.steer.sae:SaeSteer",
    "safety_project": "actgraph.passes.steer.safety_project:SafetyProject",
    "selective_steer": "actgraph.passes.steer.selective:SelectiveSteer",
    "sparsify": "actgraph.passes.sparsify.sparsify:Sparsify",
    "steer": "actgraph.passes.steer.steer:Steer",
    "steer2edit": "actgraph.passes.steer.steer2edit:Steer2Edit",
    "tap": "actgraph.passes.tap.tap:Tap",
    "taugate": "actgraph.passes.steer.taugate:TauGate",
    "unfold": "actgraph.passes.steer.unfold:Unfold",
}
