"""Coarser codes within an error limit: a frame in, a valid frame out that decodes to nearly the same and packs better.

Every group of 16 channels takes one rung of a ladder: all of its bits; no refinement; and then base codes of fewer and
fewer levels, which are a subset of the levels that the format has, so that nothing but the codes changes. Refinement
that is left out becomes the two codes next to its middle in turn, token by token: the mean stays where it was. Which
rung a group takes follows from the squared error that its own codes would make, weighted by what the calibration found
an error to cost (HeadPlan), and from the bytes that it saves, at one price for all groups of the page.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mosaic_kernels.segment import GROUP
from sglang_mosaic.manager.recompress.groups import FrameLayout, Groups, Kind

LEVELS: dict[int, tuple[tuple[int, ...], ...]] = {
    4: ((0, 3, 6, 9, 12, 15), (0, 5, 10, 15), (5, 10)),
    2: ((1, 2),),
    1: (),
}
"""Bits of a base code -> what its codes may be rounded to, rung by rung. Steps are odd and levels symmetric about the
middle of the codes: every level then stands in the middle of those that are rounded to it. No level at all is no rung:
an error that is the same for all tokens of a page does more harm than its square says."""


def rungs(kind: Kind) -> int:
    """Number of rungs: 0 keeps everything, 1 drops refinement, further ones round the base."""
    return 2 + len(LEVELS[kind.base_bits])


def apply(kind: Kind, rung: int, base: np.ndarray, refinement: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Planes [n, bytes] of groups on a rung."""
    if rung >= 1:
        refinement = np.broadcast_to(filling(kind.refinement_bits, refinement.shape[1]), refinement.shape)
    if rung >= 2:
        base = _ROUNDING[kind.base_bits][rung - 2][base]
    return base, refinement


def planes(frame: np.ndarray, groups: Groups, rows: np.ndarray | slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """Base and refinement planes of groups, uint8 [n, bytes]."""
    words = frame.view(np.uint32)
    return words[groups.base[rows]].view(np.uint8), words[groups.refinement[rows]].view(np.uint8)


def filling(bits: int, nbytes: int) -> np.ndarray:
    """What stands for dropped bits of a group, uint8 [nbytes]: the codes below and above the middle, token by token."""
    if bits == 1:  # both tokens in one byte, the even one lower
        return np.full(nbytes, 0xF0, np.uint8)
    below = (1 << bits) // 2 - 1
    even, odd = (sum(code << shift for shift in range(0, 8, max(bits, 1))) for code in (below, below + 1))
    return np.where(np.arange(nbytes) // max(2 * bits, 1) % 2 == 0, even, odd).astype(np.uint8)


class Coarsened(NamedTuple):
    """A frame after coarsening."""

    frame: np.ndarray
    """uint8 [frame bytes]."""
    rungs: dict[Kind, np.ndarray]
    """uint8 [n] of every kind's groups."""


def coarsen(layout: FrameLayout, frame: np.ndarray, max_error: float) -> Coarsened:
    """Spend what the error limit leaves.

    Args:
        frame: uint8 [frame bytes].
        max_error: largest relative error of the attention output, root mean square over the segments, that the result
            may be expected to make, what the frame makes already included (its headers say it).

    Returns:
        A frame whose headers have the new errors; on rung 0 everywhere, and unchanged, if the limit is used up.

    Raises:
        FrameError: the frame is not of this epoch.
    """
    numbers = layout.numbers(frame)
    kinds, _ = layout.take_apart(numbers)
    made = layout.errors(frame).astype(np.float64) ** 2
    # NaN marks what cannot be measured: such a page stays as it is.
    room = (max_error**2 - made.mean()) * len(made)
    if not room > 0:
        return Coarsened(frame, {kind: np.zeros(len(groups), np.uint8) for kind, groups in kinds.items()})
    costs = {kind: _costs(kind, groups, frame) for kind, groups in kinds.items()}
    chosen = _choose(costs, room)
    result = frame.copy()
    words = result.view(np.uint32)
    for kind, groups in kinds.items():
        for rung in np.unique(chosen[kind]).tolist():
            rows = chosen[kind] == rung
            for at, plane in zip(
                (groups.base[rows], groups.refinement[rows]),
                apply(kind, rung, *planes(frame, groups, rows)),
                strict=True,
            ):
                words[at] = np.ascontiguousarray(plane).view(np.uint32)
        added = np.take_along_axis(costs[kind], chosen[kind][:, None].astype(np.int64), 1)[:, 0]
        np.add.at(made, groups.segments, added)
    layout.put_errors(result, np.sqrt(made))
    return Coarsened(result, chosen)


def _choose(costs: dict[Kind, np.ndarray], room: float) -> dict[Kind, np.ndarray]:
    """The rung of every group: the least bytes whose squared errors sum up to at most `room`, by bisection of the price
    of a bit in squared error."""

    def at_price(price: float) -> tuple[dict[Kind, np.ndarray], float]:
        rows = {kind: (cost + price * _bits(kind)).argmin(1) for kind, cost in costs.items()}
        total = sum(float(np.take_along_axis(costs[k], r[:, None], 1).sum()) for k, r in rows.items())
        return rows, total

    low, high = 1e-15, 1e3
    rows, _ = at_price(low)
    for _ in range(40):
        middle = (low * high) ** 0.5
        tried, total = at_price(middle)
        if total <= room:
            low, rows = middle, tried
        else:
            high = middle
    return {kind: r.astype(np.uint8) for kind, r in rows.items()}


def _bits(kind: Kind) -> np.ndarray:
    """About what a group takes on every rung, in bits of a code."""
    return np.array([kind.bits, kind.base_bits, *(np.log2(len(levels)) for levels in LEVELS[kind.base_bits])])


def _costs(kind: Kind, groups: Groups, frame: np.ndarray) -> np.ndarray:
    """Weighted squared error of every group on every rung, float64 [n, rungs]."""
    base, refinement = planes(frame, groups)
    before = codes_of(kind, base, refinement)
    scales = frame[groups.scales]
    if kind.tensor == "k":
        per_channel, per_token = scales.view(np.float16).astype(np.float64) ** 2 * groups.weights, None
    else:
        per_channel, per_token = groups.weights, (scales.astype(np.uint16) << 7).view(np.float16).astype(np.float32)
    costs = np.zeros((len(base), rungs(kind)))
    for rung in range(1, rungs(kind)):
        moved = (codes_of(kind, *apply(kind, rung, base, refinement)) - before).astype(np.float32)
        if per_token is not None:
            moved *= per_token[:, :, None]
        costs[:, rung] = (np.square(moved).sum(1) * per_channel).sum(1)
    return costs


def codes_of(kind: Kind, base: np.ndarray, refinement: np.ndarray) -> np.ndarray:
    """Codes int16 [n, tokens, 16] of planes [n, bytes]."""
    codes = _unpack(base, kind.base_bits)
    if kind.refinement_bits:
        codes = codes << kind.refinement_bits | _unpack(refinement, kind.refinement_bits)
    return codes


def _unpack(planes: np.ndarray, bits: int) -> np.ndarray:
    """int16 [n, tokens, 16] of a plane's bytes [n, bytes] (mosaic_kernels.segment.Plane has the order)."""
    rows = planes.reshape(len(planes), -1, 4 if bits == 1 else 2 * bits)
    parts = [rows >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    codes = np.stack(parts, 2).reshape(len(planes), -1, GROUP)
    return codes.astype(np.int16)


def _table(bits: int, levels: tuple[int, ...]) -> np.ndarray:
    nearest = np.abs(np.arange(1 << bits)[:, None] - np.array(levels)).argmin(1)
    codes = np.array(levels, np.uint8)[nearest]
    data = np.arange(256)
    table = np.zeros(256, np.uint8)
    for shift in range(0, 8, bits):
        table |= codes[data >> shift & (1 << bits) - 1] << shift
    return table


_ROUNDING = {bits: [_table(bits, levels) for levels in ladder] for bits, ladder in LEVELS.items()}
