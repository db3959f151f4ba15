"""Two runs of the same prompts, sample by sample: differences with their confidence intervals, and KL divergence."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmark.common.errors import BenchmarkError
from benchmark.quality.metrics import perplexity
from benchmark.quality.run_folder import Record
from benchmark.quality.scoring import Listed, divergence

RESAMPLES = 10_000
CONFIDENCE = 0.95

Interval = tuple[float, float]
Pair = tuple[Record, Record]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One task at one length, full KV against another run."""

    suite: str
    task: str
    length: int
    samples: int
    tokens: float
    """Mean length of the prompts, in tokens."""
    full: float
    other: float
    difference: float
    """Other minus full, as the interval."""
    interval: Interval
    lost: int
    """Samples that score lower than with full KV."""
    gained: int
    near_ties: int
    """Forced answers that only the other run gets wrong, by a near-tie."""
    mean_kl: float | None
    """In nats over the answers' tokens; None where replies were generated."""
    uncached: int
    """Samples whose context was not in the cache of the other run when the question came."""

    @property
    def name(self) -> str:
        return f"{self.task} @ {self.length}"


@dataclasses.dataclass(frozen=True)
class TextCell:
    """Running text at one length."""

    suite: str
    task: str
    length: int
    passages: int
    positions: int
    full: float
    """Perplexity, as `other`."""
    other: float
    log_ratio: float
    """Mean over passages of the loss in nats per token, other minus full."""
    interval: Interval | None
    """None for a single passage."""
    agreement: float
    """Share of positions with the same first choice."""
    mean_kl: float
    uncached: int


@dataclasses.dataclass(frozen=True)
class Loss:
    """Mean over the tasks that full KV can do."""

    floor: float
    counted: list[str]
    left_out: list[str]
    full: float | None
    other: float | None
    difference: float | None
    interval: Interval | None


def pairs(full: dict[str, Record], other: dict[str, Record]) -> list[Pair]:
    """The samples of both runs, in the order of the prompts; BenchmarkError when one was asked differently."""
    found = []
    for key, record in full.items():
        if key in other:
            if record["hash"] != other[key]["hash"] or record["mode"] != other[key]["mode"]:
                raise BenchmarkError(
                    f"--compare: the runs asked sample {key} differently, so they cannot be paired; repeat one of them "
                    "with the same tokenizer, data and options"
                )
            found.append((record, other[key]))
    if not found:
        raise BenchmarkError("--compare: the runs have no sample in common")
    # Not that of the files: there they stand as they were finished.
    return sorted(found, key=lambda pair: pair[0]["position"])


def cells(found: Sequence[Pair]) -> tuple[list[Cell], list[TextCell]]:
    """Figures per task and length, in the order of the runs."""
    grouped: dict[tuple[str, str, int], list[Pair]] = {}
    for pair in found:
        grouped.setdefault((pair[0]["suite"], pair[0]["task"], pair[0]["length"]), []).append(pair)
    tasks = [_cell(key, group) for key, group in grouped.items() if not group[0][0]["likelihood"]]
    return tasks, [_text_cell(key, group) for key, group in grouped.items() if group[0][0]["likelihood"]]


def _cell(key: tuple[str, str, int], group: Sequence[Pair]) -> Cell:
    differences = [b["score"] - a["score"] for a, b in group]
    divergences = [value for a, b in group for value in divergences_of(a, b)]
    return Cell(
        *key,
        samples=len(group),
        tokens=_mean([a["prompt_tokens"] for a, _ in group]),
        full=_mean([a["score"] for a, _ in group]),
        other=_mean([b["score"] for _, b in group]),
        difference=_mean(differences),
        interval=interval([differences]),
        lost=sum(value < 0 for value in differences),
        gained=sum(value > 0 for value in differences),
        near_ties=sum(b.get("near_tie", False) and a["score"] == 1 for a, b in group),
        mean_kl=_mean(divergences) if divergences else None,
        uncached=_uncached(group),
    )


def _text_cell(key: tuple[str, str, int], group: Sequence[Pair]) -> TextCell:
    differences = [_mean(a["own"]) - _mean(b["own"]) for a, b in group]
    same = [p[0] == q[0] for a, b in group for p, q in zip(a["top_tokens"], b["top_tokens"], strict=True)]
    return TextCell(
        *key,
        passages=len(group),
        positions=len(same),
        full=perplexity([value for a, _ in group for value in a["own"]]),
        other=perplexity([value for _, b in group for value in b["own"]]),
        log_ratio=_mean(differences),
        interval=interval([differences], bound=math.inf) if len(group) > 1 else None,
        agreement=_mean(same),
        mean_kl=_mean([value for a, b in group for value in divergences_of(a, b)]),
        uncached=_uncached(group),
    )


def loss(tasks: Sequence[Cell], found: Sequence[Pair], floor: float) -> Loss:
    """Mean difference over the tasks where full KV scores at least `floor`; every task has the same weight."""
    counted = [cell for cell in tasks if cell.full >= floor]
    names = [cell.name for cell in counted]
    left_out = [cell.name for cell in tasks if cell.full < floor]
    if not counted:
        return Loss(floor, names, left_out, None, None, None, None)
    keys = {(cell.suite, cell.task, cell.length): [] for cell in counted}
    for a, b in found:
        key = (a["suite"], a["task"], a["length"])
        if key in keys:
            keys[key].append(b["score"] - a["score"])
    means = [[getattr(cell, field) for cell in counted] for field in ("full", "other", "difference")]
    return Loss(floor, names, left_out, *map(_mean, means), interval(list(keys.values())))


def divergences_of(full: Record, other: Record) -> list[float]:
    """KL(full || other) at every scored token, in nats; empty for generated replies."""
    if "top" not in full or "top" not in other:
        return []
    return [divergence(p, q) for p, q in zip(_listed(full), _listed(other), strict=True)]


def interval(strata: Sequence[Sequence[float]], bound: float = 1.0) -> Interval:
    """Bootstrap confidence interval of the mean of the strata's means, by percentiles.

    Where nothing varies a bootstrap gives no width at all, however few the samples. By the rule of three, n samples
    without an event leave room for a rate of 3 / n, so that is added on both sides of a stratum's mean; in running text
    differences always vary.

    Args:
        strata: differences, per task. Resampled within each.
        bound: the largest difference there can be.
    """
    generator = np.random.default_rng(0)
    means = np.zeros(RESAMPLES)
    slack = 0.0
    for values in map(np.asarray, strata):
        if np.ptp(values) == 0:
            means += values[0]
            # Independent strata: their uncertainties add up in squares.
            slack += (3 / len(values)) ** 2
        else:
            means += values[generator.integers(0, len(values), (RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(means / len(strata), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    slack = math.sqrt(slack) / len(strata)
    return max(float(low) - slack, -bound), min(float(high) + slack, bound)


def _listed(record: Record) -> list[Listed]:
    return [
        dict(zip(tokens, values, strict=True))
        for tokens, values in zip(record["top_tokens"], record["top"], strict=True)
    ]


def _uncached(group: Sequence[Pair]) -> int:
    # A page or less is always computed anew.
    return sum(b["cached_tokens"] < b["context_tokens"] // 64 * 64 for _, b in group)


def _mean(values: Sequence[Any]) -> float:
    return float(sum(values) / len(values))
