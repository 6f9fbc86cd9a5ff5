"""Capture a module of your own, watch and bound an activation, and run the result with nothing but onnxruntime."""

import numpy as np
import onnxruntime
import torch

import actgraph as ag


class Classifier(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = torch.nn.Conv2d(3, 8, kernel_size=3, padding=1)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.features(image)).mean((2, 3)))


torch.manual_seed(0)
images = torch.randn(2, 3, 16, 16)
graph = ag.trace(Classifier(), (images,), dynamic={"image": ("batch", None, None, None)})
for site in graph.sites():
    print(site.name, site.type)

out = ag.run(graph, "clip{site=activation.0 max=0.5}, tap{site=activation.0}")
out.graph.save("classifier.onnx", inline="all")

session = onnxruntime.InferenceSession("classifier.onnx", providers=["CPUExecutionProvider"])
names = [output.name for output in session.get_outputs()]
results = dict(zip(names, session.run(names, {"image": np.ones((3, 3, 16, 16), np.float32)}), strict=True))
print({name: array.shape for name, array in results.items()})
assert results["activation.0"].max() <= 0.5
