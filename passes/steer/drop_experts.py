"""Removing experts that no token can get: their weights go, and nothing else of the router.

The router keeps its rows and the layout of its groups (so weights that come from a softmax over all experts stay what they
are, and groups keep their members); only the stacks of the experts' matrices lose slices, and what addresses them is made
compact: the indices of gathered weights, or the row offsets of grouped products, in which an expert without rows is nothing.

Source: *Mixture of Tunable Experts*, 2025.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from actgraph.graph import Editor, Graph, Value
from actgraph.graph.graph import Array, Node
from actgraph.graph.recognize.experts import ExpertProduct, expert_products
from actgraph.graph.recognize.semantic import Semantics
from actgraph.graph.views import MixtureOfExperts


@dataclass(frozen=True)
class Stack:
    """The matrices of all experts, and what addresses them.

    weights: the parameter ``[experts, ., .]``; reader: the node that gathers from it, or multiplies by it, with the operand
    ``index``: the experts of the rows (gathered), or the row offsets of the experts (grouped).
    """

    weights: Value
    reader: Node
    index: int
    grouped: bool


def expert_stacks(s: Semantics, mixture: MixtureOfExperts) -> list[Stack] | str:
    """The stacks of a mixture of experts, or the reason why they cannot be cut."""
    products = expert_products(s)
    down = next((p for p in products if mixture.hidden is not None and s.same(p.rows, mixture.hidden)), None)
    if down is None:
        return "the products of its experts were not found"
    address = s.root(down.index, casts=True)
    own = [p for p in products if s.root(p.index, casts=True) == address]
    if len(own) < 2:
        return "the products of its experts are not addressed alike"
    stacks = [_stack(s, product) for product in own]
    return next((each for each in stacks if isinstance(each, str)), None) or [e for e in stacks if isinstance(e, Stack)]


def _stack(s: Semantics, product: ExpertProduct) -> Stack | str:
    if product.parts:
        return "its experts are multiplied one by one"
    weights = product.weights
    reader = next((use.node for use in weights.uses), None)
    while not weights.is_parameter:
        prim = s.prim(weights)
        source = prim.operands[0] if prim is not None and prim.op in ("transpose", "identity") else None
        moved = prim is not None and prim.op == "transpose" and prim.attributes["perm"][0] != 0
        if not isinstance(source, Value) or moved:
            return f"its weights {product.weights.name} are computed"
        weights = source
    if len(weights.uses) != 1 or len(product.weights.uses) != 1 or reader is None:
        return f"its weights {weights.name} have other readers"
    prim = reader.prim
    grouped = prim is not None and prim.op == "grouped_matmul"
    if prim is None or not (grouped or prim.op in ("gather", "index")):
        return f"its weights {weights.name} have other readers"
    address = prim.operands[2 if grouped else 1]
    if not isinstance(address, Value) or address not in reader.operands:
        return f"what addresses {weights.name} was not found"
    return Stack(weights, reader, list(reader.operands).index(address), grouped)


def drop_experts(editor: Editor, graph: Graph, stacks: list[Stack], experts: int, gone: Collection[int]) -> int:
    """Cut the slices of experts that are never chosen out of ``stacks``; returns how many bytes went.

    experts: how many there are by the router's count. The results stay: no row belongs to what is cut.
    """
    kept = np.array([e for e in range(experts) if e not in set(gone)], np.int64)
    place = np.zeros(experts, np.int64)
    place[kept] = np.arange(len(kept))
    saved = 0
    compact: dict[Value, Value] = {}
    for stack in stacks:
        address = stack.reader.operands[stack.index]
        assert address is not None
        if address not in compact:
            table: list[Value | Array | None] = [address, kept] if stack.grouped else [place, address]
            compact[address] = editor.insert("actgraph.take_along", table, name="kept_experts", after=address.producer).output
        data = graph.read(stack.weights)
        saved += data.nbytes - data[kept].nbytes
        editor.set_parameter(stack.weights, np.ascontiguousarray(data[kept]))
        editor.set_operand(stack.reader, stack.index, compact[address])
        readers = [use.node for use in stack.weights.uses if use.node is not None]
        editor.retype([*readers, stack.reader])
    return saved
