"""``actgraph verify``: promises are checked by running, and what could not be checked is not ok."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.pipeline import ROUNDING, UNBOUNDED, Pass, PassContext, PassResult, registry

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
