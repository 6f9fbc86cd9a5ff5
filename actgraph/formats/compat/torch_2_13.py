"""Non-public interfaces of torch 2.13 that the ONNX export uses, behind stable signatures.

What is used, and why it cannot be had otherwise: the table of ATen-to-ONNX translations (``torch.onnx`` offers it only
as part of a whole export, which re-traces the model, renames its nodes and inlines functions), the recorder those
translations write to, the rules of implicit type promotion, and the decompositions of ops that have no translation.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
import torch.fx
from onnxscript import evaluator, values
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.onnx._internal.exporter import _building, _core, _decomp, _dispatching, _registration
from torch.onnx._internal.fx.passes import type_promotion

__all__ = ["TorchTensor", "decompose", "graph_value", "namespace", "promotions", "quiet", "recording", "translation"]

#: A torch tensor behind the tensor protocol of onnx_ir: shares memory, also for bfloat16 and float8.
TorchTensor = _core.TorchTensor

Translation = Callable[..., Any]


@functools.cache
def _registry(opset: int) -> _registration.ONNXRegistry:
    with quiet("torch.onnx._internal.exporter._registration"):  # it warns of torchvision on every machine that has none
        return _registration.ONNXRegistry.from_torchlib(opset)


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Errors only from the logger ``name`` inside the block."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@functools.cache
def _decompositions(opset: int) -> dict[Any, Callable[..., Any]]:
    registered = set(_decomp.get_onnx_implemented_overloads(_registry(opset)))
    return dict(_decomp.create_onnx_friendly_decomposition_table(registered))


def translation(node: torch.fx.Node, opset: int) -> Translation | None:
    """torch's translation of ``node`` to ONNX ops of ``opset``; call it inside ``recording``."""
    found, _ = _dispatching.dispatch(node, _registry(opset))
    return found


def graph_value(name: str, opset: int) -> ir.Value:
    """A value that translations can compute with."""
    from torch.onnx._internal.exporter import _tensors

    return _tensors.SymbolicTensor(values.Opset("", opset), name=name)


class Recording:
    """What a translation wrote: ``nodes`` in order, and ``functions`` that it called by identifier."""

    def __init__(self, recorder: _building.OpRecorder) -> None:
        self._recorder = recorder

    @property
    def nodes(self) -> list[ir.Node]:
        return self._recorder.nodes

    @property
    def functions(self) -> dict[ir.OperatorIdentifier, ir.Function]:
        found: dict[ir.OperatorIdentifier, ir.Function] = {}
        for identifier, function in self._recorder.functions.items():
            if not isinstance(function, ir.Function):
                function = ir.serde.deserialize_function(function.to_function_proto())
            found[identifier] = function
        return found


@contextmanager
def recording(opset: int, constants: dict[Any, ir.Value]) -> Iterator[Recording]:
    """Record the ONNX nodes that translations make inside the block. ``constants`` is shared by all blocks of a graph."""
    recorder = _building.OpRecorder(values.Opset("", opset), constants)  # type: ignore[abstract]
    with evaluator.default_as(recorder):
        _core.current_tracer = recorder  # read by the translations of higher-order ops
        try:
            yield Recording(recorder)
        finally:
            _core.current_tracer = None


@functools.cache
def _promotion_table() -> type_promotion.TypePromotionTable:
    return type_promotion.TypePromotionTable()


def promotions(
    node: torch.fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[dict[int, torch.dtype], dict[str, torch.dtype]]:
    """The element types to which torch implicitly converts operands of ``node``, by position and by keyword.

    args, kwargs: example values (fake tensors, numbers) of the operands.
    """
    rule = type_promotion.get_type_promotion_rule(node, _promotion_table())
    if rule is None:
        return {}, {}
    snapshot = rule.preview_type_promotion(tuple(args), dict(kwargs))
    return dict(snapshot.args_dtypes), dict(snapshot.kwargs_dtypes)


def decompose(node: torch.fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any], opset: int) -> torch.fx.GraphModule | None:
    """``node`` in terms of simpler ops, or ``None`` where torch has no decomposition of it.

    args, kwargs: example values. The result takes the tensor and symbolic-size operands in order of appearance.
    """
    target = node.target
    function = _decompositions(opset).get(target)
    if function is None and isinstance(target, torch._ops.OpOverload) and _is_composite(target):
        function = target.decompose
    if function is None:
        return None
    leaves, spec = torch.utils._pytree.tree_flatten((list(args), dict(kwargs)))
    kinds = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
    dynamic = [i for i, leaf in enumerate(leaves) if isinstance(leaf, kinds)]

    def call(*operands: Any) -> Any:
        filled = list(leaves)
        for position, operand in zip(dynamic, operands, strict=True):
            filled[position] = operand
        positional, keyword = torch.utils._pytree.tree_unflatten(filled, spec)
        return function(*positional, **keyword)

    operands = [leaves[i] for i in dynamic]
    mode = detect_fake_mode(operands)
    if mode is None:
        raise RuntimeError(f"{node.name} has no example values")
    with mode, enable_python_dispatcher(), torch.no_grad():
        return make_fx(dispatch_functionalize(call), tracing_mode="real", _allow_non_fake_inputs=True)(*operands)


def _is_composite(target: torch._ops.OpOverload) -> bool:
    name: str = target.name()  # type: ignore[no-untyped-call]
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


def namespace(node: torch.fx.Node) -> str:
    """The module path with classes that model viewers group nodes by."""
    return str(_core._get_node_namespace(node)[0])
