"""Device code: rotated pages -> the format of every segment, the reference's on every device.

Sums are of integers; what is left are single operations, most in float64, in a fixed order, never fused (the launch
sees to that). Maxima pass over NaN: it counts as infinity, of which a cost comes out NaN as well.
"""

import triton
import triton.language as tl

from mosaic_kernels import segment_table as table
from mosaic_kernels.segment_encode import exact
from mosaic_kernels.topk import reference as topk

_SCALARS = tl.constexpr(table.SCALARS)
_KIND, _INVALID = tl.constexpr(table.KIND), tl.constexpr(table.INVALID)
_PLANES, _TOPK = tl.constexpr(table.PLANES), tl.constexpr(table.TOPK)
_EXCEPTIONS = tl.constexpr(table.EXCEPTIONS)
_K_KEEP, _V_KEEP = (tl.constexpr(keep) for keep in table.TOPK_KEEP)
_UNITS = tl.constexpr(1 << exact.SQUARE_BITS)
_HALF_STEP = tl.constexpr(topk.HALF_STEP)
_INFINITE_BITS = tl.constexpr(0x7F800000)


@triton.jit
def choose_kernel(
    k_rot, v_rot, numbers, scalars, shares, k_weights, v_roots, epoch, pages,
    HEADS: tl.constexpr, FORMATS: tl.constexpr, PADDED: tl.constexpr, T: tl.constexpr,
    DK: tl.constexpr, K_DIM: tl.constexpr, DV: tl.constexpr, V_DIM: tl.constexpr,
    ANY_TOPK: tl.constexpr, ANY_EXCEPTIONS: tl.constexpr,
):  # fmt: skip
    """One program: one page and head. numbers int32 [HEADS, pages], written."""
    page, head = tl.program_id(0), tl.program_id(1)
    at = (head * pages + page).to(tl.int64) * T
    keys, values, roots = k_rot + at * K_DIM, v_rot + at * V_DIM, v_roots + head * V_DIM
    rows = scalars + (epoch * HEADS + head) * FORMATS * _SCALARS
    shares += head * ((K_DIM + V_DIM) // 16) * PADDED
    n = tl.arange(0, PADDED)
    costs = _weigh(tl.zeros([PADDED], tl.float64), _key_energies(keys, 0, T, DK, K_DIM), shares, DK, K_DIM, PADDED)
    if ANY_EXCEPTIONS:
        for i in range(FORMATS):
            kept = tl.load(rows + i * _SCALARS + _EXCEPTIONS)
            if (tl.load(rows + i * _SCALARS + _KIND) == _PLANES) & (kept > 0):
                energies = _key_energies(keys, kept, T, DK, K_DIM)
                others = _weigh(tl.zeros([PADDED], tl.float64), energies, shares, DK, K_DIM, PADDED)
                costs = tl.where(n == i, others, costs)
    energies = _value_energies(values, roots, T, DV, V_DIM)
    costs = _weigh(costs, energies, shares + K_DIM // 16 * PADDED, DV, V_DIM, PADDED)
    if ANY_TOPK:
        for i in range(FORMATS):
            if tl.load(rows + i * _SCALARS + _KIND) == _TOPK:
                keep = tl.load(rows + i * _SCALARS + _K_KEEP)
                cost = _topk_energy(keys, roots, keep, False, T, DK, K_DIM) * tl.load(k_weights + head)
                keep = tl.load(rows + i * _SCALARS + _V_KEEP)
                costs = tl.where(n == i, cost + _topk_energy(values, roots, keep, True, T, DV, V_DIM), costs)
    kind = tl.load(rows + n * _SCALARS + _KIND, mask=n < FORMATS, other=_INVALID)
    costs = tl.where(kind == _INVALID, float("inf"), tl.where(costs == costs, costs, -float("inf")))
    first = tl.min(tl.where(costs == tl.min(costs, 0), n, PADDED), 0)
    tl.store(numbers + head * pages + page, first)


@triton.jit
def _weigh(costs, energies, shares, D: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Add energies [D / 16] times shares [DIM / 16, PADDED], group by group."""
    group = tl.arange(0, D // 16)
    for g in tl.static_range(DIM // 16):
        energy = tl.sum(tl.where(group == g, energies, 0.0), 0)
        costs += energy * tl.load(shares + g * PADDED + tl.arange(0, PADDED))
    return costs


@triton.jit
def _key_energies(keys, exceptions, T: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr):
    """`reference.energies` of K: float64 [D / 16]."""
    t, c = tl.arange(0, T)[:, None], tl.arange(0, D)[None, :]
    y = tl.load(keys + t * DIM + c, mask=c < DIM, other=0)
    out = tl.zeros([T, 1], tl.int1)
    if exceptions > 0:
        out = _outlying(y, exceptions, T)
    low = tl.min(tl.where(out, float("inf"), y), 0)
    high = tl.max(tl.where(out, -float("inf"), y), 0)
    unknown = tl.max(tl.where(out, 0, (y != y).to(tl.int32)), 0)
    ranges = high - low
    ranges = tl.where((ranges == ranges) & (unknown == 0), ranges, float("inf"))
    integers, unit = _integers(ranges, tl.max(ranges, 0))
    return tl.sum(tl.reshape(integers, [D // 16, 16]), 1).to(tl.float64) * unit * T


@triton.jit
def _outlying(y, exceptions, T: tl.constexpr):
    """`outliers.ranges_without`: which tokens are left out, [T, 1]."""
    unknown = tl.where(tl.max((y != y).to(tl.int32), 0) > 0, float("nan"), 0.0)[None, :]
    middle = (tl.min(y, 0)[None, :] + unknown) * 0.5 + (tl.max(y, 0)[None, :] + unknown) * 0.5
    distance = tl.abs(y - middle)
    bits = tl.where(distance == distance, distance.to(tl.int32, bitcast=True), _INFINITE_BITS + 1)
    # Rows of one matrix and columns of another: a layout each.
    largest = tl.max(bits, 1).to(tl.int64)
    keys = (largest << 8) + (255 - tl.arange(0, T))
    before = tl.sum((keys[None, :] > keys[:, None]).to(tl.int32), 1)
    return (before < exceptions)[:, None]


@triton.jit
def _value_energies(values, roots, T: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr):
    """`reference.energies` of V: float64 [D / 16]."""
    t, c = tl.arange(0, T)[:, None], tl.arange(0, D)[None, :]
    y = tl.abs(tl.load(values + t * DIM + c, mask=c < DIM, other=0)) * tl.load(roots + c, mask=c < DIM, other=0)
    y = tl.where(y == y, y, float("inf"))
    integers, unit = _integers(y, tl.max(tl.max(y, 1), 0))
    return tl.sum(tl.reshape(tl.sum(integers, 0), [D // 16, 16]), 1).to(tl.float64) * unit


@triton.jit
def _topk_energy(
    source, roots, keep, WEIGHTED: tl.constexpr, T: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr
):  # fmt: skip
    """Sum of squares of `topk.reference.error_bounds`, float64; with `roots` or without."""
    t, c = tl.arange(0, T)[:, None], tl.arange(0, D)[None, :]
    y = tl.abs(tl.load(source + t * DIM + c, mask=c < DIM, other=0))
    y = tl.where(y == y, y, float("inf"))
    # Positive floats sort as their bits.
    bits = tl.where(c < DIM, y.to(tl.int32, bitcast=True), -1)
    # The largest number that `keep` of a token reach, bit by bit.
    least = tl.zeros([T], tl.int32)
    for i in range(31):
        more = least | 1 << 30 - i
        least = tl.where(tl.sum((bits >= more[:, None]).to(tl.int32), 1) >= keep, more, least)
    above, equal = bits > least[:, None], bits == least[:, None]
    room = keep - tl.sum(above.to(tl.int32), 1)
    kept = above | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= room[:, None]))
    errors = tl.where(kept, tl.max(y, 1)[:, None] * _HALF_STEP, y)
    if WEIGHTED:
        errors *= tl.load(roots + c, mask=c < DIM, other=0)
        errors = tl.where(errors == errors, errors, float("inf"))
    integers, unit = _integers(errors, tl.max(tl.max(errors, 1), 0))
    return tl.sum(tl.sum(integers, 1), 0).to(tl.float64) * unit


@triton.jit
def _integers(x, largest):
    """`exact.sum_of_squares` before the sums: squares int64, and what 1 of them is worth, float64."""
    largest = tl.where(largest == 0, 1.0, largest).to(tl.float64)
    scaled = x.to(tl.float64) / largest * _UNITS
    # To the nearest integer, halves to even; what is not finite, or would not be, counts as 0.
    nearest = (scaled + 6755399441055744.0) - 6755399441055744.0
    integers = tl.where(largest < float("inf"), nearest, 0.0).to(tl.int32)
    unit = largest / _UNITS
    return (integers * integers).to(tl.int64), tl.where(largest < float("inf"), unit * unit, float("nan"))
