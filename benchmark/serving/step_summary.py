"""Figures, gate and plot of a run of steps.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmark.common import compare
from benchmark.common.report import COLOURS, new_figure
from benchmark.common.stats import percentile
from benchmark.serving.step_probe import CACHED, FEW_TOKENS, FIRST, NEW, PAGE_TOKENS, SUFFIX, TOKENS, Row, StepWorkload

MAY_REFUSE = (compare.STOCK, compare.HICACHE)
"""Systems that hold fewer tokens in the same memory."""


def token_ms(rows: Sequence[Row], context: int, batch: int) -> float | None:
    """Milliseconds per output token: the median over repeats; None when none was measured."""
    few: dict[int, Row] = {}
    many: dict[int, Row] = {}
    for row in _measured(rows, TOKENS, context, batch=batch):
        (few if row["output_tokens"] == FEW_TOKENS else many)[row["repeat"]] = row
    return _median(
        1000
        * (many[repeat]["seconds"] - few[repeat]["seconds"])
        / (many[repeat]["output_tokens"] - few[repeat]["output_tokens"])
        for repeat in few.keys() & many.keys()
    )


def per_token(rows: Sequence[Row], load: StepWorkload) -> list[dict[str, Any]]:
    """The time of a token by context and batch."""
    return [
        {"context": context, "batch": batch, "ms": token_ms(rows, context, batch)}
        for batch in load.batches
        for context in load.contexts
    ]


def summarise(rows: Sequence[Row], load: StepWorkload) -> dict[str, float | None]:
    """Every figure of a run; None for what was not measured."""
    figures = {f"token_ms_{step['context']}_x{step['batch']}": step["ms"] for step in per_token(rows, load)}
    figures[f"new_prompt_{load.new_prompt}_s"] = _seconds(_measured(rows, NEW, 0, new_tokens=load.new_prompt))
    for context in load.contexts:
        figures[f"first_prompt_{context}_s"] = _seconds(_measured(rows, FIRST, context))
    for new in load.suffixes:
        for context in load.contexts:
            figures[f"new_{new}_after_{context}_s"] = _seconds(_measured(rows, SUFFIX, context, new_tokens=new))
    return figures


def _measured(rows: Sequence[Row], kind: str, context: int, **more: int) -> list[Row]:
    wanted = {"kind": kind, "context": context, "error": None, "unmeasured": None, **more}
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _seconds(rows: Iterable[Row]) -> float | None:
    return _median(row["seconds"] for row in rows)


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return percentile(found, 50) if found else None


def unmeasured(rows: Sequence[Row]) -> list[str]:
    """What was left out and why, each said once."""
    found = {}
    for row in rows:
        if row["unmeasured"]:
            found.setdefault((row["context"], row["batch"], row["new_tokens"]), row["unmeasured"])
    return [
        f"{context} tokens and {batch} x {new} new ones: {reason}" for (context, batch, new), reason in found.items()
    ]


def gate(results: dict[str, dict[str, Any]]) -> list[str]:
    """Why the figures must not be used: failed requests, contexts that were not cached or not measured, or noise."""
    failures = []
    for name, result in results.items():
        rows = result["rows"]
        failed = [row for row in rows if row["error"]]
        if failed:
            first = failed[0]
            failures.append(
                f"{name}: {len(failed)} failed request(s), the first a {first['kind']} at {first['context']} tokens of "
                f"context: {first['error']}"
            )
        missed = [
            row
            for row in rows
            if row["kind"] in CACHED and row["seconds"] and row["cached_tokens"] <= row["context"] - PAGE_TOKENS
        ]
        if missed:
            first = missed[0]
            failures.append(
                f"{name}: {len(missed)} request(s) did not find their context in the cache, the first "
                f"{first['cached_tokens']} of {first['context']} tokens; raise --kv-tokens"
            )
        left = [] if name in MAY_REFUSE else unmeasured(rows)
        if left:
            failures.append(f"{name}: not measured: {left[0]}" + (f", and {len(left) - 1} more" if left[1:] else ""))
        noisy = [step for step in result["per_token"] if step["ms"] is not None and step["ms"] <= 0]
        if noisy:
            failures.append(
                f"{name}: more output tokens took no longer at {noisy[0]['context']} tokens of context, batch "
                f"{noisy[0]['batch']}; raise --output-tokens or --repeats"
            )
    return failures


def draw(results: dict[str, dict[str, Any]]) -> Figure:
    """Milliseconds per token over the context, one line per system and batch."""
    figure = new_figure(1)
    axis = figure.axes[0]
    contexts: set[int] = set()
    for name, result in results.items():
        steps = result["per_token"]
        contexts |= {step["context"] for step in steps}
        for batch, style in zip(dict.fromkeys(step["batch"] for step in steps), _styles(), strict=False):
            line = [step for step in steps if step["batch"] == batch]
            heights = [float("nan") if step["ms"] is None else step["ms"] for step in line]
            label = f"{name}, batch {batch}"
            axis.plot([step["context"] for step in line], heights, color=COLOURS[name], label=label, **style)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(contexts), [f"{context:,}" for context in sorted(contexts)])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("cached context, tokens")
    axis.set_ylabel("ms per output token")
    axis.legend()
    return figure


def _styles() -> Iterable[dict[str, str]]:
    while True:
        for marker in "osD^":
            for line in ("-", "--", ":", "-."):
                yield {"marker": marker, "linestyle": line}
