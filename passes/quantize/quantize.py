"""Quantization of weights and activations.

Weights: int8, symmetric, per output channel (scale = absmax / 127). Activations: int8 per token with scales computed at run
time (``dynamic``), or int8 per tensor with scales from calibration (``static``). Sources: Quantization and Training of Neural
Networks for Efficient Integer-Arithmetic-Only Inference (2018); ZeroQuant (2022) for per-token dynamic activations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from actgraph.calibrate.statistics import Request
from actgraph.errors import PassError
from actgraph.graph import Editor, Graph, Use, Value
from actgraph.graph.graph import Array, parameter_bytes
from actgraph.graph.views import Convolution, Linear
from actgraph.ops.dtypes import DType
from actgraph.ops.quantizer import symmetric_parameters
from actgraph.passes.linears import check_selectors, chosen, edge_name
from actgraph.passes.places import Selector
from actgraph.passes.quantize.weights import embeddings, float_readers, pack, packable, symmetric_int8
from actgraph.pipeline.base import Declined, Pass, PassContext, PassResult

#: How far outputs may move, relative: far more than 8 bits cost a sound model, far less than a wrong scale or axis does.
_WEIGHTS_SIZE, _ACTIVATIONS_SIZE = 0.5, 1.0


class Quantize(Pass):
    """Quantize the weights of linears and convolutions, and on request their inputs and the embedding table."""

    name: ClassVar[str] = "quantize"
    family: ClassVar[str] = "quantize"

    weights: Literal["int8", "none"] = Field(default="int8", description="int8: symmetric per output channel.")
    activations: Literal["none", "dynamic", "static"] = Field(
        default="none", description="Inputs of the linears: dynamic is per token, static is per tensor from calibration."
    )
    embeddings: bool = Field(default=False, description="Store embedding tables as int8 rows too.")
    site: Selector = Field(
        default=(), description="Which linears and convolutions (their output or input sites); default: all."
    )
    ignore: Selector = Field(default=(), description="Linears and convolutions to leave in float.")

    def requests(self, graph: Graph) -> Sequence[Request]:
        if self.activations != "static":
            return ()
        return [Request(edge_name(graph, w), "absmax") for w in self._places(graph)]

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        places = self._places(graph)
        tables = [prim.operands[0] for prim in embeddings(graph)] if self.embeddings else []
        if not places and not tables:
            raise PassError("quantize: no linear or convolution is selected", "check site and ignore with `actgraph sites`")
        rounded = [what for what in ("weights", "activations") if getattr(self, what) != "none"]
        result = PassResult(
            expected_change=f"{' and '.join(rounded) or 'embeddings'} are rounded to 8 bits",
            expected_size=_WEIGHTS_SIZE if self.activations == "none" else _ACTIVATIONS_SIZE,
        )
        before = sum(parameter_bytes(p) for p in graph.parameters())
        with context.edit(graph) as editor:
            if self.weights == "int8":
                self._pack_weights(graph, editor, places, result)
            if self.activations != "none":
                self._quantize_inputs(graph, editor, places, context, result)
            editor.erase_dead()
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

    def _places(self, graph: Graph) -> list[Linear | Convolution]:
        views = graph.views
        linears, convs = views.linears(), views.convs()
        every: list[Linear | Convolution] = [*linears, *convs]
        check_selectors(graph, self.site, lambda named: any(named.covers(w) for w in every), "linear or convolution")
        return [*chosen(graph, linears, self.site, self.ignore), *chosen(graph, convs, self.site, self.ignore)]

    def _pack_weights(self, graph: Graph, editor: Editor, places: list[Linear | Convolution], result: PassResult) -> None:
        """Pack each weight once, however many linears share it."""
        shared: dict[tuple[Value, int], list[Linear | Convolution]] = defaultdict(list)
        for place in places:
            weight = place.weight
            if packable(place) is None:
                result.declined.append(Declined(place.output.name, f"its weight {weight.name} is not read as it is stored"))
            elif weight.dtype is None or not weight.dtype.is_float:
                result.declined.append(Declined(place.output.name, f"its weight is {weight.dtype} already"))
            elif isinstance(place, Convolution) and place.transposed:
                result.declined.append(Declined(place.output.name, "transposed convolutions keep float weights"))
            else:
                shared[weight, place.out_axis if isinstance(place, Linear) else 0].append(place)
        tables = {prim.operands[0]: prim for prim in embeddings(graph)} if self.embeddings else {}
        for (weight, axis), group in shared.items():
            packed, scale = pack(editor, weight, axis, [use for use in map(packable, group) if use is not None])
            result.counts["weights packed"] += 1
            if weight in tables and axis == 0:
                self._pack_table(editor, weight, packed, scale, result)
                del tables[weight]
        for table in tables:
            if isinstance(table, Value) and table.is_parameter and table.dtype is not None and table.dtype.is_float:
                q, scales = symmetric_int8(graph.read(table), 0)
                self._pack_table(
                    editor, table, editor.add_parameter(f"{table.name}_int8", q),
                    editor.add_parameter(f"{table.name}_scale", scales), result,
                )  # fmt: skip

        for weight in [weight for weight, _ in shared]:
            if readers := float_readers(weight):
                editor.messages.append(f"{weight.name} stays in float for {', '.join(readers)}: both forms are stored")

    def _pack_table(self, editor: Editor, table: Value, packed: Value, scale: Value, result: PassResult) -> None:
        """Gather int8 rows and their scales instead of float rows: the table is never dequantized as a whole."""
        graph = editor.graph
        dtype = table.dtype
        column = editor.add_parameter(f"{table.name}_row_scale", graph.read(scale)[:, None])
        for prim in embeddings(graph):
            if prim.operands[0] != table:
                continue
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
