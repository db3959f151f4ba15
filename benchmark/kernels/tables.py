"""Tables and the figure of the kernel benchmark. Plain values in, text out: no device is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark.common.report import new_figure, write_png
from benchmark.common.stats import format_table

COMPARED = ("full", "step")
"""Ops of the crossover."""


def describe_shape(shape: dict[str, Any]) -> str:
    """The table of one shape (`measure.measure_shape`)."""
    header = ["", "us", "x bf16", "x fp8", "MB", "of read", "plain reads"]
    rows = [
        [
            row["name"], row["us"], row["faster_than_bf16"], row["faster_than_fp8"], row["bytes"] / 1e6,
            row["of_read_bandwidth"], row["plain_reads"],
        ]
        for row in shape["rows"]
    ]  # fmt: skip
    lists = f"{shape['page_lists']} page list{'s' if shape['page_lists'] > 1 else ''}"
    title = f"batch {shape['batch']}, context {shape['context']:,} ({lists})"
    notes = [f"{row['name']}: {row['note']}" for row in shape["rows"] if row["note"]]
    return "\n".join([title, format_table(header, rows), *notes])


def times(shape: dict[str, Any]) -> dict[str, float | None]:
    """Microseconds by name."""
    return {row["name"]: row["us"] for row in shape["rows"]}


def wins_from(lengths: Sequence[int], dense: Sequence[float], op: Sequence[float]) -> int | None:
    """The shortest length from which on the op is faster at every measured one; None: not at the longest.

    Args:
        lengths: rising; dense, op: their times.
    """
    first = None
    for length, theirs, ours in reversed(list(zip(lengths, dense, op, strict=True))):
        if ours >= theirs:
            break
        first = length
    return first


def describe_crossover(shapes: Sequence[dict[str, Any]]) -> str:
    """For each batch size, times by length, and from where on an op beats dense attention in bf16."""
    parts = []
    for batch in sorted({shape["batch"] for shape in shapes}):
        own = sorted((shape for shape in shapes if shape["batch"] == batch), key=lambda shape: shape["context"])
        found = [times(shape) for shape in own]
        columns = ["dense bf16", "dense fp8", *(name for name in COMPARED if name in found[0])]
        rows = [[f"{s['context']:,}", *(t.get(name) for name in columns)] for s, t in zip(own, found, strict=True)]
        parts.append(f"crossover, batch {batch} (us)\n{format_table(['context', *columns], rows)}")
        parts.extend(_verdict(name, own, found) for name in columns[2:])
    return "\n".join(parts)


def _verdict(name: str, shapes: Sequence[dict[str, Any]], found: Sequence[dict[str, float | None]]) -> str:
    dense = [t.get("dense bf16") for t in found]
    if None in dense:
        return f"{name}: no dense time to compare with"
    lengths = [shape["context"] for shape in shapes]
    first = wins_from(lengths, dense, [t[name] for t in found])
    if first is None:
        return f"{name}: dense wins at {lengths[-1]:,}, the longest"
    if first == lengths[0]:
        return f"{name}: faster than dense from {first:,}, the shortest"
    return f"{name}: dense wins up to {lengths[lengths.index(first) - 1]:,}, {name} from {first:,}"


def compare_with_base(ours: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every shape and op that both have: `shape`, `op`, `base_us`, `us`."""
    of_base = {(shape["batch"], shape["context"]): times(shape) for shape in base}
    return [
        {
            "shape": f"{shape['batch']}x{shape['context']}",
            "op": row["name"],
            "base_us": of_base.get((shape["batch"], shape["context"]), {}).get(row["name"]),
            "us": row["us"],
        }
        for shape in ours
        for row in shape["rows"]
        if not row["name"].startswith("dense ")
    ]


def describe_base(ref: str, verdicts: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> str:
    """The table of `compare_with_base`, and what was not timed there."""
    lines = [
        [row["shape"], row["op"], row["base_us"], row["us"], row["base_us"] and row["base_us"] / row["us"]]
        for row in rows
    ]
    failed = [f"{v['op']}: its gate failed: {v['message'] or v['error']}" for v in verdicts if not v["passed"]]
    table = format_table(["shape", "op", "its us", "us", "its / ours"], lines)
    return "\n".join([f"against {ref}", table, *failed])


def plot(path: Path, shapes: Sequence[dict[str, Any]]) -> None:
    """Bars: how many times faster than dense attention in bf16, by shape and op."""
    ops = [row["name"] for row in shapes[0]["rows"] if row["faster_than_bf16"]]
    figure = new_figure(1)
    figure.set_size_inches(2.2 * len(shapes) + 3, 4)
    (axis,) = figure.axes
    width = 0.8 / max(len(ops), 1)
    for i, name in enumerate(ops):
        heights = [next(row["faster_than_bf16"] for row in s["rows"] if row["name"] == name) or 0 for s in shapes]
        bars = axis.bar([x + (i + 0.5) * width - 0.4 for x in range(len(shapes))], heights, width, label=name)
        axis.bar_label(bars, fmt="%.1f", fontsize=6, rotation=90, padding=2)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_yscale("log")
    axis.set_ylabel("times faster than FlashInfer, bf16")
    axis.set_xticks(range(len(shapes)), [f"{s['batch']} x {s['context'] // 1024}k" for s in shapes])
    axis.set_xlabel("batch x context")
    axis.legend(fontsize=7, ncols=2)
    write_png(path, figure)
