"""The table of metrics, kept up to date in this process's part of SGLang's /metrics.

Import this only when metrics are wanted, in the process that exports them: prometheus_client settles as it is imported
whether several processes share an endpoint, and SGLang says so after it has loaded its plugins.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from sglang_mosaic.adapter.metric_table import MANAGER, METRICS, Kind, Metric
from sglang_mosaic.manager.metrics import BOUNDS_S

PERIOD_S = 1.0
"""Between two updates. An idle scheduler turns once a second, a manager tells its figures as often."""


class CountedHistogram(Histogram):
    """A histogram of what was sorted into its buckets elsewhere.

    prometheus_client can only observe value by value, and takes no samples of ours where several processes share an
    endpoint: whoever answers reads files of its own format. A counter per bucket would not do either, as its name has
    to end in `_total`. So this adds to the fields that `observe` adds to, as SGLang does for its inter-token latency.
    """

    def add(self, counts: Sequence[float], total: float) -> None:
        """Count values, by bucket, the last one without a bound; `total` is their sum."""
        for bucket, count in zip(self._buckets, counts, strict=True):
            if count:
                bucket.inc(count)
        self._sum.inc(total)


class Increase:
    """What was added to a running total that somebody else keeps, and may begin again at 0."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, total: float) -> float:
        """Since this was asked last."""
        total = max(total, 0.0)
        increase = total - self._last if total >= self._last else total
        self._last = total
        return increase

    def restart(self) -> None:
        """The next total begins at 0."""
        self._last = 0.0


class Exporter:
    """
    Args:
        labels: of every series; those of SGLang's own, so that both can be joined.
        read: gives the statistics; must not wait for anything.
    """

    def __init__(self, labels: Mapping[str, Any], read: Callable[[], dict[str, Any]]) -> None:
        self._labels = dict(labels)
        self._read = read
        self._next = 0.0
        self._updates: list[Callable[[dict[str, Any]], None]] = []
        self._of_manager: list[Increase] = []
        self._manager: object = None
        stats = read()
        for metric in METRICS:
            if stats["host"] is not None or not metric.of_host:
                self._create(metric)
        self.turn()

    def turn(self) -> None:
        """Update everything if it is time. Call once a turn of the scheduler."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + PERIOD_S
            self.update()

    def update(self) -> None:
        """Update everything."""
        stats = self._read()
        # A new manager may have counted more since the last update than the former one in all its life.
        manager = (stats["host"] or {}).get("pid")
        if manager != self._manager:
            self._manager = manager
            for increase in self._of_manager:
                increase.restart()
        for update in self._updates:
            update(stats)

    def _create(self, metric: Metric) -> None:
        names = [*self._labels, *([metric.label] if metric.label else [])]
        if metric.kind is Kind.COUNTER:
            family = Counter(metric.name, metric.help, names)
        elif metric.kind is Kind.GAUGE:
            family = Gauge(metric.name, metric.help, names, multiprocess_mode="mostrecent")
        else:
            family = CountedHistogram(metric.name, metric.help, names, buckets=BOUNDS_S)
        for value, place in metric.places.items():
            series = family.labels(**self._labels, **({metric.label: value} if metric.label else {}))
            if metric.kind is Kind.COUNTER:
                self._updates.append(self._counting(series, place))
            elif metric.kind is Kind.GAUGE:
                self._updates.append(_setting(series, place))
            else:
                self._updates.append(self._adding(series, place))

    def _counting(self, series: Counter, place: str) -> Callable[[dict[str, Any]], None]:
        path, increase = place.split("."), self._increase(place)

        def update(stats: dict[str, Any]) -> None:
            if amount := increase(_number(_at(stats, path))):
                series.inc(amount)

        return update

    def _adding(self, series: CountedHistogram, place: str) -> Callable[[dict[str, Any]], None]:
        counts_path, seconds_path = f"{place}_counts".split("."), f"{place}_seconds".split(".")
        buckets, seconds = [self._increase(place) for _ in range(len(BOUNDS_S) + 1)], self._increase(place)

        def update(stats: dict[str, Any]) -> None:
            counts = _at(stats, counts_path)
            if not isinstance(counts, list) or len(counts) != len(buckets):
                counts = [0] * len(buckets)
            added = [bucket(_number(count)) for bucket, count in zip(buckets, counts, strict=True)]
            series.add(added, seconds(_number(_at(stats, seconds_path))))

        return update

    def _increase(self, place: str) -> Increase:
        increase = Increase()
        if place.startswith(MANAGER):
            self._of_manager.append(increase)
        return increase


def _setting(series: Gauge, place: str) -> Callable[[dict[str, Any]], None]:
    path = place.split(".")
    return lambda stats: series.set(_number(_at(stats, path)))


def _at(stats: Any, path: Sequence[str]) -> Any:
    """What the statistics have there; None: nothing, as without a manager."""
    for name in path:
        if not isinstance(stats, dict):
            return None
        stats = stats.get(name)
    return stats


def _number(value: Any) -> float:
    """What is none counts as 0: figures of a manager are its own affair, and must not end the server."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0
