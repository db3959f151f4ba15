"""Sums of squares of queries by kernel."""

from __future__ import annotations

import pytest
import torch

from mosaic_kernels.query_squares import reference
from mosaic_kernels.query_squares.launch import ROWS, add_squares
from triton_device import DEVICE


def queries(tokens, heads, group, dim, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, heads * group, dim, generator=generator).to(DEVICE, dtype)


def zeros(heads, dim):
    return torch.zeros(heads, dim, dtype=torch.float64, device=DEVICE)


def assert_close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("tokens", "heads", "group", "dim"),
    [(1, 1, 1, 64), (ROWS + 1, 2, 3, 64), (5, 8, 8, 128), (ROWS, 1, 4, 128), (3, 3, 2, 80), (2, 1, 5, 24)],
)
def test_sums(tokens: int, heads: int, group: int, dim: int, dtype: torch.dtype) -> None:
    found, wanted = zeros(heads, dim), zeros(heads, dim)
    for seed in range(2):
        q = queries(tokens, heads, group, dim, dtype, seed)
        add_squares(q, found)
        reference.add_squares(q, wanted)
    assert_close(found, wanted)


def test_the_same_calls_give_the_same_bits() -> None:
    q, sums = queries(300, 2, 4, 64), [zeros(2, 64) for _ in range(3)]
    for one in sums:
        add_squares(q[:170], one)
        add_squares(q[170:], one)
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])


def test_sums_of_whole_numbers_are_exact() -> None:
    q, found, wanted = queries(200, 2, 3, 64).mul(50).round(), zeros(2, 64), zeros(2, 64)
    add_squares(q.bfloat16(), found)
    reference.add_squares(q.bfloat16(), wanted)
    assert torch.equal(found, wanted)


def test_what_is_not_finite_stays_in_its_channel_and_head() -> None:
    q, found, wanted = queries(70, 3, 2, 64), zeros(3, 64), zeros(3, 64)
    reference.add_squares(q, wanted)
    q[5, 1, 7], q[9, 2, 33] = torch.nan, -torch.inf
    add_squares(q, found)
    assert found[0, 7].isnan() and found[1, 33] == torch.inf
    found[0, 7], found[1, 33] = wanted[0, 7], wanted[1, 33]
    assert_close(found, wanted)


@pytest.mark.parametrize("scale", [1e-30, 1e30], ids=str)
def test_squares_that_float32_cannot_hold(scale: float) -> None:
    q, found, wanted = queries(10, 1, 2, 64) * scale, zeros(1, 64), zeros(1, 64)
    add_squares(q, found)
    reference.add_squares(q, wanted)
    assert (found > 0).all() and found.isfinite().all()
    assert_close(found, wanted)


def test_queries_anywhere_in_memory_and_none() -> None:
    q = queries(40, 2, 2, 128)
    found, wanted = zeros(2, 64), zeros(2, 64)
    for strided in (q[::3, :, ::2], q[:0, :, :64], q[:, :, 64:].transpose(0, 1).contiguous().transpose(0, 1)):
        add_squares(strided, found)
        reference.add_squares(strided, wanted)
    assert_close(found, wanted)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_graph_can_replay_it() -> None:
    q, sums, wanted = queries(50, 2, 4, 64), zeros(2, 64), zeros(2, 64)
    add_squares(q, sums)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add_squares(q, sums)
    sums.zero_()
    for seed in range(3):
        q.copy_(queries(50, 2, 4, 64, seed=seed))
        graph.replay()
        reference.add_squares(q, wanted)
    assert_close(sums, wanted)


def test_arguments_that_do_not_fit_are_refused() -> None:
    q, sums = queries(4, 2, 2, 64), zeros(2, 64)
    for arguments, message in (
        ((q, sums.float()), "sums must be contiguous float64"),
        ((q[:, :3], sums), "multiple of 2"),
        ((q.int(), sums), "float dtype"),
        ((q[..., :32], sums), "64"),
    ):
        with pytest.raises(ValueError, match=message):
            add_squares(*arguments)
