"""``actgraph verify``: promises are checked by running, and what could not be checked is not ok."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.cli import verify
from actgraph.cli.verify import FLIPPED_CODES, activation_quantizers, check_exports, check_pipeline
from actgraph.pipeline import ROUNDING, UNBOUNDED, Pass, PassContext, PassResult, registry
from tests import zoo

Cli = Callable[..., Any]


class Scale(Pass):
    """Multiplies the result of the first linear, and says that it moves the outputs by at most ``size``."""

    name: ClassVar[str] = "toy_verify_scale"
    family: ClassVar[str] = "toy"
    factor: float = 2.0
    size: float = ROUNDING

    def run(self, graph: ag.Graph, context: PassContext) -> PassResult:
        with context.edit(graph) as editor:
            editor.insert_at(graph.site("linear.0"), "mul", [np.float32(self.factor)])
        result = PassResult(expected_change="scaled", expected_size=self.size)
        result.counts["scaled"] = 1
        return result


class Rename(Pass):
    """Takes every output away and gives another one."""

    name: ClassVar[str] = "toy_verify_rename"
    family: ClassVar[str] = "toy"

    def run(self, graph: ag.Graph, context: PassContext) -> PassResult:
        with context.edit(graph) as editor:
            for name, value in list(graph.outputs()):
                editor.add_output(value, f"{name}_renamed")
                editor.remove_output(name)
        result = PassResult(expected_change="renamed", expected_size=UNBOUNDED)
        result.counts["renamed"] = 1
        return result


@pytest.fixture(autouse=True)
def _passes() -> Iterator[None]:
    for cls in (Scale, Rename):
        registry.register(cls)
    yield
    for cls in (Scale, Rename):
        registry.unregister(cls.name)


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    graph = ag.trace(net, (torch.zeros(2, 4),), dynamic={"input": ("batch", None)})
    return graph.save(tmp_path_factory.mktemp("mlp") / "mlp.onnx")


def test_a_broken_promise_fails_and_the_checks_behind_it_still_run(cli: Cli, mlp: Path) -> None:
    shown = cli("verify", mlp, "-p", "toy_verify_scale, clip{site=activation.0 max=1.0}", "--json")
    checks = shown.json["checks"]
    assert shown.code == 1 and shown.json["ok"] is False
    assert [check["ok"] for check in checks] == [False, *[True] * (len(checks) - 1)]
    assert checks[0]["what"] == "toy_verify_scale: keeps its promise"
    assert "promises 'scaled' within 1e-05" in checks[0]["detail"]
    assert checks[1]["what"].startswith("clip") and "keeps its promise" in checks[1]["what"] and checks[1]["change"] > 0
    assert any("exported ONNX, inlined" in check["what"] for check in checks)


@pytest.mark.parametrize(("size", "detail"), [(1.5, "declared: <= 2"), ("inf", "finite (no bound is known)")])
def test_a_kept_promise_says_what_was_declared(cli: Cli, mlp: Path, size: object, detail: str) -> None:
    shown = cli("verify", mlp, "-p", f"toy_verify_scale{{size={size}}}", "--json")
    assert shown.code == 0, shown.out
    assert shown.json["checks"][0]["detail"] == detail and 0.1 < shown.json["checks"][0]["change"] < 1.5


def test_new_infinities_fail_whatever_was_declared(cli: Cli, mlp: Path) -> None:
    shown = cli("verify", mlp, "-p", "toy_verify_scale{factor=inf size=inf}", "--json")
    assert shown.code == 1 and "became NaN or infinite" in shown.json["checks"][0]["detail"]


def test_what_was_not_checked_is_not_ok(cli: Cli, mlp: Path) -> None:
    shown = cli("verify", mlp, "-p", "toy_verify_rename")
    assert shown.code == 1
    (line,) = [line for line in shown.out.splitlines() if line.startswith("NOT CHECKED")]
    assert "keeps its promise" in line and "no output of before is left" in line
    data = cli("verify", mlp, "-p", "toy_verify_rename", "--json").json
    assert (data["ok"], data["checks"][0]["ok"], data["checks"][0]["checked"]) == (False, False, False)


def test_agreement_about_nan_is_not_ok(cli: Cli, mlp: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "nan.npz", input=np.full((2, 4), np.nan, np.float32))
    same = cli("verify", mlp, mlp, "--inputs", tmp_path / "nan.npz")
    assert same.code == 1 and "NOT CHECKED" in same.out and "all NaN on both sides" in same.out
    refused = cli("verify", mlp, "-p", "clip{site=activation.0 max=1.0}", "--inputs", tmp_path / "nan.npz")
    assert refused.code == 2 and "gives no numbers but NaN" in refused.err
    assert cli("verify", mlp, mlp).code == 0


def test_flipped_codes_are_allowed_as_a_share_of_what_the_pass_declares(cli: Cli, mlp: Path, tmp_path: Path) -> None:
    """Another order of sums makes a number on the border of two codes take the other one: a whole step, in few places."""
    shown = cli("verify", "stories260k", "-p", "quantize{activations=dynamic}", "--json")
    assert shown.code == 0, shown.out
    exports = [check for check in shown.json["checks"] if "exported" in check["what"]]
    assert len(exports) == 2
    for check in exports:  # equal or above the tolerance, and then it says why
        assert check["change"] <= 1e-4 + FLIPPED_CODES and ("may flip" in check["detail"]) == (check["change"] > 1e-4)
    assert exports[0]["change"] == pytest.approx(exports[1]["change"], rel=0.01), "kept and inlined files agree"


def test_only_quantizers_of_activations_loosen_the_comparison_of_exports(tmp_path: Path) -> None:
    graph = zoo.captured("stories260k")
    weights = ag.run(graph, "quantize", parity="none").graph
    both = ag.run(graph, "quantize{activations=dynamic}", parity="none").graph
    assert activation_quantizers(graph) == activation_quantizers(weights) == 0 < activation_quantizers(both)
    inputs = [ag.sample_inputs(graph, batch=1, seq=3)]

    def off(flips: float) -> list[bool]:
        """Checks of a model whose files are made from another one."""
        broken = both.clone()
        broken.save = lambda path, **_: weights.save(path)  # type: ignore[method-assign]
        return [check.ok for check in check_exports(broken, tmp_path, inputs, 1e-4, flips)]

    assert off(0.0) == [False, False] and off(1.0) == [True, True]

    def tolerances(pipeline: str) -> list[float]:
        seen: list[float] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(verify, "check_exports", lambda *args: seen.append(args[4]) or iter(()))
            list(check_pipeline(graph, ag.Pipeline.parse(pipeline), None, inputs, 1e-4, quiet=True))
        return seen

    assert tolerances("quantize") == [0.0] and tolerances("quantize{activations=dynamic}") == [FLIPPED_CODES]
