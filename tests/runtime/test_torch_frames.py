"""Frames of torch functions give what torch gives, whatever the shapes and strides, or there are none."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from actgraph.errors import InputError
from actgraph.runtime.native.library import available, library
from actgraph.runtime.torch_frames import Count, Front, Growing, frames_of, known
from actgraph.runtime.torch_lowering import append, front, write

pytestmark = pytest.mark.skipif(not available(), reason="the kernels' library was not built")
aten = torch.ops.aten


def run(target: Any, *args: Any, used: int = 7, **options: Any) -> Any:
    """The result of the frames for a call; ``None`` where there are none."""
    made = frames_of(target, args, options, used)
    if made is None:
        return None
    frames, result = made
    assert frames
    for frame in frames:
        assert library().ag_run(ctypes.byref(frame.variant), frame.words.ctypes.data, 2) == 0
    return result


def x(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


SPECIAL = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-30, 88.0, 1e5, 3e38, torch.inf, -torch.inf, torch.nan])
SHAPES = [
    ((2, 1, 4), (2, 1, 4)), ((2, 1, 1), (1, 1, 4)), ((4,), (2, 3, 4)), ((2, 3, 1), (2, 3, 5)), ((), (2, 3)),
    ((1, 1, 33), (1, 1, 1)),
]  # fmt: skip


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("function", [torch.add, torch.sub, torch.mul, torch.div])
def test_pairs(function: Callable[..., torch.Tensor], shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    a, b = x(*shapes[0]), x(*shapes[1]) + 2
    for left, right in ((a, b), (b, a), (a, 0.3), (2, b)):
        torch.testing.assert_close(run(function, left, right), function(left, right), rtol=0, atol=0)
    torch.testing.assert_close(run(function, SPECIAL, 0.5), function(SPECIAL, 0.5), rtol=0, atol=0, equal_nan=True)


def test_pairs_of_views_and_of_integers() -> None:
    rows = x(3, 12)
    a, b = rows[:, 2:6], rows[:, 7:11]
    torch.testing.assert_close(run(torch.mul, a, b), a * b, rtol=0, atol=0)
    places = torch.tensor([[5], [9]])
    assert run(torch.add, places, 2).tolist() == [[7], [11]]
    assert run(torch.sub, places, torch.tensor([1, 7])).tolist() == [[4, -2], [8, 2]]
    for bad in (
        (torch.add, places, 2.5), (torch.mul, places, 2), (torch.add, rows.t(), x(12, 3)), (torch.add, rows, rows.double()),
        (torch.add, x(0, 3), x(0, 3)), (torch.add, x(2, 3, 4)[:, :, ::2], x(2, 3, 2)),
    ):  # fmt: skip
        assert run(*bad) is None
    assert run(torch.add, rows, rows, alpha=2) is None


@pytest.mark.parametrize(
    ("function", "ulps"),
    [
        (torch.neg, 0), (torch.cos, 1), (torch.sin, 1), (torch.tanh, 4), (torch.rsqrt, 2), (aten.exp.default, 2),
        (aten.sigmoid.default, 4), (functional.silu, 4), (aten.relu.default, 0), (aten.gelu.default, 8),
    ],
)  # fmt: skip
def test_each(function: Callable[..., torch.Tensor], ulps: int) -> None:
    for given in (x(2, 1, 37) * 5, SPECIAL, x(1, 64) * 1e4):
        wanted = function(given.double()).float()
        torch.testing.assert_close(run(function, given), wanted, rtol=ulps * 1.2e-7, atol=ulps * 3e-8, equal_nan=True)
    columns = x(4, 9)[:, 3:7]
    if function not in (functional.silu, aten.relu.default, aten.gelu.default):
        torch.testing.assert_close(run(function, columns), function(columns), rtol=1e-6, atol=1e-7, equal_nan=True)


def test_clamps() -> None:
    low, high = torch.tensor(0.0), torch.tensor([[1.0], [0.5]])
    for given, options in (
        ((low, high), {}), ((), {"min": low, "max": high}), ((low,), {}), ((None, high), {}), ((torch.tensor(torch.nan),), {})
    ):  # fmt: skip
        for a in (x(2, 11), SPECIAL):
            wanted = torch.clamp(a, *given, **options)
            torch.testing.assert_close(run(aten.clamp.Tensor, a, *given, **options), wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(run(aten.clamp.default, SPECIAL, -1, 2), SPECIAL.clamp(-1, 2), rtol=0, atol=0, equal_nan=True)
    assert run(aten.clamp.default, x(3)) is None and run(aten.clamp.default, torch.ones(3, dtype=torch.int64), 0, 1) is None
    assert run(aten.clamp.default, x(3), 0, min=0) is None


def test_one_number_for_many() -> None:
    """An operand that is expanded has fewer numbers than it shows."""
    gate = x(1, 4, 1).expand(1, 4, 8)
    assert run(aten.sigmoid.default, gate) is None
    torch.testing.assert_close(run(torch.mul, gate, x(1, 4, 8)), gate * x(1, 4, 8))


def test_sums() -> None:
    a = x(2, 3, 37)
    for axes, keep in (([-1], True), ([2], False)):
        torch.testing.assert_close(run(aten.sum.dim_IntList, a, axes, keep), a.sum(-1, keepdim=keep), rtol=1e-5, atol=1e-5)
    assert run(aten.sum.dim_IntList, x(2, 0), [1], True).tolist() == [[0.0], [0.0]]
    for bad in ((a, [1], True), (a, [1, 2]), (a,), (a.transpose(1, 2), [-1]), (a.double(), [-1])):
        assert run(aten.sum.dim_IntList, *bad) is None


def test_powers() -> None:
    a = x(3, 5)
    torch.testing.assert_close(run(torch.pow, a, 3.0), a**3)
    torch.testing.assert_close(run(torch.pow, a, 2), a**2)
    assert run(torch.pow, a, 2.5) is None
    assert run(torch.pow, 2.0, a) is None
    torch.testing.assert_close(run(aten.gelu.default, a, approximate="tanh"), functional.gelu(a, approximate="tanh"))


def test_conversions() -> None:
    ids = torch.tensor([[0, 1, -3, 1 << 40]])
    torch.testing.assert_close(run(aten._to_copy.default, ids, dtype=torch.float32), ids.float())
    assert run(aten._to_copy.default, ids, dtype=torch.bool).tolist() == [[False, True, True, True]]
    assert run(aten._to_copy.default, SPECIAL, dtype=torch.bool).tolist() == SPECIAL.bool().tolist()
    assert run(aten._to_copy.default, SPECIAL > 0, dtype=torch.float32).tolist() == (SPECIAL > 0).float().tolist()
    assert run(aten._to_copy.default, ids, dtype=torch.int32) is None
    assert run(aten._to_copy.default, ids, dtype=torch.float32, layout=torch.sparse_coo) is None


def test_every_float16() -> None:
    """To float32 and back, and the numbers between neighbours."""
    every = torch.from_numpy(np.arange(65536, dtype=np.uint16).view(np.float16))
    wide = run(aten._to_copy.default, every, dtype=torch.float32)
    torch.testing.assert_close(wide, every.float(), rtol=0, atol=0, equal_nan=True)
    numbers = wide[torch.isfinite(wide)].sort().values
    between = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2, numbers * 1.0001, torch.tensor([65519.9, 65520.0, 1e30])])
    between = torch.cat([between, -between, SPECIAL, torch.tensor([1e-45, 2.0**-25, 2.0**-25 * 1.001])])
    found = run(aten._to_copy.default, between, dtype=torch.float16)
    torch.testing.assert_close(found, between.half(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(found[~torch.isnan(found)]), torch.signbit(between.half()[~torch.isnan(found)]))


def test_copies() -> None:
    a = x(2, 3, 8)
    view = a.view(6, 8)[:, 2:6]
    torch.testing.assert_close(run(aten.clone.default, view), view)
    assert run(aten.clone.default, view).is_contiguous()
    torch.testing.assert_close(run(torch.reshape, view, [24]), view.reshape(24))
    assert run(torch.reshape, view, [2, 3, 4]) is None  # a view
    assert run(torch.reshape, a, [6, 8]) is None  # a view
    heads = x(2, 5, 24)[:, :3, 4:12]
    torch.testing.assert_close(run(aten.clone.default, heads), heads)
    torch.testing.assert_close(run(torch.cat, [heads, heads + 1], -1), torch.cat([heads, heads + 1], -1))
    assert run(aten.clone.default, x(2, 3, 4, 5).permute(3, 0, 2, 1)) is None  # more than rows with gaps
    for axis in (0, 1, -1):
        pieces = [x(2, 3, 4), x(2, 3, 4) + 1]
        torch.testing.assert_close(run(torch.cat, pieces, axis), torch.cat(pieces, axis))
    pieces = [x(2, 3), x(2, 5)]
    torch.testing.assert_close(run(torch.cat, pieces, dim=1), torch.cat(pieces, 1))
    table, ids = x(10, 6), torch.tensor([[3], [9]])
    torch.testing.assert_close(run(torch.embedding, table, ids, 0), table[ids])
    assert run(torch.embedding, table, ids.int()) is None
    for odd in (-1, 10):
        frames, _ = frames_of(torch.embedding, [table, torch.tensor([odd])], {}, 7) or ([], None)
        with pytest.raises(InputError, match="does not have"):
            frames[0].failed(library().ag_run(ctypes.byref(frames[0].variant), frames[0].words.ctypes.data, 1))


def test_writing_into_slots() -> None:
    new = x(2, 3, 1, 4)
    buffer = torch.zeros(2, 3, 16, 4)
    result = run(append, buffer, new, Count(), used=5)
    assert isinstance(result, Front)
    torch.testing.assert_close(result.now(5)[:, :, 5:], new)
    assert buffer.count_nonzero() == new.numel()
    ring = torch.zeros(2, 3, 4, 4)
    assert run(write, ring, new, Count(), "ring", used=6) is ring
    torch.testing.assert_close(ring[:, :, 2:3], new)
    frames, _ = frames_of(write, [ring, new, Count(), "ring"], {}, 6) or ([], None)
    (word,) = frames[0].moving
    assert (word.step, word.cycle) == (16, 4)
    assert run(append, buffer, new.half(), Count()) is None
    assert run(append, buffer, torch.cat([new, new], 2), Count()) is None


def test_what_grows() -> None:
    """Masks with an entry for each token: converted as far as they are, and viewed without a frame."""
    grown = Growing(torch.zeros(2 * 64, dtype=torch.int64), (2, 8), 1)
    grown.now(7).copy_(torch.arange(16).view(2, 8) % 3)
    seen = run(aten._to_copy.default, grown, dtype=torch.bool)
    assert isinstance(seen, Growing)
    assert torch.equal(seen.now(7), grown.now(7).bool())
    assert grown.now(9).shape == (2, 10)
    slot = Front(torch.zeros(2, 3, 64, 4), Count())
    assert known(aten.sym_size.int, [slot, 2], 7) == Count()
    assert known(aten.sym_size.int, [slot, 3], 7) == 4
    assert known(aten.sym_size.int, [grown, -1], 7) == Count(1)
    viewed = known(torch.reshape, [seen, [2, 1, 1, Count(1)]], 7)
    assert viewed.axis == 3
    assert viewed.now(9).shape == (2, 1, 1, 10)
    assert known(torch.reshape, [seen, [16]], 7) is None  # which of its sizes grows is not told
    assert known(torch.unsqueeze, [grown, 1], 7).axis == 2
    assert isinstance(known(front, [slot.buffer, Count()], 7), Front)
