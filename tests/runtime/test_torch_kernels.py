"""Kernels behind ``torch.ops.actgraph`` on the CPU: what the dispatcher reaches, gradients, attributes that are lists."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from actgraph.ops.registry import get_op
from actgraph.ops.torch_library import torch_op
from actgraph.runtime.native.library import available

pytestmark = pytest.mark.skipif(not available(), reason="the kernels' library was not built")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the ops whose kernels have run."""
    from actgraph.runtime import torch_kernels

    names: list[str] = []
    call = torch_kernels.KernelCall.__call__

    def spied(self: torch_kernels.KernelCall, *operands: torch.Tensor | None) -> object:
        frame_of = self._frame

        def noted(given: object) -> object:
            frame = frame_of(given)  # type: ignore[arg-type]
            names.extend([] if frame is None else [self.op])
            return frame

        self._frame = noted  # type: ignore[method-assign, assignment]
        self._own.found.clear()
        try:
            return call(self, *operands)
        finally:
            del self._frame

    monkeypatch.setattr(torch_kernels.KernelCall, "__call__", spied)
    assert torch_kernels.register_torch_kernels() is not None
    yield names


@pytest.mark.parametrize("axes", [(), (-1,), (-2, -1), (1,)])
def test_lists_of_axes(axes: tuple[int, ...], ran: list[str]) -> None:
    x, vector = torch.randn(2, 5, 8), torch.randn(8)
    attributes = {"norm": "restore", "norm_axes": list(axes)}
    got = torch_op("shift")(x, vector, **attributes)
    torch.testing.assert_close(got, get_op("shift").reference(x, vector, **attributes))
    assert ran == ["shift"]


def test_gradients_are_those_of_the_reference(ran: list[str]) -> None:
    x, weight, bias = (t.requires_grad_() for t in (torch.randn(3, 16), torch.randn(10, 16), torch.randn(10)))
    found = []
    for run in (torch_op("linear"), get_op("linear").reference):
        y = run(x, weight, None, None, bias, keep="abs>", threshold=0.5)
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), (x, weight, bias))))
    assert ran == ["linear"]
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert (found[0][1] == 0).any() and found[0][2].abs().max() > 0
