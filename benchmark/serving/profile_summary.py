"""Tables, gate and figure of a run of step_profile.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from matplotlib.figure import Figure

from benchmark.common.report import COLOURS, new_figure
from benchmark.common.stats import format_table
from benchmark.serving.gpu_trace import DECODE, PREFILL
from benchmark.serving.kernel_names import IDLE, OTHER, categories
from benchmark.serving.step_summary import MAY_REFUSE

_UNITS = {PREFILL: f"{PREFILL}, ms in all", DECODE: f"{DECODE}, ms per step"}
MOST_OTHER = 3
"""Kernels without a category that are named below a table."""

Results = dict[str, dict[str, Any]]


def describe(results: Results) -> str:
    """A table for every stage, context and batch, one column for each server or trace; what is missing after them."""
    parts = []
    for title, profiles in _cells(results).items():
        found = {name: profile["summary"] for name, profile in profiles.items()}
        rows = [
            [category, *(summary["ms"].get(category) for summary in found.values())]
            for category in _present(found.values())
        ]
        rows.append(["all", *(summary["step_ms"] for summary in found.values())])
        unprofiled = [profile.get("unprofiled_token_ms") for profile in profiles.values()]
        if title.startswith(DECODE) and any(unprofiled):
            rows.append(["a token without profiler", *unprofiled])
        rows.append(["number of kernels", *(summary["kernels"] for summary in found.values())])
        parts += ["", title, format_table(["ms", *found], rows), *_unknown(found)]
    return "\n".join([*parts, *_told(results, "unmeasured")])


def gate(results: Results) -> list[str]:
    """Why the figures must not be used: what failed, had no kernel, or did not fit (unless that is stock)."""
    must_fit = {name: result for name, result in results.items() if name not in MAY_REFUSE}
    return [*_told(results, "error"), *_told(must_fit, "unmeasured")]


def draw(results: Results) -> Figure:
    """Stacked bars, one panel for each stage."""
    measured = [(name, profile) for name, profile in _profiles(results) if profile["summary"]]
    stages = list(dict.fromkeys(profile["stage"] for _, profile in measured))
    figure = new_figure(max(1, len(stages)))
    figure.set_size_inches(7 * max(1, len(stages)), 2.4 + 0.35 * len(measured) / max(1, len(stages)))
    colours = _colours()
    for axis, stage in zip(figure.axes, stages, strict=False):
        bars = [(name, profile) for name, profile in measured if profile["stage"] == stage]
        # Systems side by side.
        bars.sort(key=lambda bar: (bar[1]["context"] or 0, bar[1]["batch"] or 0))
        left = [0.0] * len(bars)
        for category in _present(profile["summary"] for _, profile in measured):
            widths = [profile["summary"]["ms"].get(category, 0.0) for _, profile in bars]
            axis.barh(range(len(bars)), widths, left=left, color=colours[category], label=category)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axis.set_yticks(range(len(bars)), [f"{name} {_size(profile)}".strip() for name, profile in bars])
        for tick, (name, _) in zip(axis.get_yticklabels(), bars, strict=True):
            tick.set_color(COLOURS.get(name, "black"))
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.grid(axis="x", alpha=0.3)
        axis.set_xlabel(_UNITS[stage])
    if stages:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    return figure


def _profiles(results: Results) -> Iterable[tuple[str, dict[str, Any]]]:
    return [(name, profile) for name, result in results.items() for profile in result["profiles"]]


def _cells(results: Results) -> dict[str, dict[str, dict[str, Any]]]:
    """By title, what was measured of every server."""
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for name, profile in _profiles(results):
        if profile["summary"]:
            cells.setdefault(_title(profile), {})[name] = profile
    return cells


def _present(summaries: Iterable[dict[str, Any]]) -> list[str]:
    found = {category for summary in summaries for category in summary["ms"]}
    return [category for category in categories() if category in found]


def _size(profile: dict[str, Any]) -> str:
    return "" if profile["context"] is None else f"{profile['context']:,} x {profile['batch']}"


def _place(profile: dict[str, Any]) -> str:
    return "" if profile["context"] is None else f", context {profile['context']:,}, batch {profile['batch']}"


def _title(profile: dict[str, Any]) -> str:
    return _UNITS[profile["stage"]] + _place(profile)


def _told(results: Results, key: str) -> list[str]:
    """What is under `key` of profiles, said once where prefill and decode have it in common."""
    said = [f"{name}{_place(profile)}: {profile[key]}" for name, profile in _profiles(results) if profile[key]]
    return list(dict.fromkeys(said))


def _unknown(found: dict[str, dict[str, Any]]) -> list[str]:
    return [
        f"{name}: other: {row['ms']:.3g} ms {row['name']}"
        for name, summary in found.items()
        for row in [row for row in summary["names"] if row["category"] == OTHER][:MOST_OTHER]
    ]


def _colours() -> dict[str, Any]:
    """Fixed, so that a category keeps its colour from figure to figure."""
    from matplotlib import colormaps

    palette = [*colormaps["tab20"].colors, *colormaps["tab20b"].colors]
    colours = {category: palette[index % len(palette)] for index, category in enumerate(categories())}
    return colours | {OTHER: "#000000", IDLE: "#dddddd"}
