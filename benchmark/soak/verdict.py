"""What a soak says: what must not have happened, tables and a figure."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from benchmark.common.report import new_figure
from benchmark.common.stats import format_table

MOST_GROWTH = 1.1
"""Of a process's memory, from the second to the last quarter of the soak."""
LEAST_GROWTH_MIB = 30.0
"""What a process may grow by in any case: one batch more of requests under way."""
LEAST_S = 600.0
"""Soak from which memory is judged: before that caches fill, and the manager may be a few seconds old."""
MOST_DESCRIPTORS = 20
"""That a process may hold more of in the last quarter: clients that are connected at the moment."""


def failures(result: dict[str, Any]) -> list[str]:
    """What must not have happened."""
    stats = result["stats"]
    found = [*result["wrong"], *result["trouble"], *(f"left behind: {name}" for name in result["left_behind"])]
    frames = stats["dense_frames_used"] + stats["mosaic_frames_used"]
    if frames:
        found.append(f"{frames} frames leaked")
    if not stats["step_audits"]:
        found.append("nothing was audited under load")
    judged = result["samples"][-1]["second"] - result["samples"][0]["second"] >= LEAST_S
    for series, where in (("memory_mib", ""), ("gpu_mib", " on the GPU")):
        for role, (early, late) in result["growth"][series].items():
            if judged and late > max(early * MOST_GROWTH, early + LEAST_GROWTH_MIB):
                found.append(f"memory of the {role}{where} grew from {early:.0f} to {late:.0f} MiB")
    for role, (early, late) in result["growth"]["descriptors"].items():
        if late > early + MOST_DESCRIPTORS:
            found.append(f"descriptors of the {role} grew from {early:.0f} to {late:.0f}")
    return found


def describe(result: dict[str, Any]) -> str:
    """Tables of faults and of processes, and what the clients saw."""
    rows = [
        [kind, sum(outcomes.values()), ", ".join(f"{n} {outcome}" for outcome, n in outcomes.items())]
        for kind, outcomes in result["outcomes"].items()
    ]
    growth_rows = [
        [
            role,
            *(
                f"{x:.0f}" if x is not None else None
                for series in ("memory_mib", "gpu_mib", "descriptors", "threads")
                for x in result["growth"][series].get(role, (None, None))
            ),
        ]
        for role in result["growth"]["memory_mib"]
    ]
    host = result["stats"]["host"]
    return "\n".join(
        [
            format_table(("fault", "times", "outcome"), rows),
            "",
            format_table(
                ("process", "MiB", "then", "on the GPU", "then", "descriptors", "then", "threads", "then"), growth_rows
            ),
            "",
            f"requests: {result['requests']}, {len(result['wrong'])} wrong; {result['retracted']:.0f} retractions, "
            f"{result['evicted_tokens']:.0f} tokens evicted, {host['restored']} pages restored, "
            f"{result['stats']['pages_encoded']} compressed, {result['stats']['step_audits']} audits under load",
            "of the last manager: "
            + ", ".join(f"{name} {host['manager'].get(name, 0)}" for name in ("evicted", "recompressed", "transformed"))
            + f"; {host['manager'].get('disk_records', 0)} records on disk",
        ]
    )


def draw(result: dict[str, Any]) -> Figure:
    """Memory and descriptors over time, and when faults were made."""
    figure = new_figure(2)
    samples = result["samples"]
    for axis, series, label in zip(
        figure.axes, ("memory_mib", "descriptors"), ("private memory, MiB", "open descriptors"), strict=True
    ):
        roles = dict.fromkeys(role for sample in samples for role in sample[series])
        for role in roles:
            points = [(s["second"] / 60, s[series][role]) for s in samples if role in s[series]]
            axis.plot(*zip(*points, strict=True), label=role, linewidth=1)
        for fault in result["faults"]:
            axis.axvline(fault["second"] / 60, color="#d55e00", alpha=0.25, linewidth=0.6)
        axis.set_xlabel("minutes; a line is a fault")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.legend()
    return figure
