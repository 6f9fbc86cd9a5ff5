"""Folding edits into weights: exact, with its legality stated, and undone from the record in the graph and in files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.errors import PassError, SiteError
from actgraph.graph import Graph
from actgraph.graph.folds import FoldRecord, WeightChange, add_lowrank, scale_along
from actgraph.graph.graph import Array
from actgraph.passes.steer.fold_edits import FoldEdits
from actgraph.passes.steer.folding import Folding, fold_edit
from actgraph.passes.steer.merging import merge_edits
from actgraph.passes.steer.unfold import Unfold, unfold_edit
from actgraph.pipeline.base import Pass, PassContext
from tests import zoo
from tests.passes.conftest import apply, as_dialect, in_dialect, relative, run

SHIFT, MAP, SCALE = "actgraph.shift", "actgraph.lowrank_map", "actgraph.channel_scale"


def operands(op: str, width: int, seed: int = 0) -> list[Array]:
    """Of a random shift, a random map of rank 2 (no projection, not symmetric), or random factors."""
    rng = np.random.default_rng(seed)
    if op == MAP:
        return [rng.normal(0, width**-0.5, (width, 2)).astype(np.float32), rng.normal(0, 0.7, (2, 2)).astype(np.float32)]
    return [rng.normal(0 if op == SHIFT else 1, 0.4, width).astype(np.float32)]


def insert(graph: Graph, site: str, op: str, given: Sequence[Any] | None = None, seed: int = 0, **attributes: Any) -> Graph:
    """A copy of ``graph`` with an edit at ``site``."""
    graph = graph.clone()
    with graph.edit("by_hand") as editor:
        place = graph.site(site)
        shape = place.type.shape
        assert shape is not None
        width = shape[attributes.get("axis", -1)]
        assert isinstance(width, int)
        editor.insert_at(place, op, operands(op, width, seed) if given is None else given, attributes)
    return graph


def fold(graph: Graph) -> tuple[Graph, list[Folding]]:
    """A copy with every edit folded by hand, and what became of each."""
    graph = graph.clone()
    with graph.edit("fold") as editor:
        nodes = [node for node in graph.nodes() if node.op in (SHIFT, MAP, SCALE)]
        return graph, [fold_edit(graph, editor, node) for node in nodes]


def directly(step: Pass, graph: Graph) -> Graph:
    """A copy behind one pass, without the instruments that watch passes."""
    graph = graph.clone()
    step.run(graph, PassContext(text=str(step), name=step.name))
    return graph


def body(graph: Graph) -> str:
    """The canonical text without the passes that ran."""
    return graph.text().split("history {")[0]


def sites(graph: Graph) -> list[str]:
    return [name for name in graph.site_table.anchors if not name.startswith("%")]


def check(graph: Graph, edited: Graph, rule: str, inputs: dict[str, Array]) -> Graph:
    """``edited`` folds by ``rule`` alone, exactly, without a node more than ``graph`` (or one, a bias in ONNX), and back."""
    folded = directly(FoldEdits(), edited)
    assert [record.rule for record in folded.folds] == [rule]
    assert not any(node.op in (SHIFT, MAP, SCALE) for node in folded.nodes())
    assert relative(run(edited, inputs), run(folded, inputs)) < 1e-5
    assert relative(run(graph, inputs), run(folded, inputs)) > 1e-4, "and the edit is one that shows"
    created = sum(change.kind == "created" for record in folded.folds for change in record.changes)
    assert len(folded.nodes()) <= len(graph.nodes()) + (created if graph.dialect == "onnx" else 0)
    folded.verify()
    back = directly(Unfold(), folded)
    assert body(back) == body(edited), "nodes, names, weights bit for bit, and sites"
    assert sites(back) == sites(edited) and back.site_table.removed == edited.site_table.removed
    assert not back.folds
    return folded


CASES = [
    ("llama", "blocks.1.resid_post", SHIFT, "bias"),
    ("llama", "blocks.0.mlp.out", MAP, "writer weights"),
    ("llama", "blocks.0.mlp.out", SCALE, "writer weights"),
    ("llama", "blocks.1.mlp.norm", SCALE, "norm weight"),
    ("llama", "blocks.1.mlp.norm", MAP, "reader weights"),
    ("llama", "model.layers.1.mlp.gate_proj:in", SCALE, "reader weights"),
    ("llama", "embed", SHIFT, "writer weights"),
    ("llama", "embed", MAP, "writer weights"),
    ("gpt2", "blocks.0.resid_mid", SHIFT, "bias"),
    ("gpt2", "blocks.1.mlp.norm", SHIFT, "bias"),
    ("gpt2", "blocks.0.attn.out", MAP, "writer weights"),
    ("gpt2", "blocks.1.mlp.norm", SCALE, "norm weight"),
    ("opt", "blocks.1.resid_post", SHIFT, "bias"),
    ("opt", "blocks.1.mlp.norm", MAP, "reader weights"),
    ("gemma3", "blocks.1.mlp.norm", SCALE, "norm weight"),
    ("gemma3", "blocks.1.mlp.out", SCALE, "norm weight"),
    ("gemma3", "blocks.1.mlp.hidden", MAP, "reader weights"),
    ("bert", "blocks.1.resid_post", SHIFT, "bias"),
    ("bert", "blocks.1.resid_post", SCALE, "norm weight"),
    ("bert", "blocks.0.mlp.out", MAP, "writer weights"),
    ("stories260k", "blocks.2.resid_post", SHIFT, "bias"),
    ("stories260k", "blocks.2.attn.out", MAP, "writer weights"),
]


@pytest.mark.parametrize(("model", "site", "op", "rule"), CASES)
def test_exact_and_back(model: str, site: str, op: str, rule: str, dialect: str) -> None:
    graph = in_dialect(model, dialect)
    check(graph, insert(graph, site, op), rule, zoo.inputs(model))


def test_one_edge_folds_into_its_reader_alone(dialect: str) -> None:
    graph = in_dialect("gpt2", dialect)
    edge = "transformer.h.1.mlp.c_fc:in"
    check(graph, insert(graph, edge, SHIFT), "bias", zoo.inputs("gpt2"))  # the only reader of its norm
    both = in_dialect("llama", dialect)
    folded = check(both, insert(both, "model.layers.0.mlp.up_proj:in", MAP), "reader weights", zoo.inputs("llama"))
    assert folded.folds[0].readers == ("model.layers.0.mlp.up_proj.weight",)
    assert folded.site("model.layers.0.mlp.gate_proj:in").value == folded.site("blocks.0.mlp.norm").value
    with pytest.raises(SiteError, match="removed by fold_edits"):
        folded.site("model.layers.0.mlp.up_proj:in")


class Nets(torch.nn.Module):
    """Convolutions with and without bias, in groups, transposed, and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.plain = torch.nn.Conv2d(8, 8, 1, bias=False)
        self.grouped = torch.nn.Conv2d(8, 8, 3, groups=4)
        self.up = torch.nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.norm = torch.nn.BatchNorm2d(6)
        torch.nn.init.normal_(self.norm.bias)
        self.head = torch.nn.Conv2d(6, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.plain(torch.relu(self.first(x))))
        return self.head(torch.relu(self.norm(torch.relu(self.up(torch.relu(self.grouped(x)))))))


X = {"x": np.random.default_rng(0).normal(0, 1, (2, 3, 6, 6)).astype(np.float32)}
_NETS: dict[str, Graph] = {}


def nets(dialect: str) -> Graph:
    if dialect not in _NETS:
        traced = ag.trace(Nets().eval(), (torch.randn(2, 3, 6, 6),), dynamic={"x": ("batch", None, None, None)})
        _NETS[dialect] = as_dialect(traced, dialect)
    return _NETS[dialect]


@pytest.mark.parametrize(
    ("site", "op", "rule"),
    [
        ("first", SHIFT, "bias"),
        ("first", MAP, "writer weights"),
        ("plain", SHIFT, "bias"),
        ("plain", MAP, "writer weights"),
        ("grouped", SCALE, "writer weights"),
        ("grouped", SHIFT, "bias"),
        ("up", MAP, "writer weights"),
        ("norm", SHIFT, "bias"),
        ("norm", SCALE, "norm weight"),
    ],
)
def test_convolutions(site: str, op: str, rule: str, dialect: str) -> None:
    graph = nets(dialect)
    check(graph, insert(graph, site, op, axis=1), rule, X)


def test_a_map_across_groups_is_declined(dialect: str) -> None:
    graph = insert(nets(dialect), "grouped", MAP, axis=1)
    _, (found,) = fold(graph)
    assert not found.folded and "4 groups" in found.condition


class Odd(torch.nn.Module):
    """Two readers of one weight, a reader without weights, an output in the middle, and readers with biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.twice, self.last = (torch.nn.Linear(6, 6) for _ in range(3))
        self.one, self.other = torch.nn.Linear(6, 5), torch.nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.twice(torch.relu(self.twice(self.first(x))))
        m = torch.relu(self.last(h))
        return torch.tanh(self.one(m) * self.other(m)), h


ROWS = {"x": np.random.default_rng(0).normal(0, 1, (3, 6)).astype(np.float32)}
_ODD: dict[str, Graph] = {}


def odd(dialect: str) -> Graph:
    if dialect not in _ODD:
        _ODD[dialect] = as_dialect(ag.trace(Odd().eval(), (torch.randn(2, 6),), dynamic={"x": ("batch", None)}), dialect)
    return _ODD[dialect]


def test_a_shared_weight_is_untied_for_one_use(dialect: str) -> None:
    graph = odd(dialect)
    shared = next(p for p in graph.parameters() if p.name == "twice.weight")
    before = graph.read(shared).copy()
    edited = insert(graph, "linear.1", MAP)
    folded = check(graph, edited, "writer weights", ROWS)
    assert [change.kind for change in folded.folds[0].changes] == ["untied", "untied"]
    assert np.array_equal(folded.read(folded.value("twice.weight")), before), "the other use keeps the original"


def test_a_shift_between_relu_and_linears_is_in_their_biases(dialect: str) -> None:
    graph = odd(dialect)
    assert "relu" in (graph.site("one:in").value.producer or graph.nodes()[0]).op.lower()
    check(graph, insert(graph, "last", MAP), "writer weights", ROWS)
    relu = f"%{graph.site('one:in').value.name}"
    folded = check(graph, insert(graph, relu, SHIFT), "reader bias", ROWS)
    assert "all readers are linears with biases" in folded.folds[0].condition


def test_an_output_of_the_graph_sees_the_edit(dialect: str) -> None:
    """The value is an output: its writer may carry the map (the output shows it), its reader may not."""
    graph = odd(dialect)
    edited = insert(graph, "linear.2", MAP)
    folded = apply(edited, "fold_edits")
    for a, b in zip(edited.run(ROWS).values(), folded.run(ROWS).values(), strict=True):
        assert relative(a, b) < 1e-5
    assert folded.folds[0].rule == "writer weights"
    _, (found,) = fold(insert(graph, "last:in", SCALE))
    assert found.rule == "reader weights", "one edge: the output keeps what it was"


DECLINED = [
    ("llama", "blocks.1.resid_post", MAP, {}, "is the sum .* and a map of a sum is not one of a summand"),
    ("llama", "blocks.1.mlp.norm", SHIFT, {}, "norm that writes it has no bias; .* has no bias, and one of its own would cost"),
    ("llama", "blocks.1.mlp.act", SHIFT, {}, "which is no linear, norm, convolution or table"),
    ("llama", "blocks.1.mlp.out", SHIFT, {"norm": "restore"}, "norm=restore makes it depend on the activation's norm"),
    ("llama", "model.layers.1.mlp.gate_proj:in", SHIFT, {}, "is also read by .*, which must not see the edit"),
    ("gemma3", "blocks.1.resid_post", SHIFT, {}, "norm that writes it has no bias"),
    ("gemma3", "blocks.1.mlp.out", MAP, {}, "written by a norm, whose weight is one factor per channel and no map"),
    ("gpt2", "embed", SHIFT, {}, "table transformer.wte.weight is read by others"),
]


@pytest.mark.parametrize(("model", "site", "op", "attributes", "reason"), DECLINED)
def test_declined_with_the_condition(
    model: str, site: str, op: str, attributes: dict[str, Any], reason: str, dialect: str
) -> None:
    edited = insert(in_dialect(model, dialect), site, op, **attributes)
    before = edited.content_hash()
    with pytest.raises(PassError, match=f"fold_edits folded nothing: .*{reason}"):
        apply(edited, "fold_edits")
    assert edited.content_hash() == before and not edited.folds


def test_masks_strengths_and_shapes_are_declined(dialect: str) -> None:
    graph = in_dialect("llama", dialect)
    width = 32
    (vector,) = operands(SHIFT, width)
    some = np.ones((1, 1), np.float32)
    for given, reason in (
        ([vector, None, some], "mask"),
        ([vector, some], "strength"),
        ([np.broadcast_to(vector, (1, 8, width)).copy()], "not one number per channel"),
    ):
        _, (found,) = fold(insert(graph, "blocks.0.mlp.out", SHIFT, given))
        assert not found.folded and reason in found.condition
    _, (found,) = fold(insert(graph, "blocks.0.mlp.out", SCALE, [np.float32(1.5)]))
    assert found.folded, "one number for all channels"


def test_experts_decline(dialect: str) -> None:
    _, (found,) = fold(insert(in_dialect("mixtral", dialect), "blocks.0.mlp.out", MAP))
    assert not found.folded and "is no linear" in found.condition


def test_quantized_weights_decline_a_map_and_take_a_bias(dialect: str) -> None:
    quantized = apply(in_dialect("gpt2", dialect), "quantize")
    site = "blocks.0.mlp.out"
    _, (found,) = fold(insert(quantized, site, MAP))
    assert not found.folded and "is quantized" in found.condition
    edited = insert(quantized, site, SHIFT)
    folded, (found,) = fold(edited)
    assert found.rule == "bias"
    assert relative(run(edited, zoo.inputs("gpt2")), run(folded, zoo.inputs("gpt2"))) < 1e-5


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_half_precision_says_how_it_rounds(dtype: str) -> None:
    graph = apply(zoo.captured("gpt2"), f"cast{{dtype={dtype}}}")
    stored = graph.site("blocks.0.mlp.out").type.dtype
    assert stored is not None and stored.value == dtype
    edited = insert(graph, "blocks.0.mlp.out", MAP, [array.astype(stored.numpy) for array in operands(MAP, 32)])
    folded, (found,) = fold(edited)
    assert found.folded and f"is {dtype}: each number is rounded once more" in found.condition
    assert body(apply(folded, "unfold")) == body(edited)


@pytest.mark.parametrize("ending", [".pt2", ".onnx"])
@pytest.mark.parametrize(
    ("site", "op"), [("blocks.1.resid_post", SHIFT), ("blocks.1.mlp.norm", MAP), ("blocks.0.mlp.out", SCALE)]
)
def test_a_file_unfolds(tmp_path: Path, dialect: str, ending: str, site: str, op: str) -> None:
    if dialect == "onnx" and ending == ".pt2":
        pytest.skip("ONNX graphs are saved as ONNX")
    inputs = zoo.inputs("gpt2")
    edited = insert(in_dialect("gpt2", dialect), site, op)
    folded = apply(edited, "fold_edits")
    folded.save(tmp_path / f"folded{ending}")
    edited.save(tmp_path / f"edited{ending}")
    loaded = ag.load(str(tmp_path / f"folded{ending}"))
    assert [f.rule for f in loaded.folds] == [f.rule for f in folded.folds]
    back = apply(loaded, "unfold")
    expected = ag.load(str(tmp_path / f"edited{ending}"))
    assert np.array_equal(run(back, inputs), run(expected, inputs))
    for parameter in expected.parameters():
        assert np.array_equal(back.read(back.value(parameter.name)), expected.read(parameter))
    lost = set(sites(expected)) - set(sites(back))
    if (dialect, ending) == ("fx", ".onnx"):  # exported while folded: copies that only a lost edge needed are gone
        assert all(name.endswith("dropout:in") for name in lost)
    else:
        assert not lost and body(back) == body(expected)


def test_two_folds_in_one_weight_come_out_in_reverse(dialect: str) -> None:
    graph = in_dialect("gpt2", dialect)
    site = "blocks.0.mlp.out"
    edited = insert(insert(graph, site, MAP), site, SCALE, seed=1)
    folded = apply(edited, "fold_edits")
    assert [f.op for f in folded.folds] == [MAP, SCALE]
    inputs = zoo.inputs("gpt2")
    assert relative(run(edited, inputs), run(folded, inputs)) < 1e-5
    assert body(apply(folded, "unfold")) == body(edited)
    with folded.edit("test") as editor:  # the lower one alone cannot be taken out
        assert "was changed since" in unfold_edit(folded, editor, folded.folds[0])
    assert len(folded.folds) == 2


def test_a_weight_changed_since_is_declined(dialect: str) -> None:
    graph = in_dialect("gpt2", dialect)
    folded = apply(insert(graph, "blocks.0.mlp.out", MAP), "fold_edits")
    with folded.edit("later") as editor:
        weight = folded.value("transformer.h.0.mlp.c_proj.weight")
        editor.set_parameter(weight, folded.read(weight) * np.float32(1.5))
    with pytest.raises(PassError, match=r"transformer\.h\.0\.mlp\.c_proj\.weight that holds it was changed since"):
        apply(folded, "unfold")
    with pytest.raises(PassError, match="nothing was folded in this graph"):
        apply(graph, "unfold")
    with pytest.raises(PassError, match="nothing was folded at"):
        apply(folded, "unfold{site=blocks.7.mlp.out}")


def test_later_edits_stay_where_they_are(dialect: str) -> None:
    """An edit made after folding reads the folded value; after unfolding it reads the edit that came out."""
    graph = in_dialect("gpt2", dialect)
    inputs = zoo.inputs("gpt2")
    site = "blocks.1.resid_post"
    folded = apply(insert(graph, site, SHIFT), "fold_edits")
    later = insert(folded, site, MAP)
    back = apply(later, "unfold")
    assert relative(run(later, inputs), run(back, inputs)) < 1e-5
    assert relative(run(folded, inputs), run(back, inputs)) > 1e-4
    expected = insert(insert(graph, site, SHIFT), site, MAP)
    assert np.array_equal(run(expected, inputs), run(back, inputs))


def test_steer_and_ablate_fold_by_the_same_mechanism(stories: Graph) -> None:
    vector = "[" + ", ".join(map(str, np.linspace(-1, 1, 64).tolist())) + "]"
    plan = f"steer{{vector={vector} site=blocks.1.resid_post}}, ablate{{direction={vector} site=blocks.3.attn.out}}"
    folded = apply(stories, plan)
    assert [(f.site, f.rule) for f in folded.folds] == [
        ("blocks.1.resid_post", "bias"),
        ("blocks.3.attn.out", "writer weights"),
    ]
    kept = apply(stories, plan.replace("resid_post", "resid_post fold=false").replace("attn.out", "attn.out fold=false"))
    assert relative(run(kept), run(folded)) < 1e-5
    assert body(apply(folded, "unfold")) == body(kept)
    one = apply(folded, "unfold{site='*.attn.out'}")
    assert [f.site for f in one.folds] == ["blocks.1.resid_post"]
    assert body(apply(one, "fold_edits")) == body(folded)


def test_the_report_has_a_row_for_every_edit(dialect: str) -> None:
    graph = insert(in_dialect("gpt2", dialect), "blocks.0.mlp.out", SHIFT)
    graph = insert(insert(graph, "blocks.0.mlp.out", SHIFT, seed=1), "blocks.1.resid_post", MAP)
    done = ag.run(graph, "fold_edits")
    (row,) = done.report.rows
    assert [(each["site"], each["rule"]) for each in row.details] == [
        ("blocks.0.mlp.out", "merged"),
        ("blocks.0.mlp.out", "bias"),
        ("blocks.1.resid_post", "declined"),
    ]
    assert all(each["condition"] for each in row.details)
    assert relative(run(graph, zoo.inputs("gpt2")), run(done.graph, zoo.inputs("gpt2"))) < 1e-5
    for nothing in ("{site=blocks.0.attn.out}", "{ignore=['blocks.*']}"):
        with pytest.raises(PassError, match="found no edit"):
            apply(graph, f"fold_edits{nothing}")
    chosen = apply(graph, "fold_edits{ignore=blocks.1.resid_post}")
    assert [f.site for f in chosen.folds] == ["blocks.0.mlp.out"]
    assert body(apply(graph, "fold_edits{site=blocks.0.mlp.out}")) == body(chosen)


@pytest.mark.parametrize("op", [SHIFT, MAP, SCALE])
@pytest.mark.parametrize("clause", ["", "same", "other"])
def test_merging(op: str, clause: str, dialect: str) -> None:
    from actgraph.graph.where_mask import where_mask

    graph = in_dialect("gpt2", dialect).clone()
    inputs = zoo.inputs("gpt2")
    with graph.edit("by_hand") as editor:
        for seed, tokens in ((0, "2:"), (1, "2:" if clause == "same" else "3:")):
            mask = where_mask(editor, graph, tokens) if clause else None
            given = [*operands(op, 32, seed), *([None] if op == SHIFT else []), mask]
            editor.insert_at(graph.site("blocks.0.resid_post"), op, given if clause else operands(op, 32, seed))
    merged = graph.clone()
    with merged.edit("merge") as editor:
        last = [node for node in merged.nodes() if node.op == op][-1]
        found = merge_edits(merged, editor, last)
    assert (found is None) == (clause == "other")
    assert sum(node.op == op for node in merged.nodes()) == (2 if clause == "other" else 1)
    assert relative(run(graph, inputs), run(merged, inputs)) < 1e-5
    merged.verify()


@pytest.mark.parametrize("fault", ["sign", "transpose", "layer", "bias"])
def test_a_wrong_fold_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check that accepts right folds refuses a sign, an orientation, a place or a bias that is wrong."""
    from actgraph.passes.steer import targets
    from actgraph.passes.steer.edits import Edit

    right = Edit.lowrank_on

    def wrong(self: Edit, data: Array, axis: int, *, reader: bool = False) -> tuple[Array, Array]:
        coordinates, directions = right(self, data, axis, reader=reader != (fault == "transpose"))
        if fault == "bias" and data.ndim == 1:
            return coordinates * 0, directions
        return (-coordinates if fault == "sign" else coordinates), directions

    monkeypatch.setattr(Edit, "lowrank_on", wrong)
    if fault == "layer":
        monkeypatch.setattr(Edit, "lowrank_on", right)
        monkeypatch.setattr(targets.Write, "make", _elsewhere(targets.Write.make))
    graph = in_dialect("gpt2", "fx")
    edited = insert(graph, "blocks.0.mlp.out", MAP)
    folded, (found,) = fold(edited)
    assert found.folded
    assert relative(run(edited, zoo.inputs("gpt2")), run(folded, zoo.inputs("gpt2"))) > 1e-3


def _elsewhere(make: Any) -> Any:
    def wrong(self: Any, editor: Any) -> WeightChange:
        if self.kind == "lowrank":
            graph = self.stored.graph
            other = graph.value("transformer.h.1.mlp.c_proj.weight")
            self = dataclasses.replace(self, stored=other, uses=list(other.uses))
        return make(self, editor)  # type: ignore[no-any-return]

    return wrong


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_changes_come_back_bit_for_bit(dtype: str) -> None:
    """Also where a factor is 0, where nothing is left of a weight, and with signed zeros; and the record is small."""
    rng = np.random.default_rng(0)
    before = rng.normal(0, 1, (96, 64)).astype(dtype)
    before[0, :4] = [0.0, -0.0, 1e-7, 1]
    factor = rng.normal(1, 0.3, 96)
    factor[5] = 0
    scaled = scale_along(before, 0, factor)
    change = WeightChange("w", "scale", "", axis=0, arrays={"factor": factor}).repaired(before, scaled)
    assert change.undone(scaled).tobytes() == before.tobytes()
    assert change.nbytes < before.nbytes / 4
    unit = rng.normal(0, 1, 96)
    unit /= np.linalg.norm(unit)
    coordinates, directions = -(before.T.astype(np.float64) @ unit)[:, None], unit[None]
    mapped = add_lowrank(before, 0, coordinates, directions)
    assert np.abs(unit @ mapped.astype(np.float64)).max() < (1e-5 if dtype == "float32" else 2e-2)
    arrays = {"coordinates": coordinates, "directions": directions}
    change = WeightChange("w", "lowrank", "", axis=0, arrays=arrays).repaired(before, mapped)
    again = WeightChange.from_dict(change.to_dict())
    assert again.undone(mapped).tobytes() == before.tobytes()
    assert "patch" in change.arrays, "the factors alone do not bring every bit back"


def test_a_record_is_data(dialect: str) -> None:
    """It survives JSON, and names what the reader of a file wants to know."""
    import json

    folded = apply(insert(in_dialect("gpt2", dialect), "blocks.1.mlp.norm", MAP), "fold_edits")
    (record,) = folded.folds
    again = FoldRecord.from_dict(json.loads(json.dumps(record.to_dict())))
    assert json.dumps(again.to_dict()) == json.dumps(record.to_dict())
    assert folded.clone().folds == folded.folds


def test_inspect_tells_what_is_folded() -> None:
    from actgraph.cli.inspect import describe

    folded = apply(insert(in_dialect("gpt2", "onnx"), "blocks.1.mlp.norm", MAP), "fold_edits")
    (row,) = describe(folded)["folds"]
    assert (row["site"], row["rule"]) == ("blocks.1.mlp.norm", "reader weights")
    assert "all readers are linears" in row["condition"] and row["bytes"] > 0
