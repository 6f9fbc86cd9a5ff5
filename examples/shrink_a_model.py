"""Prune, sparsify and quantize one model, and see what each step costs in perplexity."""

from pathlib import Path

import actgraph as ag

graph = ag.load("stories260k")
print(f"as trained: perplexity {ag.perplexity(graph):.3f}")

for pipeline in (
    "quantize{weights=int8}",
    "sparsify{method=teal sparsity=0.3}, quantize{weights=int8}",
    "prune{ratio=0.1}, sparsify{method=teal sparsity=0.3}, quantize{weights=int8}",
):
    out = ag.run(graph, pipeline)
    print(f"{pipeline}: perplexity {ag.perplexity(out.graph):.3f}")

print(out.report)
path = out.graph.save("small.onnx")
print(f"{path}: {Path(path).stat().st_size / 1e3:.0f} KB")
