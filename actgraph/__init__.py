"""actgraph: the compiler for neural-network activations."""

from __future__ import annotations

from actgraph.graph.executor import install_executor

__version__ = "0.1.0"

install_executor("fx", "actgraph.runtime.torch_engine:TorchExecutor")
install_executor("onnx", "actgraph.runtime.ort_engine:OrtExecutor")
