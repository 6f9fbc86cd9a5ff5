"""Slots of one graph: what the verifier demands of them, and how they are printed."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

import actgraph as ag
from actgraph.errors import InputError, VerifyError
from actgraph.graph import Graph
from actgraph.graph.graph import Role
from actgraph.graph.slots import Slot, advance, slots_of, with_initial_slots
from actgraph.graph.specialise import specialise
from actgraph.ops.dtypes import DType
from tests import zoo


def cached(dialect: str, options: str = "") -> Graph:
    graph = zoo.captured("llama") if dialect == "fx" else zoo.exported("llama")
    return ag.run(graph, f"kv_cache{{graphs=combined {options}}}").graph


def _unwritten(graph: Graph) -> None:
    with graph.edit("t") as editor:
        editor.remove_output("present.0.key")


def _of_no_slot(graph: Graph) -> None:
    with graph.edit("t") as editor:
        editor.add_output(graph.value("present.0.key" if graph.dialect == "onnx" else "present_0_key"), "more", role=Role.SLOT)


def _recorded(key: str, value: str) -> Callable[[Graph], None]:
    def change(graph: Graph) -> None:
        slots = json.loads(graph.metadata["slots"])
        slots["past_key_values.0.key"][key] = value
        graph.metadata["slots"] = json.dumps(slots)

    return change


def _undeclared(graph: Graph) -> None:
    slots = json.loads(graph.metadata["slots"])
    slots["lost"] = {"init": 0.0, "reset": "request", "update": "replace"}
    graph.metadata["slots"] = json.dumps(slots)


def _swapped(graph: Graph) -> None:
    """A slot is written with what has another shape."""
    with graph.edit("t") as editor:
        editor.remove_output("present.0.key")
        editor.add_output(dict(graph.outputs())["logits"], "present.0.key", role=Role.SLOT)


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize(
    ("break_it", "why"),
    [
        (_unwritten, "past_key_values.0.key is read and not written: there is no output present.0.key"),
        (_of_no_slot, "the output more is that of no slot"),
        (_recorded("update", "now"), "update is 'now'"),
        (_recorded("reset", "always"), "reset is 'always'"),
        (_recorded("update", "replace"), r"which should keep its shape \(replace\)"),
        (_recorded("update", "scatter"), r"which should keep its shape \(scatter\)"),
        (_undeclared, "slot lost is declared, and no input holds it"),
        (_swapped, r"which should grow along one axis \(append\)"),
    ],
)
def test_broken_slots_are_found(break_it: Callable[[Graph], None], why: str, dialect: str) -> None:
    graph = cached(dialect).clone()
    graph.verify()
    break_it(graph)
    with pytest.raises(VerifyError, match=why):
        graph.verify()


def test_a_slot_of_fixed_size_does_not_grow() -> None:
    graph = cached("fx", "form=static max_length=16")
    graph.verify()
    _recorded("update", "append")(graph)
    with pytest.raises(VerifyError, match="should grow along one axis"):
        graph.verify()


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_the_text_of_a_graph_lists_its_slots(dialect: str) -> None:
    graph = cached(dialect)
    line = (
        "  past_key_values.0.key: f32[batch, 2, past, 8] {init = 0, reset = request, update = append}  "
        "%past_key_values.0.key -> present.0.key"
    )
    lines = graph.text().splitlines()
    place = lines.index("slots {")
    assert lines[place + 1] == line and lines[place + 5] == "}"
    assert "slots {" not in zoo.captured("llama").text()
    other = graph.clone()
    _recorded("reset", "session")(other)
    assert other.content_hash() != graph.content_hash() and ag.diff(graph, other)
    _recorded("reset", "always")(other)
    assert "? slot past_key_values.0.key: reset is 'always'" in other.text()  # a broken graph can be looked at


def test_state_is_carried_from_call_to_call() -> None:
    graph = specialise(cached("fx"), {"seq": 1})
    inputs = ag.sample_inputs(graph, batch=2)
    assert inputs["attention_mask"].shape == (2, 1)  # before the first call nothing is held
    results = graph.run(with_initial_slots(graph, inputs))
    state = advance(slots_of(graph).values(), results)
    assert set(state) == {slot.input for slot in slots_of(graph).values()}
    assert all(array.shape == (2, 2, 1, 8) for array in state.values())


def test_options_of_a_slot_are_checked() -> None:
    with pytest.raises(InputError, match="reset is 'daily'"):
        Slot("x", DType.F32, (1,), reset="daily")
    with pytest.raises(InputError, match="update is 'merge'"):
        Slot("x", DType.F32, (1,), update="merge")
