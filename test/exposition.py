"""What /metrics shows of our own metrics, in short names that tests can compare."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

from sglang_mosaic.adapter.metric_table import METRICS, PREFIX, Kind

SGLANG = "sglang:num_running_reqs"
"""A metric of SGLang's own scheduler."""


def labels_of(text: str, name: str) -> dict[str, str]:
    """Labels of the only sample of a metric."""
    (sample,) = (s for family in text_string_to_metric_families(text) for s in family.samples if s.name == name)
    return sample.labels


def values(text: str, labels: Mapping[str, str]) -> dict[str, float]:
    """Values by `name` or, where there is a label besides SGLang's, by `name{value}`.

    Args:
        text: as exposed; must be what Prometheus can read.
        labels: that every series has to have.
    """
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith(PREFIX):
                own = {name: value for name, value in sample.labels.items() if name not in labels}
                assert sample.labels == {**labels, **own}, sample
                name = sample.name.removeprefix(PREFIX) + "".join(f"{{{value}}}" for value in own.values())
                found[name] = sample.value
    return found


def expected(stats: Mapping[str, object]) -> dict[str, float]:
    """The same of statistics that began at 0, but for histograms."""
    found = {}
    for metric in METRICS:
        if metric.kind is not Kind.HISTOGRAM and (stats["host"] is not None or not metric.of_host):
            for value, place in metric.places.items():
                number = stats
                for name in place.split("."):
                    number = number[name]
                found[metric.name.removeprefix(PREFIX) + (f"{{{value}}}" if value else "")] = float(number)
    return found
