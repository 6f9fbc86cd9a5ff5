"""SAE latents: against the whole SAE in forward hooks, in both dialects, masked, composed, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.errors import InputError, OptionError, PassError
from actgraph.formats.saelens import load_sae
from actgraph.graph import Graph
from tests.passes.conftest import apply, hooked_logits, in_dialect, relative, run, token_inputs
from tests.saes import Reference, random_sae, write_sae

SIZE = 0.6  # about that of the channels of the residual stream behind block 2
CHOSEN = [5, 11, 40, 95]
LISTED = "latents=[5, 11, 40, 95]"
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("standard", {}),
    "jumprelu": ("jumprelu", {}),
    "gated": ("gated", {}),
    "rescaled input": ("standard", {"normalize_activations": "constant_norm_rescale"}),
    "normalised input": ("jumprelu", {"normalize_activations": "layer_norm"}),
}
Edit = Callable[[torch.Tensor], torch.Tensor]


def at(change: Edit, chosen: list[int] | None = None) -> Edit:
    def edit(f: torch.Tensor) -> torch.Tensor:
        f[..., chosen or CHOSEN] = change(f[..., chosen or CHOSEN])
        return f

    return edit


def hooked(sae: Reference, edit: Edit, layer: int = 2, tokens: slice = slice(None)) -> np.ndarray:
    """Logits of the transformers model whose block's output is encoded, edited and decoded with the whole SAE."""

    def hook(h: torch.Tensor) -> torch.Tensor:
        steered = h.clone()
        steered[:, tokens] = sae.steer(h.double(), edit)[:, tokens].to(h.dtype)
        return steered

    return hooked_logits(f"model.layers.{layer}", hook)


def made(tmp_path: Path, kind: str = "standard") -> tuple[Reference, Path]:
    architecture, settings = KINDS[kind]
    sae = random_sae(architecture, scale=1.0 if settings else SIZE, **settings)
    return sae, write_sae(tmp_path / "sae", sae)


NUMBERS = torch.tensor([0.0, 3.0, -1.5, 2.0])
EDITS: dict[str, Edit] = {
    "mode=clamp value=[0.0, 3.0, -1.5, 2.0]": lambda f: 0 * f + NUMBERS,
    "mode=scale value=4": lambda f: 4 * f,
    "mode=add value=[0.0, 3.0, -1.5, 2.0]": lambda f: f + NUMBERS,
    "mode=ablate": lambda f: 0 * f,
    "mode=clamp value=3": lambda f: 0 * f + 3,
    "mode=ablate strength=3": lambda f: -2 * f,
}
#: All edits of one architecture, and of the others the first ones.
PAIRS = [("standard", options) for options in EDITS] + [(kind, o) for kind in list(KINDS)[1:] for o in list(EDITS)[:3]]


@pytest.mark.parametrize(("kind", "options"), PAIRS)
def test_equals_the_whole_sae_in_a_hook(stories: Graph, tmp_path: Path, kind: str, options: str) -> None:
    sae, folder = made(tmp_path, kind)
    steered = run(apply(stories, f"sae_steer{{sae={str(folder)!r} {LISTED} {options}}}"))
    want = hooked(sae, at(EDITS[options]))
    assert relative(want, steered) < 1e-5
    assert relative(run(stories), want) > 1e-2, "the edit must be seen"
    if kind == "standard":
        assert relative(hooked(sae, at(EDITS[options]), layer=1), steered) > 1e-2, "the wrong layer must be noticed"
        assert relative(hooked(sae, at(EDITS[options], [5, 12, 40, 95])), steered) > 1e-3, "a wrong latent must be noticed"


def test_what_is_put_into_the_graph(stories: Graph, tmp_path: Path) -> None:
    """Rows of the edited latents and no more; adding is a shift or, folded, nothing."""
    _, folder = made(tmp_path)
    step = f"sae_steer{{sae={str(folder)!r} {LISTED} %s}}"
    clamped = apply(stories, step % "mode=clamp value=1")
    (node,) = [node for node in clamped.nodes() if node.op == "actgraph.latent_edit"]
    assert [o.shape for o in node.operands[1:4] if o is not None] == [(4, 64), (4, 64), (4,)]
    added = apply(stories, step % "mode=add value=1 fold=false")
    assert [node.op for node in added.nodes() if node.op.startswith("actgraph.")] == ["actgraph.shift"]
    folded = apply(stories, step % "mode=add value=1")
    assert not any(node.op.startswith("actgraph.") for node in folded.nodes())
    assert relative(run(added), run(folded)) < 1e-5


def test_clamp_and_add_of_one_code(stories: Graph, tmp_path: Path) -> None:
    """Clamps first, adds after: the sum of both edits of the same code, also of one latent."""
    sae, folder = made(tmp_path)
    both = apply(
        stories,
        f"sae_steer{{sae={str(folder)!r} latents=[5, 11] mode=clamp value=2}}, "
        f"sae_steer{{sae={str(folder)!r} latents=[11, 40] mode=add value=[1.0, -2.0]}}",
    )

    def edit(f: torch.Tensor) -> torch.Tensor:
        f[..., [5, 11]] = 2.0
        f[..., [11, 40]] += torch.tensor([1.0, -2.0])
        return f

    assert relative(hooked(sae, edit), run(both)) < 1e-5


def test_off_is_the_same_file(stories: Graph, tmp_path: Path) -> None:
    _, folder = made(tmp_path)
    for options in ("mode=ablate strength=0", "mode=add value=0", "mode=scale value=1", "mode=clamp value=3 strength=0"):
        out = ag.run(stories, f"sae_steer{{sae={str(folder)!r} {LISTED} {options}}}")
        assert np.array_equal(run(stories), run(out.graph))
        assert not any(node.op.startswith("actgraph.") for node in out.graph.nodes())


def test_tokens_whose_latents_are_silent_keep_every_bit(stories: Graph, tmp_path: Path) -> None:
    sae, folder = made(tmp_path, "jumprelu")
    tap = "tap{site=blocks.2.resid_post}"
    plain = apply(stories, tap).run(token_inputs())["blocks.2.resid_post"]
    f = sae.encode(torch.from_numpy(plain).double())[..., [7]]
    silent = (f == 0).all(-1).numpy()
    assert 0 < silent.sum() < silent.size
    step = f"sae_steer{{sae={str(folder)!r} latents=[7] mode=ablate}}"
    ablated = apply(stories, f"{step}, {tap}").run(token_inputs())["blocks.2.resid_post"]
    assert np.array_equal(ablated[silent].view(np.uint32), plain[silent].view(np.uint32))
    assert (np.abs(ablated - plain).max(-1)[~silent] > 0).all()


@pytest.mark.parametrize(
    ("where", "tokens"), [("all", slice(None)), ("3:", slice(3, None)), (":4", slice(0, 4)), ("2:5", slice(2, 5))]
)
def test_where(stories: Graph, tmp_path: Path, where: str, tokens: slice) -> None:
    sae, folder = made(tmp_path)
    for options, change in (("mode=clamp value=2", lambda f: 0 * f + 2), ("mode=add value=2", lambda f: f + 2)):
        steered = apply(stories, f"sae_steer{{sae={str(folder)!r} {LISTED} {options} where='{where}'}}")
        assert relative(hooked(sae, at(change), tokens=tokens), run(steered)) < 1e-5
        if where == "3:":
            assert relative(hooked(sae, at(change), tokens=slice(2, None)), run(steered)) > 1e-3
            early = run(steered)[:, :3]
            assert np.array_equal(early, run(stories)[:, :3]), "tokens before the window are as they were"


def test_generated_tokens(stories: Graph, tmp_path: Path) -> None:
    sae, folder = made(tmp_path)
    steered = apply(stories, f"sae_steer{{sae={str(folder)!r} {LISTED} mode=clamp value=2 where=generated}}")
    lengths = {"prompt_lengths": np.array([5, 5], np.int64)}
    got = next(iter(steered.run({**token_inputs(), **lengths}).values()))
    assert relative(hooked(sae, at(lambda f: 0 * f + 2), tokens=slice(5, None)), got) < 1e-5
    assert np.array_equal(run(steered), run(stories)), "where nobody tells lengths, all tokens are prompt"


def test_strength_of_each_row_at_run_time(stories: Graph, tmp_path: Path) -> None:
    """An input that nobody gives leaves every bit; each row has its own strength."""
    sae, folder = made(tmp_path)
    for options, change in (
        ("mode=clamp value=3", lambda f: 0 * f + 3),
        ("mode=add value=2", lambda f: f + 2),
        ("mode=ablate where='2:'", lambda f: 0 * f),
    ):
        steered = apply(stories, f"sae_steer{{sae={str(folder)!r} {LISTED} {options} strength=input}}")
        assert np.array_equal(run(steered), run(stories))
        given = {**token_inputs(), "sae_steer.strength": np.array([0.0, 1.0], np.float32)}
        got = next(iter(steered.run(given).values()))
        want = hooked(sae, at(change), tokens=slice(2 if "where" in options else 0, None))
        assert relative(want[1], got[1]) < 1e-5 < 1e-2 < relative(run(stories)[1], got[1])
        assert np.array_equal(got[0], run(stories)[0])


def test_order_with_steer_is_the_order_of_effect(stories: Graph, tmp_path: Path) -> None:
    sae, folder = made(tmp_path)
    vector = np.random.default_rng(2).normal(0, 0.5, 64).astype(np.float32)
    text = "[" + ", ".join(map(repr, map(float, vector))) + "]"
    add, clamp = f"steer{{vector={text} site=blocks.2.resid_post}}", f"sae_steer{{sae={str(folder)!r} {LISTED} mode=ablate}}"
    v = torch.from_numpy(vector)
    for text, hook in (
        (f"{add}, {clamp}", lambda h: sae.steer((h + v).double(), at(lambda f: 0 * f)).float()),
        (f"{clamp}, {add}", lambda h: sae.steer(h.double(), at(lambda f: 0 * f)).float() + v),
    ):
        assert relative(hooked_logits("model.layers.2", hook), run(apply(stories, text))) < 1e-5
    assert relative(run(apply(stories, f"{add}, {clamp}")), run(apply(stories, f"{clamp}, {add}"))) > 1e-3


def test_taken_away_in_front_of_the_final_norm(stories: Graph, tmp_path: Path) -> None:
    """The added direction acts on later blocks and not on the logits directly."""
    sae, folder = made(tmp_path)
    step = f"sae_steer{{sae={str(folder)!r} {LISTED} mode=add value=2 undo_at_final_norm=0.75 %s}}"
    vector = 2 * sae.tensors["W_dec"][CHOSEN].sum(0).float()

    def with_both() -> np.ndarray:
        from tests.passes.conftest import hf_stories

        last = hf_stories().get_submodule("model.layers.4")
        handle = last.register_forward_hook(
            lambda _, __, out: (out[0] - 0.75 * vector, *out[1:]) if isinstance(out, tuple) else out - 0.75 * vector
        )
        try:
            return hooked_logits("model.layers.2", lambda h: h + vector)
        finally:
            handle.remove()

    want = with_both()
    for fold in ("fold=true", "fold=false"):
        assert relative(want, run(apply(stories, step % fold))) < 1e-5
    assert relative(want, run(apply(stories, (step % "").replace("0.75", "0")))) > 1e-2
    with pytest.raises(PassError, match="only a constant"):
        apply(stories, f"sae_steer{{sae={str(folder)!r} {LISTED} mode=clamp value=2 undo_at_final_norm=1}}")


def test_top_k_can_be_added_to_alone(stories: Graph, tmp_path: Path) -> None:
    sae = random_sae("topk", scale=SIZE, k=8, rescale_acts_by_decoder_norm=True)
    folder = write_sae(tmp_path / "sae", sae)
    steered = apply(stories, f"sae_steer{{sae={str(folder)!r} {LISTED} mode=add value=2}}")
    assert relative(hooked(sae, at(lambda f: f + 2)), run(steered)) < 1e-5
    for mode in ("mode=ablate", "mode=clamp value=2", "mode=scale value=2"):
        with pytest.raises(PassError, match=r"is a top-8 SAE.*all 96 are compared"):
            apply(stories, f"sae_steer{{sae={str(folder)!r} {LISTED} {mode}}}")


def test_dialects_agree_and_files_keep_it(both_stories: dict[str, Graph], tmp_path: Path) -> None:
    _, folder = made(tmp_path, "normalised input")
    step = f"sae_steer{{sae={str(folder)!r} {LISTED} mode=scale value=[0.0, 2.0, 3.0, -1.0] where='2:'}}"
    fx, onnx = (apply(graph, step) for graph in both_stories.values())
    assert relative(run(fx), run(onnx)) < 1e-5
    onnx.save(tmp_path / "steered.onnx")
    again = ag.load(tmp_path / "steered.onnx")
    assert relative(run(onnx), run(again)) < 1e-6
    assert any(node.op == "actgraph.latent_edit" for node in again.nodes())


@pytest.mark.parametrize(("engine", "name"), [("torch", "fx"), ("onnxruntime", "onnx")])
def test_in_sessions(both_stories: dict[str, Graph], tmp_path: Path, engine: str, name: str) -> None:
    """With a cache, the tokens that the whole text without a cache gives; a kernel has the edit."""
    _, folder = made(tmp_path)
    graph = both_stories[name]
    step = f"sae_steer{{sae={str(folder)!r} {LISTED} mode=clamp value=3 where='2:'}}"
    steered = apply(graph, step)
    compiled = ag.compile(ag.run(graph, f"{step}, kv_cache").program, engine)
    claims = compiled.claims["decode"]
    assert any("latent_edit" in node for node in claims.claimed), (claims.claimed, claims.unclaimed)
    begin = [1, 403, 407, 261]
    made_tokens = list(ag.generate(compiled, begin, 8, stop_at_end=False).tokens)
    for model, same in ((steered, True), (graph, False)):
        ids = list(begin)
        for _ in range(8):
            row = np.array([ids], np.int64)
            inputs = {"input_ids": row, "attention_mask": np.ones_like(row), "position_ids": np.arange(len(ids))[None]}
            ids.append(int(run(model, inputs)[0, -1].argmax()))
        assert (ids[len(begin) :] == made_tokens) is same


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ("latents=[96] mode=ablate", InputError, "has 96 latents, and no latent 96"),
        ("latents=[3, 3] mode=ablate", InputError, "latent 3 is named twice"),
        ("latents=[] mode=ablate", OptionError, "latents"),
        ("latents=[3] mode=clamp", PassError, "mode=clamp needs a value"),
        ("latents=[3] mode=ablate value=2", PassError, "mode=ablate takes no value"),
        ("latents=[3] mode=add value=[1.0, 2.0]", PassError, "2 values for 1 latents"),
        ("latents=[3] mode=negate value=1", OptionError, "mode"),
        ("latents=[3] mode=add value=1 where=''", OptionError, "where"),
        ("latents=[3] mode=ablate site=blocks.1.resid_post", InputError, r"was trained at blocks\.2\.hook_resid_post"),
        ("latents=[3] mode=ablate site=blocks.1.mlp.hidden other_site=allow", InputError, "reads 64 channels"),
        ("latents=[3] mode=ablate axis=1", InputError, "reads 64 channels, but"),
        ("latents=[3] mode=ablate input_scale=2", InputError, "does not scale its input"),
    ],
)
def test_refused(tmp_path: Path, options: str, error: type[Exception], message: str) -> None:
    _, folder = made(tmp_path)
    stories = in_dialect("stories260k", "fx")
    before = stories.content_hash()
    with pytest.raises(error, match=message):
        apply(stories, f"sae_steer{{sae={str(folder)!r} {options}}}")
    assert stories.content_hash() == before


def test_another_model_is_refused(stories: Graph, tmp_path: Path) -> None:
    folder = write_sae(tmp_path / "sae", random_sae(scale=SIZE), model_name="gemma-2-2b")
    with pytest.raises(InputError, match="was trained on gemma-2-2b, and the model is stories260k"):
        apply(stories, f"sae_steer{{sae={str(folder)!r} {LISTED} mode=ablate}}")
    forced = apply(stories, f"sae_steer{{sae={str(folder)!r} {LISTED} mode=ablate other_model=allow}}")
    assert relative(run(stories), run(forced)) > 1e-2


def test_a_layout_of_images(tmp_path: Path) -> None:
    """The channels of [batch, channels, height, width] are what the SAE reads, at every place."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 2, 1)).eval()
    x = np.random.default_rng(0).normal(0, 1, (2, 3, 5, 6)).astype(np.float32)
    graph = ag.trace(net, (torch.from_numpy(x),), name="net")
    sae = random_sae("jumprelu", 8, 20, scale=SIZE)
    folder = write_sae(tmp_path / "sae", sae, hook_name="conv.0:out", model_name="")
    steered = apply(graph, f"sae_steer{{sae={str(folder)!r} latents=[1, 6] mode=clamp value=2 axis=1}}")
    with torch.no_grad():
        h = net[0](torch.from_numpy(x)).movedim(1, -1).double()
        want = net[1](sae.steer(h, at(lambda f: 0 * f + 2, [1, 6])).movedim(-1, 1).float()).numpy()
    name = graph.inputs()[0].name
    assert relative(want, next(iter(steered.run({name: x}).values()))) < 1e-5
    assert relative(want, next(iter(graph.run({name: x}).values()))) > 1e-2


def test_reading_some_latents_of_the_file_is_enough(tmp_path: Path) -> None:
    """What the pass reads is what the whole file has at these latents."""
    _, folder = made(tmp_path, "gated")
    np.testing.assert_array_equal(load_sae(folder, CHOSEN).encoder, load_sae(folder).chosen(CHOSEN).encoder)
