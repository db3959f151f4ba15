"""Where bytes go: widths within a segment, sizes over heads, formats over segments."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_kernels.segment import WIDTHS
from mosaic_kernels.segment_choice.reference import K_SHARES, V_SHARES
from sglang_mosaic.codec.allocation import Allocator, Step, best_formats
from sglang_mosaic.codec.calibration import share_out

DIMS = st.sampled_from([16, 32, 48, 80, 128])
ENERGIES = st.floats(0, 1e6)


@st.composite
def problems(draw):
    """(page size, K's channels, V's channels, energies, budget, exceptions)."""
    k_dim, v_dim, page_size = draw(DIMS), draw(DIMS), draw(st.sampled_from([16, 64, 128]))
    groups = k_dim // 16 + v_dim // 16
    energies = draw(st.lists(ENERGIES, min_size=groups, max_size=groups))
    budget = draw(st.integers(0, page_size * (k_dim + v_dim) * 2))
    return page_size, k_dim, v_dim, energies, budget, draw(st.sampled_from([0, 1, 4]))


@given(problems())
@settings(deadline=None)
def test_a_path_grows_within_its_budget_while_the_cost_falls(problem):
    page_size, k_dim, v_dim, energies, budget, exceptions = problem
    allocator = Allocator(page_size, k_dim, v_dim)
    path = allocator.path(energies, budget, exceptions)
    k_groups = k_dim // 16
    shares = [K_SHARES] * k_groups + [V_SHARES] * (v_dim // 16)
    assert not any(path[0].widths)
    assert all(step.nbytes <= budget for step in path[1:])
    for before, after in itertools.pairwise(path):
        assert after.nbytes > before.nbytes
        assert after.cost <= before.cost * (1 + 1e-12) + 1e-9
        assert sum(a != b for a, b in zip(before.widths, after.widths, strict=True)) == 1
    for step in path:
        for widths in (step.widths[:k_groups], step.widths[k_groups:]):
            assert list(widths) == sorted(widths, reverse=True) and set(widths) <= set(WIDTHS)
        assert allocator.format(step.widths, exceptions).segment_bytes == step.nbytes
        cost = sum(e * share[bits] for e, share, bits in zip(energies, shares, step.widths, strict=True))
        assert step.cost == pytest.approx(cost, rel=1e-6, abs=1e-3)


@given(problems())
@settings(deadline=None)
def test_a_path_ends_only_when_no_further_width_fits(problem):
    page_size, k_dim, v_dim, energies, budget, exceptions = problem
    allocator = Allocator(page_size, k_dim, v_dim)
    last = allocator.path(energies, budget, exceptions)[-1]
    k_groups = k_dim // 16
    for i, bits in enumerate(last.widths):
        if bits == WIDTHS[-1]:
            continue
        wider = list(last.widths)
        wider[i] = WIDTHS[WIDTHS.index(bits) + 1]
        if i in (0, k_groups) or wider[i] <= wider[i - 1]:
            assert allocator.format(tuple(wider), exceptions).segment_bytes > budget


@functools.cache
def all_widths():
    """Every choice for three groups of K and four of V, and its bytes."""
    falling = [list(itertools.combinations_with_replacement(reversed(WIDTHS), count)) for count in (3, 4)]
    choices = [k_bits + v_bits for k_bits in falling[0] for v_bits in falling[1]]
    return [(widths, Allocator(64, 48, 64).format(widths).segment_bytes) for widths in choices]


@pytest.mark.parametrize("ratio", [3, 4, 6])
@pytest.mark.parametrize("seed", range(5))
def test_the_greedy_choice_is_close_to_the_best_one(ratio, seed):
    generator = torch.Generator().manual_seed(seed)
    allocator = Allocator(64, 48, 64)
    k, v = torch.rand(3, generator=generator) ** 3 * 100, torch.rand(4, generator=generator) ** 3 * 100
    energies = [*k.sort(descending=True).values.tolist(), *v.sort(descending=True).values.tolist()]
    budget = 64 * (48 + 64) * 2 // ratio
    costs = []
    for widths, nbytes in all_widths():
        if nbytes <= budget:
            shares = [K_SHARES[bits] for bits in widths[:3]] + [V_SHARES[bits] for bits in widths[3:]]
            costs.append(sum(e * share for e, share in zip(energies, shares, strict=True)))
    assert min(costs) * (1 - 1e-6) <= allocator.path(energies, budget)[-1].cost <= 1.5 * min(costs)


def test_the_group_with_more_energy_gets_more_bits():
    allocator = Allocator(64, 64, 64)
    path = allocator.path([100.0, 10.0, 1.0, 0.1, 30.0, 10.0, 3.0, 1.0], 64 * 128 * 2 // 4)
    k, v = path[-1].widths[:4], path[-1].widths[4:]
    assert k[0] > k[1] > k[3] and v[0] > v[3]


# Sizes of heads.


@st.composite
def paths(draw):
    """Of one head: bytes rise by multiples of 16, costs fall convexly or not."""
    nbytes, cost = 16 * draw(st.integers(1, 20)), draw(st.floats(0, 1e4))
    path = [Step(nbytes, cost, ())]
    for extra, share in draw(st.lists(st.tuples(st.integers(1, 20), st.floats(0, 0.9)), max_size=8)):
        nbytes, cost = nbytes + 16 * extra, cost * share
        path.append(Step(nbytes, cost, ()))
    return path


@given(st.lists(paths(), min_size=1, max_size=8), st.integers(0, 400))
def test_sizes_never_exceed_the_frame_and_leave_less_than_an_alignment_a_head(heads, units):
    total = 16 * units
    sizes = share_out(heads, total)
    assert sum(sizes) <= total
    assert total - sum(sizes) < 16 * len(sizes)
    assert not any(size % 16 for size in sizes)
    if sum(path[0].nbytes for path in heads) <= total:
        assert all(size >= path[0].nbytes for size, path in zip(sizes, heads, strict=True))


@given(paths(), st.floats(1.1, 100), st.integers(20, 400))
def test_a_head_that_loses_more_gets_no_fewer_bytes(path, factor, units):
    # Costs fall convexly in what follows, as expected errors do.
    path = [Step(100 * 16 + 64 * i, 1000.0 * 0.5**i, ()) for i in range(len(path) + 1)]
    louder = [Step(step.nbytes, step.cost * factor, ()) for step in path]
    small, large = share_out([path, louder], 2 * path[0].nbytes + 16 * units)
    assert small <= large


def test_equal_heads_get_equal_bytes_up_to_a_step():
    path = [Step(64 + 64 * i, 0.5**i, ()) for i in range(10)]
    sizes = share_out([path] * 4, 4 * 64 + 10 * 64)
    assert sorted(sizes) == [192, 192, 256, 256]


# Formats of a head.


def test_formats_complement_each_other():
    costs = torch.tensor([[1.0, 9.0, 4.0], [1.0, 9.0, 4.0], [9.0, 1.0, 5.0], [9.0, 1.0, 5.0]], dtype=torch.float64)
    assert best_formats(costs, 1) == [2]  # on average the best alone
    assert best_formats(costs, 5)[0] == 2 and sorted(best_formats(costs, 5)[1:]) == [0, 1]
    assert best_formats(costs, 2) in ([2, 0], [2, 1])


@given(st.lists(st.lists(st.floats(0.01, 100), min_size=3, max_size=3), min_size=1, max_size=6), st.integers(1, 4))
def test_a_further_format_is_taken_only_if_it_helps(rows, most):
    costs = torch.tensor(rows, dtype=torch.float64)
    chosen = best_formats(costs, most)
    assert 1 <= len(chosen) <= most and len(set(chosen)) == len(chosen)
    assert chosen[0] == int(costs.mean(0).argmin())
    reached = [costs[:, chosen[: i + 1]].amin(1).mean() for i in range(len(chosen))]
    assert all(after <= 0.995 * before for before, after in itertools.pairwise(reached))
    if len(chosen) < min(most, 3):
        rest = [i for i in range(3) if i not in chosen]
        assert all(costs[:, [*chosen, i]].amin(1).mean() > 0.995 * reached[-1] for i in rest)


def test_formats_are_chosen_on_the_device_of_the_costs():
    # Nothing can be read from the meta device; getting as far as the first number means that no devices were mixed.
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta"):
        best_formats(torch.empty(5, 3, dtype=torch.float64, device="meta"), 2)
