"""Quantization of weights and activations.

Weights: symmetric int8 (scale = absmax / 127), int4 (absmax / 7, round to nearest) or fp8 e4m3 (absmax / 448), per output
channel or per group of inputs. Activations: int8 per token with scales computed at run time (``dynamic``), or int8 per tensor
with scales from calibration (``static``). Sources: Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference (2018); ZeroQuant (2022) for per-token dynamic activations and groups; FP8 Formats for Deep
Learning (2022).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from actgraph.calibrate.statistics import Request
from actgraph.errors import OptionError, PassError
from actgraph.graph import Editor, Graph, Use, Value
from actgraph.graph.graph import Array, parameter_bytes
from actgraph.graph.views import Convolution, Linear, Views
from actgraph.ops.dtypes import DType
from actgraph.ops.quantizer import symmetric_parameters
from actgraph.passes.linears import check_selectors, chosen, edge_name, expert_weights
from actgraph.passes.places import Selector
from actgraph.passes.quantize.weights import (
    INT8,
    Stored,
    embeddings,
    float_readers,
    formats,
    pack,
    stored_weight,
    symmetric_int8,
)
from actgraph.pipeline.base import Declined, Pass, PassContext, PassResult

#: How far outputs may move, relative: far more than the format costs a sound model, less than a wrong scale or axis does.
_WEIGHTS_SIZE = {"int8": 0.5, "fp8": 1.0, "int4": 2.0, "none": 0.5}
_ACTIVATIONS_SIZE = 1.0


class Quantize(Pass):
    """Quantize the weights of linears and convolutions, and on request their inputs and the embedding table."""

    name: ClassVar[str] = "quantize"
    family: ClassVar[str] = "quantize"

    weights: Literal["int8", "int4", "fp8", "none"] = Field(
        default="int8", description="Codes of the weights, symmetric; int4 is stored two a byte, fp8 is e4m3."
    )
    group_size: int | None = Field(
        default=None,
        ge=0,
        description="Inputs of a linear that share a scale; 0: a scale per output channel. Default: int4 32, else 0.",
    )
    activations: Literal["none", "dynamic", "static"] = Field(
        default="none", description="Inputs of the linears: dynamic is per token, static is per tensor from calibration."
    )
    embeddings: bool = Field(default=False, description="Store embedding tables as int8 rows too.")
    site: Selector = Field(
        default=(), description="Which linears and convolutions (their output or input sites); default: all."
    )
    ignore: Selector = Field(default=(), description="Linears and convolutions to leave in float.")

    @model_validator(mode="after")
    def _groups(self) -> Quantize:
        if self.group_size and self.weights in ("fp8", "none"):
            raise OptionError(f"weights={self.weights} has no groups", "group_size is for int8 and int4")
        return self

    def requests(self, graph: Graph) -> Sequence[Request]:
        if self.activations != "static":
            return ()
        return [Request(edge_name(graph, w), "absmax") for w in self._places(graph, graph.views)]

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        views = graph.views
        places = self._places(graph, views)
        tables = list(dict.fromkeys(table for _, table in embeddings(graph))) if self.embeddings else []
        experts = expert_weights(graph, views, self.site, self.ignore)
        if not places and not tables:
            raise PassError("quantize: no linear or convolution is selected", "check site and ignore with `actgraph sites`")
        rounded = [what for what in ("weights", "activations") if getattr(self, what) != "none"]
        rounded += ["embeddings"] * bool(tables)
        result = PassResult(
            expected_change=f"{' and '.join(rounded) or 'nothing'} are rounded to {4 if self.weights == 'int4' else 8} bits",
            expected_size=max(_WEIGHTS_SIZE[self.weights], 0.0 if self.activations == "none" else _ACTIVATIONS_SIZE),
        )
        before = sum(parameter_bytes(p) for p in graph.parameters())
        with context.edit(graph) as editor:
            codes = self._pack_weights(editor, places, tables, result) if self.weights != "none" else {}
            self._pack_tables(editor, tables, codes, result)
            if self.activations != "none":
                self._quantize_inputs(graph, editor, places, context, result)
            editor.erase_dead()
        if rounded != ["embeddings"]:
            result.declined += [Declined(name, f"{reason}, which quantize leaves as they are") for name, reason in experts]
        if self.embeddings and not tables:
            result.messages.append("no lookup of rows in a stored float table: embeddings=true did nothing")
        after = sum(parameter_bytes(p) for p in graph.parameters())
        result.details.append({"site": "parameters", "bytes before": before, "bytes after": after})
        result.messages += editor.messages
        if not any(result.counts.values()):
            reason = (
                f"{result.declined[0].site}: {result.declined[0].reason}"
                if result.declined
                else "everything is quantized already"
            )
            raise PassError(f"quantize changed nothing: {reason}")
        return result

    def _places(self, graph: Graph, views: Views) -> list[Linear | Convolution]:
        linears, convs = views.linears(), views.convs()
        every: list[Linear | Convolution] = [*linears, *convs]
        check_selectors(graph, self.site, lambda named: any(named.covers(w) for w in every), "linear or convolution")
        return [*chosen(graph, linears, self.site, self.ignore), *chosen(graph, convs, self.site, self.ignore)]

    def _pack_weights(
        self, editor: Editor, places: list[Linear | Convolution], tables: list[Value], result: PassResult
    ) -> dict[Value, tuple[Value, Value]]:
        """Pack each weight once, however many linears share it; returns the codes and scales of ``tables`` among them."""
        shared: dict[tuple[Value, int], list[Stored]] = defaultdict(list)
        form = formats(self.weights, self.group_size)
        for place in places:
            stored = stored_weight(place)
            reason = _refusal(place) or (form.refuses(stored) if stored is not None else "")
            if stored is None or reason:
                result.declined.append(Declined(place.output.name, reason))
            else:
                shared[stored.weight, stored.axis].append(stored)
        codes = {}
        for (weight, axis), readers in shared.items():
            is_table = weight in tables and axis == 0 and form == INT8  # rows of a table are int8
            packed = pack(editor, weight, axis, readers, form, as_stored=is_table)
            result.counts["weights packed"] += 1
            scales = int(np.prod([size for size in packed[1].shape or () if isinstance(size, int)]))
            kind = f"{form.dtype}, {scales} scales"
            row = {"site": weight.name, "type": str(weight.type), "packed": kind, "read by": len(readers)}
            result.details.append(row)
            if is_table:
                codes[weight] = packed
        for weight in dict.fromkeys(weight for weight, _ in shared if weight not in tables):
            _report_float(editor, weight)
        return codes

    def _pack_tables(
        self, editor: Editor, tables: list[Value], codes: dict[Value, tuple[Value, Value]], result: PassResult
    ) -> None:
        """Pack each table, with the codes of a linear that shares it where there is one."""
        for table in tables:
            if table in codes:
                packed, scale = codes[table]
            else:
                rows, scales = symmetric_int8(editor.graph.read(table), 0)
                packed = editor.add_parameter(f"{table.name}_int8", rows)
                scale = editor.add_parameter(f"{table.name}_scale", scales)
            self._pack_table(editor, table, packed, scale, result)
            _report_float(editor, table)

    def _pack_table(self, editor: Editor, table: Value, packed: Value, scale: Value, result: PassResult) -> None:
        """Gather int8 rows and their scales instead of float rows: the table is never dequantized as a whole."""
        graph = editor.graph
        dtype = table.dtype
        column = editor.add_parameter(f"{table.name}_row_scale", graph.read(scale)[:, None])
        for prim in [prim for prim, read in embeddings(graph) if read == table]:
            rows = editor.copy_region([prim.node], {table: packed})[prim.output]
            scales = editor.copy_region([prim.node], {table: column})[prim.output]
            wide = editor.insert("cast", [rows], {"to": DType.F32}, after=scales.producer)
            product = editor.insert("mul", [wide.output, scales], after=wide)
            if dtype is not DType.F32:
                product = editor.insert("cast", [product.output], {"to": dtype}, after=product)
            editor.redirect(prim.output, product.output)
            result.counts["embeddings packed"] += 1

    def _quantize_inputs(
        self, graph: Graph, editor: Editor, places: list[Linear | Convolution], context: PassContext, result: PassResult
    ) -> None:
        names = {place.output: edge_name(graph, place) for place in places}
        nodes: dict[tuple[Value, object], Value] = {}  # one quantizer a value and scale: q, k and v share theirs
        for place in places:
            node, index = place.input
            value = node.operands[index] if node is not None else None
            if node is None or value is None:
                continue
            if self.activations == "dynamic":
                if isinstance(place, Convolution):
                    result.declined.append(
                        Declined(place.output.name, "dynamic per-token scales need a token axis; use static")
                    )
                    continue
                key: tuple[Value, object] = (value, "dynamic")
                operands: list[Value | Array | None] = [value, None, None]
                attributes = {"dtype": "i8", "source": "dynamic", "granularity": "token", "symmetric": True}
            else:
                assert context.statistics is not None
                scale = float(symmetric_parameters(context.statistics[names[place.output], "absmax"])[0])
                key = (value, scale)
                operands = [value, np.asarray(scale, np.float32), np.asarray(0, np.int8)]
                attributes = {"dtype": "i8", "source": "static", "granularity": "tensor", "symmetric": True}
            if key not in nodes:
                made = editor.insert("actgraph.fake_quant", operands, attributes, after=value.producer)
                nodes[key] = made.output
                result.counts["activation quantizers"] += 1
            editor.redirect(value, nodes[key], [Use(node, index)])


def _refusal(place: Linear | Convolution) -> str:
    """Why the weight of ``place`` stays as it is; empty when it can be packed."""
    weight = place.weight
    if weight.producer is not None and weight.producer.prim is not None and weight.producer.prim.op == "dequantize":
        return "its weight is quantized already"
    if weight.dtype is None or not weight.dtype.is_float:
        return f"its weight is {weight.dtype} already"
    if isinstance(place, Convolution) and place.transposed:
        return "transposed convolutions keep float weights"
    return "" if stored_weight(place) else f"its weight {weight.name} is computed, not read as it is stored: fold may help"


def _report_float(editor: Editor, weight: Value) -> None:
    if readers := float_readers(weight):
        editor.messages.append(f"{weight.name} stays in float for {', '.join(readers)}: both forms are stored")
