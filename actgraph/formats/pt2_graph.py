"""An ``FxGraph`` as JSON data: everything but the tensors, so that loading gives back the equal graph, ops kept whole."""

from __future__ import annotations

import base64
import importlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import sympy
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from actgraph.errors import InputError, UnsupportedError
from actgraph.graph import fx_build
from actgraph.graph.folds import FoldRecord
from actgraph.graph.fx import FxGraph
from actgraph.graph.fx_types import DimNames, new_symbol
from actgraph.graph.graph import Array, Companions, Role
from actgraph.graph.provenance import KEY, PassRecord, RecordedNote
from actgraph.graph.sites import SiteTable
from actgraph.ops.dtypes import DType

VERSION = 1
Data = dict[str, Any]


def encode(graph: FxGraph) -> Data:
    """``graph`` as JSON data. Raises UnsupportedError for constants that JSON cannot hold."""
    symbols: dict[str, sympy.Symbol] = {}
    writer = _Writer(graph, symbols)
    nodes = [writer.node(node) for node in graph.graph.nodes]
    return {
        "version": VERSION,
        "name": graph.name,
        "nodes": nodes,
        "symbols": [_symbol(graph, symbol) for symbol in symbols.values()],
        "outputs": list(graph.output_names),
        "input_roles": {key: role.value for key, role in graph.input_roles.items()},
        "output_roles": {key: role.value for key, role in graph.output_roles.items()},
        "public": dict(graph.public),
        "defaults": {key: encode_array(value) for key, value in graph.defaults.items()},
        "dim_ranges": {key: list(value) for key, value in graph.dim_ranges.items()},
        "parameters": [_parameter(graph, path) for path in graph._parameters],
        "history": [record.to_dict() for record in graph.history],
        "notes": list(graph.notes),
        "folds": [record.to_dict() for record in graph.folds],
        "metadata": dict(graph.metadata),
        "sites": graph.site_table.to_dict(),
        "companions": _encode_companions(graph.companions),
    }


def decode(data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> FxGraph:
    """The graph that ``encode`` described, over ``tensors`` by name. Raises InputError for data that does not fit."""
    if data.get("version") != VERSION:
        raise InputError(
            f"the file was written by another version of actgraph (format {data.get('version')})", "upgrade actgraph"
        )
    root = _root(data, tensors)
    env = ShapeEnv()
    fake_mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    dims = DimNames()
    symbols: dict[str, sympy.Symbol] = {}
    for row in data["symbols"]:
        symbol = new_symbol(env, row["symbol"], row["hint"], row["low"], row["high"])
        symbols[row["symbol"]] = symbol
        if row["name"] is not None:
            dims.names[symbol] = row["name"]
    reader = _Reader(root, fake_mode, symbols)
    native = fx.Graph()
    for row in data["nodes"]:
        reader.node(native, row)
    graph = FxGraph(
        native,
        root,
        data["name"],
        output_names=data["outputs"],
        input_roles={key: Role(role) for key, role in data["input_roles"].items()},
        output_roles={key: Role(role) for key, role in data["output_roles"].items()},
        dim_names=dims,
        fake_mode=fake_mode,
    )
    graph.public = dict(data["public"])
    graph.defaults = {key: decode_array(value) for key, value in data["defaults"].items()}
    graph.dim_ranges = {key: (value[0], value[1]) for key, value in data["dim_ranges"].items()}
    graph._index()
    order = [row["path"] for row in data["parameters"]]
    graph._parameters = {path: graph._parameters[path] for path in order}
    graph._aliases.update({row["path"]: tuple(row["aliases"]) for row in data["parameters"]})
    graph.history = [PassRecord.from_dict(record) for record in data["history"]]
    graph.notes, graph.metadata = [RecordedNote(note) for note in data["notes"]], dict(data["metadata"])
    graph.folds = [FoldRecord.from_dict(record) for record in data.get("folds", ())]
    graph.companions = _decode_companions(data["companions"])
    graph._sites = SiteTable.from_dict(graph, data["sites"])
    return graph


# --- nodes ----------------------------------------------------------------------------------------------------------------


class _Writer:
    def __init__(self, graph: FxGraph, symbols: dict[str, sympy.Symbol]) -> None:
        self.graph = graph
        self.symbols = symbols
        self.sizes: dict[sympy.Expr, str] = {}

    def node(self, node: fx.Node) -> Data:
        row: Data = {"op": node.op, "name": node.name, "target": self.target(node)}
        row["args"], row["kwargs"] = self.value(node.args), self.value(node.kwargs)
        custom = (node.meta.get("custom") or {}).get(KEY)
        if custom is not None:
            row["origin"] = custom
        if "val" in node.meta:
            row["val"] = self.fake(node.meta["val"])
        if node.op == "get_attr":
            found = fx_build.lookup(self.graph.root, str(node.target))
            if isinstance(found, fx.GraphModule):
                row["branch"] = self.branch(found)
        return row

    def branch(self, module: fx.GraphModule) -> list[Data]:
        if next(fx_build.named_tensors(module), None) is not None:
            raise UnsupportedError("a branch of control flow holds tensors of its own", "save as .onnx")
        return [self.node(node) for node in module.graph.nodes]

    @staticmethod
    def target(node: fx.Node) -> Any:
        if isinstance(node.target, str):
            return node.target
        if isinstance(node.target, torch._ops.OpOverload):
            return {"op": str(node.target), "module": _defining_module(node.target)}
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return {"higher_order": node.target.__name__}
        return {"function": f"{node.target.__module__}:{node.target.__qualname__}"}

    def value(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return {"node": value.name}
        if isinstance(value, (list, tuple)):
            items = [self.value(item) for item in value]
            return {"tuple": items} if isinstance(value, tuple) else items
        if isinstance(value, dict):
            return {"dict": {key: self.value(item) for key, item in value.items()}}
        if isinstance(value, slice):
            return {"slice": [self.value(item) for item in (value.start, value.stop, value.step)]}
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": repr(value)}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            return {"torch": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if isinstance(value, complex):
            return {"complex": [value.real, value.imag]}
        raise UnsupportedError(f"a constant of type {type(value).__name__} cannot be saved", "save as .onnx")

    def fake(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            row: Data = {
                "dtype": DType.of(value.dtype).value,
                "shape": [self.size(size) for size in value.shape],
                "stride": [self.size(size) for size in value.stride()],
            }
            if value.device.type != "cpu":
                row["device"] = str(value.device)
            return row
        if isinstance(value, (torch.SymInt, torch.SymBool, torch.SymFloat)):
            return {type(value).__name__: self.size(value)}
        if isinstance(value, (list, tuple)):
            return [self.fake(item) for item in value]
        return {"plain": value} if value is None or isinstance(value, (bool, int, float)) else None

    def size(self, size: Any) -> int | str:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression not in self.sizes:
            for symbol in expression.free_symbols:
                self.symbols.setdefault(symbol.name, symbol)
            self.sizes[expression] = sympy.srepr(expression)
        return self.sizes[expression]


class _Reader:
    def __init__(self, root: nn.Module, fake_mode: FakeTensorMode, symbols: Mapping[str, sympy.Symbol]) -> None:
        self.root = root
        self.fake_mode = fake_mode
        self.symbols = symbols
        self.expressions: dict[str, sympy.Expr] = {}
        self.nodes: dict[str, fx.Node] = {}

    def node(self, native: fx.Graph, row: Mapping[str, Any]) -> None:
        if "branch" in row:
            self.branch(row)
        target = self.target(row["target"])
        made = native.create_node(row["op"], target, self.value(row["args"]), self.value(row["kwargs"]), name=row["name"])
        fx_build.rename(native, made, row["name"])
        self.nodes[row["name"]] = made
        if "origin" in row:
            made.meta["custom"] = {KEY: dict(row["origin"])}
        if "val" in row:
            made.meta["val"] = self.fake(row["val"])

    def branch(self, row: Mapping[str, Any]) -> None:
        inner = _Reader(self.root, self.fake_mode, self.symbols)
        graph = fx.Graph()
        for item in row["branch"]:
            inner.node(graph, item)
        fx_build.attach(self.root, row["target"], fx.GraphModule(nn.Module(), graph))

    @staticmethod
    def target(target: Any) -> Any:
        if isinstance(target, str):
            return target
        if "op" in target:
            return _find_op(target["op"], target.get("module", ""))
        if "higher_order" in target:
            return getattr(torch.ops.higher_order, target["higher_order"])
        module, _, name = target["function"].partition(":")
        if module not in ("_operator", "operator", "math", "torch", "builtins", "torch.fx.experimental.symbolic_shapes"):
            raise InputError(
                f"the file calls {target['function']}, which is not an operation on sizes", "do not trust this file"
            )
        return getattr(importlib.import_module(module), name)

    def value(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.value(item) for item in value]
        if not isinstance(value, dict):
            return value
        (kind, item), *_ = value.items()
        if kind == "node":
            return self.nodes[item]
        if kind == "tuple":
            return tuple(self.value(each) for each in item)
        if kind == "dict":
            return {key: self.value(each) for key, each in item.items()}
        if kind == "slice":
            return slice(*(self.value(each) for each in item))
        if kind == "float":
            return float(item)
        if kind == "torch":
            return getattr(torch, item)
        if kind == "device":
            return torch.device(item)
        if kind == "complex":
            return complex(*item)
        raise InputError(f"the file holds a constant of unknown kind {kind!r}", "upgrade actgraph")

    def fake(self, row: Any) -> Any:
        if isinstance(row, list):
            return [self.fake(item) for item in row]
        if row is None:
            return None
        if "dtype" in row:
            shape, stride = ([self.size(size) for size in row[key]] for key in ("shape", "stride"))
            with self.fake_mode:
                return torch.empty_strided(shape, stride, dtype=DType(row["dtype"]).torch, device=row.get("device", "cpu"))
        if "plain" in row:
            return row["plain"]
        (kind, item), *_ = row.items()
        env = self.fake_mode.shape_env
        assert env is not None
        make = {"SymInt": env.create_symintnode, "SymBool": env.create_symboolnode, "SymFloat": env.create_symfloatnode}[kind]
        expression = self.expression(item) if isinstance(item, str) else sympy.Integer(item)
        return make(expression) if kind == "SymBool" else make(expression, hint=None)  # type: ignore[operator]

    def size(self, size: int | str) -> Any:
        if isinstance(size, int):
            return size
        env = self.fake_mode.shape_env
        assert env is not None
        return env.create_symintnode(self.expression(size), hint=None)

    def expression(self, text: str) -> sympy.Expr:
        if text not in self.expressions:
            self.expressions[text] = _parse(text, self.symbols)
        return self.expressions[text]


def _parse(text: str, symbols: Mapping[str, sympy.Symbol]) -> sympy.Expr:
    """A size expression written by ``sympy.srepr``, read without evaluating anything but sympy constructors."""
    import ast

    from torch.utils._sympy import functions

    def build(node: ast.AST) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -build(node.operand)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name = node.func.id
            if name == "Symbol":
                return symbols[build(node.args[0])]
            maker = getattr(functions, name, None) or getattr(sympy, name, None)
            if isinstance(maker, type) and issubclass(maker, sympy.Basic):
                return maker(*(build(argument) for argument in node.args))
        raise InputError(f"the file holds a size that cannot be read: {text[:80]}", "the file is damaged")

    return build(ast.parse(text, mode="eval").body)


# --- parts ----------------------------------------------------------------------------------------------------------------


def _symbol(graph: FxGraph, symbol: sympy.Symbol) -> Data:
    env = graph.fake_mode.shape_env
    assert env is not None
    bounds = env.var_to_range.get(symbol)
    hint = env.backed_var_to_val.get(symbol)
    low = int(bounds.lower) if bounds is not None and bounds.lower.is_Integer else 0
    high = int(bounds.upper) if bounds is not None and bounds.upper.is_Integer else None
    known = None if hint is None else int(hint)
    return {"symbol": symbol.name, "name": graph.dims.names.get(symbol), "hint": known, "low": low, "high": high}


def _parameter(graph: FxGraph, path: str) -> Data:
    *parents, leaf = path.split(".")
    holder = fx_build.lookup(graph.root, ".".join(parents)) if parents else graph.root
    return {
        "path": path,
        "aliases": list(graph._aliases[path]),
        "buffer": leaf in holder._buffers,
        "persistent": leaf not in holder._non_persistent_buffers_set,
        "trained": bool(getattr(holder, leaf).requires_grad),
    }


def _root(data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    root = nn.Module()
    for row in data["parameters"]:
        tensor = tensors.get(row["path"])
        if tensor is None:
            raise InputError(f"the file has no data for parameter {row['path']}", "the file is damaged")
        if not row["buffer"]:
            tensor = nn.Parameter(tensor.detach(), requires_grad=row["trained"])
        for path in row["aliases"]:
            fx_build.store(root, path, tensor, buffer=row["buffer"], persistent=row["persistent"])
    return root


def _defining_module(op: torch._ops.OpOverload) -> str:
    """The Python module that defines an op which is neither torch's nor ours; importing it makes the op exist."""
    from torch._library.custom_ops import OPDEFS

    definition = OPDEFS.get(op._schema.name)
    return str(definition._init_fn.__module__) if definition is not None else ""


def _find_op(name: str, module: str) -> Any:
    """The op overload ``aten.add.Tensor``. Raises InputError when it is not defined here."""
    namespace, *parts = name.split(".")
    if namespace == "actgraph":
        from actgraph.ops.torch_library import register_all

        register_all()
    for attempt in range(2):
        try:
            found: Any = getattr(torch.ops, namespace)
            for part in parts:
                found = getattr(found, part)
            return found
        except AttributeError:
            if attempt or not module:
                break
            try:
                importlib.import_module(module)
            except ImportError:
                break
    raise InputError(f"the file uses the op {name}, which is not defined", f"install {(module or namespace).split('.')[0]}")


def encode_array(array: Array) -> Data:
    """An array as JSON data."""
    return {
        "dtype": DType.of(array.dtype).value,
        "shape": list(array.shape),
        "data": base64.b64encode(np.ascontiguousarray(array).tobytes()).decode(),
    }


def decode_array(data: Mapping[str, Any]) -> Array:
    """The array that ``encode_array`` wrote."""
    raw = np.frombuffer(base64.b64decode(data["data"]), dtype=DType(data["dtype"]).numpy)
    return raw.reshape(data["shape"]).copy()


def _encode_companions(companions: Companions) -> Data:
    files = dict(companions.tokenizer_files)
    if companions.tokenizer is not None and "tokenizer.json" not in files:
        files["tokenizer.json"] = companions.tokenizer.to_str().encode()
    return {
        "files": {name: base64.b64encode(content).decode() for name, content in files.items()},
        "config": companions.config,
        "generation_config": companions.generation_config,
        "source": companions.source,
        "sample_inputs": {key: encode_array(value) for key, value in companions.sample_inputs.items()},
    }


def _decode_companions(data: Mapping[str, Any]) -> Companions:
    from actgraph.formats.huggingface import make_tokenizer

    files = {name: base64.b64decode(content) for name, content in data["files"].items()}
    return Companions(
        tokenizer=make_tokenizer(files),
        tokenizer_files=files,
        config=dict(data["config"]),
        generation_config=dict(data["generation_config"]),
        source=data["source"],
        sample_inputs={key: decode_array(value) for key, value in data["sample_inputs"].items()},
    )
