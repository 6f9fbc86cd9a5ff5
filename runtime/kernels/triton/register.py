"""Registers the Triton kernels: in the op registry, and as CUDA implementations of the ``torch.library`` ops.

This module is the one place of the package that may be imported without Triton; ``install`` imports the kernels where there
is a CUDA device for them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from actgraph.ops.registry import DOMAIN, Kernel, OpDef, get_op, register_kernel
from actgraph.ops.torch_library import operand_types, register_all

#: Compute capability from which on the kernels are compiled in tests (bfloat16 in tensor cores comes with it).
MIN_CAPABILITY = (8, 0)

_LIBRARY: torch.library.Library | None = None


def install(device: torch.device | None = None) -> bool:
    """Make the kernels the CUDA implementations of their ops; whether they are. Calling it again changes nothing.

    Where they are not ``usable`` on ``device`` nothing is imported and nothing happens: the references run.
    """
    global _LIBRARY
    if not usable(device):
        return False
    if _LIBRARY is not None:
        return True
    _LIBRARY = torch.library.Library(DOMAIN, "IMPL")  # kept for the life of the process
    implement(_LIBRARY, "CUDA")
    for kernel in triton_kernels():
        register_kernel(kernel)
    return True


def usable(device: torch.device | None = None) -> bool:
    """Whether ``device`` (torch's current one) is of NVIDIA, ``MIN_CAPABILITY`` or newer, beside Triton. Imports nothing."""
    return not why_not(device)


def why_not(device: torch.device | None = None) -> str:
    """Why the kernels cannot run on ``device`` (torch's current one), empty where they can. Imports nothing."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "there is no CUDA device of NVIDIA"
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return f"its compute capability is below {'.'.join(map(str, MIN_CAPABILITY))}"
    return "" if importlib.util.find_spec("triton") is not None else "Triton is not installed (pip install 'actgraph[triton]')"


@functools.cache
def triton_kernels() -> tuple[Kernel, ...]:
    """The kernels. Imports Triton; raises ImportError without it."""
    from actgraph.runtime.kernels.triton import feed_forward, linear, steering

    return tuple(
        Kernel(op, "triton", "torch", "cuda", claims, implementation)
        for op, claims, implementation in (
            ("linear", linear.claims, linear.linear),
            ("feed_forward", feed_forward.claims, feed_forward.feed_forward),
            ("shift", steering.claims_shift, steering.shift),
            ("channel_scale", steering.claims_channel_scale, steering.channel_scale),
            ("lowrank_map", steering.claims_lowrank_map, steering.lowrank_map),
            ("latent_edit", steering.claims_latent_edit, steering.latent_edit),
            ("clip", steering.claims_clip, steering.clip),
            ("gate", steering.claims_gate, steering.gate),
        )
    )


def implement(library: torch.library.Library, key: str) -> None:
    """Register the kernels in ``library`` for a dispatch key ("CUDA"; tests take another one).

    The key comes before the reference, which is registered for all backends, and after autograd: gradients are those of the
    op, and for ``torch.compile`` each op stays one call whose fake kernel is the op's own.
    """
    register_all()
    for kernel in triton_kernels():
        library.impl(kernel.op, _dispatch(get_op(kernel.op), kernel), key)


@dataclass(frozen=True)
class _Form:
    """What was found out about calls of one form: whether the kernel takes them, and the strides that the op gives."""

    claimed: bool
    strides: tuple[int, ...]


def _dispatch(op: OpDef, kernel: Kernel) -> Callable[..., Any]:
    """The kernel where it claims the call, else the reference. The checks run once for each form of a call."""
    forms: dict[Any, _Form] = {}
    reference = op.eager or op.reference

    @functools.wraps(op.reference)
    def implementation(*operands: Any, **attributes: Any) -> Any:
        key = (*[t if t is None else (t.device, t.dtype, t.shape, t.stride()) for t in operands], *map(str, attributes.items()))
        form = forms.get(key)
        if form is None:
            if len(forms) >= 4096:
                forms.clear()
            form = forms[key] = _examine(op, kernel, operands, attributes)
        if not form.claimed:
            result = reference(*operands, **attributes)
            assert not isinstance(result, tuple)
            return result.clone() if result._is_view() or any(result is t for t in operands) else result
        device = operands[0].device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():  # Triton uses the current one
            result = kernel.implementation(*operands, **attributes)
        if result.stride() == form.strides or not result.numel():
            return result
        return result.new_empty_strided(result.shape, form.strides).copy_(result)

    return implementation


def _examine(op: OpDef, kernel: Kernel, operands: Sequence[Any], attributes: dict[str, Any]) -> _Form:
    """Check a call and see what the kernel and the reference (on tensors without data) say of it. Raises VerifyError.

    Compiled graphs rely on the strides that the fake kernel, which is the reference, promised them.
    """
    types, complete = operand_types(operands), op.complete(attributes)
    types += [None] * (len(op.inputs) - len(types))
    op.result_types(types, complete)
    bare = [None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in operands]
    result = op.reference(*bare, **attributes)
    assert not isinstance(result, tuple)
    devices = {t.device for t in operands if t is not None}  # torch takes numbers from the CPU, kernels do not
    able = len(devices) == 1 and all(device.type != "cuda" or usable(device) for device in devices)
    return _Form(able and kernel.claims(types, complete), result.stride())
