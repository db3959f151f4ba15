"""What a trace of torch's profiler says of the GPU's time."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.common.errors import BenchmarkError
from benchmark.serving.kernel_names import IDLE, categories, category

PREFILL, DECODE = "prefill", "decode"
KERNEL = "kernel"
GPU_KINDS = (KERNEL, "gpu_memcpy", "gpu_memset")
# SGLang puts one around every forward pass: step[DECODE bs=8], step[EXTEND bs=1 toks=32].
_SPAN = re.compile(r"step\[(\w+) bs=(\d+)")
NAME_LENGTH = 160


@dataclass(frozen=True)
class Work:
    """One kernel, copy or fill on the GPU; times in microseconds."""

    name: str
    kind: str
    start: float
    duration: float


@dataclass(frozen=True)
class Trace:
    """What was recorded: `passes` counts forward passes by mode and requests, and is empty where they are not named."""

    work: tuple[Work, ...]
    passes: Counter[tuple[str, int]]

    @property
    def stage(self) -> str:
        """PREFILL when all forward passes extend prompts, else DECODE."""
        return PREFILL if self.passes and {mode for mode, _ in self.passes} == {"EXTEND"} else DECODE

    def describe_passes(self) -> str:
        """Their numbers, for messages."""
        return ", ".join(f"{count} x {mode} of {batch}" for (mode, batch), count in sorted(self.passes.items()))


def read_trace(path: Path) -> Trace:
    """A trace in chrome's format, by gzip or plain.

    Raises:
        BenchmarkError: it cannot be read, or is no such trace.
    """
    try:
        text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        events = json.loads(text)["traceEvents"]
        work = [
            Work(event["name"], event["cat"], float(event["ts"]), float(event["dur"]))
            for event in events
            if event.get("cat") in GPU_KINDS and event.get("ph") == "X"
        ]
        spans = [_SPAN.match(event["name"]) for event in events if event.get("cat") == "user_annotation"]
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BenchmarkError(f"{path} is not a whole trace of torch's profiler: {error!r}") from error
    return Trace(tuple(work), Counter((span[1], int(span[2])) for span in spans if span))


def busy_us(work: Iterable[Work]) -> float:
    """Microseconds in which at least one of `work` runs."""
    total, end = 0.0, float("-inf")
    for each in sorted(work, key=lambda each: each.start):
        total += max(0.0, each.start + each.duration - max(end, each.start))
        end = max(end, each.start + each.duration)
    return total


def summarise(trace: Trace, steps: int) -> dict[str, Any] | None:
    """Milliseconds per step by category; None when the GPU did nothing.

    Work on two streams at a time counts in both categories: their sum is then above the step's time less IDLE, which is
    the time from the first start to the last end, less that in which anything runs.
    """
    if not trace.work:
        return None
    of_name: dict[tuple[str, str], list[float]] = {}
    for each in trace.work:
        of_name.setdefault((each.name, each.kind), []).append(each.duration)
    per_step = 1000 * steps
    kernels = [
        {"name": name[:NAME_LENGTH], "category": category(name, kind), "count": len(us), "ms": sum(us) / per_step}
        for (name, kind), us in of_name.items()
    ]
    span = max(each.start + each.duration for each in trace.work) - min(each.start for each in trace.work)
    ms = dict.fromkeys(categories(), 0.0)
    for row in kernels:
        ms[row["category"]] += row["ms"]
    ms[IDLE] = (span - busy_us(trace.work)) / per_step
    return {
        "steps": steps,
        "passes": trace.describe_passes() or None,
        "step_ms": span / per_step,
        "kernels": sum(each.kind == KERNEL for each in trace.work) / steps,
        "ms": {name: value for name, value in ms.items() if value or name == IDLE},
        # Counts are those of the whole trace.
        "names": sorted(kernels, key=lambda row: -row["ms"]),
    }
