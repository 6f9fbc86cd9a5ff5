"""Programs: one graph as before, several over shared weights; context values as their first users."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

import actgraph as ag
from actgraph.errors import ActgraphError, InputError, PassError, VerifyError
from actgraph.formats import onnx_stream
from actgraph.formats.onnx_export import to_onnx
from actgraph.formats.program_file import load_program
from actgraph.graph.context import KINDS, counted_positions, graph_context, has_context, input_default
from actgraph.graph.graph import Graph, Role
from actgraph.graph.parity import compare
from actgraph.graph.program import Case, Driver, Program, diff_programs
from actgraph.graph.slots import Slot, declare_slot
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import TensorType
from actgraph.pipeline.bisect import parity
from tests import zoo


def two(dialect: str = "fx") -> Program:
    """A full graph and one that stops after the first block, over the same weights."""
    full = zoo.captured("llama")
    short = full.clone()
    with short.edit("cut") as editor:
        editor.redirect(short.site("blocks.1.resid_post").value, short.site("blocks.0.resid_post").value)
        editor.erase_dead()
    graphs: dict[str, Graph] = {"full": full, "short": short}
    if dialect == "onnx":
        graphs = {name: to_onnx(graph) for name, graph in graphs.items()}  # type: ignore[arg-type]
    return Program(graphs, Driver("short", (Case("full", every=3),)), "early exit")


def test_a_program_of_one_behaves_like_its_graph(tmp_path: Path) -> None:
    graph = zoo.captured("llama")
    program = Program.of(graph)
    assert program.text() == graph.text() and program.content_hash() == graph.content_hash()
    assert program.graph is graph and len(program) == 1 and repr(program) == repr(graph)
    program.verify()
    assert program.save(tmp_path / "m.onnx") == tmp_path / "m.onnx"
    assert (tmp_path / "m.onnx").is_file()
    with graph.edit("test") as editor:
        editor.insert_at(graph.site("blocks.0.resid_post"), "mul", [np.float32(2)])
    assert not diff_programs(program, program.clone()) and diff_programs(Program.of(zoo.captured("llama")), program)


def test_a_diff_of_programs_counts_by_graph() -> None:
    """The kinds of changes inside a graph begin with its name, in the lines and in the summary."""
    left, right = two(), two()
    graph = right.graphs["short"]
    with graph.edit("test") as editor:
        editor.insert_at(graph.site("blocks.0.resid_post"), "mul", [np.float32(2)])
    found = diff_programs(left, right)
    assert "short: node added" in found.counts() and not any(kind.startswith("full: ") for kind in found.counts())
    summary = found.text().splitlines()[-1]
    assert summary.startswith("summary: ") and "short: 1 node added" in summary
    assert "@@ short: nodes" in found.text()


def test_driver_is_data() -> None:
    driver = Driver.prefill_then_decode()
    assert [driver.graph_at(step) for step in range(3)] == ["prefill", "decode", "decode"]
    cached = Driver("cheap", (Case("full", steps=(1, 4), every=5),))
    assert [cached.graph_at(step) for step in range(7)] == ["full", "full", "cheap", "cheap", "full", "full", "cheap"]
    assert Driver.from_dict(json.loads(json.dumps(cached.to_dict()))) == cached
    assert str(cached) == "step 1, 4 and every 5 steps -> full; else -> cheap"
    with pytest.raises(InputError, match="lacks"):
        Program({"a": zoo.captured("mlp")}, Driver("b"))


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_weights_are_edited_once_and_graphs_each(dialect: str) -> None:
    program = two(dialect)
    program.verify()
    shared = program.shared()
    assert "model.layers.0.mlp.up_proj.weight" in shared and "model.layers.1.mlp.up_proj.weight" not in shared
    before = program.content_hash()
    original = program.graphs["full"].read(program.graphs["full"].views.linears()[0].weight).copy()

    def edit(graph: Graph) -> int:
        """Relative to the old weight, so that doing it twice would show; and a node in every graph."""
        with graph.edit("scale") as editor:
            linear = graph.views.linears()[0]
            linear.write_weight(editor, linear.read_weight() * 2)
            editor.insert_at(graph.site("blocks.0.resid_post"), "mul", [np.float32(1.5)])
            return len(graph.nodes())

    counts = program.apply(edit)
    assert counts["full"] > counts["short"]
    program.verify()
    assert program.content_hash() != before
    weights = [graph.views.linears()[0].weight for graph in program]
    arrays = [graph.read(weight) for graph, weight in zip(program, weights, strict=True)]
    assert np.shares_memory(*arrays), "one result, stored once"
    assert np.array_equal(arrays[0], original * 2)
    alone = zoo.captured("llama")
    edit(alone)
    compare(alone, program.graphs["full"], [zoo.inputs("llama")], rtol=1e-4).check()


def test_a_failing_or_disagreeing_edit_rolls_everything_back() -> None:
    program = two()
    before = program.content_hash()

    def fails_on_the_second(graph: Graph) -> None:
        with graph.edit("bad") as editor:
            if len(graph.views.linears()) < 10:
                raise PassError("no")
            editor.insert_at(graph.site("blocks.0.resid_post"), "mul", [np.float32(2)])

    with pytest.raises(PassError, match="no"):
        program.apply(fails_on_the_second)
    assert program.content_hash() == before

    def depends_on_the_graph(graph: Graph) -> None:
        with graph.edit("bad") as editor:
            linear = graph.views.linears()[0]
            linear.write_weight(editor, linear.read_weight() * len(graph.nodes()))

    with pytest.raises(PassError, match="differs between full and short"):
        program.apply(depends_on_the_graph)
    assert program.content_hash() == before
    program.verify()


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_a_pipeline_runs_on_a_program(dialect: str) -> None:
    program = two(dialect)
    before = program.content_hash()
    text = "quantize{weights=int8 site=*.up_proj}, clip{site=blocks.0.resid_post min=-1 max=1}"
    result = program.map(lambda graph: ag.run(graph, text, parity="none", reproducer=False).graph)
    assert program.content_hash() == before and result.driver == program.driver
    result.verify()
    for name, graph in result.graphs.items():
        assert [record.name for record in graph.history][-2:] == ["quantize", "clip"]
        assert not compare(program.graphs[name], graph, [zoo.inputs("llama")], rtol=1e-3).ok
    packed = [key for key, holders in result.shared().items() if next(iter(holders.values())).dtype is DType.I8]
    assert packed
    holders = list(result.shared()[packed[0]].values())
    assert np.shares_memory(*(holder.graph.read(holder) for holder in holders))


def test_run_takes_a_program_of_one_as_its_graph() -> None:
    graph = zoo.captured("mlp")
    program = Program({"only": graph}, Driver.single("only"), "a program")
    result = ag.run(program, "quantize, dce")
    assert list(result.program.graphs) == ["only"] and result.program.driver == program.driver
    assert result.program.name == "a program" and result.graph is result.program.graph
    alone = ag.run(graph, "quantize, dce")
    assert result.program.content_hash() == alone.graph.content_hash() == alone.program.content_hash() != graph.content_hash()
    assert result.report[0].counts == alone.report[0].counts and "quantize" in repr(result)
    with pytest.raises(PassError, match=r"^pass 1 \(quantize\)"):
        ag.run(result.program, "quantize", reproducer=False)


def test_run_takes_a_program_of_several_graphs() -> None:
    program = two()
    before = program.content_hash()
    result = ag.run(program, "quantize{site=*.up_proj}, dce")
    assert program.content_hash() == before and result.program.driver == program.driver
    assert list(result.reports) == ["full", "short"]
    counts = [report[0].counts["weights packed"] for report in result.reports.values()]
    assert counts[0] > counts[1] > 0, "each has its own"
    packed = [holders for holders in result.program.shared().values() if next(iter(holders.values())).dtype is DType.I8]
    assert packed and all(np.shares_memory(*(v.graph.read(v) for v in holders.values())) for holders in packed)
    for read in (lambda: result.graph, lambda: result.report):
        with pytest.raises(InputError, match=r"choose one of .*full, short"):
            read()
    with pytest.raises(ActgraphError, match=r"^short: pass 1 \(quantize\): "):
        ag.run(program, "quantize{site=*.layers.1.*.up_proj}", reproducer=False)


def test_diff_and_bisect_take_programs() -> None:
    graph = zoo.captured("mlp")
    one = Program.of(graph)
    changed = ag.run(one, "quantize").program
    assert not ag.diff(one, one) and not ag.diff(one, graph) and not ag.diff(graph, one)
    assert ag.diff(one, changed).changes == ag.diff(graph, changed.graph).changes != ()
    several = two()
    assert not ag.diff(several, several.clone())
    assert {change.kind for change in ag.diff(several.graphs["full"], several)} >= {"driver", "graph"}
    found = ag.bisect(one, "dce, quantize", parity(one, 1e-6))
    assert found.culprit_name == "quantize" and found.index == 1
    clear = r"^bisect takes one graph, and early exit is a program of 2 \(choose one of full, short\)$"
    for refused in (lambda: ag.bisect(several, "dce", lambda graph: True), lambda: parity(several)):
        with pytest.raises(InputError, match=clear):
            refused()


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_several_graphs_are_saved_with_one_file_of_weights(dialect: str, tmp_path: Path) -> None:
    program = two(dialect)
    folder = program.save(tmp_path / "program")
    data = list(folder.glob("*.data"))
    assert len(data) == 1 and sorted(p.name for p in folder.glob("*.onnx")) == ["full.onnx", "short.onnx"]
    full = program.graphs["full"]
    total = sum(full.read(p).nbytes for p in full.parameters())
    assert data[0].stat().st_size < 1.3 * total, "shared weights are stored once"
    loaded = load_program(folder)
    assert loaded.driver == program.driver and loaded.name == program.name
    loaded.verify()
    for name, graph in program.graphs.items():
        compare(graph, loaded.graphs[name], [zoo.inputs("llama")], rtol=1e-4).check()
    if dialect == "onnx":
        assert loaded.content_hash() == program.content_hash()
        assert not diff_programs(program, loaded)
    whole = json.loads((folder / "program.json").read_text())
    for text, problem in (
        ("{", "is damaged: Expecting"),
        ("{}", "is damaged: it lacks 'version'"),
        ("[]", "is damaged: it is no JSON object"),
        (json.dumps({key: value for key, value in whole.items() if key != "name"}), "it lacks 'name'"),
    ):
        (folder / "program.json").write_text(text)
        with pytest.raises(InputError, match=problem):
            ag.load(folder)
    with pytest.raises(InputError, match="holds no"):
        load_program(tmp_path)


def test_several_graphs_are_refused_the_name_of_a_file(tmp_path: Path) -> None:
    for suffix in ("onnx", "pt2"):
        with pytest.raises(InputError, match="is a folder") as refused:
            two("onnx").save(tmp_path / f"m.{suffix}")
        assert "without a suffix" in refused.value.hint
    assert not list(tmp_path.iterdir())


def test_a_program_is_not_written_among_other_files(tmp_path: Path) -> None:
    """A folder would load as the program, in place of the model that it holds."""
    program = two("onnx")
    for name in ("config.json", "genai_config.json", "notes.txt"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("{}")
        with pytest.raises(InputError, match=rf"holds something else \({name}\)") as refused:
            program.save(folder)
        assert "empty folder" in refused.value.hint and [path.name for path in folder.iterdir()] == [name]
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / ".gitignore").write_text("*")
    for _ in range(2):  # and over a program
        assert ag.load(program.save(empty)).content_hash() == program.content_hash()
    (empty / "program.json").unlink()
    with pytest.raises(InputError, match=r"holds full.onnx, short.onnx"):
        ag.load(empty)


def test_a_saved_program_is_loaded_by_its_folder(tmp_path: Path) -> None:
    program = two("onnx")
    folder = program.save(tmp_path / "program")
    (folder / "config.json").write_text("{}")  # as a companion may be
    for source in (folder, str(folder)):
        loaded = ag.load(source)
        assert isinstance(loaded, ag.Program) and loaded.content_hash() == program.content_hash()
    with pytest.raises(InputError, match="no loading option 'dtype'"):
        ag.load(folder, dtype="float16")


@pytest.mark.parametrize("good", range(3))
def test_a_program_that_cannot_be_written_leaves_the_old_one(
    good: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever write fails: that of the weights, of the first graph or of the second."""
    program = two("onnx")
    for graph in program:
        graph.companions.sample_inputs = {"x": np.zeros(3, np.float32)}
    folder = program.save(tmp_path / "program")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = program.map(lambda graph: ag.run(graph, "clip{site=blocks.0.resid_post max=1}", parity="none").graph)
    for graph in other:
        graph.companions.sample_inputs = {"x": np.ones(3, np.float32)}
        with graph.edit() as editor:
            editor.set_parameter(graph.views.linears()[0].weight, graph.read(graph.views.linears()[0].weight) * 2)
    writes = 0

    def failing(original):  # type: ignore[no-untyped-def]
        def write(*args, **options):  # type: ignore[no-untyped-def]
            nonlocal writes
            writes += 1
            if writes > good:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **options)

        return write

    for name in ("write_data", "write_model"):
        monkeypatch.setattr(onnx_stream, name, failing(getattr(onnx_stream, name)))
    for place in (folder, tmp_path / "new" / "place"):
        writes = 0
        with pytest.raises(InputError, match="no space left"):
            other.save(place)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not (tmp_path / "new").exists(), "folders that were made go away again"
    assert ag.load(folder).content_hash() == program.content_hash()


def test_text_and_diff_of_several_graphs() -> None:
    left, right = two(), two()
    text = left.text()
    assert "driver every 3 steps -> full; else -> short" in text and "# short" in text and "shared model.norm.weight" in text
    assert left.content_hash() == right.content_hash()
    right.graphs["short"].history.clear()
    with right.graphs["short"].edit("test") as editor:
        editor.insert_at(right.graphs["short"].site("blocks.0.mlp.out"), "mul", [np.float32(2)])
    right.driver = Driver("short", (Case("full", every=4),))
    kinds = {change.kind for change in diff_programs(left, right)}
    assert kinds == {"driver", "short: node"}


def test_slots_are_paired() -> None:
    graph = zoo.captured("mlp")
    slot = Slot("mean", DType.F32, ("batch", 7), update="replace", reset="session")
    with graph.edit("test") as editor:
        state = editor.add_input("state_in.mean", slot.type, role=Role.SLOT, default=np.zeros((1, 7), np.float32))
        result = editor.insert("add", [graph.outputs()[0][1], state]).output
        editor.add_output(result, "state_out.mean", role=Role.SLOT)
    declare_slot(graph, slot)
    program = Program.of(graph)
    assert program.slots == {"mean": slot} and Slot.from_dict(json.loads(json.dumps(slot.to_dict()))) == slot
    program.verify()
    assert Program.of(to_onnx(graph)).slots == program.slots
    with graph.edit("test") as editor:
        editor.remove_output("state_out.mean")
    with pytest.raises(VerifyError, match="mean"):
        Program.of(graph).verify()
    with pytest.raises(InputError, match="reset"):
        Slot("s", DType.F32, (), reset="sometimes")


# --- context values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_a_causal_model_gives_its_own_positions_and_mask(dialect: str) -> None:
    graph: Graph = zoo.captured("llama")
    graph = to_onnx(graph) if dialect == "onnx" else graph  # type: ignore[arg-type]
    names = [value.name for value in graph.inputs()]
    with graph.edit("test") as editor:
        assert graph_context(graph, editor, "positions") == graph.input("position_ids")
        valid = graph_context(graph, editor, "valid_tokens")
        assert valid.type == TensorType(DType.BOOL, ("batch", "seq"))
        assert graph_context(graph, editor, "valid_tokens") == valid
    assert [value.name for value in graph.inputs()] == names
    graph.verify()


def test_positions_that_the_graph_counts_itself() -> None:
    graph = zoo.captured("opt")
    assert counted_positions(zoo.captured("mlp")) is None
    if "position_ids" not in {value.name for value in graph.inputs()}:
        assert has_context(graph, "positions")


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_missing_value_becomes_an_optional_input_that_changes_nothing(name: str, dialect: str) -> None:
    graph: Graph = zoo.captured("vit") if name == "step" else zoo.captured("llama")
    source = graph.clone()
    graph = to_onnx(graph) if dialect == "onnx" else graph  # type: ignore[arg-type]
    inputs = zoo.inputs(source.name)
    owned = has_context(graph, name)
    with graph.edit("test") as editor:
        value = graph_context(graph, editor, name)
        if not owned:
            assert graph_context(graph, editor, name) == value
            assert graph.role(name) is Role.CONTEXT
            default = input_default(graph, name)
            assert default is not None and default.size == 1 and default.ndim == len(value.shape or ())
            number = editor.insert("cast", [value], {"to": DType.F32}).output
            wide = editor.insert("reshape", [number], {"shape": (-1, 1, 1)}).output
            usual = int(default.reshape(-1)[0])
            off = editor.insert("sub", [wide, np.float32(usual)]).output
            factor = editor.insert("add", [off, np.float32(1)]).output
            editor.insert_at(graph.site("blocks.0.resid_post"), "mul", [factor])
    graph.verify()
    if owned:
        return
    compare(source, graph, [inputs], rtol=1e-4).check()  # the input is left out
    rows = next(iter(inputs.values())).shape[0]
    given = np.full(rows if KINDS[name].axes else 1, usual, KINDS[name].dtype.numpy)
    compare(source, graph, [{**inputs, name: given}], rtol=1e-4).check()
    assert not compare(source, graph, [{**inputs, name: given // 2 + 3}], rtol=1e-3).ok


def test_context_needs_tokens() -> None:
    graph = zoo.captured("mlp")
    with graph.edit("test") as editor, pytest.raises(InputError, match="no context value"):
        graph_context(graph, editor, "weather")


def test_a_program_saved_over_another_leaves_nothing_of_it(tmp_path: Path) -> None:
    first, second = (
        ag.run(zoo.captured(name), "kv_cache", parity="none", reproducer=False).program for name in ("llama", "gpt2")
    )
    first.save(tmp_path / "out")
    held = {path.name for path in (tmp_path / "out").glob("*.data")}
    second.save(tmp_path / "out")
    weights = {path.name for path in (tmp_path / "out").glob("*.data")}
    assert len(weights) == 1 and not weights & held
    assert ag.load(tmp_path / "out").content_hash() == ag.load(second.save(tmp_path / "other")).content_hash()


def test_a_graph_whose_name_is_no_file_is_refused(tmp_path: Path) -> None:
    graph = zoo.captured("gpt2")
    program = Program({"../evil": graph, "decode": graph.clone()}, Driver("decode"))
    with pytest.raises(InputError, match="cannot be a file"):
        program.save(tmp_path / "in")
    assert not list(tmp_path.iterdir())
