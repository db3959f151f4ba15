"""The report on full KV against other runs: tables, markdown and a figure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.common.errors import BenchmarkError
from benchmark.common.report import COLOURS
from benchmark.common.stats import format_table, format_value
from benchmark.quality.pairing import Cell, Interval, Loss, TextCell, cells, loss, pairs
from benchmark.quality.run_folder import read_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADER = ("task", "length", "mean tokens", "n", "full KV", "other", "difference [95% CI]", "lost", "gained", "mean KL")
TEXT_HEADER = (
    *("text", "length", "passages", "perplexity, full KV", "other"),
    *("nats per token [95% CI]", "same choice", "mean KL"),
)
# Settings in which paired runs may differ: what is compared.
COMPARED = "server"
PALETTE = (COLOURS["mosaic"], "#d55e00", "#009e73", "#cc79a7", "#e69f00")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One run against full KV."""

    name: str
    about: dict[str, Any]
    tasks: list[Cell]
    texts: list[TextCell]
    loss: Loss
    missing: int
    """Samples of the full-KV run that this one lacks."""
    warnings: list[str]


def compare(folders: Sequence[Path], floor: float) -> tuple[dict[str, Any], list[Comparison]]:
    """run.json of the first run, and every other run against it."""
    about, full, _ = read_run(folders[0])
    found = []
    for folder in folders[1:]:
        other_about, other, sessions = read_run(folder)
        _check_settings(about, other_about, folder)
        matched = pairs(full, other)
        tasks, texts = cells(matched)
        missing = len(full) - len(matched)
        found.append(
            Comparison(
                folder.resolve().name, other_about, tasks, texts, loss(tasks, matched, floor), missing,
                _warnings(other_about, sessions, missing, [*tasks, *texts]),
            )
        )  # fmt: skip
    return about, found


def _check_settings(full: dict[str, Any], other: dict[str, Any], folder: Path) -> None:
    a, b = full["settings"], other["settings"]
    different = sorted(key for key in {*a, *b} - {COMPARED} if a.get(key) != b.get(key))
    if different:
        listed = "; ".join(f"{key}: {a.get(key)!r} against {b.get(key)!r}" for key in different)
        raise BenchmarkError(f"--compare: {folder} was measured with other settings than the first run ({listed})")


def _warnings(
    about: dict[str, Any], sessions: Sequence[dict[str, Any]], missing: int, found: Sequence[Cell | TextCell]
) -> list[str]:
    warnings = []
    if missing:
        warnings.append(f"{missing} samples of full KV are missing here; the figures are over the others")
    uncached = sum(cell.uncached for cell in found)
    if uncached:
        warnings.append(f"{uncached} samples did not get their context from the cache; give the server more KV memory")
    # A session that was interrupted counted nothing.
    counts = [session["pages_encoded"] for session in sessions if "pages_encoded" in session]
    if about["settings"][COMPARED].get("attention_backend") == "mosaic" and counts and not any(counts):
        warnings.append("no page was compressed, so this run measures nothing; serve with --mosaic-encode seal")
    return warnings


def _with_interval(value: float, bounds: Interval | None, scale: float, digits: int) -> str:
    if bounds is None:
        return f"{value * scale:+.{digits}f}"
    low, high = (f"{bound * scale:+.{digits}f}" for bound in bounds)
    return f"{value * scale:+.{digits}f} [{low}, {high}]"


def _task_rows(comparison: Comparison) -> list[list[Any]]:
    return [
        [
            cell.task, cell.length, round(cell.tokens), cell.samples, f"{cell.full:.1%}", f"{cell.other:.1%}",
            _with_interval(cell.difference, cell.interval, 100, 1), cell.lost, cell.gained,
            None if cell.mean_kl is None else f"{cell.mean_kl:.2g}",
        ]
        for cell in comparison.tasks
    ]  # fmt: skip


def _text_rows(comparison: Comparison) -> list[list[Any]]:
    return [
        [
            cell.task, cell.length, cell.passages, f"{cell.full:.3f}", f"{cell.other:.3f}",
            _with_interval(cell.log_ratio, cell.interval, 1, 4), f"{cell.agreement:.2%}", f"{cell.mean_kl:.2g}",
        ]
        for cell in comparison.texts
    ]  # fmt: skip


def _summary(comparison: Comparison) -> list[str]:
    """The lines under the tables."""
    average = comparison.loss
    if average.difference is None or average.interval is None:
        lines = [f"Full KV reaches {average.floor:.0%} in no task, so there is no average."] if comparison.tasks else []
    else:
        change = _with_interval(average.difference, average.interval, 100, 2)
        lines = [
            f"Mean over the {len(average.counted)} tasks where full KV scores at least {average.floor:.0%}: "
            f"{average.full:.2%} to {average.other:.2%}, {change} points. Counted: {', '.join(average.counted)}."
        ]
    if average.left_out:
        lines.append(f"Not counted: {', '.join(average.left_out)}.")
    ties = sum(cell.near_ties for cell in comparison.tasks)
    if ties:
        lines.append(f"{ties} of the lost samples differ only by near-ties, which full KV may flip, too.")
    return lines + [f"WARNING: {warning}" for warning in comparison.warnings]


def text(comparisons: Sequence[Comparison]) -> str:
    """For the terminal."""
    blocks = []
    for comparison in comparisons:
        block = [f"== {comparison.name} against full KV"]
        if comparison.tasks:
            block.append(format_table(HEADER, _task_rows(comparison)))
        if comparison.texts:
            block.append(format_table(TEXT_HEADER, _text_rows(comparison)))
        blocks.append("\n\n".join([*block, "\n".join(_summary(comparison))]))
    return "\n\n".join(blocks)


def markdown(about: dict[str, Any], comparisons: Sequence[Comparison]) -> str:
    """For a file in the repository."""
    settings = about["settings"]
    lines = [
        f"Model {settings['model']}, scores by {settings['score']} answers, seed {settings['seed']}. "
        f"Full KV: {_server(about)}."
    ]
    for comparison in comparisons:
        lines += ["", f"## {comparison.name}", "", f"Server: {_server(comparison.about)}.", ""]
        if comparison.tasks:
            lines += [_markdown_table(HEADER, _task_rows(comparison)), ""]
        if comparison.texts:
            lines += [_markdown_table(TEXT_HEADER, _text_rows(comparison)), ""]
        lines += _summary(comparison)
    return "\n".join(lines) + "\n"


def _server(about: dict[str, Any]) -> str:
    hardware = about["environment"]["gpu"] or about["environment"]["cpu"]
    listed = ", ".join(f"{key} {value}" for key, value in about["settings"][COMPARED].items() if value is not None)
    return f"{listed} (client on {hardware})"


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *([format_value(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_json(about: dict[str, Any], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Everything, with both runs' settings and environments."""
    return {"benchmark": "quality", "full": about, "others": [dataclasses.asdict(one) for one in comparisons]}


def figure(comparisons: Sequence[Comparison]) -> Figure:
    """Above, what every run loses per task; below, its KL divergence."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(cell.name for comparison in comparisons for cell in comparison.tasks))
    drawn = Figure(figsize=(max(6.0, 2 + 0.35 * len(names)), 7), layout="constrained")
    FigureCanvasAgg(drawn)
    above, below = drawn.subplots(2, 1, sharex=True)
    for number, comparison in enumerate(comparisons):
        shift = (number - (len(comparisons) - 1) / 2) * 0.7 / len(comparisons)
        colour = PALETTE[number % len(PALETTE)]
        at = [names.index(cell.name) + shift for cell in comparison.tasks]
        values = [100 * cell.difference for cell in comparison.tasks]
        errors = [
            [100 * (cell.difference - cell.interval[0]) for cell in comparison.tasks],
            [100 * (cell.interval[1] - cell.difference) for cell in comparison.tasks],
        ]
        if at:
            above.errorbar(at, values, yerr=errors, fmt="o", ms=4, capsize=2, color=colour, label=comparison.name)
        listed = [(x, cell.mean_kl) for x, cell in zip(at, comparison.tasks, strict=True) if cell.mean_kl is not None]
        if listed:
            below.bar(*zip(*listed, strict=True), width=0.7 / len(comparisons), color=colour)
    above.axhline(0, color=COLOURS["stock"], lw=1)
    above.set_ylabel("score, points against full KV")
    below.set_ylabel("mean KL to full KV, nats")
    below.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    if names:
        above.legend(fontsize=8)
    for axis in (above, below):
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    return drawn
