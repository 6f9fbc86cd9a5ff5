"""Capture: a torch module and example inputs become an ``FxGraph``.

torch.export in non-strict mode under ``no_grad``, then ``run_decompositions({})``, so that the result is functional and
composite ops (linear, scaled_dot_product_attention, silu) stay whole.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from actgraph.errors import CaptureError, InputError
from actgraph.formats.trace_dims import (
    ConstantWatch,
    DynamicSpec,
    Limits,
    explain_violation,
    plan_dimensions,
)  # fmt: skip
from actgraph.formats.trace_result import graph_of_program
from actgraph.graph.fx import FxGraph


def trace(
    module: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic: DynamicSpec | None = None,
    strict_dims: bool = False,
    name: str | None = None,
    *,
    limits: Limits | None = None,
) -> FxGraph:
    """Capture ``module`` called with ``args`` and ``kwargs`` (tensors in any nesting of lists, tuples and dicts).

    dynamic: dimension names by argument, ``{"input_ids": ("batch", "seq")}``; ``None`` in a tuple is a static dimension,
    nested arguments take equally nested specs, and a name used twice is one dimension. limits: ``{"seq": (1, 512)}``. A
    ``torch.export.Dim`` in the place of a name brings its own.
    strict_dims: an error instead of a note where torch can only capture a dimension as a constant.

    The module is captured in eval mode and left as it was. Raises CaptureError naming the line of user code that could not be
    captured, InputError for arguments or specs that do not fit.
    """
    if not isinstance(module, nn.Module):
        raise InputError(f"trace takes a torch.nn.Module, not a {type(module).__name__}", "wrap functions in a module")
    arguments = _bind(module, tuple(args), dict(kwargs or {}))
    plan = plan_dimensions(arguments, dynamic or {}, limits or {})
    notes: list[str] = []
    with eval_mode(module), _quiet():
        while True:
            watch = ConstantWatch()
            try:
                with torch.no_grad(), watch:
                    program = torch.export.export(module, (), plan.arguments, dynamic_shapes=plan.specification(), strict=False)
                    program = program.run_decompositions({})
                break
            except Exception as error:
                changes = explain_violation(error, plan, watch, notes)
                if not changes:
                    raise CaptureError(*_explain(module, error)) from error
                if strict_dims:
                    raise CaptureError(changes[0].text, "drop strict_dims to keep the dimension static") from error
                notes += [change.text for change in changes]
                for change in changes:
                    plan = plan.apply(change)
        graph = graph_of_program(program, name or type(module).__name__, plan)
    _keep_names(graph, arguments)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    graph.notes += notes
    return graph


def _keep_names(graph: FxGraph, arguments: Mapping[str, Any]) -> None:
    """Call each input what the user calls it: torch renames arguments such as ``input`` that are Python builtins."""
    taken = {value.name for value in graph.inputs()}
    for value in graph.inputs():
        stem, _, number = value.name.rpartition("_")
        if (
            number.isdigit()
            and value.name not in arguments
            and isinstance(arguments.get(stem), torch.Tensor)
            and stem not in taken
        ):
            graph.public[value.key.name] = stem
    graph._index()


def _bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Positional arguments by the names of ``forward``, then keywords in the order given."""
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind_partial(*args)
    except TypeError as error:
        raise InputError(f"{type(module).__name__}.forward does not take {len(args)} arguments by position") from error
    named: dict[str, Any] = {}
    for key, value in bound.arguments.items():
        if signature.parameters[key].kind is inspect.Parameter.VAR_POSITIONAL:
            raise InputError(f"{type(module).__name__}.forward takes *{key}", "wrap it in a module with named arguments")
        named[key] = value
    twice = sorted(set(named) & set(kwargs))
    if twice:
        raise InputError(f"argument {twice[0]!r} is given twice")
    result = {**named, **{key: value for key, value in kwargs.items() if value is not None}}
    if not result:
        raise InputError(f"{type(module).__name__} needs example inputs", "pass args or kwargs")
    return _distinct(result)


def _distinct(arguments: dict[str, Any]) -> dict[str, Any]:
    """A tensor that is passed twice as two tensors: torch.export would read both arguments from one input."""
    seen: set[int] = set()

    def once(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) in seen:
            return tensor.clone()
        seen.add(id(tensor))
        return tensor

    return dict(tree_map_only(torch.Tensor, once, arguments))


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode and no key/value cache; everything as it was afterwards."""
    training = [(child, child.training) for child in module.modules()]
    found: list[Any] = [getattr(child, "config", None) for child in module.modules()]
    configs = {id(config): config for config in found if hasattr(config, "use_cache")}
    caching = [(config, config.use_cache) for config in configs.values()]
    module.eval()
    for config, _ in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for child, mode in training:
            child.training = mode
        for config, value in caching:
            config.use_cache = value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Capture prints nothing: warnings and torch's log lines are about internals."""
    loggers = [
        logging.getLogger(n)
        for n in ("torch.export", "torch._dynamo", "torch.fx", "torch._export", "torch._subclasses", "transformers")
    ]
    levels = [logger.level for logger in loggers]
    # torch prints the graph so far to standard error when a capture fails
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _explain(module: nn.Module, error: Exception) -> tuple[str, str]:
    """One line about a failed capture: where in user code, and what torch said."""
    from actgraph.formats.trace_dims import user_line

    place = user_line(error.__traceback__)
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = said[0] if said else type(error).__name__
    where = f" at {place}" if place else ""
    hint = "rewrite that line without data-dependent Python control flow, or trace a part of the model"
    if not type(error).__module__.startswith("torch.") and not isinstance(error, torch.jit.Error):
        hint = "the model raised this itself: check that it runs on these example inputs"
    return f"{type(module).__name__} could not be captured{where}: {type(error).__name__}: {reason[:300]}", hint
