"""Bits by importance: which formats fill a number of bytes with the least expected error.

Greedy: every step gives the next width to the group that gains most per byte. The expected errors (choice.py) fall
convexly with the bits but for the first step, so that the result is close to the equal-slope optimum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mosaic_kernels.segment import GROUP, WIDTHS, SegmentFormat
from mosaic_kernels.segment_choice.reference import K_SHARES, V_SHARES


class Step(NamedTuple):
    """One step of an allocation."""

    nbytes: int
    """Bytes of the segment after it."""
    cost: float
    """Expected weighted squared error after it."""
    widths: tuple[int, ...]
    """Bits of K's groups, then of V's."""


class Allocator:
    """Allocations for segments of one shape.

    Args:
        page_size, k_dim, v_dim: as of SegmentFormat.
    """

    def __init__(self, page_size: int, k_dim: int, v_dim: int) -> None:
        self._shape = {"page_size": page_size, "k_dim": k_dim, "v_dim": v_dim}
        self._k_groups = k_dim // GROUP
        self._shares = [K_SHARES] * self._k_groups + [V_SHARES] * (v_dim // GROUP)
        self._bit_bytes = page_size * GROUP // 8
        # Scales: of K those of a group that gets its first bit, of V those that the first group of all brings.
        self._scale_bytes = [2 * GROUP] * self._k_groups + [page_size] + [0] * (v_dim // GROUP - 1)

    def path(self, energies: list[float], budget: int, exceptions: int = 0) -> list[Step]:
        """Steps from nothing coded to a full budget.

        Args:
            energies: weighted, of K's groups, then of V's (choice.energies).
            budget: bytes of a segment.
            exceptions: tokens kept uncompressed.
        """
        widths = [0] * len(energies)
        nbytes = self.format(tuple(widths), exceptions).segment_bytes
        cost = sum(e * shares[0] for e, shares in zip(energies, self._shares, strict=True))
        steps = [Step(nbytes, cost, tuple(widths))]
        while True:
            best = None
            for i, width in enumerate(widths):
                wider = self._wider(widths, i)
                if wider is None:
                    continue
                extra = (wider - width) * self._bit_bytes + (0 if width else self._scale_bytes[i])
                gain = energies[i] * (self._shares[i][width] - self._shares[i][wider])
                if nbytes + extra <= budget and (best is None or gain / extra > best[0]):
                    best = (gain / extra, i, wider, extra, gain)
            if best is None:
                return steps
            _, i, widths[i], extra, gain = best
            nbytes += extra
            cost -= gain
            steps.append(Step(nbytes, cost, tuple(widths)))

    def format(self, widths: tuple[int, ...], exceptions: int = 0) -> SegmentFormat:
        """The format of an allocation."""
        k_bits, v_bits = widths[: self._k_groups], widths[self._k_groups :]
        return SegmentFormat(**self._shape, k_bits=k_bits, v_bits=v_bits, exceptions=exceptions)

    def _wider(self, widths: list[int], i: int) -> int | None:
        """The next width of a group; none beyond the group before it, whose channels have more energy."""
        at = WIDTHS.index(widths[i]) + 1
        if at == len(WIDTHS):
            return None
        leads = i in (0, self._k_groups)
        return WIDTHS[at] if leads or WIDTHS[at] <= widths[i - 1] else None


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
