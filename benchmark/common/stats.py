"""Percentiles, ratios and plain-text tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

Number = int | float


def percentile(values: Sequence[Number], q: float) -> float:
    """The q-th percentile (q in [0, 100]), linear between the two nearest ranks, in the unit of `values`."""
    if not values:
        raise ValueError("percentile of no values: check for an empty sequence first")
    if not 0 <= q <= 100:
        raise ValueError(f"q must lie in [0, 100], found {q}")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * q / 100
    low, high = math.floor(rank), math.ceil(rank)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (rank - low))


def spread(values: Iterable[Number | None]) -> dict[str, float | None]:
    """Mean, p50, p90 and p99 of the values that are not None; all None when there are none."""
    present = [value for value in values if value is not None]
    if not present:
        return {"mean": None, "p50": None, "p90": None, "p99": None}
    return {
        "mean": sum(present) / len(present),
        "p50": percentile(present, 50),
        "p90": percentile(present, 90),
        "p99": percentile(present, 99),
    }


def ratio(numerator: Number | None, denominator: Number | None) -> float | None:
    """numerator / denominator; None when either is unknown or the denominator is zero."""
    if numerator is None or not denominator:
        return None
    return numerator / denominator


def format_value(value: object) -> str:
    """One table cell: four significant digits for floats, thousands separators for integers, "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return str(value)


def format_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table with a left-aligned first column and right-aligned others; one line per row, no trailing newline."""
    cells = [list(header), *([format_value(value) for value in row] for row in rows)]
    for line in cells:
        if len(line) != len(header):
            raise ValueError(f"every row needs {len(header)} cells as in the header, found {len(line)}: {line}")
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]

    def layout(line: Sequence[str]) -> str:
        first = line[0].ljust(widths[0])
        return "  ".join([first, *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))])

    return "\n".join([layout(cells[0]), "  ".join("-" * width for width in widths), *map(layout, cells[1:])])
