"""Exports statistics as a scheduler process would: reads one JSON object a line, and updates the metrics from each."""

from __future__ import annotations

import json
import sys

from sglang_mosaic.adapter.metrics import Exporter

LABELS = {"model_name": "some-model", "tp_rank": 0}

if __name__ == "__main__":
    first, *others = map(json.loads, sys.stdin)
    latest = dict(first)
    exporter = Exporter(LABELS, lambda: latest)
    for stats in others:
        latest.update(stats)
        exporter.update()
