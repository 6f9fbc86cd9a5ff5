"""Guiding Giants: controllers in the graph against the paper's loop of hooks, and trained ones on what they tell apart."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import actgraph as ag
from actgraph.calibrate.document_rows import collect_rows
from actgraph.errors import InputError, OptionError, PassError, SiteError
from actgraph.formats.artifacts import Artifact
from actgraph.formats.vectors import model_fingerprint
from actgraph.graph import Graph, Value
from actgraph.graph.graph import Array
from actgraph.graph.prims import Prim
from actgraph.passes.cache.kv_cache import KeyValueCache
from actgraph.passes.steer.guiding_giants import Controller
from actgraph.passes.steer.train_controller import embedding_direction, train_controller
from tests import zoo
from tests.passes.conftest import as_dialect, in_dialect

FIRST, SECOND = "blocks.0.resid_post", "blocks.1.resid_post"
BLOCKS = {"llama": "model.layers.{}", "gpt2": "transformer.h.{}", "stories260k": "model.layers.{}"}
PROMPTS = [[5, 17, 3, 80, 41, 9], [22, 7, 64], [33]]


def random_controller(
    inputs: Sequence[str], layers: Sequence[str], width: int = zoo.WIDTH, seed: int = 0, model: str = ""
) -> Controller:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Array:
        return (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)

    direction = draw(width)
    return Controller(
        tuple(inputs), tuple(layers), draw(24, width * len(inputs)) * 3, draw(24), draw(1 + len(layers), 24) * 3,
        draw(1 + len(layers)), direction / np.linalg.norm(direction), model,
    )  # fmt: skip


def guided(graph: Any, controller: Controller, folder: Path, options: str = "", **more: Any) -> ag.RunResult:
    path = controller.save(folder / "c.safetensors")
    return ag.run(graph, f"guiding_giants{{controller={path} {options}}}", **({"parity": "none", "reproducer": False} | more))


def the_papers_loop(
    name: str, controller: Controller, prompt: list[int], following: list[int], gate: Any = "raw", eta: float = 4.0
) -> Array:
    """Logits behind the prompt and each following token: transformers with its cache, patched at [:, -1] of every call."""
    model, seen, handles = zoo.model(name), {}, []
    numbers = sorted({int(site.split(".")[1]) for site in (*controller.inputs, *controller.layers)})

    def hook(number: int, _: Any, __: Any, output: Any) -> Any:
        h = output if isinstance(output, torch.Tensor) else output[0]
        site = f"blocks.{number}.resid_post"
        seen[site] = h[:, -1].numpy().copy()
        if site in controller.layers:
            dose = controller.doses(seen, gate)[:, controller.layers.index(site)]
            h = h.clone()
            h[:, -1] += torch.from_numpy(dose[:, None] * np.float32(eta) * controller.direction)
        return h if isinstance(output, torch.Tensor) else (h, *output[1:])

    for number in numbers:
        block = model.get_submodule(BLOCKS[name].format(number))
        handles.append(block.register_forward_hook(functools.partial(hook, number)))
    try:
        with torch.no_grad():
            out = model(torch.tensor([prompt]), use_cache=True)
            rows = [out.logits[0, -1].numpy()]
            for token in following:
                out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
                rows.append(out.logits[0, -1].numpy())
    finally:
        for handle in handles:
            handle.remove()
    return np.stack(rows)


def tokens(rows: list[list[int]], lengths: list[int]) -> dict[str, Array]:
    """Rows padded on the left, with the number of prompt tokens of each."""
    longest = max(map(len, rows))
    mask = np.array([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    ids = np.array([[0] * (longest - len(row)) + row for row in rows])
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "prompt_lengths": np.array(lengths)}


# --- the graph ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize(("model", "inputs", "layers"), [
    ("llama", [FIRST], [FIRST, SECOND]), ("gpt2", [FIRST, SECOND], [SECOND]), ("gpt2", [FIRST], [SECOND]),
])  # fmt: skip
def test_the_graph_is_the_papers_loop(model: str, inputs: list[str], layers: list[str], dialect: str, tmp_path: Path) -> None:
    """Whole padded batches without a cache give the logits of the loop, which patches the newest token of each call."""
    graph, controller = in_dialect(model, dialect), random_controller(inputs, layers)
    following = np.random.default_rng(5).integers(1, zoo.VOCAB, (len(PROMPTS), 5)).tolist()
    batch = tokens([p + f for p, f in zip(PROMPTS, following, strict=True)], [len(p) for p in PROMPTS])
    plain = graph.run({name: batch[name] for name in list(batch)[:3]})["logits"]
    for gate in ("raw", "sigmoid", "relu"):
        found = guided(graph, controller, tmp_path, f"gate={gate}").graph.run(batch)["logits"]
        for row, prompt in enumerate(PROMPTS):
            expected = the_papers_loop(model, controller, prompt, following[row], gate)
            np.testing.assert_allclose(
                found[row, -6:], expected, atol=3e-5 * np.abs(expected).max(), err_msg=f"{gate}, row {row}"
            )
            if gate == "raw":
                assert np.abs(plain[row, -6:] - expected).max() > 0.05 * np.abs(expected).max()
                wrong = guided(graph, random_controller(inputs, layers, seed=1), tmp_path).graph.run(batch)["logits"]
                assert np.abs(wrong[row, -6:] - expected).max() > 0.05 * np.abs(expected).max()


def test_at_the_site_itself(tmp_path: Path) -> None:
    """The named tokens move by ``gate(s) w eta d``, the others are as they were, bit for bit."""
    graph, controller = zoo.captured("llama"), random_controller([FIRST], [FIRST, SECOND], seed=1)
    inputs = tokens([[5, 17, 3, 80, 41, 9, 11]], [4])
    own = {name: inputs[name] for name in list(inputs)[:3]}
    tap = f"tap{{site={FIRST}}}"
    before = ag.run(graph, tap).graph.run(own)[FIRST]
    for gate, eta in (("raw", 4.0), ("relu", -1.5), ("sigmoid", 0.5)):
        made = ag.run(guided(graph, controller, tmp_path, f"gate={gate} eta={eta}").graph, tap).graph
        after = made.run(inputs)[FIRST]
        dose = controller.doses({FIRST: before}, gate)[..., 0]  # type: ignore[arg-type]
        assert np.array_equal(after[:, :3], before[:, :3]) and np.abs(after[:, 3:] - before[:, 3:]).max() > 0.1
        assert gate != "relu" or np.array_equal((after != before).any(-1)[0, 3:], controller({FIRST: before})[0][0, 3:] > 0)
        np.testing.assert_allclose(after[:, 3:], (before + dose[..., None] * eta * controller.direction)[:, 3:], atol=2e-5)
    every = ag.run(guided(graph, controller, tmp_path, "where=all").graph, tap).graph.run(own)[FIRST]
    assert (every != before).any(-1).all()


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_blocks_before_an_input_are_declined(dialect: str, tmp_path: Path) -> None:
    """The paper's settings: the last four blocks are read, all are to be patched, and only the last can be."""
    graph = in_dialect("stories260k", dialect)
    sites = [f"blocks.{i}.resid_post" for i in range(5)]
    controller = random_controller(sites[1:], sites, width=64)
    result = guided(graph, controller, tmp_path)
    row = result.report[0]
    assert row.counts == {"inserted": 1} and [d.site for d in row.declined] == sites[:4]
    assert "the controller reads blocks.1.resid_post, which depends on it" in row.declined[0].reason
    assert "the controller reads blocks.4.resid_post, which depends on it" in row.declined[3].reason
    assert any("1 of 5 blocks are patched" in message for message in row.messages)
    result.graph.verify()
    assert len([node for node in result.graph.nodes() if node.op == "actgraph.shift"]) == 1
    with pytest.raises(PassError, match=r"changed nothing: blocks\.2\.resid_post: the controller reads blocks\.3"):
        guided(graph, controller, tmp_path, "site=blocks.2.resid_post")
    early = guided(graph, random_controller(sites[:1], sites, width=64), tmp_path)
    assert early.report[0].counts == {"inserted": 5} and not early.report[0].declined
    dense = [p for node in early.graph.nodes() if (p := node.prim) is not None and p.op == "matmul" and _reads_controller(p)]
    assert len(dense) == 2  # the controller runs once for all blocks


def _reads_controller(prim: Prim) -> bool:
    return any(isinstance(o, Value) and o.name.startswith("guiding_giants.") and len(o.shape or ()) == 2 for o in prim.operands)


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_off_is_off(dialect: str, tmp_path: Path) -> None:
    graph, inputs = in_dialect("gpt2", dialect), tokens(PROMPTS, [2, 1, 1])
    own = {name: inputs[name] for name in list(inputs)[:3]}
    plain = graph.run(own)["logits"]
    exact = 0 if dialect == "fx" else 1e-6  # onnxruntime fuses what follows in another way where a node stands between
    controller = random_controller([FIRST], [SECOND])
    none = guided(graph, controller, tmp_path, "eta=0")
    assert none.graph.text(provenance=False) == graph.text(provenance=False) and none.report[0].counts == {"identity": 1}
    silent = Controller(**{**vars(controller), "second": controller.second * np.array([[0], [1]], np.float32),
                           "second_bias": controller.second_bias * np.array([0, 1], np.float32)})  # fmt: skip
    quiet = guided(graph, silent, tmp_path).graph
    seen = [
        ag.run(each, f"tap{{site={SECOND}}}").graph.run(inputs if each is quiet else own)[SECOND] for each in (graph, quiet)
    ]
    assert np.array_equal(*seen)
    np.testing.assert_allclose(quiet.run(inputs)["logits"], plain, rtol=0, atol=exact * np.abs(plain).max())
    given = guided(graph, controller, tmp_path, "eta=input").graph
    np.testing.assert_allclose(given.run(inputs)["logits"], plain, rtol=0, atol=exact * np.abs(plain).max())
    told = given.run({**inputs, "guiding_giants.eta": np.array([4.0, 0.0, -2.0], np.float32)})["logits"]
    for row, eta in enumerate((4.0, 0.0, -2.0)):
        expected = guided(graph, controller, tmp_path, f"eta={eta}").graph.run(inputs)["logits"][row] if eta else plain[row]
        np.testing.assert_allclose(told[row], expected, atol=2e-5 * np.abs(plain).max())


@pytest.mark.parametrize(("model", "dialect"), [("gpt2", "fx"), ("llama", "onnx")])
def test_the_same_tokens_for_every_way_of_calling(model: str, dialect: str, tmp_path: Path) -> None:
    """Without a cache, with one inserted before or after, growing and of fixed size, in chunks, padded and alone."""
    graph, controller = in_dialect(model, dialect), random_controller([FIRST], [FIRST, SECOND])
    made = guided(graph, controller, tmp_path).graph
    expected = ag.generate(made, PROMPTS, 6, stop_at_end=False)
    for row, each in enumerate(expected):
        logits = the_papers_loop(model, controller, PROMPTS[row], list(each.tokens[:-1]))
        assert logits.argmax(-1).tolist() == list(each.tokens)
    for form in ("growing", "static"):
        cached = ag.run(made, KeyValueCache(form=form)).program
        for chunk in (512, 2):
            assert ag.generate(ag.compile(cached, chunk=chunk), PROMPTS, 6, stop_at_end=False) == expected, (form, chunk)
    before = guided(ag.run(graph, KeyValueCache()).program, controller, tmp_path, parity="none").program
    assert ag.generate(ag.compile(before), PROMPTS, 6, stop_at_end=False) == expected
    assert [ag.generate(ag.compile(before), prompt, 6, stop_at_end=False) for prompt in PROMPTS] == expected
    assert ag.generate(graph, PROMPTS, 6, stop_at_end=False) != expected, "the controller does something"


def test_files_for_other_programs(tmp_path: Path) -> None:
    graph, inputs = zoo.captured("llama"), tokens(PROMPTS, [3, 2, 1])
    made = guided(graph, random_controller([FIRST, SECOND], [SECOND]), tmp_path).graph
    want = made.run(inputs)["logits"]
    kept = ag.load(made.save(tmp_path / "kept.onnx"))
    plain = ag.load(made.save(tmp_path / "plain.onnx", inline="all"))
    for each in (kept, plain, guided(as_dialect(graph, "onnx"), random_controller([FIRST, SECOND], [SECOND]), tmp_path).graph):
        np.testing.assert_allclose(each.run(inputs)["logits"], want, atol=2e-5 * np.abs(want).max())
    assert not [node for node in plain.nodes() if not node.op.startswith("onnx.")]
    assert SECOND in [site.name for site in kept.sites("blocks.*.resid_post")]


def test_behind_other_edits(tmp_path: Path) -> None:
    """The controller reads what an edit before it left, and an edit behind it is not read."""
    graph, controller = zoo.captured("llama"), random_controller([FIRST], [FIRST])
    inputs = tokens([[5, 17, 3, 80, 41, 9, 11]], [4])
    own, tap = {name: inputs[name] for name in list(inputs)[:3]}, f"tap{{site={FIRST}}}"
    steer = f"steer{{vector=[{', '.join(['0.25'] * zoo.WIDTH)}] site={FIRST} fold=false}}"
    before = ag.run(graph, tap).graph.run(own)[FIRST]
    first = ag.run(guided(ag.run(graph, steer).graph, controller, tmp_path).graph, tap).graph.run(inputs)[FIRST]
    last = ag.run(guided(graph, controller, tmp_path).graph, f"{steer}, {tap}").graph.run(inputs)[FIRST]
    for found, read in ((first, before + 0.25), (last, before)):
        dose = controller.doses({FIRST: read})[..., 0, None]
        np.testing.assert_allclose(found[:, 3:], (before + 0.25 + 4 * dose * controller.direction)[:, 3:], atol=3e-5)
    assert np.abs(first - last)[:, 3:].max() > 1e-2


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_half_precision(dialect: str, tmp_path: Path) -> None:
    """The controller computes in float32 whatever the model does."""
    graph, inputs = in_dialect("llama", dialect), tokens(PROMPTS, [3, 2, 1])
    controller = random_controller([FIRST, SECOND], [SECOND])
    want = guided(graph, controller, tmp_path).graph.run(inputs)["logits"]
    half = guided(ag.run(graph, "cast{dtype=f16}", parity="none").graph, controller, tmp_path).graph
    np.testing.assert_allclose(half.run(inputs)["logits"], want, atol=1e-2 * np.abs(want).max())


# --- training -------------------------------------------------------------------------------------------------------------


def separable(count: int = 240, width: int = 24, seed: int = 0) -> tuple[dict[str, Array], dict[str, Array]]:
    """Two sites whose activations differ along one direction each."""
    rng = np.random.default_rng(seed)
    axis = rng.normal(size=(2, width))
    axis /= np.linalg.norm(axis, axis=1, keepdims=True)
    return tuple(  # type: ignore[return-value]
        {
            site: (rng.normal(size=(count, width)) + sign * 2.5 * a).astype(np.float32)
            for site, a in zip((FIRST, SECOND), axis, strict=True)
        }
        for sign in (1, -1)
    )


QUICK: dict[str, Any] = {"layers": [FIRST, SECOND], "epochs": 12, "progress": False}
DIRECTION = np.eye(24, dtype=np.float32)[3] * 2


def test_a_trained_controller_tells_them_apart() -> None:
    """On samples it has not seen; the raw gate pushes the others the other way, which is the trap of the released code."""
    both = separable(300)
    seen, fresh = (tuple({k: v[rows] for k, v in part.items()} for part in both) for rows in (slice(240), slice(240, None)))
    controller = train_controller(*seen, DIRECTION, **QUICK)
    signs = [controller(part)[0] > 0 for part in fresh]
    assert np.mean([signs[0].mean(), 1 - signs[1].mean()]) > 0.95
    for gate, ratio in (("relu", 5.0), ("sigmoid", 5.0)):
        sizes = [np.abs(controller.doses(part, gate)).mean() for part in fresh]  # type: ignore[arg-type]
        assert sizes[0] > ratio * sizes[1]
    raw = [controller.doses(part).mean() for part in fresh]
    assert raw[0] > 0 > raw[1] and abs(raw[1]) > 0.2 * raw[0]
    assert (
        controller.inputs == (FIRST, SECOND) and controller.first.shape == (1024, 48) and controller.second.shape == (3, 1024)
    )
    np.testing.assert_allclose(controller.direction, DIRECTION / 2)


def test_training_is_repeatable_and_stops() -> None:
    options = QUICK | {"hidden": 32, "lr": 1e-3}
    first, again = (train_controller(*separable(80), DIRECTION, **options) for _ in range(2))
    assert np.array_equal(first.first, again.first) and np.array_equal(first.second_bias, again.second_bias)
    other = train_controller(*separable(80), DIRECTION, **options | {"seed": 1})
    assert not np.array_equal(first.first, other.first)
    rng = np.random.default_rng(0)
    noise = [{FIRST: rng.normal(size=(60, 24)).astype(np.float32)} for _ in range(2)]
    stopped = train_controller(
        *noise, DIRECTION, layers=[FIRST], hidden=64, lr=1e-2, epochs=60, held_out=0.4, patience=3, progress=False
    )
    history = stopped.history
    assert history is not None and len(history.epochs) == history.best + 4 < 60
    assert history.loss == min(epoch.held_out for epoch in history.epochs)


def test_weights_of_positive_samples_are_drawn_to_a_half() -> None:
    """The penalty of the loss: ``w`` near one half, and the order of what is joined is that of the arguments."""
    positive, negative = separable(120)
    controller = train_controller(positive, negative, DIRECTION, **QUICK | {"hidden": 64, "lr": 3e-3})
    assert np.abs(controller(positive)[1] - 0.5).mean() < 0.05
    swapped = {name: positive[name] for name in (SECOND, FIRST)}, {name: negative[name] for name in (SECOND, FIRST)}
    assert train_controller(*swapped, DIRECTION, **QUICK | {"epochs": 1}).inputs == (SECOND, FIRST)


def test_from_texts_to_a_guided_model(tmp_path: Path) -> None:
    """Questions are to be steered and statements not: the trained file steers the ones and leaves the others, bit for bit."""
    graph = in_dialect("stories260k", "fx")
    stems = ["Once upon a time there was a dog", "Lily went to the park with Ben", "The sun was hot", "She had a red ball",
             "Tom saw a bird in the tree", "They played all day", "Mom said it was time", "He was very happy"]  # fmt: skip
    site = "blocks.2.resid_post"
    states = [collect_rows(graph, [site], [stem + end for stem in stems], progress=False) for end in ("?", ".")]
    direction = embedding_direction(graph, ["no", "I can not"], ["yes", "sure"])
    controller = train_controller(
        *states, direction, layers=["blocks.2.resid_post", "blocks.4.resid_post"], graph=graph, hidden=64, lr=3e-3, held_out=0,
        progress=False,
    )  # fmt: skip
    assert controller.model == model_fingerprint(graph)
    made = guided(graph, controller, tmp_path, "gate=relu").graph
    tokenizer = graph.companions.tokenizer
    assert tokenizer is not None
    for stem in stems[:4]:
        for end, steered in (("?", True), (".", False)):
            ids = tokenizer.encode(stem + end).ids
            inputs = tokens([ids], [len(ids)])
            moved = np.abs(made.run(inputs)["logits"] - graph.run({k: inputs[k] for k in list(inputs)[:3]})["logits"]).max()
            assert moved > 1e-2 if steered else moved == 0


def test_the_direction_of_embeddings() -> None:
    graph = in_dialect("stories260k", "fx")
    tokenizer = graph.companions.tokenizer
    assert tokenizer is not None
    table = zoo.model("stories260k").get_input_embeddings().weight.detach().numpy().astype(np.float64)  # type: ignore[operator,union-attr]
    ids = [
        [i for text in texts for i in tokenizer.encode(text, add_special_tokens=False).ids]
        for texts in (["no", "not now"], ["yes"])
    ]
    difference = table[ids[0]].mean(0) - table[ids[1]].mean(0)
    found = embedding_direction(graph, ["no", "not now"], ["yes"])
    np.testing.assert_allclose(found, difference / np.linalg.norm(difference), atol=1e-6)
    with pytest.raises(InputError, match="no vector of a length above 0"):
        embedding_direction(graph, ["yes"], ["yes"])
    with pytest.raises(InputError, match="no tokenizer"):
        embedding_direction(zoo.captured("llama"), ["yes"], ["no"])


# --- files and bad input --------------------------------------------------------------------------------------------------


def test_files(tmp_path: Path) -> None:
    controller = random_controller([FIRST, SECOND], [SECOND], model="f32[1,2]:ab")
    path = controller.save(tmp_path / "c.safetensors")
    again = Controller.load(path)
    assert (again.inputs, again.layers, again.model) == (controller.inputs, controller.layers, controller.model)
    assert all(np.array_equal(getattr(again, name), array) for name, array in load_file(path).items())
    arrays = load_file(path)
    for changes, notes, kind, message in [
        ({}, {}, "kif_signature", "no controller file but kif_signature"),
        ({}, {"inputs": None}, "controller", "is damaged"),
        ({}, {"layers": [FIRST, SECOND]}, "controller", "is damaged: a controller of 2 layers has no such second"),
        ({"first": arrays["first"] * np.nan}, {}, "controller", "NaN"),
    ]:
        manifest = {"inputs": [FIRST, SECOND], "layers": [SECOND]} | notes
        Artifact(kind, arrays | changes, manifest).save(path)
        with pytest.raises(InputError, match=message):
            Controller.load(path)


def test_refusals(tmp_path: Path) -> None:
    graph = zoo.captured("llama")
    other = model_fingerprint(zoo.captured("gpt2"))
    with pytest.raises(PassError, match="made from another model"):
        guided(graph, random_controller([FIRST], [SECOND], model=other), tmp_path)
    allowed = guided(graph, random_controller([FIRST], [SECOND], model=other), tmp_path, "other_model=allow")
    assert allowed.report[0].counts == {"inserted": 1}
    with pytest.raises(PassError, match=r"no weight for blocks\.0\.resid_post"):
        guided(graph, random_controller([FIRST], [SECOND]), tmp_path, f"site={FIRST}")
    with pytest.raises(SiteError, match=r"blocks\.7\.resid_post"):
        guided(graph, random_controller(["blocks.7.resid_post"], [SECOND]), tmp_path)
    with pytest.raises(PassError, match="the direction has 16 numbers"):
        guided(graph, random_controller([FIRST], [SECOND], width=16), tmp_path)
    with pytest.raises(PassError, match="takes 64 numbers"):
        guided(graph, Controller(**{**vars(random_controller([FIRST, SECOND], [SECOND])), "inputs": (FIRST,)}), tmp_path)
    with pytest.raises(PassError, match="a controller steers tokens"):
        ag.run(zoo.captured("mlp"), f"guiding_giants{{controller={_of_mlp(tmp_path)} where=all}}")
    with pytest.raises(OptionError, match="finite"):
        guided(graph, random_controller([FIRST], [SECOND]), tmp_path, "eta=inf")
    with pytest.raises(InputError, match="there is no file"):
        ag.run(graph, "guiding_giants{controller=none.safetensors}")


def _of_mlp(folder: Path) -> Path:
    site = next(site for site in zoo.captured("mlp").sites("linear.*") if site.name == "linear.0")
    assert site.type.shape is not None and isinstance(site.type.shape[-1], int)
    return random_controller(["linear.0"], ["linear.0"], width=site.type.shape[-1]).save(folder / "m.safetensors")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda p, n: (p, {FIRST: n[FIRST]}), {}, "one set has"),
        (lambda p, n: ({**p, SECOND: p[SECOND][:5]}, n), {}, "as many prompts for all"),
        (lambda p, n: (p, {name: a[:, :7] for name, a in n.items()}), {}, "different widths"),
        (lambda p, n: (p, {**n, FIRST: n[FIRST] * np.nan}), {}, "NaN"),
        (lambda p, n: (p, n), {"layers": []}, "name layers"),
        (lambda p, n: (p, n), {"held_out": 1.5}, "held_out is 1.5"),
        (lambda p, n: (p, n), {"lr": 1e30, "clip": 1e30}, "use a smaller lr"),
    ],
)
def test_activations_that_do_not_do(change: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train_controller(*change(*separable(20)), DIRECTION, **QUICK | {"hidden": 8} | options)


def test_a_direction_of_nothing() -> None:
    with pytest.raises(InputError, match="length above 0"):
        train_controller(*separable(20), np.zeros(24), **QUICK)


def test_graphs_are_left_alone(tmp_path: Path) -> None:
    graph: Graph = zoo.captured("llama")
    text = graph.content_hash()
    guided(graph, random_controller([FIRST], [SECOND]), tmp_path)
    assert graph.content_hash() == text
