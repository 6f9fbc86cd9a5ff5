"""TauGate: trained thresholds and gains, against hooks on the eager model, and as trained on turned digits."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import actgraph as ag
from actgraph.errors import InputError, OptionError, PassError, UnsupportedError
from actgraph.formats.artifacts import Artifact
from actgraph.formats.vectors import model_fingerprint
from actgraph.graph import Graph
from actgraph.graph.graph import Array
from actgraph.ops.torch_library import torch_op
from actgraph.passes.steer.taugate import NeuronGates, TauGates
from actgraph.passes.steer.train_taugate import _LOSSES, train_taugate
from tests import zoo
from tests.passes.conftest import as_dialect, in_dialect, relative
from tests.passes.digits import SIZE, classifier, pictures

#: The activation of each block: modules, and the width. OPT has a ReLU, GPT-2 a GELU, Llama a gated SiLU.
MODELS = {
    "opt": ("model.decoder.layers.{}.activation_fn", 48),
    "gpt2": ("transformer.h.{}.mlp.act", 128),
    "llama": ("model.layers.{}.mlp.act_fn", 48),
}


def made(width: int, seed: int = 0, layers: int = 2, name: str = "blocks.{}.mlp.act", model: str = "") -> TauGates:
    """Gates that close some neurons and scale others."""
    rng = np.random.default_rng(seed)
    pairs = [
        (rng.normal(0, 0.5, width).astype(np.float32), rng.uniform(0.5, 1.5, width).astype(np.float32)) for _ in range(layers)
    ]
    return TauGates({name.format(i): NeuronGates(*pair) for i, pair in enumerate(pairs)}, 4.0, model)


def apply(graph: Graph, gates: TauGates | str, folder: Path, options: str = "", **more: Any) -> ag.RunResult:
    path = gates if isinstance(gates, str) else gates.save(folder / "gates.safetensors")
    return ag.run(graph, f"taugate{{gates={path} {options}}}", **({"parity": "none", "reproducer": False} | more))


def hooked(model: str, gates: TauGates, inputs: dict[str, Array], mode: str = "hard", where: Array | None = None) -> Array:
    """The eager model with the card's formula at each activation."""
    eager, handles = zoo.model(model), []
    for number, each in enumerate(gates.gates.values()):
        tau, gamma = torch.from_numpy(each.tau), torch.from_numpy(each.gamma)

        def gate(_: Any, args: Any, output: torch.Tensor, tau: torch.Tensor = tau, gamma: torch.Tensor = gamma) -> torch.Tensor:
            z = args[0]
            g = (z > tau).float() if mode == "hard" else torch.sigmoid(gates.sharpness * (z - tau))
            factor = gamma * g
            if where is not None:
                factor = torch.where(torch.from_numpy(where.copy())[..., None], factor, 1.0)
            return output * factor

        handles.append(eager.get_submodule(MODELS[model][0].format(number)).register_forward_hook(gate))
    try:
        return zoo.eager(model, inputs)["logits"]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize("model", MODELS)
def test_every_form_is_the_hooked_model(model: str, dialect: str, tmp_path: Path) -> None:
    """Hard and soft, gains folded and kept; gates of another layer are noticed."""
    graph, gates, inputs = in_dialect(model, dialect), made(MODELS[model][1]), zoo.inputs(model)
    plain = graph.run(inputs)["logits"]
    counts = {}
    for options in ("mode=hard", "mode=hard fold=false", "mode=soft", "mode=soft fold=false"):
        result = apply(graph, gates, tmp_path, options)
        expected = hooked(model, gates, inputs, options[5:9])
        assert relative(expected, result.graph.run(inputs)["logits"]) < 2e-5, options
        assert relative(expected, plain) > 1e-2
        counts[options] = result.report[0].counts
    rule = "jumprelu" if model == "opt" else "hard"
    assert counts["mode=hard"] == {"gains folded": 2, rule: 2} and counts["mode=hard fold=false"] == {rule: 2}
    assert counts["mode=soft"] == {"gains folded": 2, "soft": 2} and counts["mode=soft fold=false"] == {"soft": 2}
    swapped = TauGates(dict(zip(gates.gates, reversed(list(gates.gates.values())), strict=True)), 4.0)
    assert relative(hooked(model, gates, inputs), apply(graph, swapped, tmp_path).graph.run(inputs)["logits"]) > 1e-2


def test_the_relu_case_is_jumprelu(tmp_path: Path) -> None:
    """``gamma z 1[z > max(tau, 0)]``: thresholds up to 0 do nothing, and the gains are in the next linear's columns."""
    graph, inputs = zoo.captured("opt"), zoo.inputs("opt")
    gates = made(48)
    low = TauGates({name: NeuronGates(np.minimum(g.tau, 0), np.ones(48, np.float32)) for name, g in gates.gates.items()}, 4.0)
    same = apply(graph, low, tmp_path)
    assert same.report[0].counts == {"identity": 2} and same.graph.text(provenance=False) == graph.text(provenance=False)
    result = apply(graph, gates, tmp_path).graph
    assert [node.op for node in result.nodes() if node.op.startswith("actgraph.")] == ["actgraph.gate"] * 2
    down = [linear.read_weight() for g in (graph, result) for linear in g.views.linears() if linear.in_features == 48]
    np.testing.assert_array_equal(
        down[2], (down[0].astype(np.float64) * gates.gates["blocks.0.mlp.act"].gamma).astype(np.float32)
    )
    layer = gates.gates["blocks.0.mlp.act"]
    site = "blocks.0.mlp.act"
    z = ag.run(graph, "tap{site=blocks.0.mlp.pre_act}").graph.run(inputs)["blocks.0.mlp.pre_act"]
    on = z.reshape(-1, 48)[0].copy()
    exact = TauGates({site: NeuronGates(on, layer.gamma)}, 4.0)  # thresholds that a token of the input meets exactly
    kept = apply(graph, exact, tmp_path, "fold=false expose=true").graph
    expected = layer.gamma * np.maximum(z, 0) * (z > np.maximum(on, 0))
    np.testing.assert_array_equal(ag.run(kept, f"tap{{site={site}}}").graph.run(inputs)[site], expected)
    opened = kept.run(inputs)[f"taugate.{site}"]
    assert opened.dtype == bool and np.array_equal(opened, z > on) and not opened.reshape(-1, 48)[0].any() and opened.any()


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_open_gates_are_the_identity(dialect: str, tmp_path: Path) -> None:
    graph = in_dialect("gpt2", dialect)
    never = NeuronGates(np.full(128, -np.inf, np.float32), np.ones(128, np.float32))
    result = apply(graph, TauGates({"blocks.0.mlp.act": never}, 4.0), tmp_path)
    assert result.report[0].counts == {"identity": 1} and result.graph.text(provenance=False) == graph.text(provenance=False)


def test_soft_becomes_hard_as_it_sharpens() -> None:
    z, x, tau = torch.randn(64, 32), torch.randn(64, 32), torch.randn(32)
    far = (z - tau).abs() > 0.1
    gate = torch_op("threshold_gate")
    hard = gate(x, tau, z, None, None, mode="hard", sharpness=1.0, result="gated", axis=-1)
    gaps = [float((gate(x, tau, z, None, None, mode="soft", sharpness=s, result="gated", axis=-1) - hard)[far].abs().max())
            for s in (1.0, 10.0, 100.0, 1000.0)]  # fmt: skip
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > 0.1 and gaps[-1] < 1e-6


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_soft_gates_are_hardened_in_place(dialect: str, tmp_path: Path) -> None:
    graph, gates, inputs = in_dialect("gpt2", dialect), made(128), zoo.inputs("gpt2")
    soft = apply(graph, gates, tmp_path, "mode=soft fold=false").graph
    hard = ag.run(soft, "taugate")
    assert hard.report[0].counts == {"hard": 2}
    assert relative(hooked("gpt2", gates, inputs), hard.graph.run(inputs)["logits"]) < 2e-5
    assert {node.attributes.get("mode", "hard") for node in hard.graph.nodes() if node.op == "actgraph.threshold_gate"} == {
        "hard"
    }
    first = ag.run(soft, "taugate{site=blocks.0.mlp.act}").graph
    assert sorted(n.attributes.get("mode", "hard") for n in first.nodes() if n.op == "actgraph.threshold_gate") == [
        "hard",
        "soft",
    ]


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_other_tokens_and_places(dialect: str, tmp_path: Path) -> None:
    """A clause, a pre-activation as the place, edits made before, and a file that another program reads."""
    graph, gates, inputs = in_dialect("llama", dialect), made(48), zoo.inputs("llama")
    windowed = apply(graph, gates, tmp_path, "where=3:").graph
    expected = hooked("llama", gates, inputs, where=np.broadcast_to(np.arange(8) >= 3, (2, 8)))
    found = windowed.run(inputs)["logits"]
    assert relative(expected, found) < 2e-5 and np.array_equal(found[:, :3], graph.run(inputs)["logits"][:, :3])
    by_gate = apply(graph, gates, tmp_path, "site=blocks.*.mlp.pre_act").graph
    assert relative(hooked("llama", gates, inputs), by_gate.run(inputs)["logits"]) < 2e-5
    both = apply(graph, gates, tmp_path, "site=[blocks.0.mlp.pre_act, blocks.0.mlp.act]").report[0]
    assert both.counts["hard"] == 1 and "gated already" in both.declined[0].reason
    vector = "[" + ", ".join(["0.5"] * 48) + "]"
    steered = ag.run(graph, f"steer{{vector={vector} site=blocks.0.mlp.act}}").graph
    after = ag.run(apply(steered, gates, tmp_path, "fold=false").graph, "tap{site=blocks.0.mlp.act}").graph.run(inputs)
    before = ag.run(graph, "tap{site=[blocks.0.mlp.pre_act, blocks.0.mlp.act]}").graph.run(inputs)
    layer = gates.gates["blocks.0.mlp.act"]
    want = (before["blocks.0.mlp.act"] + 0.5) * layer.gamma * (before["blocks.0.mlp.pre_act"] > layer.tau)
    np.testing.assert_allclose(after["blocks.0.mlp.act"], want, atol=1e-5)
    for inline in ("default", "all"):
        saved = ag.load(
            apply(graph, gates, tmp_path).graph.save(tmp_path / "x.onnx", **({"inline": "all"} if inline == "all" else {}))
        )
        assert relative(hooked("llama", gates, inputs), saved.run(inputs)["logits"]) < 2e-5


def test_with_other_passes(tmp_path: Path) -> None:
    """Behind a ReLU the gate goes into the linear that reads it; with a cache the tokens stay the same."""
    graph, gates, inputs = zoo.captured("opt"), made(48), zoo.inputs("opt")
    gated = apply(graph, gates, tmp_path).graph
    fused = ag.run(gated, "fuse").graph
    assert not [node for node in fused.nodes() if node.op == "actgraph.gate"]
    assert relative(hooked("opt", gates, inputs), fused.run(inputs)["logits"]) < 2e-5
    prompts = [[5, 17, 3, 80, 41, 9], [22, 7, 64]]
    whole = ag.generate(gated, prompts, 6, stop_at_end=False)
    assert ag.generate(ag.run(gated, "kv_cache").program, prompts, 6, stop_at_end=False) == whole
    assert ag.generate(graph, prompts, 6, stop_at_end=False) != whole


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_gains_come_out_of_the_weights_again(dialect: str, tmp_path: Path) -> None:
    graph, gates, inputs = in_dialect("llama", dialect), made(48), zoo.inputs("llama")
    out = ag.run(apply(graph, gates, tmp_path).graph, "unfold")
    assert sum(node.op == "actgraph.channel_scale" for node in out.graph.nodes()) == 2
    assert relative(hooked("llama", gates, inputs), out.graph.run(inputs)["logits"]) < 2e-5
    weights = [[linear.read_weight() for linear in g.views.linears() if linear.in_features == 48] for g in (graph, out.graph)]
    assert len(weights[0]) == 2 and all(np.array_equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_half_precision_and_stored_weights(dialect: str, tmp_path: Path) -> None:
    """Weights that would be rounded keep their bits: gains stay with the gate, which compares in float32."""
    graph, gates, inputs = in_dialect("llama", dialect), made(48), zoo.inputs("llama")
    for before, tolerance in (("cast{dtype=f16}", 0.05), ("quantize{weights=int8}", 0.1)):
        result = apply(ag.run(graph, before, parity="none").graph, gates, tmp_path)
        assert result.report[0].counts == {"hard": 2}
        assert relative(hooked("llama", gates, inputs), result.graph.run(inputs)["logits"]) < tolerance


# --- training -------------------------------------------------------------------------------------------------------------


@functools.cache
def network(seed: int, function: str = "relu") -> Graph:
    model = classifier(seed, torch.nn.ReLU() if function == "relu" else torch.nn.GELU())
    return ag.trace(model, (torch.zeros(3, SIZE * SIZE),), dynamic={"input": ("batch", None)}, name="digits")


def accuracy(graph: Graph, seed: int) -> float:
    x, labels = pictures(2000, 45, seed + 3)
    return float((graph.run({"input": x})["output"].argmax(-1) == labels).mean())


def turned(seed: int) -> dict[str, Array]:
    x, labels = pictures(1000, 45, seed + 2)
    return {"input": x, "labels": labels}


QUICK: dict[str, Any] = {"epochs": 8, "batch_size": 100, "lr": 0.05, "progress": False}


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_turned_digits(seed: int, tmp_path: Path) -> None:
    """A classifier of upright and turned digits, specialised to turned ones: better than before, with hard gates."""
    graph = network(seed)
    gates = train_taugate(graph, turned(seed), **QUICK)
    inputs = {"input": pictures(8, 45, 1)[0]}
    hard, soft = (apply(graph, gates, tmp_path, f"mode={mode}", inputs=inputs).graph for mode in ("hard", "soft"))
    before = accuracy(graph, seed)
    assert accuracy(hard, seed) > before + 0.005 and accuracy(soft, seed) > before + 0.005
    assert accuracy(as_dialect(hard, "onnx"), seed) == accuracy(hard, seed)


def test_a_penalty_closes_gates(tmp_path: Path) -> None:
    graph, data = network(0, "gelu"), turned(0)
    open_shares = []
    for penalty in (0.0, 1.0, 3.0):
        gates = train_taugate(graph, data, gate_penalty=penalty, held_out=0, **QUICK | {"epochs": 5})
        outputs = apply(graph, gates, tmp_path, "expose=true", inputs={"input": data["input"][:8]}).graph.run(
            {"input": data["input"]}
        )
        open_shares.append(float(np.mean([outputs[f"taugate.{site}"].mean() for site in gates.gates])))
    assert open_shares == sorted(open_shares, reverse=True) and open_shares[0] > 0.95 and open_shares[-1] < open_shares[0] - 0.1


def test_only_thresholds_and_gains_are_trained() -> None:
    """Weights and their flags are as they were, the gates are not where they began, and equal arguments give equal gates."""
    model = classifier(0)
    model.zero_grad(set_to_none=True)
    graph = ag.trace(model, (torch.zeros(3, SIZE * SIZE),), dynamic={"input": ("batch", None)}, name="digits")
    before, text = {name: p.detach().clone() for name, p in model.named_parameters()}, graph.content_hash()
    first = train_taugate(graph, turned(0), **QUICK | {"epochs": 3})
    assert graph.content_hash() == text
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.requires_grad and parameter.grad is None
    again = train_taugate(graph, turned(0), **QUICK | {"epochs": 3})
    assert set(first.gates) == {"activation.0", "activation.1"}
    for site, gates in first.gates.items():
        assert np.array_equal(gates.tau, again.gates[site].tau) and np.array_equal(gates.gamma, again.gates[site].gamma)
        assert gates.tau.shape == (32,) and (gates.gamma != 1).mean() > 0.5


def test_the_start_is_near_the_identity(tmp_path: Path) -> None:
    """With a step of nothing, gates are what calibration made them: 4 / sharpness below the first percentile."""
    graph, data = network(0, "gelu"), turned(0)
    gates = train_taugate(graph, data, sharpness=8.0, **QUICK | {"lr": 1e-12, "epochs": 1})
    z = ag.run(graph, "tap{site=linear.0}", inputs={"input": data["input"][:4]}).graph.run({"input": data["input"]})["linear.0"]
    first = gates.gates["activation.0"].tau + 0.5
    low, high = np.percentile(z, 0.8, axis=0), np.percentile(z, 1.2, axis=0)
    assert (first > low - 0.01 * abs(low)).all() and (first < high + 0.01 * abs(high)).all()
    soft = apply(graph, gates, tmp_path, "mode=soft", inputs={"input": data["input"][:8]}).graph
    assert relative(graph.run({"input": data["input"]})["output"], soft.run({"input": data["input"]})["output"]) < 0.02


def test_training_stops_and_keeps_the_best() -> None:
    """The loss of a task without structure only grows on held-out samples."""
    data = turned(0) | {"labels": np.random.default_rng(0).integers(0, 10, 1000)}
    gates = train_taugate(network(0), data, held_out=0.5, patience=2, **QUICK | {"lr": 0.5, "epochs": 50})
    history = gates.history
    assert history is not None and len(history.epochs) == history.best + 3 < 50
    assert history.loss == min(epoch.held_out for epoch in history.epochs)


def test_a_language_model_of_documents() -> None:
    """Documents of different lengths share batches."""
    rng = np.random.default_rng(0)
    documents = [{"input_ids": rng.integers(1, 12, (1, n))} for n in (9, 4, 12, 7, 9, 5)]
    options: dict[str, Any] = {"loss": "next_token", "site": "blocks.*.mlp.act", "held_out": 0, "progress": False}
    gates = train_taugate(zoo.captured("llama"), documents, epochs=4, batch_size=3, lr=0.05, **options)
    assert list(gates.gates) == ["blocks.0.mlp.act", "blocks.1.mlp.act"] and gates.history is not None
    losses = [epoch.trained for epoch in gates.history.epochs]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1


def test_padding_is_no_part_of_the_loss() -> None:
    """What the trainer makes of documents of 5, 3 and 2 tokens: where they are padded, and the loss of the real tokens."""
    lengths, seen = (5, 3, 2), []

    def loss(outputs: Any, batch: Any) -> torch.Tensor:
        own = [torch.nn.functional.cross_entropy(outputs["logits"][r, : n - 1], batch["input_ids"][r, 1:n], reduction="sum")
               for r, n in enumerate(batch["valid"].sum(1).tolist())]  # fmt: skip
        seen.append((sorted(batch["valid"].sum(1).tolist()), sum(float(each.detach()) for each in own) / 7))
        seen.append(float(_LOSSES["next_token"](zoo.captured("llama"))(outputs, batch).detach()))
        return outputs["logits"].mean()

    documents = [{"input_ids": np.arange(1, n + 1)[None]} for n in lengths]
    train_taugate(zoo.captured("llama"), documents, loss=loss, epochs=1, held_out=0, batch_size=3, progress=False)
    (valid, expected), found = seen
    assert valid == [2, 3, 5] and found == pytest.approx(expected, rel=1e-5)


def test_a_loss_of_ones_own() -> None:
    gates = train_taugate(
        network(0), turned(0), loss=lambda outputs, batch: (outputs["output"] ** 2).mean(), **QUICK | {"epochs": 3}
    )
    assert gates.history is not None and gates.history.epochs[-1].trained < gates.history.epochs[0].trained


# --- files and bad input --------------------------------------------------------------------------------------------------


def test_files(tmp_path: Path) -> None:
    gates = made(5, model="f32[1,2]:ab")
    path = gates.save(tmp_path / "g.safetensors")
    again = TauGates.load(path)
    assert (list(again.gates), again.sharpness, again.model) == (list(gates.gates), 4.0, "f32[1,2]:ab")
    assert all(
        np.array_equal(again.gates[s].tau, g.tau) and np.array_equal(again.gates[s].gamma, g.gamma)
        for s, g in gates.gates.items()
    )
    assert path.read_bytes() == again.save(tmp_path / "h.safetensors").read_bytes()
    tensors = load_file(path)
    notes = {"sites": list(gates.gates), "sharpness": 4.0}

    def damaged(message: str, arrays: dict[str, Array] | None = None, kind: str = "taugate", **changes: Any) -> None:
        path = Artifact(kind, arrays or tensors, notes | changes).save(tmp_path / "bad.safetensors")
        with pytest.raises(InputError, match=message) as error:
            TauGates.load(path)
        assert "bad.safetensors" in error.value.message and error.value.hint

    damaged("no taugate file but controller", kind="controller")
    damaged("is damaged", sites=["blocks.9.mlp.act"])
    damaged("is damaged", sharpness="steep")
    damaged("holds no neuron gates", sites=[])
    damaged("NaN", tensors | {"blocks.0.mlp.act.tau": np.full(5, np.nan, np.float32)})
    damaged("gains", tensors | {"blocks.0.mlp.act.gamma": np.ones(4, np.float32)})
    with pytest.raises(InputError, match="there is no file"):
        TauGates.load(tmp_path / "none.safetensors")


def test_refusals(tmp_path: Path) -> None:
    graph = zoo.captured("llama")
    with pytest.raises(PassError, match="made from another model"):
        apply(graph, made(48, model=model_fingerprint(zoo.captured("gpt2"))), tmp_path)
    other = made(48, model=model_fingerprint(zoo.captured("gpt2")))
    assert apply(graph, other, tmp_path, "other_model=allow").report[0].counts["hard"] == 2
    with pytest.raises(PassError, match=r"32 thresholds, and blocks\.0\.mlp\.act is"):
        apply(graph, made(32), tmp_path)
    with pytest.raises(PassError, match=r"changed nothing: blocks\.0\.resid_post: it is neither"):
        apply(graph, made(48), tmp_path, "site=blocks.0.resid_post")
    with pytest.raises(PassError, match=r"no thresholds for blocks\.1\.mlp\.act"):
        apply(graph, made(48, layers=1), tmp_path, "site=blocks.*.mlp.act")
    with pytest.raises(PassError, match="no soft gate to harden"):
        ag.run(graph, "taugate")
    with pytest.raises(OptionError, match="without a file"):
        ag.run(graph, "taugate{mode=soft}")
    with pytest.raises(PassError, match=r"blocks\.0\.resid_post is no activation"):
        train_taugate(graph, zoo.inputs("llama"), loss="next_token", site="blocks.0.resid_post")
    with pytest.raises(UnsupportedError, match="no torch form"):
        train_taugate(zoo.exported("llama"), zoo.inputs("llama"))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"labels": None}, {}, "needs labels"),
        ({"input": None}, {}, "give input, a row for each sample"),
        ({"labels": np.zeros(3, np.int64)}, {}, "a row for each sample"),
        ({}, {"held_out": 1.0}, "held_out is 1.0"),
        ({}, {"epochs": 0}, "at least 1"),
        ({}, {"lr": 0.0}, "are positive"),
        ({"input": np.full((1000, SIZE * SIZE), np.nan, np.float32)}, {}, "NaN"),
    ],
)
def test_training_data_that_do_not_do(changes: dict[str, Any], options: dict[str, Any], message: str) -> None:
    data = {name: array for name, array in (turned(0) | changes).items() if array is not None}
    with pytest.raises(InputError, match=message):
        train_taugate(network(0), data, **QUICK | options)
