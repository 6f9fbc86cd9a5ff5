"""Where rounding moves channels over thresholds, a cache is shown on a copy whose gates are open, and the jump is reported."""

from __future__ import annotations

from typing import Any

import pytest

import actgraph as ag
from actgraph.errors import PassError
from actgraph.passes.cache import proof
from tests import zoo


@pytest.fixture
def jumps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for a model whose results jump: with gates no proof succeeds."""
    real = proof.reproduces

    def reproduces(before: ag.Graph, after: ag.Graph, *more: Any) -> float:
        if any(node.op in ("actgraph.gate", "actgraph.topk_gate") for node in (*before.nodes(), *after.nodes())):
            raise PassError("kv_cache: with a cache the logits move by 0.1 relative")
        return real(before, after, *more)

    monkeypatch.setattr(proof, "reproduces", reproduces)


@pytest.mark.usefixtures("jumps")
@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_gates_are_open_where_they_jump(dialect: str) -> None:
    graph = zoo.captured("llama") if dialect == "fx" else zoo.exported("llama")
    result = ag.run(graph, "sparsify{threshold=0.2}, kv_cache", parity="none", reproducer=False)
    assert "with gates that rounding opens and closes: logits move by" in str(result.report)
    after = next(iter(result.program.graphs.values()))
    assert any(node.op in ("actgraph.gate", "actgraph.topk_gate") for node in after.nodes())


@pytest.mark.usefixtures("jumps")
def test_what_is_no_gate_is_no_excuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "TOLERANCE", -1.0)
    for passes in ("kv_cache", "sparsify{threshold=0.2}, kv_cache"):
        with pytest.raises(PassError, match=r"relative|see later ones"):
            ag.run(zoo.captured("llama"), passes, parity="none", reproducer=False)
