"""Bytes of weights per second that products of one token touch, weights cold, beside the fastest read loop there is.

    python benchmarks/kernels.py                                              # all shapes, formats and gates
    python benchmarks/kernels.py --shapes 768x2048 --formats int8 int4 --gates 0 50 --peers

A shape is inputs x outputs. There are as many copies of a weight as exceed ``--cold`` bytes together, and each is used once in
turn. In a round the read stream, our kernel and each peer are measured one after the other; figures are medians over rounds,
ratios to the stream are medians of the ratios within a round. Touched are the codes of the inputs that the gate leaves, and the
scales of their groups. ``of_rows``: beside a loop that reads the same rows of the weight and computes nothing, four rows at a
time and prefetched, which is what memory gives where every second row is skipped.
``error`` is the largest difference from the product in float64 with the stored weight, relative to the largest output: that of
rounding the inputs, where a kernel does.

Peers: torch (``linear`` in float32, bfloat16), onnxruntime (MatMul, and MatMulNBits with groups of 32 and accuracy level 4),
the copies as nodes of one graph, so that a session is called once for all. They are dense: gates have no peer here.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import common
import numpy as np
from common import Bandwidth, round_to

SHAPES = ("768x768", "768x2048", "2048x768", "768x32000", "2048x8192", "8192x2048", "4096x4096", "4096x11008", "11008x4096")
FORMATS = ("f32", "bf16", "int8", "int8-groups", "int4")
GATES = (0, 50, 70)
GROUP = 32
#: Bytes touched per second, as a part of the stream, that kernels should reach.
GOALS = {"f32": 0.85, "bf16": 0.85, "int8": 0.85, "int8-groups": 0.85, "int4": 0.75}

#: Runs all copies once.
Pass = Callable[[], None]
Result = Callable[[], np.ndarray]


@dataclass
class Stored:
    """A weight [outputs, inputs] in a format: codes (packed two a byte for int4), scales, and the values they stand for."""

    codes: np.ndarray
    scale: np.ndarray | None
    values: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + (self.scale.nbytes if self.scale is not None else 0)


def store(weight: np.ndarray, form: str) -> Stored:
    """Symmetric codes: int8 per output or per group of inputs, int4 per group with zero point 8."""
    outputs, inputs = weight.shape
    if form == "f32":
        return Stored(weight, None, weight)
    if form == "bf16":
        import ml_dtypes

        codes = weight.astype(ml_dtypes.bfloat16)
        return Stored(codes, None, codes.astype(np.float32))
    group = inputs if form == "int8" else GROUP
    top = 7 if form == "int4" else 127
    blocks = weight.reshape(outputs, -1, group)
    scale = np.maximum(np.abs(blocks).max(-1), 1e-12) / np.float32(top)
    codes = np.rint(blocks / scale[..., None]).astype(np.int8)
    values = (codes * scale[..., None]).astype(np.float32).reshape(weight.shape)
    codes = codes.reshape(weight.shape)
    if form == "int4":
        points = (codes + 8).astype(np.uint8)
        return Stored(points[:, ::2] | points[:, 1::2] << 4, scale, values)
    return Stored(codes, scale[:, 0] if form == "int8" else scale, values)


def touched_bytes(stored: Stored, x: np.ndarray) -> float:
    """Of a weight: the codes of inputs that are not 0, and the scales of outputs, or of groups with such an input."""
    codes = stored.codes.nbytes * np.count_nonzero(x) / x.size
    if stored.scale is None or stored.scale.ndim == 1:
        return codes + (0 if stored.scale is None else stored.scale.nbytes)
    return codes + stored.scale.nbytes * x.reshape(stored.scale.shape[1], -1).any(-1).mean()


def by_inputs(stored: Stored, form: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Codes and scales of a weight stored as [inputs, outputs], of which a gate skips rows."""
    if form != "int4":
        scale = stored.scale
        return np.ascontiguousarray(stored.codes.T), scale.T.copy() if scale is not None and scale.ndim == 2 else scale
    assert stored.scale is not None
    points = np.empty((len(stored.codes), stored.codes.shape[1] * 2), np.uint8)
    points[:, ::2], points[:, 1::2] = stored.codes & 15, stored.codes >> 4
    turned = points.T
    return turned[:, ::2] | turned[:, 1::2] << 4, stored.scale.T.copy()


def several(array: np.ndarray, copies: int) -> list[np.ndarray]:
    """Copies of an array, one after the other in one piece of memory: pages are large in large pieces alone.

    Each has another element changed: onnxruntime keeps equal initializers once.
    """
    step = (array.nbytes + 63) // 64 * 64
    memory = np.empty(copies * step + 64, np.uint8)
    start = -memory.ctypes.data % 64
    made = []
    for copy in range(copies):
        place = start + copy * step
        own = memory[place : place + array.nbytes].view(array.dtype).reshape(array.shape)
        own[...] = array
        if copy:
            own.reshape(-1).view(np.uint8)[copy * array.itemsize % array.nbytes] ^= 1
        made.append(own)
    return made


# --- our kernel ---------------------------------------------------------------------------------------------------------------


def open_actgraph_kernel(
    form: str, stored: Stored, copies: int, x: np.ndarray, gated: bool, threads: int
) -> tuple[Pass, Result, str]:
    """``actgraph.linear`` on ``copies`` copies: by the kernel of ours, called as the engines call it, or where there is none
    by the reference. Drops zeros of x when gated. Returns what runs all copies, what gives the result, and who computes."""
    codes, scale = by_inputs(stored, form) if gated else (stored.codes, stored.scale)
    attributes: dict[str, Any] = {"layout": "in_out" if gated else "out_in"}
    attributes |= {"keep": "abs>", "threshold": 0.0} if gated else {}
    attributes |= {"block_size": GROUP} if form in ("int8-groups", "int4") else {}
    if form == "int4":  # sessions store codes around a zero point of 8 as the signed codes that they are
        codes, attributes = codes ^ np.uint8(0x88), attributes | {"packed": "i4"}
    operands = [[x, own, None if scale is None else scale.copy()] for own in several(codes, copies)]
    try:
        return _by_kernel(operands, attributes, threads)
    except _NoKernelError as error:
        return _by_reference(operands, attributes, threads, str(error))


class _NoKernelError(Exception):
    pass


def _by_kernel(operands: list[list[Any]], attributes: dict[str, Any], threads: int) -> tuple[Pass, Result, str]:
    try:
        import ctypes

        from actgraph.ops.dtypes import DType
        from actgraph.ops.shapes import TensorType
        from actgraph.runtime.kernels import calls
        from actgraph.runtime.kernels.registry import kernel_for
        from actgraph.runtime.native.library import HEAD, TENSOR, library

        native = library()
    except Exception as error:
        raise _NoKernelError(f"{type(error).__name__}: {error}") from error
    from actgraph.ops.registry import get_op

    op = get_op("linear")
    complete = op.complete(attributes)
    full = [[*row, *[None] * (len(op.inputs) - len(row))] for row in operands]
    types = [None if array is None else TensorType(DType.of(array.dtype), array.shape) for array in full[0]]
    found = kernel_for("linear", types, complete)
    if found is None:
        raise _NoKernelError("there is no kernel for these types")
    kernels, kernel = found
    variant = calls.variant_of(kernels, kernel)
    y = np.empty((1, _outputs(operands[0], complete)), np.float32)
    frames = []
    for row in full:
        frame = calls.frame_of(kernels, row, complete)
        calls.describe(frame, len(op.inputs), y.ctypes.data, DType.F32.onnx, y.shape)
        frames.append(frame)
    # sets the shape of y, and refuses what the kernel cannot take
    shape = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(variant.shape)
    base = HEAD + TENSOR * len(op.inputs)
    for frame in frames:
        calls.check(kernels, shape(frame.ctypes.data, 0, 1))
        assert tuple(frame[base + 3 : base + 5]) == y.shape
    steps = np.array([(ctypes.addressof(variant), frame.ctypes.data, 0, 0) for frame in frames], np.int64)
    failed = np.zeros(1, np.int64)

    def run() -> None:
        calls.check(kernels, native.ag_replay(steps.ctypes.data, len(steps), threads, failed.ctypes.data))

    def result() -> np.ndarray:
        calls.check(kernels, native.ag_run(ctypes.byref(variant), int(steps[0, 1]), threads))
        return y.copy()

    run.weights = [row[1] for row in full]  # type: ignore[attr-defined]
    run.keep = full, frames, y  # type: ignore[attr-defined]  # addresses do not keep arrays alive
    return run, result, "numba"


def rows_reader(weights: list[np.ndarray], x: np.ndarray, threads: int) -> Callable[[], float] | None:
    """Bytes per second of reading, and no more, the rows of ``weights`` [inputs, ...] whose inputs are not 0, as many for each
    thread; None without our library, or where there are too few rows."""
    try:
        from actgraph.runtime.kernels.numba.stream import RowStream
        from actgraph.runtime.native.library import library

        library()
    except Exception:
        return None
    kept = np.array_split(np.flatnonzero(x[0]), threads)
    fewest, line = min(map(len, kept)), weights[0].strides[0]
    if fewest * len(weights) < 4 or line % 64:
        return None
    parts = [weight.ctypes.data + part[:fewest] * line for part in kept for weight in weights]
    return RowStream(np.concatenate(parts), line, threads).measure


def _outputs(row: list[Any], complete: dict[str, Any]) -> int:
    codes = row[1]
    if complete["layout"] == "out_in":
        return int(codes.shape[0])
    return int(codes.shape[1]) * (2 if complete["packed"] else 1)


def _by_reference(operands: list[list[Any]], attributes: dict[str, Any], threads: int, reason: str) -> tuple[Pass, Result, str]:
    import torch

    from actgraph.ops.registry import get_op

    torch.set_num_threads(threads)
    op = get_op("linear")
    complete = op.complete(attributes)
    rows = [[None if array is None else _tensor(array) for array in row] for row in operands]

    def result() -> np.ndarray:
        return np.asarray(op.reference(*rows[0], **complete))

    def run() -> None:
        for row in rows:
            op.reference(*row, **complete)

    return run, result, f"the reference in torch ({reason})"


def _tensor(array: np.ndarray) -> Any:
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


# --- peers --------------------------------------------------------------------------------------------------------------------


def open_torch(form: str, stored: Stored, copies: int, x: np.ndarray, threads: int) -> tuple[Pass, Result]:
    import torch

    torch.set_num_threads(threads)
    row = torch.from_numpy(x).to(torch.bfloat16 if form == "bf16" else torch.float32)
    weights = [_tensor(own) for own in several(stored.codes, copies)]

    def run() -> None:
        with torch.inference_mode():
            for weight in weights:
                torch.nn.functional.linear(row, weight)

    return run, lambda: torch.nn.functional.linear(row, weights[0]).float().numpy()


def open_onnxruntime(form: str, stored: Stored, copies: int, x: np.ndarray, threads: int) -> tuple[Pass, Result]:
    """One graph of ``copies`` products; their sum over outputs keeps results small and is not worth mentioning beside them."""
    import onnxruntime as ort
    from onnx import TensorProto, helper

    outputs, inputs = stored.values.shape
    nodes, values = [], []
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    external: dict[str, Any] = {}

    def weight(name: str, array: np.ndarray) -> str:
        # given as initializers of the session: a protobuf of more than 2 GB is none
        value = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
        external[name] = value
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor = TensorProto(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=name)
        values.append(tensor)
        return name

    bits = 4 if form == "int4" else 8
    codes = np.ascontiguousarray(stored.codes.T) if form == "f32" else stored.codes.reshape(outputs, inputs // GROUP, -1)
    if form == "int8-groups":
        codes = (codes.astype(np.int16) + 128).astype(np.uint8)
    for copy, own in enumerate(several(codes, copies)):
        if form == "f32":
            nodes.append(helper.make_node("MatMul", ["x", weight(f"w{copy}", own)], [f"y{copy}"]))
            continue
        assert stored.scale is not None
        names = ["x", weight(f"w{copy}", own), weight(f"s{copy}", stored.scale.astype(np.float32))]
        nodes.append(
            helper.make_node(
                "MatMulNBits", names, [f"y{copy}"], domain="com.microsoft", K=inputs, N=outputs, bits=bits, block_size=GROUP,
                accuracy_level=4,
            )
        )  # fmt: skip
    graph = helper.make_graph(
        nodes, "copies", [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info(f"y{copy}", TensorProto.FLOAT, [1, outputs]) for copy in range(copies)], values,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options.add_external_initializers(list(external), list(external.values()))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {"x": x}

    def run() -> None:
        session.run(None, feeds)

    run.keep = external  # type: ignore[attr-defined]  # the session does not own them
    return run, lambda: session.run(["y0"], feeds)[0]


#: Peers of each format.
PEERS: dict[str, dict[str, Any]] = {
    "f32": {"torch": open_torch, "onnxruntime": open_onnxruntime},
    "bf16": {"torch": open_torch},
    "int8-groups": {"onnxruntime": open_onnxruntime},
    "int4": {"onnxruntime": open_onnxruntime},
}

# --- measuring ----------------------------------------------------------------------------------------------------------------


def quiet() -> None:
    """Wait until threads of peers that spin for more work have gone to sleep."""
    time.sleep(0.05)


def measure(shape: str, form: str, gate: int, stream: Bandwidth, args: argparse.Namespace) -> None:
    inputs, outputs = map(int, shape.split("x"))
    rng = np.random.default_rng(0)
    stored = store(rng.standard_normal((outputs, inputs), np.float32), form)
    x = rng.standard_normal((1, inputs), np.float32)
    x[0, rng.permutation(inputs)[: inputs * gate // 100]] = 0.0
    touched = touched_bytes(stored, x)
    # what is touched of all copies must exceed the caches, not what is stored
    copies = max(2, int(np.ceil(args.cold / touched)))
    exact = x.astype(np.float64) @ stored.values.T.astype(np.float64)
    where: dict[str, Any] = {"shape": shape, "format": form, "gated": gate, "copies": copies}
    contestants: dict[str, Pass] = {}
    opened: dict[str, Any] = {"actgraph": lambda: open_actgraph_kernel(form, stored, copies, x, gate > 0, args.threads)}
    if not gate:
        peers = {name: make for name, make in PEERS.get(form, {}).items() if args.peers is None or name in args.peers}
        for name, make in peers.items():
            opened[name] = lambda make=make: (*make(form, stored, copies, x, args.threads), "")
    lines: dict[str, dict[str, Any]] = {}
    for name, make in opened.items():
        try:
            run, result, by = make()
            error = np.abs(np.asarray(result(), np.float64) - exact).max() / np.abs(exact).max()
            lines[name], contestants[name] = {"error": round_to(error), **({"by": by} if by else {})}, run
        except Exception as error:  # one line for what cannot run here
            common.emit("kernels", **where, runner=name, error=f"{type(error).__name__}: {str(error).splitlines()[0]}")
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    weights = getattr(contestants.get("actgraph"), "weights", None)
    read_rows = rows_reader(weights, x, args.threads) if gate and weights else None
    streams: list[float] = []
    of_rows: list[float] = []
    for round in range(-1, args.rounds):
        quiet()
        bandwidth = stream.measure()
        for name, run in contestants.items():
            quiet()
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            if round >= 0:
                rates[name].append(touched * copies / seconds)
            if name == "actgraph" and read_rows is not None:
                limit = read_rows()
                if round >= 0:
                    of_rows.append(rates[name][-1] / limit)
        if round >= 0:
            streams.append(bandwidth)
    for name, found in rates.items():
        part = statistics.median(a / b for a, b in zip(found, streams, strict=True))
        goal: dict[str, Any] = {}
        if name == "actgraph":
            goal = {"goal": GOALS[form], "met": bool(part >= GOALS[form])}
            goal |= {"of_rows": round_to(statistics.median(of_rows))} if of_rows else {}
        common.emit(
            "kernels", **where, runner=name, unit="GB/s", value=round_to(statistics.median(found) / 1e9),
            stream=round_to(statistics.median(streams) / 1e9), of_stream=round_to(part), **goal, **lines[name],
        )  # fmt: skip


def overhead(args: argparse.Namespace) -> None:
    """What a call costs beside its work: a linear of 64 x 64, by each way that reaches the kernel, and torch's own."""
    import torch
    from torch.nn import functional

    from actgraph.ops.registry import get_op
    from actgraph.runtime.torch_kernels import kernel_call, register_torch_kernels

    torch.set_num_threads(args.threads)
    register_torch_kernels()
    x, weight = torch.randn(1, 64), torch.randn(64, 64)
    call = kernel_call(get_op("linear"), {})
    assert call is not None
    rest = [None] * 6
    ways: dict[str, Callable[[], Any]] = {
        "torch.ops.actgraph.linear": lambda: torch.ops.actgraph.linear(x, weight, *rest),
        "kernel of a session": lambda: call(x, weight, *rest),
        "torch.nn.functional.linear": lambda: functional.linear(x, weight),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for round in range(-1, args.rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                for _ in range(2000):
                    way()
                if round >= 0:
                    times[name].append((time.perf_counter() - start) / 2000)
    for name, found in times.items():
        common.emit("kernels", figure="call", runner=name, unit="us", value=round_to(statistics.median(found) * 1e6))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="inputs x outputs; default: %(default)s")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--gates", nargs="+", type=int, default=list(GATES), help="percent of the inputs that are dropped")
    parser.add_argument("--peers", nargs="*", choices=("torch", "onnxruntime"), help="default: all; none named: ours alone")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cold", type=int, default=256 << 20, help="bytes that copies touch together; default: %(default)s")
    parser.add_argument("--stream", type=int, default=1 << 30, help="bytes of the read stream; default: %(default)s")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    stream = Bandwidth(args.threads, args.stream)
    common.emit(
        "kernels", figure="read bandwidth", value=round_to(stream.measure(5) / 1e9), unit="GB/s", how=stream.how,
        threads=args.threads, processor=common.processor(),
    )  # fmt: skip
    overhead(args)
    for shape in args.shapes:
        for form in args.formats:
            for gate in args.gates:
                measure(shape, form, gate, stream, args)


if __name__ == "__main__":
    main()
