"""What every benchmark script does around its measurement: run it, print, write reports, set the exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmark.common import compare
from benchmark.common.errors import BenchmarkError
from benchmark.common.report import environment, public_command, write_json, write_png

Results = dict[str, dict[str, Any]]


def run_script(
    name: str,
    args: argparse.Namespace,
    measure: compare.Measure,
    gate: Callable[[Results], list[str]],
    describe: Callable[[Results], str],
    draw: Callable[[Results], Figure],
    complete: Callable[[Results], None] = lambda results: None,
) -> int:
    """Measure, print `describe`, write --json and --png; the exit status: 0, 1 for a failed gate, 2 for no result.

    `complete` adds figures that need more than one measurement knows, such as the bytes each server was given.
    `gate` gives the reasons why the figures must not be used. Reports are written all the same, with the reasons in.
    """
    try:
        compare.check_target(args)
        results = compare.run(args, measure)
    except BenchmarkError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    complete(results)
    failures = [*gate(results), *compare.unfair_comparison(results)]
    print(describe(results))
    return publish(name, args, results, failures, draw, ratio=compare.ratios(results))


def publish(
    name: str,
    args: argparse.Namespace,
    results: Results,
    failures: list[str],
    draw: Callable[[Results], Figure],
    **more: Any,
) -> int:
    """Write --json, with `more` in it, and --png; print why the gate failed. The exit status, 0 or 1 for that."""
    if args.json:
        report = {
            "benchmark": name,
            "environment": environment(),
            "arguments": {key: _public(value) for key, value in sorted(vars(args).items())},
            "gate": {"passed": not failures, "failures": failures},
            **more,
            "systems": results,
        }
        write_json(args.json, report)
        print(f"wrote {args.json}")
    if args.png:
        write_png(args.png, draw(results))
        print(f"wrote {args.png}")
    for failure in failures:
        print(f"GATE FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _public(each) for key, each in value.items()}
    return public_command([str(value)])[0] if isinstance(value, str | Path) else value
