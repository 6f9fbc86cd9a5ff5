"""Sessions on a CUDA device: what can be shown without one, and all of it where there is one.

Operands that lie on different devices are refused, on the device without memory (``meta``) as on others. For numbers, the CPU
stands in for the device: the same code runs, and the kernels through Triton's interpreter.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import fx

import actgraph as ag
from actgraph.errors import InputError, UnsupportedError
from actgraph.graph.fx import FxGraph
from actgraph.graph.slots import slots_of
from actgraph.runtime import torch_device
from actgraph.runtime.kernels.triton import register
from actgraph.runtime.torch_device import Placed, find_device, install_kernels, move
from actgraph.runtime.torch_engine import TorchExecutor, TorchRunner
from actgraph.runtime.torch_held import HeldGraph
from tests import zoo

try:
    from tests.runtime import interpreted  # before anything imports the kernels compiled
except pytest.skip.Exception:
    interpreted = None  # type: ignore[assignment]

needs_triton = pytest.mark.skipif(interpreted is None, reason="Triton is not installed")
CUDA = torch.cuda.is_available()
PASSES = "sparsify{method=teal threshold=0.3}, quantize{weights=int8}, kv_cache{form=FORM last_logits=true}"


def program(name: str = "llama", passes: str = PASSES, form: str = "growing") -> ag.Program:
    return ag.run(zoo.captured(name), passes.replace("FORM", form), parity="none", reproducer=False).program


# --- which device -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tpu", "cuda:", "cuda:x", "cuda:-1", "", "cpu:", "CUDA"])
def test_no_such_device(name: str) -> None:
    with pytest.raises(InputError, match="there is no device") as error:
        find_device(name)
    assert "cuda:1" in (error.value.hint or "")


@pytest.mark.skipif(CUDA, reason="there is a CUDA device")
def test_no_cuda() -> None:
    graph = zoo.captured("mlp")
    with pytest.raises(UnsupportedError, match=r"there is no CUDA device: torch .* was built without CUDA") as error:
        ag.compile(graph, device="cuda")
    assert error.value.hint == "use device='cpu'"
    with pytest.raises(UnsupportedError, match="onnxruntime runs on the CPU here, not on cuda"):
        ag.compile(graph, "onnxruntime", device="cuda")


def test_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert find_device("cuda") == find_device("cuda:1") == torch.device("cuda", 1)
    assert find_device("cuda:0") == torch.device("cuda", 0) and find_device("cpu") is None
    with pytest.raises(InputError, match="there is no device 'cuda:2': torch sees 2"):
        find_device("cuda:2")


# --- kernels ------------------------------------------------------------------------------------------------------------------


def test_kernels_are_installed_for_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(torch_device, "install_kernels", lambda device: asked.append(device) or False)
    model = zoo.captured("mlp")
    for engine in ("torch", "onnxruntime"):
        ag.compile(model, engine)
        ag.compile(model, engine, kernels=False)
    assert asked == []
    monkeypatch.setattr(torch_device, "find_device", lambda name: torch.device("cpu"))
    ag.compile(model, device="cuda", kernels=False)
    assert asked == []
    ag.compile(model, device="cuda")
    assert asked == [torch.device("cpu")]
    with pytest.raises(UnsupportedError, match="there are no Triton kernels on cpu"):
        ag.compile(model, device="cuda", require_kernels=True)


def test_why_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line says so, once; a device that can have them gets them."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device.index else (8, 0))
    monkeypatch.setattr(torch_device, "_SAID", [])
    installed: list[bool] = []
    monkeypatch.setattr(register, "install", lambda device: installed.append(True) or True)
    assert not install_kernels(torch.device("cuda:1")) and not install_kernels(torch.device("cuda:1")) and not installed
    line = "actgraph: no Triton kernels on cuda:1: its compute capability is below 8.0; everything runs without them, slower\n"
    assert capsys.readouterr() == ("", line)
    monkeypatch.setattr(register.importlib.util, "find_spec", lambda name: None)
    assert "not installed (pip install 'actgraph[triton]')" in register.why_not(torch.device("cuda:0"))
    monkeypatch.setattr(register.importlib.util, "find_spec", lambda name: name)
    assert install_kernels(torch.device("cuda:0")) and installed


def test_the_device_that_was_asked_for_is_what_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside an older device that is torch's current one kernels are installed, and are none of the older one's."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device=None: (8, 0) if device is not None and device.index else (7, 5)
    )
    monkeypatch.setattr(register.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(register, "_LIBRARY", None)
    monkeypatch.setattr(register, "implement", lambda library, key: None)
    monkeypatch.setattr(register, "triton_kernels", lambda: ())
    assert install_kernels(torch.device("cuda:1")) and register.usable(torch.device("cuda:1"))
    assert not register.install(torch.device("cuda:0")) and not register.usable()
    assert capsys.readouterr() == ("", "")


def test_the_cpu_needs_no_triton() -> None:
    """Where importing it fails, sessions on the CPU run, with kernels."""
    code = """
import sys
sys.modules["triton"] = None
import numpy as np, actgraph as ag
from tests import zoo
model = ag.run(zoo.captured("llama"), "sparsify{method=teal threshold=0.3}, fuse, kv_cache", parity="none").program
compiled = ag.compile(model)
assert np.isfinite(compiled.session().feed(np.array([[3, 4]]))["logits"]).all() and compiled.claims["decode"].claimed
assert not [name for name in sys.modules if name.startswith("triton") and sys.modules[name] is not None]
ours = {name for name in sys.modules if name.startswith("actgraph.runtime.kernels.triton.")}
assert ours <= {"actgraph.runtime.kernels.triton.register"}, ours
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


# --- everything is on the device ----------------------------------------------------------------------------------------------

META = torch.device("meta")


def bare(graph: FxGraph, seq: int, used: int) -> dict[str, torch.Tensor]:
    """Inputs of a graph on ``META``, slots with room as a state has it."""
    sizes, made = {"batch": 2, "seq": seq}, {}
    slots = {slot.input: slot for slot in slots_of(graph).values()}
    for value in graph.inputs():
        assert value.shape is not None and value.dtype is not None
        shape = [size if isinstance(size, int) else sizes.get(str(size), used + seq) for size in value.shape]
        if value.name in slots and slots[value.name].update == "append":
            shape[2] = 32
        made[value.name] = torch.zeros(shape, dtype=value.dtype.torch, device=META)
    return made


@pytest.mark.parametrize(("name", "form"), [("llama", "growing"), ("gemma3", "ring"), ("opt", "static")])
def test_held_graphs_lie_on_one_device(name: str, form: str) -> None:
    placed = Placed(META)
    for graph in program(name, form=form).graphs.values():
        assert isinstance(graph, FxGraph)
        held = HeldGraph(graph, placed=placed)
        assert held.weights and {weight.device for weight in held.weights} == {META}
        seq = next(iter(graph.inputs())).shape[1]  # type: ignore[index]
        results = held(bare(graph, seq if isinstance(seq, int) else 5, 3), 3)
        assert results and {result.device for result in results.values()} == {META}


def run_bare(name: str) -> set[torch.device]:
    """The devices of the results of a graph that was opened for ``META``."""
    graph = zoo.captured(name)
    inputs = {**graph.defaults, **zoo.inputs(name)}
    runner = TorchExecutor(Placed(META)).open(graph)
    assert isinstance(runner, TorchRunner)
    with torch.no_grad():
        results = runner.run(*(torch.from_numpy(np.asarray(inputs[name])).to(META) for name in runner.order))
    return {result.device for result in results}


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit", "mlp"])
def test_opened_graphs_lie_on_one_device(name: str) -> None:
    assert run_bare(name) == {META}


def test_what_stays_behind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail: of a graph that makes tensors on the CPU."""
    monkeypatch.setattr(torch_device, "move", lambda native, device: None)
    with pytest.raises(RuntimeError, match="device"):
        run_bare("t5")


def test_branches_are_moved() -> None:
    """Tensors that branches of control flow make, and those that no operand places."""

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            def up(x: torch.Tensor) -> torch.Tensor:
                return x + torch.arange(3)

            def down(x: torch.Tensor) -> torch.Tensor:
                return x.to("cpu") - torch.full((3,), 2)

            return torch.cond(x.sum() > 0, up, down, (x,)) + torch.ones(3)

    module = torch.export.export(Model(), (torch.ones(2, 3),)).module()
    assert isinstance(module, fx.GraphModule)
    moved = Placed(META).module(module.graph, module)
    branches = [child for child in moved.children() if isinstance(child, fx.GraphModule)]
    assert len(branches) >= 2
    for branch in branches:
        result = branch(torch.ones(2, 3, device=META))
        assert not isinstance(result, tuple) or result[0].device == META


def test_made_from_nothing() -> None:
    native = fx.Graph()
    made = native.call_function(torch.ops.aten.full.default, ([2], 1.0))
    other = native.call_function(torch.ops.aten.zeros_like.default, (made,))
    native.output(other)
    move(native, torch.device("meta"))
    assert made.kwargs == {"device": torch.device("meta")} and other.kwargs == {}


# --- numbers ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stands_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The CPU in the place of the device, with the kernels; the list collects the names of those that ran."""
    ran: list[str] = []
    found = register.triton_kernels()

    def spied() -> Iterator[object]:
        for kernel in found:

            def run(*operands: object, kernel: object = kernel, **attributes: object) -> object:
                ran.append(kernel.op)  # type: ignore[attr-defined]
                return kernel.implementation(*operands, **attributes)  # type: ignore[attr-defined]

            yield type(kernel)(kernel.op, kernel.name, kernel.engine, kernel.device, kernel.claims, run)

    spies = tuple(spied())
    with interpreted.library(), torch.library._scoped_library("actgraph", "IMPL") as library:
        monkeypatch.setattr(register, "triton_kernels", lambda: spies)
        if CUDA:
            assert register.install()
        else:
            register.implement(library, "CPU")
            monkeypatch.setattr(torch_device, "find_device", lambda name: torch.device("cpu"))
            monkeypatch.setattr(torch_device, "install_kernels", lambda device: True)
        yield ran


def converse(compiled: ag.Compiled, batch: int) -> list[np.ndarray]:
    session, rng = compiled.session(batch), np.random.default_rng(3)
    return [session.feed(rng.integers(3, 90, (batch, count)))["logits"] for count in (4, 1, 1)]


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
@pytest.mark.parametrize("form", ["growing", "static"])
def test_sessions_give_the_same_by_triton(stands_in: list[str], form: str) -> None:
    """Gated int8 linears and steering; and each claimed node ran by its kernel, in each call."""
    model = program(form=form)
    expected = converse(ag.compile(model, kernels=False), 2)
    assert stands_in == []
    made = ag.compile(model, device="cuda")
    found = converse(made, 2)
    for a, b in zip(found, expected, strict=True):
        assert isinstance(a, np.ndarray) and np.abs(a - b).max() <= 1e-4 * np.abs(b).max()
    assert made.claims is not None
    counts = [len(made.claims[stage].claimed) for stage in ("prefill", "decode")]
    assert len(stands_in) == counts[0] + 2 * counts[1] and min(counts) >= 14
    assert set(stands_in) == {"linear", "gate"}, "prompts have their gates in front of products"
    assert not any("attention" in node for claims in made.claims.values() for node in claims.unclaimed)


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
def test_graphs_without_slots_by_triton(stands_in: list[str]) -> None:
    vector = np.random.default_rng(0).standard_normal(zoo.WIDTH).astype(np.float32)
    graph = zoo.captured("llama")
    with graph.edit("test") as editor:
        editor.insert_at(graph.sites("blocks.0.resid_post")[0], "actgraph.shift", [vector], {"scale": 0.5})
    inputs = zoo.inputs("llama")
    made = ag.compile(graph, device="cuda")
    found, expected = made(inputs)["logits"], graph.run(inputs)["logits"]
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max() and stands_in == ["shift"]
    assert made.claims is not None and [list(each.claimed.values()) for each in made.claims.values()] == [["shift triton"]]


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
def test_weights_are_placed_once(stands_in: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all graphs and sessions."""
    placed: list[Placed] = []
    begin = Placed.__init__
    monkeypatch.setattr(Placed, "__init__", lambda self, device: (placed.append(self), begin(self, device))[1])
    made = ag.compile(program(passes="kv_cache{form=FORM}"), device="cuda")
    sessions = [made.session() for _ in range(3)]
    assert len(placed) == 1
    before = len(placed[0]._made)
    for session in sessions:
        session.feed(np.array([[3, 4, 5]]))
        session.feed(np.array([[3]]))
    held = made._held
    assert held is not None and len(placed[0]._made) == before
    pointers = [{weight.data_ptr() for weight in graph.weights} for graph in held.values()]
    assert len(pointers) == 2 and pointers[0] == pointers[1] and len(pointers[0]) == before
