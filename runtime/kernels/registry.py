"""Which ops have kernels for processors, and which kernel a node of a graph gets."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from actgraph.ops.shapes import TensorType
from actgraph.runtime.kernels.numba.kernel import NumbaKernel, OpKernels


@functools.cache
def all_kernels() -> Mapping[str, OpKernels]:
    """The kernels of each op that has some, by the name of the op."""
    from actgraph.runtime.kernels.numba import linear_gathered  # noqa: F401  # it adds to those of linear
    from actgraph.runtime.kernels.numba.attention import ATTENTION
    from actgraph.runtime.kernels.numba.chosen import INDEX_GATE, TOPK_GATE
    from actgraph.runtime.kernels.numba.elementwise import CLIP, GATE
    from actgraph.runtime.kernels.numba.feed_forward import FEED_FORWARD
    from actgraph.runtime.kernels.numba.latent import LATENT_EDIT
    from actgraph.runtime.kernels.numba.linear import LINEAR
    from actgraph.runtime.kernels.numba.norms import LAYER_NORM, RMS_NORM
    from actgraph.runtime.kernels.numba.quantization import DEQUANTIZE, QUANTIZE, TOKEN_SCALE
    from actgraph.runtime.kernels.numba.rotary import ROTARY
    from actgraph.runtime.kernels.numba.steering import CHANNEL_SCALE, SHIFT
    from actgraph.runtime.kernels.numba.subspace import LOWRANK_MAP, TARGET_ANGLE

    fused = (LINEAR, FEED_FORWARD, ATTENTION, RMS_NORM, LAYER_NORM, ROTARY)
    steering = (SHIFT, CHANNEL_SCALE, LOWRANK_MAP, TARGET_ANGLE, LATENT_EDIT)
    rest = (CLIP, GATE, TOPK_GATE, INDEX_GATE, QUANTIZE, DEQUANTIZE, TOKEN_SCALE)
    return {kernels.op: kernels for kernels in (*fused, *steering, *rest)}


def kernel_for(op: str, types: Sequence[TensorType | None], attributes: dict[str, Any]) -> tuple[OpKernels, NumbaKernel] | None:
    """The kernel for a call of ``op`` with operands of these types (``None``: absent) and complete attributes."""
    kernels = all_kernels().get(op)
    kernel = kernels.find(types, attributes) if kernels is not None else None
    return (kernels, kernel) if kernels is not None and kernel is not None else None
