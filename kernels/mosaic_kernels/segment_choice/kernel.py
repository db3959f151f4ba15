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
# The bound of what top-k costs: thresholds from 2^-8 of a token's largest value on, in steps of about 2^(1/4).
_SPAN, _STEPS = tl.constexpr(8 << 23), tl.constexpr(5)
_FLOOR, _CEILING = tl.constexpr(1e-18), tl.constexpr(1e8)
_SAFE = tl.constexpr(0.98)
"""The cost is of 2^17 errors or fewer in units of 2^-15 of the largest: rounding them takes 1.1% off it at most."""


# Compiled once for any number of pages: it takes seconds, in the middle of serving.
@triton.jit(do_not_specialize=["pages", "epoch"])
def choose_kernel(
    k_rot, v_rot, numbers, scalars, shares, k_weights, v_roots, epoch, pages,
    HEADS: tl.constexpr, FORMATS: tl.constexpr, PADDED: tl.constexpr, T: tl.constexpr,
    DK: tl.constexpr, K_DIM: tl.constexpr, DV: tl.constexpr, V_DIM: tl.constexpr,
    ANY_TOPK: tl.constexpr, ANY_EXCEPTIONS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: one page and head. numbers int32 [HEADS, pages], written: -1 where top-k may win.

    EXACT: decide what is -1, and leave the others. Apart, since it is rare and takes registers.
    """
    page, head = tl.program_id(0), tl.program_id(1)
    if EXACT:
        if tl.load(numbers + head * pages + page) >= 0:
            return
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
    energies, most = _value_energies(values, roots, T, DV, V_DIM)
    costs = _weigh(costs, energies, shares + K_DIM // 16 * PADDED, DV, V_DIM, PADDED)
    kind = tl.load(rows + n * _SCALARS + _KIND, mask=n < FORMATS, other=_INVALID)
    costs = tl.where(kind == _PLANES, tl.where(costs == costs, costs, -float("inf")), float("inf"))
    if ANY_TOPK:
        weight = tl.load(k_weights + head)
        best, proven = tl.min(costs, 0), True
        for i in range(FORMATS):
            if tl.load(rows + i * _SCALARS + _KIND) == _TOPK:
                k_keep = tl.load(rows + i * _SCALARS + _K_KEEP)
                v_keep = tl.load(rows + i * _SCALARS + _V_KEEP)
                if EXACT:
                    cost = _topk_energy(keys, roots, k_keep, False, T, DK, K_DIM) * weight
                    cost += _topk_energy(values, roots, v_keep, True, T, DV, V_DIM)
                    costs = tl.where(n == i, tl.where(cost == cost, cost, -float("inf")), costs)
                else:
                    least = _least_topk_energy(keys, roots, k_keep, False, T, DK, K_DIM) * weight
                    # K alone is nearly always enough.
                    if not (least > best):
                        least += _least_topk_energy(values, roots, v_keep, True, T, DV, V_DIM)
                    proven &= (most < _CEILING) & (least > best)
    first = tl.min(tl.where(costs == tl.min(costs, 0), n, PADDED), 0)
    if ANY_TOPK and not EXACT:
        first = tl.where(proven, first, -1)
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
    y = _tile(keys, T, D, DIM)
    out = tl.zeros([T, 1], tl.int1)
    if exceptions > 0:
        out = _outlying(y, exceptions, T)
    y = tl.where(y == y, y, float("inf"))
    ranges = tl.max(tl.where(out, -float("inf"), y), 0) - tl.min(tl.where(out, float("inf"), y), 0)
    ranges = tl.where(ranges == ranges, ranges, float("inf"))
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
    """`reference.energies` of V, float64 [D / 16], and the largest of magnitudes and roots."""
    y, root = _magnitudes(_tile(values, T, D, DIM)), _tile(roots, 1, D, DIM)
    most = tl.maximum(_largest(y), _largest(root))
    y = _magnitudes(y * root)
    integers, unit = _integers(y, _largest(y))
    return tl.sum(tl.reshape(tl.sum(integers, 0), [D // 16, 16]), 1).to(tl.float64) * unit, most


@triton.jit
def _least_topk_energy(
    source, roots, keep, WEIGHTED: tl.constexpr, T: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr
):  # fmt: skip
    """At most `_topk_energy`, float64, of roots below CEILING. NaN if a value reaches it: that may be NaN, too.

    What is below a value that `keep` of its token reach is dropped. Such a value is looked for among a few; where none
    is found, the token counts nothing.
    """
    y = _magnitudes(_tile(source, T, D, DIM))
    bits, largest = _bits(y, D, DIM), tl.max(y, 1).to(tl.int32, bitcast=True)
    least = tl.maximum(largest - _SPAN, 0)
    found = tl.sum((bits >= least[:, None]).to(tl.int32), 1) >= keep
    for i in tl.static_range(_STEPS):
        more = least + (_SPAN >> i + 1)
        least = tl.where(tl.sum((bits >= more[:, None]).to(tl.int32), 1) >= keep, more, least)
    errors, most = y, tl.max(largest, 0).to(tl.float32, bitcast=True)
    if WEIGHTED:
        errors *= _tile(roots, 1, D, DIM)
    # Squares of what is counted are normal numbers.
    dropped = (bits < tl.where(found, least, 0)[:, None]) & (errors > _FLOOR)
    energy = tl.sum(tl.sum(tl.where(dropped, errors * errors, 0.0), 1), 0)
    return tl.where(most < _CEILING, energy, float("nan")).to(tl.float64) * _SAFE


@triton.jit
def _topk_energy(
    source, roots, keep, WEIGHTED: tl.constexpr, T: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr
):  # fmt: skip
    """Sum of squares of `topk.reference.error_bounds`, float64; with `roots` or without."""
    y = _magnitudes(_tile(source, T, D, DIM))
    bits = _bits(y, D, DIM)
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
        errors = _magnitudes(errors * _tile(roots, 1, D, DIM))
    integers, unit = _integers(errors, _largest(errors))
    return tl.sum(tl.sum(integers, 1), 0).to(tl.float64) * unit


@triton.jit
def _tile(source, T: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr):
    """[T, D], 0 from DIM on."""
    t, c = tl.arange(0, T)[:, None], tl.arange(0, D)[None, :]
    return tl.load(source + t * DIM + c, mask=c < DIM, other=0)


@triton.jit
def _bits(y, D: tl.constexpr, DIM: tl.constexpr):
    """Positive floats sort as their bits; channels from DIM on come last."""
    return tl.where(tl.arange(0, D)[None, :] < DIM, y.to(tl.int32, bitcast=True), -1)


@triton.jit
def _magnitudes(x):
    """Infinite instead of NaN."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def _largest(y):
    return tl.max(tl.max(y, 1), 0)


@triton.jit
def _integers(x, largest):
    """`exact.sum_of_squares` before the sums: squares int64, and what 1 of them is worth, float64."""
    largest = tl.where(largest == 0, 1.0, largest).to(tl.float64)
    # A product instead of a quotient per value: off by less than 2^-36. A quotient of two float32 is half-way between
    # integers or more than 2^-27 away from it, so that rounding to multiples of 2^-28 first decides as the quotient.
    scaled = x.to(tl.float64) * (_UNITS / largest)
    scaled = (scaled + 25165824.0) - 25165824.0
    # Adding 1.5 * 2^52 rounds to integers, halves to even, which are then the lower bits; what is not finite, or would
    # not be, counts as 0.
    nearest = (scaled + 6755399441055744.0).to(tl.int64, bitcast=True).to(tl.int32)
    integers = tl.where(largest < float("inf"), nearest, 0)
    unit = largest / _UNITS
    return (integers * integers).to(tl.int64), tl.where(largest < float("inf"), unit * unit, float("nan"))
