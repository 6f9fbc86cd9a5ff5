"""Quantization of weights and activations.

Weights: symmetric int8 (scale = absmax / 127), int4 (absmax / 7, round to nearest) or fp8 e4m3 (absmax / 448), per output
channel or per group of inputs; or bfloat16 without scales. Activations: int8 per token with scales computed at run time
(``dynamic``), or int8 per tensor with scales from calibration (``static``). Sources: Quantization and Training of Neural
Networks for Efficient Integer-Arithmetic-Only Inference (2018); ZeroQuant (2022) for per-token dynamic activations and groups;
FP8 Formats for Deep Learning (2022); A Study of BFLOAT16 for Deep Learning Training (2019).
"""

from __future__ import annotations

import math
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
    BF16,
    INT8,
    Stored,
    bfloat16,
    embeddings,
    float_readers,
    formats,
    pack,
    stored_weight,
    symmetric_int8,
)
from actgraph.pipeline.base import Declined, Pass, PassContext, PassResult

#: How far outputs may move, relative: far more than the format costs a sound model, less than a wrong scale or axis does.
_WEIGHTS_SIZE = {"int8": 0.5, "fp8": 1.0, "int4": 2.0, "bf16": 0.2, "none": 0.5}
_BITS = {"int4": 4, "bf16": 16}
_ACTIVATIONS_SIZE = 1.0


class Quantize(Pass):
    """Quantize the weights of linears and convolutions, and on request their inputs and the embedding table.

    With ``weights=bf16`` a file has half the size and the model computes as before: each weight is cast in front of its
    product, which every engine can do (onnxruntime's CPU has no product of bfloat16). Sessions with kernels, and models
    after ``fuse``, read the 16 bits directly and make no float copy.
    """

    name: ClassVar[str] = "quantize"
    family: ClassVar[str] = "quantize"

    weights: Literal["int8", "int4", "fp8", "bf16", "none"] = Field(
        default="int8",
        description="Codes of the weights, symmetric; int4 is stored two a byte, fp8 is e4m3. bf16: rounded to nearest even.",
    )
    group_size: int | None = Field(
        default=None,
        ge=0,
        description="Inputs of a linear that share a scale; 0: a scale per output channel. Default: int4 32, else 0.",
    )
    activations: Literal["none", "dynamic", "static"] = Field(
        default="none", description="Inputs of the linears: dynamic is per token, static is per tensor from calibration."
    )
    embeddings: bool = Field(default=False, description="Store embedding tables too: as int8 rows, with weights=bf16 in that.")
    site: Selector = Field(
        default=(), description="Which linears and convolutions (their output or input sites); default: all."
    )
    ignore: Selector = Field(default=(), description="Linears and convolutions to leave in float.")

    @model_validator(mode="after")
    def _groups(self) -> Quantize:
        if self.group_size and self.weights in ("fp8", "bf16", "none"):
            raise OptionError(f"weights={self.weights} has no groups", "group_size is for int8 and int4")
        return self

    def requests(self, graph: Graph) -> Sequence[Request]:
        if self.activations != "static":
            return ()
        return [Request(edge_name(graph, w), "absmax") for w in self._places(graph, graph.views)]

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        views = graph.views
        places = self._places(graph, views)
        tables = self._tables(graph)
        experts = expert_weights(graph, views, self.site, self.ignore)
        if not places and not tables:
            raise PassError("quantize: no linear or convolution is selected", "check site and ignore with `actgraph sites`")
        rounded = [what for what in ("weights", "activations") if getattr(self, what) != "none"]
        rounded += ["embeddings"] * bool(tables)
        result = PassResult(
            expected_change=f"{' and '.join(rounded) or 'nothing'} are rounded to {_BITS.get(self.weights, 8)} bits",
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

    def _tables(self, graph: Graph) -> list[Value]:
        """The tables to store: those that are wider than they would be."""
        bits = 16 if self.weights == "bf16" else 8
        found = dict.fromkeys(table for _, table in embeddings(graph)) if self.embeddings else {}
        return [table for table in found if table.dtype is not None and table.dtype.bits > bits]

    def _pack_weights(
        self, editor: Editor, places: list[Linear | Convolution], tables: list[Value], result: PassResult
    ) -> dict[Value, tuple[Value, Value | None]]:
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
            is_table = weight in tables and axis == 0 and form in (INT8, BF16)  # what rows of a table are stored in
            packed = pack(editor, weight, axis, readers, form, as_stored=is_table)
            result.counts["weights packed"] += 1
            kind = str(form.dtype) if packed[1] is None else f"{form.dtype}, {math.prod(_sizes(packed[1]))} scales"
            row = {"site": weight.name, "type": str(weight.type), "packed": kind, "read by": len(readers)}
            result.details.append(row)
            if is_table:
                codes[weight] = packed
        for weight in dict.fromkeys(weight for weight, _ in shared if weight not in tables):
            _report_float(editor, weight)
        return codes

    def _pack_tables(
        self, editor: Editor, tables: list[Value], codes: dict[Value, tuple[Value, Value | None]], result: PassResult
    ) -> None:
        """Pack each table, with the codes of a linear that shares it where there is one."""
        for table in tables:
            scale: Value | None = None
            if table in codes:
                packed, scale = codes[table]
            elif self.weights == "bf16":
                packed = editor.add_parameter(f"{table.name}_bf16", bfloat16(editor.graph.read(table)))
            else:
                rows, scales = symmetric_int8(editor.graph.read(table), 0)
                packed = editor.add_parameter(f"{table.name}_int8", rows)
                scale = editor.add_parameter(f"{table.name}_scale", scales)
            self._pack_table(editor, table, packed, scale, result)
            _report_float(editor, table)

    def _pack_table(self, editor: Editor, table: Value, packed: Value, scale: Value | None, result: PassResult) -> None:
        """Gather int8 rows and their scales, or bfloat16 rows, instead of float rows: the table is never dequantized whole."""
        graph = editor.graph
        dtype = table.dtype
        column = None
        if scale is not None:
            column = editor.add_parameter(f"{table.name}_row_scale", graph.read(scale)[:, None])
        for prim in [prim for prim, read in embeddings(graph) if read == table]:
            rows = editor.copy_region([prim.node], {table: packed})[prim.output]
            result.counts["embeddings packed"] += 1
            if column is None:
                editor.redirect(prim.output, editor.insert("cast", [rows], {"to": dtype}, after=rows.producer).output)
                continue
            scales = editor.copy_region([prim.node], {table: column})[prim.output]
            wide = editor.insert("cast", [rows], {"to": DType.F32}, after=scales.producer)
            product = editor.insert("mul", [wide.output, scales], after=wide)
            if dtype is not DType.F32:
                product = editor.insert("cast", [product.output], {"to": dtype}, after=product)
            editor.redirect(prim.output, product.output)

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
    if wider := _read_wider(place):
        return f"its weight is {weight.dtype} already, read as {wider}: fold stores it so"
    if isinstance(place, Convolution) and place.transposed:
        return "transposed convolutions keep float weights"
    return "" if stored_weight(place) else f"its weight {weight.name} is computed, not read as it is stored: fold may help"


def _read_wider(place: Linear | Convolution) -> DType | None:
    """The type in which the product reads its stored weight, where that is wider."""
    node, index = place.matrix if isinstance(place, Linear) and place.matrix is not None else (place.input.node, 1)
    operand = node.operands[index] if node is not None else None
    stored, read = place.weight.dtype, operand.dtype if operand is not None else None
    return read if stored is not None and read is not None and stored.bits < read.bits else None


def _sizes(value: Value) -> list[int]:
    return [size for size in value.shape or () if isinstance(size, int)]


def _report_float(editor: Editor, weight: Value) -> None:
    if readers := float_readers(weight):
        editor.messages.append(f"{weight.name} stays in float for {', '.join(readers)}: both forms are stored")
