"""Figures, gate and plot of a shared-prefix chat run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmark.common.report import COLOURS, new_figure
from benchmark.common.stats import format_table, ratio, spread

Row = dict[str, Any]
TIMES = ("ttft_s", "tpot_s", "latency_s")


def cache_counts(rows: Sequence[Row], reports_cache: bool | None) -> tuple[int, int | None]:
    """(prompt tokens, cached tokens) over completed rows; the latter None when the server does not report it.

    SGLang leaves the field out of a reply without hits, so a missing count is 0 on a server that reports at all:
    `reports_cache` says so, and None means to infer it from any row that has the field.
    """
    completed = [row for row in rows if row["error"] is None]
    if reports_cache is None:
        reports_cache = any(row["cached_tokens"] is not None for row in completed)
    prompt = sum(row["prompt_tokens"] for row in completed)
    return prompt, sum(row["cached_tokens"] or 0 for row in completed) if reports_cache else None


def summarise(rows: Sequence[Row], wall_s: float, reports_cache: bool | None) -> dict[str, float | int | None]:
    """The figures of the whole run: times in seconds, rates per second of `wall_s`."""
    completed = [row for row in rows if row["error"] is None]
    prompt, cached = cache_counts(rows, reports_cache)
    output = sum(row["output_tokens"] for row in completed)
    figures: dict[str, float | int | None] = {
        "completed_turns": len(completed),
        "errors": len(rows) - len(completed),
        "wall_s": wall_s,
        "requests_per_s": ratio(len(completed), wall_s),
        "output_tokens_per_s": ratio(output, wall_s),
        "prompt_tokens": prompt,
        "cached_tokens": cached,
        "hit_rate": ratio(cached, prompt),
        "output_tokens": output,
    }
    for name in TIMES:
        figures |= {f"{name[:-2]}_{key}_s": value for key, value in spread(row[name] for row in completed).items()}
    return figures


def by_turn(rows: Sequence[Row], turns: int, reports_cache: bool | None) -> list[dict[str, Any]]:
    """One entry per turn index, in order: counts, hit rate and the median and p90 of each time."""
    if reports_cache is None:
        reports_cache = cache_counts(rows, None)[1] is not None
    table = []
    for turn in range(turns):
        here = [row for row in rows if row["turn"] == turn]
        completed = [row for row in here if row["error"] is None]
        prompt, cached = cache_counts(here, reports_cache)
        entry: dict[str, Any] = {
            "turn": turn,
            "completed": len(completed),
            "errors": len(here) - len(completed),
            "prompt_tokens": prompt,
            "cached_tokens": cached,
            "hit_rate": ratio(cached, prompt),
        }
        for name in TIMES:
            values = spread(row[name] for row in completed)
            entry |= {f"{name[:-2]}_p50_s": values["p50"], f"{name[:-2]}_p90_s": values["p90"]}
        table.append(entry)
    return table


def turn_table(results: dict[str, dict[str, Any]]) -> str:
    """One line per system and turn index (counted from 1)."""
    columns = ["completed", "errors", "prompt_tokens", "hit_rate", "ttft_p50_s", "ttft_p90_s", "tpot_p50_s"]
    rows = [
        [f"{name} turn {entry['turn'] + 1}", *(entry[column] for column in columns)]
        for name, result in results.items()
        for entry in result["by_turn"]
    ]
    return format_table(["by turn", *columns], rows)


def gate(results: dict[str, dict[str, Any]], expected_turns: int) -> list[str]:
    """Why the figures must not be used: failed requests, or systems that completed different numbers of turns."""
    failures = []
    for name, result in results.items():
        failed = [row for row in result["rows"] if row["error"] is not None]
        if failed:
            first = failed[0]
            failures.append(
                f"{name}: {len(failed)} failed request(s), the first of user {first['user']} in turn "
                f"{first['turn'] + 1}: {first['error']}"
            )
    counts = {name: result["summary"]["completed_turns"] for name, result in results.items()}
    if set(counts.values()) != {expected_turns}:
        found = ", ".join(f"{name} {count}" for name, count in counts.items())
        failures.append(f"completed turns must be {expected_turns} on every system, found: {found}")
    return failures


def draw(results: dict[str, dict[str, Any]]) -> Figure:
    """Time to first token (median, band to p90) and hit rate by turn, one line per system."""
    figure = new_figure(2)
    ttft, hits = figure.axes
    for name, result in results.items():
        turns = [entry["turn"] + 1 for entry in result["by_turn"]]
        median = [_plottable(entry["ttft_p50_s"]) for entry in result["by_turn"]]
        high = [_plottable(entry["ttft_p90_s"]) for entry in result["by_turn"]]
        style = {"color": COLOURS.get(name), "marker": "o", "label": name}
        ttft.plot(turns, median, **style)
        ttft.fill_between(turns, median, high, color=COLOURS.get(name), alpha=0.15, linewidth=0)
        hits.plot(turns, [_plottable(entry["hit_rate"]) for entry in result["by_turn"]], **style)
    ttft.set_ylabel("time to first token, s (median; band to p90)")
    ttft.set_ylim(bottom=0)
    hits.set_ylabel("cached / prompt tokens")
    hits.set_ylim(0, 1.02)
    for axis in figure.axes:
        axis.set_xlabel("turn")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
    return figure


def _plottable(value: float | None) -> float:
    return float("nan") if value is None else value
