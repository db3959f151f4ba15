"""Bits by importance: which formats fill a number of bytes with the least expected error.

Greedy: every step gives the next width to the group that gains most per byte. The expected errors (choice.py) fall
convexly with the bits but for the first step, so that the result is close to the equal-slope optimum.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from mosaic_kernels.segment import GROUP, WIDTHS, SegmentFormat
from mosaic_kernels.segment_choice.reference import K_SHARES, V_SHARES

_FOLLOWING = dict(itertools.pairwise(WIDTHS))
"""Width -> the next one."""


class Step(NamedTuple):
    """One step of an allocation."""

    nbytes: int
    """Bytes of the segment after it."""
    cost: float
    """Expected weighted squared error after it."""
    widths: tuple[int, ...]
    """Bits of K's groups, then of V's."""


class _Wider(NamedTuple):
    """The next width of a group."""

    rate: float
    """Gain per byte."""
    width: int
    extra: int
    """Bytes more."""
    gain: float
    """Expected error less."""


class _Group(NamedTuple):
    shares: dict[int, float]
    """K_SHARES or V_SHARES."""
    scale_bytes: int
    """Bytes of scales that the first bit brings."""
    leads: bool
    """K's first group, or V's."""


class Allocator:
    """Allocations for segments of one shape.

    Args:
        page_size, k_dim, v_dim: as of SegmentFormat.
    """

    def __init__(self, page_size: int, k_dim: int, v_dim: int) -> None:
        self._shape = {"page_size": page_size, "k_dim": k_dim, "v_dim": v_dim}
        self._k_groups, v_groups = k_dim // GROUP, v_dim // GROUP
        self._bit_bytes = page_size * GROUP // 8
        self._empty: dict[int, int] = {}
        # Every group of K has scales of its own; all of V's share one per token, which the first of them brings.
        self._groups = [
            *(_Group(K_SHARES, 2 * GROUP, i == 0) for i in range(self._k_groups)),
            *(_Group(V_SHARES, 0 if i else page_size, i == 0) for i in range(v_groups)),
        ]

    def path(self, energies: list[float], budget: int, exceptions: int = 0) -> list[Step]:
        """Steps from nothing coded to a full budget.

        Args:
            energies: weighted, of K's groups, then of V's (choice.energies).
            budget: bytes of a segment.
            exceptions: tokens kept uncompressed.
        """
        widths = [0] * len(energies)
        nbytes = self._empty_bytes(exceptions)
        cost = sum(e * group.shares[0] for e, group in zip(energies, self._groups, strict=True))
        steps = [Step(nbytes, cost, tuple(widths))]
        wider = [self._wider(energies, widths, i) for i in range(len(widths))]
        while True:
            best = None
            for i, step in enumerate(wider):
                if step is not None and nbytes + step.extra <= budget and (best is None or step.rate > best.rate):
                    best, at = step, i
            if best is None:
                return steps
            widths[at] = best.width
            nbytes += best.extra
            cost -= best.gain
            steps.append(Step(nbytes, cost, tuple(widths)))
            # A group may be as wide as the one before it.
            for i in range(at, min(at + 2, len(widths))):
                wider[i] = self._wider(energies, widths, i)

    def _empty_bytes(self, exceptions: int) -> int:
        """Bytes of a segment without codes."""
        if exceptions not in self._empty:
            widths = (0,) * len(self._groups)
            self._empty[exceptions] = self.format(widths, exceptions).segment_bytes
        return self._empty[exceptions]

    def format(self, widths: tuple[int, ...], exceptions: int = 0) -> SegmentFormat:
        """The format of an allocation."""
        k_bits, v_bits = widths[: self._k_groups], widths[self._k_groups :]
        return SegmentFormat(**self._shape, k_bits=k_bits, v_bits=v_bits, exceptions=exceptions)

    def _wider(self, energies: list[float], widths: list[int], i: int) -> _Wider | None:
        """The next width of a group; none beyond the group before it, whose channels have more energy."""
        width, group = widths[i], self._groups[i]
        following = _FOLLOWING.get(width)
        if following is None or (not group.leads and following > widths[i - 1]):
            return None
        extra = (following - width) * self._bit_bytes + (0 if width else group.scale_bytes)
        gain = energies[i] * (group.shares[width] - group.shares[following])
        return _Wider(gain / extra, following, extra, gain)


def best_formats(costs: torch.Tensor, most: int) -> list[int]:
    """The columns of costs [segments, formats] that together serve the segments best, at most `most`, best first."""
    chosen: list[int] = []
    reached = torch.full((len(costs),), torch.inf, dtype=costs.dtype, device=costs.device)
    while len(chosen) < most:
        totals = torch.minimum(reached[:, None], costs).mean(0)
        best = int(totals.argmin())
        if best in chosen or (chosen and totals[best] > 0.995 * reached.mean()):
            break
        chosen.append(best)
        reached = torch.minimum(reached, costs[:, best])
    return chosen
