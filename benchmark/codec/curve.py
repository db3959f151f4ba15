"""Rows of measurements compared at equal bytes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from benchmark.codec.methods import OFFLINE, ONLINE
from benchmark.common.stats import ratio as quotient

SLACK = 0.01
"""Frames are rounded down to whole bytes and blocks: this far beyond its ends, a curve has the error of its end."""

KIVI_LIMITS = {3.37: 0.8, 4.27: 0.8, 5.82: 0.65}
"""Largest error of planes wanted at a ratio, as a share of KIVI's at the same bytes."""
TOPK_LIMITS = {3.1: 0.25}
ONLINE_FROM = 5.0

Row = dict[str, Any]


def interpolate(points: Iterable[tuple[float, float]], ratio: float) -> float | None:
    """The error of a curve at a ratio: its logarithm linear in the bytes between points. None beyond the curve.

    Args:
        points: (ratio, error above 0).
    """
    curve = sorted((1 / r, math.log(error)) for r, error in points)
    at = 1 / ratio
    if not curve or not curve[0][0] * (1 - SLACK) <= at <= curve[-1][0] * (1 + SLACK):
        return None
    at = min(max(at, curve[0][0]), curve[-1][0])
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if at <= x1:
            return math.exp(y0 + (y1 - y0) * (at - x0) / (x1 - x0))
    return math.exp(curve[-1][1])


def add_kivi(rows: Sequence[Row]) -> None:
    """Add every row's error as a share of KIVI's at the same bytes; None where KIVI has no such budget."""
    kivi = [(row["ratio"], row["error_mean"]) for row in rows if row["codec"].startswith("kivi")]
    for row in rows:
        row["to_kivi"] = quotient(row["error_mean"], interpolate(kivi, row["ratio"]))


def acceptance(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The comparisons that the codec is judged by: what is wanted at most (None: nothing in particular), and found."""
    found = []
    planes = {(row["basis"], row["asked_ratio"]): row for row in rows if row["codec"] == "planes"}
    topk = {row["asked_ratio"]: row for row in rows if row["codec"] == "topk"}
    for basis in (ONLINE, OFFLINE):
        for asked, limit in KIVI_LIMITS.items():
            if (basis, asked) in planes:
                row = planes[basis, asked]
                found.append(_line(f"planes {basis} / KIVI at {asked:g}", limit, row["to_kivi"]))
        for asked, limit in TOPK_LIMITS.items():
            if (basis, asked) in planes and asked in topk:
                share = quotient(planes[basis, asked]["error_mean"], topk[asked]["error_mean"])
                found.append(_line(f"planes {basis} / top-k at {asked:g}", limit, share))
    for (basis, asked), row in planes.items():
        if basis == ONLINE and asked >= ONLINE_FROM and (OFFLINE, asked) in planes:
            share = quotient(row["error_mean"], planes[OFFLINE, asked]["error_mean"])
            found.append(_line(f"planes online / offline at {asked:g}", None, share))
    return found


def _line(comparison: str, wanted: float | None, found: float | None) -> dict[str, Any]:
    return {"comparison": comparison, "wanted_at_most": wanted, "found": found}
