"""Steering whose strength, vector or choice is given with each call: a row of the batch is what it would be alone."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.errors import InputError, OptionError, PassError
from actgraph.graph import Graph
from actgraph.graph.graph import Array
from tests import zoo
from tests.passes.conftest import as_dialect, in_dialect

SITES = ("blocks.0.resid_post", "blocks.1.mlp.out")
FIRST, SECOND = np.random.default_rng(5).normal(0, 0.5, (2, zoo.WIDTH)).astype(np.float32)
LENGTH = 8


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("vectors")
    both = {"first": FIRST, "second": SECOND}
    made = [str(ag.SteeringVector({"": vector}).save(folder / f"{name}.safetensors")) for name, vector in both.items()]
    return made[0], made[1]


def steered(graph: Graph, **options: object) -> Graph:
    texts = {name: "[" + ", ".join(map(str, o)) + "]" if isinstance(o, tuple) else str(o) for name, o in options.items()}
    texts = {"site": "[" + ", ".join(SITES) + "]", "fold": "false"} | texts
    return ag.run(graph, f"steer{{{' '.join(f'{name}={text}' for name, text in texts.items())}}}", parity="none").graph


@functools.cache
def inputs(batch: int = 3, padded: bool = False) -> dict[str, Array]:
    made = zoo.inputs("llama", batch=batch, length=LENGTH)
    if padded:
        counts = [LENGTH, 5, 2][:batch]
        made["attention_mask"] = np.stack([np.r_[np.zeros(LENGTH - n, np.int64), np.ones(n, np.int64)] for n in counts])
        made["position_ids"] = np.maximum(made["attention_mask"].cumsum(1) - 1, 0)
    return made


def row(given: dict[str, Array], number: int) -> dict[str, Array]:
    return {name: array[number : number + 1] for name, array in given.items()}


def logits(graph: Graph, given: dict[str, Array], **more: object) -> Array:
    named = {name.replace("__", "."): np.asarray(value) for name, value in more.items()}
    return graph.run({**given, **named})["logits"]


def numbers(*values: float) -> Array:
    return np.array(values, np.float32)


@pytest.mark.parametrize("norm", ["none", "restore", "relative"])
def test_strength(dialect: str, norm: str, files: tuple[str, str]) -> None:
    base, given = in_dialect("llama", dialect), inputs()
    made = steered(base, vector=files[0], scale="input", norm=norm)
    made.verify()
    assert made.default("steer.scale") is not None and "steer.scale" not in ag.sample_inputs(made)
    plain = base.run(given)["logits"]
    assert np.array_equal(made.run(given)["logits"], plain)
    each = [0.7, 0.0, -1.5]
    together = logits(made, given, steer__scale=numbers(*each))
    assert np.array_equal(together[1], plain[1])
    for number, scale in enumerate(each):
        alone = logits(made, row(given, number), steer__scale=numbers(scale))
        constant = steered(base, vector=files[0], scale=scale, norm=norm).run(row(given, number))["logits"]
        np.testing.assert_allclose(alone, constant, rtol=0, atol=1e-6 * np.abs(constant).max())
        np.testing.assert_allclose(together[number], alone[0], rtol=0, atol=2e-6 * np.abs(alone).max())
    one = logits(made, given, steer__scale=numbers(0.7))  # for all rows
    assert np.array_equal(one, logits(made, given, steer__scale=numbers(0.7, 0.7, 0.7)))
    assert np.abs(one - plain).max() > 0.01 and not np.allclose(together[2], one[2], atol=0.01)


@pytest.mark.parametrize("norm", ["none", "restore", "relative"])
def test_vectors(dialect: str, norm: str, files: tuple[str, str]) -> None:
    """A given vector is that of a file; rows of zeros are no edit, bit for bit, whatever happens to norms."""
    base, given = in_dialect("llama", dialect), inputs()
    made = steered(base, vector="input", scale=0.8, norm=norm)
    plain = base.run(given)["logits"]
    assert np.array_equal(made.run(given)["logits"], plain)
    names = [f"steer.vector.{site}" for site in SITES]
    assert [v.name for v in made.inputs() if v.name.startswith("steer.")] == names
    rows = np.stack([FIRST, 0 * FIRST, SECOND])
    together = made.run({**given, **dict.fromkeys(names, rows)})["logits"]
    assert np.array_equal(together[1], plain[1])
    for number, file in ((0, files[0]), (2, files[1])):
        wanted = steered(base, vector=file, scale=0.8, norm=norm).run(row(given, number))["logits"]
        np.testing.assert_allclose(together[number], wanted[0], rtol=0, atol=2e-6 * np.abs(wanted).max())
    half = made.run({**given, names[0]: FIRST[None]})["logits"]  # one vector for all rows, at one site
    wanted = steered(base, vector=files[0], scale=0.8, norm=norm, site=SITES[0]).run(given)["logits"]
    np.testing.assert_allclose(half, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())
    both = steered(base, vector="input", scale="input", norm=norm)
    assert np.array_equal(both.run({**given, **dict.fromkeys(names, rows)})["logits"], plain)  # at strength 0
    scaled = both.run({**given, **dict.fromkeys(names, rows), "steer.scale": numbers(0.8)})["logits"]
    np.testing.assert_allclose(scaled[[0, 2]], together[[0, 2]], rtol=0, atol=2e-6 * np.abs(together).max())


def test_an_edit_that_is_off_keeps_zeros_infinities_and_the_smallest(dialect: str) -> None:
    graph = as_dialect(
        ag.trace(Doubled(), (torch.ones(2, 3, 4),), dynamic={"x": ("batch", "seq", None)}, name="doubled"), dialect
    )
    odd = np.array([[[-0.0, 0.0, np.inf, -np.inf], [1e-30, -1e-30, 1e-12, 3e38], [np.nan, -1, -0.0, 2]]], np.float32)
    x = np.repeat(odd / 2, 2, 0)
    site = "%" + graph.nodes()[-1].outputs[0].name
    for norm in ("none", "restore", "relative"):
        for options in (f"vector=input scale=-2 norm={norm}", f"vector=[1.0, 2.0, 3.0, 4.0] scale=input norm={norm}"):
            made = ag.run(graph, f"steer{{site={site} {options}}}", parity="none").graph
            name = made.inputs()[1].name
            plain, off = (next(iter(g.run({"x": x}).values())) for g in (graph, made))
            assert off.tobytes() == plain.tobytes()
            on = np.ones((2, *made.default(name).shape[1:]), np.float32)
            on[0] = 0
            result = next(iter(made.run({"x": x, name: on}).values()))
            assert result[0].tobytes() == plain[0].tobytes() and result[1].tobytes() != plain[1].tobytes()


class Doubled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x


@pytest.mark.parametrize("norm", ["none", "relative"])
def test_each_row_picks_its_vector(dialect: str, norm: str, files: tuple[str, str]) -> None:
    base, given = in_dialect("llama", dialect), inputs(padded=True)
    made = steered(base, vector=files, scale=(0.8, -1.2), pick="row", norm=norm)
    plain = base.run(given)["logits"]
    assert np.array_equal(made.run(given)["logits"], plain)
    together = logits(made, given, steer__index=np.array([2, 0, 1]))
    assert np.array_equal(together[1], plain[1])
    for number, (file, scale) in {0: (files[1], -1.2), 2: (files[0], 0.8)}.items():
        alone = steered(base, vector=file, scale=scale, norm=norm).run(row(given, number))["logits"]
        real = given["attention_mask"][number] == 1
        np.testing.assert_allclose(together[number][real], alone[0][real], rtol=0, atol=2e-6 * np.abs(alone).max())
    strong = steered(base, vector=files, scale="input", pick="row", norm=norm)
    scaled = logits(strong, given, steer__index=np.array([2, 0, 1]), steer__scale=numbers(-1.2, 5, 0.8))
    np.testing.assert_allclose(scaled, together, rtol=0, atol=2e-6 * np.abs(together).max())
    assert np.array_equal(logits(strong, given, steer__index=np.array([1])), plain)  # at strength 0
    with pytest.raises((InputError, IndexError, RuntimeError)):
        logits(made, given, steer__index=np.array([3, 0, 0]))


@pytest.mark.parametrize("kind", ["scale", "vector", "pick"])
def test_with_clauses(dialect: str, kind: str, files: tuple[str, str]) -> None:
    """Exactly the tokens of the clause, seen at the site itself; others bit for bit."""
    base, given = in_dialect("llama", dialect), inputs(padded=True)
    options, more = given_ways(files)[kind]
    tap = f"tap{{site={SITES[0]}}}"
    made = ag.run(steered(base, site=SITES[0], where='"2: ! row(1)"', **options), tap, parity="none").graph
    before = ag.run(base, tap, parity="none").graph.run(given)[SITES[0]]
    after = made.run({**given, "row_index": np.arange(3), **more})[SITES[0]]
    named = (given["position_ids"] >= 2) & (given["attention_mask"] == 1)
    named[1] = False
    assert named.any() and np.array_equal(after[~named], before[~named])
    np.testing.assert_allclose(after[named], before[named] + FIRST, rtol=0, atol=1e-5)


def given_ways(files: tuple[str, str], site: str = SITES[0]) -> dict[str, tuple[dict[str, object], dict[str, Array]]]:
    """The first vector, at strength 1, in three ways: the options, and the inputs."""
    return {
        "scale": ({"vector": files[0], "scale": "input"}, {"steer.scale": numbers(1)}),
        "vector": ({"vector": "input"}, {f"steer.vector.{site}": FIRST[None]}),
        "pick": ({"vector": (files[1], files[0]), "pick": "row"}, {"steer.index": np.array([2])}),
    }


@pytest.mark.parametrize("kind", ["scale", "vector", "pick"])
def test_saved_and_inlined(kind: str, files: tuple[str, str], tmp_path: Path) -> None:
    """Files have the inputs, with their defaults: stock onnxruntime runs them with and without."""
    import onnxruntime as ort

    base, given = zoo.captured("llama"), inputs()
    options, more = given_ways(files)[kind]
    made = steered(base, site=SITES[0], **options)
    plain, wanted = base.run(given)["logits"], made.run({**given, **more})["logits"]
    for inline in ("none", "all"):
        path = made.save(tmp_path / f"{inline}.onnx", inline=inline)
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        assert [v.name for v in session.get_overridable_initializers()] == list(more)
        off, on = session.run(["logits"], given)[0], session.run(["logits"], {**given, **more})[0]
        np.testing.assert_allclose(off, plain, rtol=0, atol=1e-5)
        np.testing.assert_allclose(on, wanted, rtol=0, atol=1e-5)
        again = ag.load(path)
        assert list(more) == [v.name for v in again.inputs() if again.default(v.name) is not None]
        np.testing.assert_allclose(again.run({**given, **more})["logits"], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "order"), [("scale", "before"), ("pick", "before"), ("vector", "after")])
def test_with_a_cache(dialect: str, kind: str, order: str, files: tuple[str, str]) -> None:
    """Every graph of the program has the inputs; sessions say what calls without a cache say."""
    base, given = in_dialect("llama", dialect), inputs()
    options, more = given_ways(files)[kind]
    text = " ".join(f"{k}={'[' + ', '.join(v) + ']' if isinstance(v, tuple) else v}" for k, v in options.items())
    passes = [f"steer{{site={SITES[0]} fold=false where=1: {text}}}", "kv_cache"]
    program = ag.run(base, ", ".join(passes if order == "before" else passes[::-1]), parity="none").program
    assert all(set(more) < {v.name for v in graph.inputs()} for graph in program)
    assert len(program) == 2
    whole = ag.run(base, passes[0], parity="none").graph
    for values in ({}, more):
        wanted = whole.run({**given, **values})["logits"]
        session = ag.compile(program).session(3, inputs=values)
        found = session.feed(given["input_ids"][:, :5])["logits"][:, -1:]
        steps = [session.feed(given["input_ids"][:, at : at + 1])["logits"] for at in range(5, LENGTH)]
        np.testing.assert_allclose(np.concatenate([found, *steps], 1), wanted[:, 4:], rtol=0, atol=2e-5)


class Convolution(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_images(dialect: str) -> None:
    """Sites of [batch, channels, height, width]; one of another rank shares the strength."""
    traced = ag.trace(
        Convolution().eval(), (torch.ones(2, 3, 5, 6),), dynamic={"x": ("batch", None, None, None)}, name="images"
    )
    graph, x = as_dialect(traced, dialect), np.random.default_rng(0).normal(size=(3, 3, 5, 6)).astype(np.float32)
    vector = [0.5, -1.0, 2.0, 0.25]
    tanh = next(node.outputs[0] for node in graph.nodes() if node.prim is not None and node.prim.op == "tanh")
    for options, name, values in (
        (f"vector={vector} scale=input", "steer.scale", numbers(0, 1, -2)),
        ("vector=input", f"steer.vector.%{tanh.name}", np.outer([0, 1, -2], vector).astype(np.float32)),
    ):
        made = ag.run(graph, f"steer{{site=%{tanh.name} axis=1 fold=false {options}}}", parity="none").graph
        plain, off = (next(iter(g.run({"x": x}).values())) for g in (graph, made))
        assert np.array_equal(off, plain)
        name = next(v.name for v in made.inputs() if v.name.startswith("steer."))
        found = next(iter(made.run({"x": x, name: values}).values()))
        weight = next(p for p in graph.parameters() if p.shape == (2, 4, 1, 1))
        moved = graph.read(weight)[:, :, 0, 0] @ np.asarray(vector, np.float32)
        wanted = plain + np.multiply.outer(numbers(0, 1, -2), moved)[:, :, None, None]
        assert np.array_equal(found[0], plain[0])
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


class Flat(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x.reshape(-1, 4)).reshape(x.shape)


def test_a_site_without_rows_is_declined(dialect: str) -> None:
    dynamic = {"x": ("batch", "seq", None)}
    graph = as_dialect(ag.trace(Flat(), (torch.ones(2, 3, 4),), dynamic=dynamic, name="flat"), dialect)
    tanh = next(node.outputs[0] for node in graph.nodes() if node.prim is not None and node.prim.op == "tanh")
    for options in ("vector=[1.0, 2.0, 3.0, 4.0] scale=input", "vector=input"):
        with pytest.raises(PassError, match=r"for each row of the batch \(batch\), which is not the first axis of \["):
            ag.run(graph, f"steer{{site=%{tanh.name} {options}}}")


def test_two_edits_have_inputs_of_their_own(dialect: str, files: tuple[str, str]) -> None:
    base, given = in_dialect("llama", dialect), inputs()
    once = steered(base, vector=files[0], scale="input")
    twice = steered(once, vector=files[1], scale="input")
    assert [v.name for v in twice.inputs() if v.name.startswith("steer.")] == ["steer.scale", "steer.scale_1"]
    first = logits(once, given, steer__scale=numbers(1))
    assert np.array_equal(logits(twice, given, steer__scale=numbers(1)), first)
    second = steered(base, vector=files[1], scale=0.5).run(given)["logits"]
    np.testing.assert_allclose(logits(twice, given, steer__scale_1=numbers(0.5)), second, rtol=0, atol=1e-5)


def test_in_half_precision(files: tuple[str, str]) -> None:
    """Strengths and vectors stay float32 beside activations of float16."""
    base, given = ag.run(zoo.captured("llama"), "cast{dtype=f16}", parity="none").graph, inputs()
    plain = base.run(given)["logits"]
    for options, more in given_ways(files).values():
        made = steered(base, site=SITES[0], **options)
        assert np.array_equal(made.run(given)["logits"], plain)
        wanted = steered(base, site=SITES[0], vector=files[0]).run(given)["logits"].astype(np.float32)
        found = made.run({**given, **more})["logits"].astype(np.float32)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-2 * np.abs(wanted).max())
        assert np.abs(found - plain).max() > 0.05 * np.abs(plain).max()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"vector": "input", "pick": "row"}, "pick=row needs vectors"),
        ({"vector": (1.0, 2.0), "pick": "row"}, "pick=row needs vectors"),
        ({"vector": "input", "scale": (1.0, 2.0)}, "there are 0 vectors and 2 scales"),
        ({"vector": ("a", "b"), "scale": (1.0,)}, "there are 2 vectors and 1 scales"),
        ({"vector": "input", "scale": "inputs"}, "scale"),
        ({"vector": "inputs"}, "there is no steering vector inputs"),
        ({"vector": "input", "scale": "nan"}, "finite"),
    ],
)
def test_bad_options(options: dict[str, object], why: str) -> None:
    with pytest.raises((OptionError, InputError), match=why):
        steered(zoo.captured("llama"), **options)


def test_bad_inputs(dialect: str, files: tuple[str, str]) -> None:
    made, given = steered(in_dialect("llama", dialect), vector=files[0], scale="input"), inputs()
    for value, why in ((numbers(1, 2), r"shape \[2\], the graph takes f32\[batch\]"), (np.ones(3), "float64"), (1, "int64")):
        with pytest.raises(InputError, match=why):
            logits(made, given, steer__scale=value)


def test_each_new_input_is_named_in_the_report() -> None:
    """Also where a name was taken, and the input got a number."""
    vector = "[" + " ".join(["1.0,"] * (zoo.WIDTH - 1)) + " 1.0]"
    steps = ", ".join(f"steer{{vector={vector} site=blocks.{n}.resid_post scale=input}}" for n in (0, 1))
    report = ag.run(zoo.captured("llama"), steps).report
    said = [[message for message in row.messages if "new optional input" in message] for row in report]
    assert [len(each) for each in said] == [1, 1] and "steer.scale " in said[0][0] and "steer.scale_1 " in said[1][0]
