"""Angular Steering: against forward hooks, the target angle, gated tokens, run-time angles, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.errors import OptionError
from actgraph.graph import Graph
from actgraph.graph.graph import Array
from tests import zoo
from tests.passes.conftest import apply, relative, run, token_inputs
from tests.passes.planes import NORMS, a_plane, angle_of, apart, hooked, module_of, seen, sent

SITES = NORMS[2:6]
LAST = "blocks.2.mlp.norm"  # the last one: what is seen there is what the others left


@pytest.fixture
def plane(tmp_path: Path) -> tuple[str, Array]:
    return a_plane(tmp_path, SITES, SITES[:2])


def outside(h: Array, basis: Array) -> Array:
    wide = basis.astype(np.float64)
    return h - (h @ wide) @ wide.T


def test_equals_forward_hooks(stories: Graph, plane: tuple[str, Array], tmp_path: Path) -> None:
    file, basis = plane
    result = ag.run(stories, f"angular_steer{{plane={file!r} angle=200}}")
    assert result.report[0].counts == {"inserted": 4}
    steered, modules = run(result.graph), [module_of(name) for name in SITES]
    assert relative(hooked(modules, lambda h: sent(h, basis, 200)), steered) < 1e-5
    for wrong, degrees in ((modules, 160), (modules[1:], 200)):
        assert relative(hooked(wrong, lambda h, degrees=degrees: sent(h, basis, degrees)), steered) > 1e-2  # type: ignore[misc]
    for inline in ("none", "all"):
        path = tmp_path / f"{inline}.onnx"
        result.graph.save(path, inline=inline)
        assert relative(steered, run(ag.load(path))) < 1e-5
    selected = apply(stories, f"angular_steer{{plane={file!r} angle=200 layers=selected}}")
    assert relative(hooked(modules[:2], lambda h: sent(h, basis, 200)), run(selected)) < 1e-5


@pytest.mark.parametrize("degrees", [0.0, 45.0, 180.0, 300.0, -30.0])
def test_every_token_ends_at_the_angle(dialect: str, plane: tuple[str, Array], degrees: float) -> None:
    """(e) of the card: the angle is the target, the length in the plane and the rest of the token stay, and so the norm."""
    file, basis = plane
    graph = zoo.captured("stories260k") if dialect == "fx" else zoo.exported("stories260k")
    before = seen(graph, [LAST])[LAST]
    after = seen(apply(graph, f"angular_steer{{plane={file!r} angle={degrees} site={LAST}}}"), [LAST])[LAST]
    assert apart(angle_of(after, basis), degrees) < 1e-3
    assert apart(angle_of(before, basis), degrees) > 30
    lengths = [np.linalg.norm(h.astype(np.float64) @ basis, axis=-1) for h in (before, after)]
    np.testing.assert_allclose(lengths[1], lengths[0], rtol=1e-5)
    np.testing.assert_allclose(outside(after, basis), outside(before, basis), atol=1e-5)
    norms = [np.linalg.norm(h.astype(np.float64), axis=-1) for h in (before, after)]
    assert (np.abs(norms[1] - norms[0]) / norms[0]).max() < 1e-6


def test_adaptive_leaves_tokens_below_the_threshold(dialect: str, tmp_path: Path) -> None:
    file, basis = a_plane(tmp_path, seed=7)  # tokens lie on both sides of zero along its first axis
    graph = zoo.captured("stories260k") if dialect == "fx" else zoo.exported("stories260k")
    before = seen(graph, [LAST])[LAST]
    first = before @ basis[:, 0]
    for threshold in (0.0, float(np.quantile(first, 0.7))):
        step = f"angular_steer{{plane={file!r} angle=240 site={LAST} adaptive=true threshold={threshold!r}}}"
        made = apply(graph, step)
        after, gated = seen(made, [LAST])[LAST], first > threshold + 1e-6
        assert 0 < gated.sum() < gated.size and not (np.abs(first - threshold) < 1e-6).any()
        assert np.array_equal(after[~gated], before[~gated])
        assert apart(angle_of(after[gated], basis), 240) < 1e-3
        want = hooked([module_of(LAST)], lambda h, t=threshold: sent(h, basis, 240, t))  # type: ignore[misc]
        assert relative(want, run(made)) < 1e-5


def test_angles_of_rows_at_run_time(stories: Graph, plane: tuple[str, Array]) -> None:
    """Two inputs: whether a row is steered, and its angle; without them it is the model bit for bit."""
    file, _ = plane
    given = apply(stories, f"angular_steer{{plane={file!r} angle=input}}")
    assert np.array_equal(run(given), run(stories))
    told = {**token_inputs(), "angular_steer.angle": np.array([77.0, 250.0], np.float32)}
    assert np.array_equal(given.run(told)["logits"], run(stories)), "an angle alone does not steer"
    on = given.run({**told, "angular_steer.scale": np.array([0.0, 1.0], np.float32)})["logits"]
    fixed = run(apply(stories, f"angular_steer{{plane={file!r} angle=250}}"))
    assert np.array_equal(on[0], run(stories)[0]) and relative(fixed[1], on[1]) < 1e-5
    always = apply(stories, f"angular_steer{{plane={file!r} angle=input scale=1}}")
    assert [value.name for value in always.inputs()][-1] == "angular_steer.angle"
    toward = run(apply(stories, f"angular_steer{{plane={file!r} angle=0}}"))
    assert relative(toward, run(always)) < 1e-6 < 1e-2 < relative(run(stories), run(always))
    strength = apply(stories, f"angular_steer{{plane={file!r} angle=250 scale=input}}")
    half = strength.run({**token_inputs(), "angular_steer.scale": np.full(2, 0.5, np.float32)})["logits"]
    assert np.array_equal(run(strength), run(stories))
    assert relative(run(apply(stories, f"angular_steer{{plane={file!r} angle=250 scale=0.5}}")), half) < 1e-5


def test_scale_zero_is_the_identity(stories: Graph, plane: tuple[str, Array]) -> None:
    off = ag.run(stories, f"angular_steer{{plane={plane[0]!r} angle=30 scale=0}}")
    assert off.report[0].counts == {"identity": 4} and np.array_equal(run(off.graph), run(stories))


def test_with_a_clause_and_quantized_weights(stories: Graph, plane: tuple[str, Array]) -> None:
    """Tokens before the clause stay bit for bit; the edit is found again behind a quantizer of weights."""
    file, basis = plane
    step = f"angular_steer{{plane={file!r} angle=120 where=4: site={LAST}}}"
    before, after = seen(stories, [LAST])[LAST], seen(apply(stories, step), [LAST])[LAST]
    assert np.array_equal(after[:, :4], before[:, :4])
    np.testing.assert_allclose(after[:, 4:], sent(torch.from_numpy(before[:, 4:]), basis, 120).numpy(), atol=1e-5)
    both = apply(stories, f"{step}, quantize{{weights=int8}}")
    assert any(node.op == "actgraph.target_angle" for node in both.nodes())
    assert relative(run(apply(stories, step)), run(both)) < 0.05


def test_then_selective(stories: Graph, plane: tuple[str, Array]) -> None:
    """Sent to 20 degrees and turned by 55 is sent to 75; turned first, it is sent to 20 all the same."""
    file, _ = plane
    send, turn = (f"{name}{{plane={file!r} site={LAST} angle=%d}}" for name in ("angular_steer", "selective_steer"))
    send, turn = send % 20, turn.replace("}", " fold=false}") % 55
    both = run(apply(stories, f"{send}, {turn}"))
    assert relative(run(apply(stories, f"angular_steer{{plane={file!r} site={LAST} angle=75}}")), both) < 1e-5
    assert relative(run(apply(stories, send)), run(apply(stories, f"{turn}, {send}"))) < 1e-5


@pytest.mark.parametrize("options", ["", "angle=nan", "angle=1 scale=inf", "angle=1 threshold=inf", "angle=left"])
def test_refusals(plane: tuple[str, Array], options: str) -> None:
    with pytest.raises(OptionError) as caught:
        apply(zoo.captured("stories260k"), f"angular_steer{{plane={plane[0]!r} {options}}}")
    assert "angular_steer" in str(caught.value)
