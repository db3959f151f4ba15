"""Where the time of decode steps and prefills goes on the GPU, by kind of kernel, on running SGLang servers.

    python benchmark/serving/step_profile.py --url stock=http://127.0.0.1:30000 --url mosaic=http://127.0.0.1:30001
    python benchmark/serving/step_profile.py --trace stock=stock-DECODE.trace.json.gz

For every context and batch, requests that share the cached context are answered under torch's profiler, which the
server runs (profile_probe.py says how): decode steps per step, and the prefill of the requests' own tokens in all. The
servers run on this machine, may write to --folder, and have no other traffic; their cache is FLUSHED. The profiler
slows down what the host does, so "idle" is more than without it, above all in prefills: tables have the time of a token
without it beside the step. --trace only sums up files that exist. Exit status: 0, 1 when the gate failed (an answer
failed, or no kernel was recorded), 2 when there is no result.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `import benchmark` when run by path

from tqdm import tqdm

from benchmark.common import sglang_http
from benchmark.common.compare import REPORTED_SETTINGS
from benchmark.common.errors import BenchmarkError
from benchmark.common.options import integer, number
from benchmark.common.script import publish
from benchmark.serving import profile_summary
from benchmark.serving.gpu_trace import DECODE, read_trace, summarise
from benchmark.serving.profile_probe import MARGIN_TOKENS, NO_KERNEL, ProfileProbe, ProfileWorkload
from benchmark.serving.steps import VOCABULARY, add_cells

Value = TypeVar("Value")


def named(convert: Callable[[str], Value], wanted: str) -> Callable[[str], tuple[str, Value]]:
    """An argparse type: NAME=VALUE, the value by `convert`."""

    def split(text: str) -> tuple[str, Value]:
        name, _, value = text.partition("=")
        if not value or not name.replace("-", "").isalnum():
            raise argparse.ArgumentTypeError(f"expected NAME={wanted}, NAME of letters, digits and -, found {text!r}")
        try:
            return name, convert(value)
        except BenchmarkError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return split


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; exits with argparse's message on a bad one. `url` and `trace` are dictionaries by name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    target = parser.add_argument_group("target: --url or --trace, each as often as needed")
    again = {"action": "append", "default": []}
    target.add_argument(
        "--url",
        type=named(sglang_http.normalise_url, "http://host:port"),
        metavar="NAME=URL",
        help="a running server on this machine; those named stock may refuse what does not fit",
        **again,
    )
    target.add_argument(
        "--trace",
        type=named(Path, "FILE"),
        metavar="NAME=FILE",
        help="a trace of torch's profiler to sum up, .json or .json.gz",
        **again,
    )
    load = parser.add_argument_group("workload")
    add_cells(load, (8192, 32768))
    load.add_argument(
        "--steps",
        type=integer(1),
        default=8,
        metavar="N",
        help="decode steps to record; of a --trace, those in it where it does not name them (default %(default)s)",
    )
    load.add_argument(
        "--output-tokens", type=integer(1), default=64, metavar="N", help="of every answer (default %(default)s)"
    )
    load.add_argument(
        "--vocabulary", type=integer(2), default=VOCABULARY, metavar="N", help="token ids are below this (%(default)s)"
    )
    load.add_argument("--seed", type=int, default=0, help="of the prompts (default %(default)s)")
    load.add_argument(
        "--timeout",
        type=number(1),
        default=600.0,
        metavar="SECONDS",
        help="longest silence of a server within one request (default %(default)g)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--folder", type=Path, help="where the servers write traces (default: a new temporary folder)")
    output.add_argument("--json", type=Path, metavar="FILE", help="write every kernel's time and the environment")
    output.add_argument("--png", type=Path, metavar="FILE", help="write a figure")
    args = parser.parse_args(argv)
    if bool(args.url) == bool(args.trace):
        parser.error(f"pass exactly one of --url and --trace, found {'both' if args.url else 'neither'}")
    for option in ("url", "trace"):
        given = getattr(args, option)
        setattr(args, option, dict(given))
        if len(getattr(args, option)) < len(given):
            parser.error(f"argument --{option}: every NAME must be another, found {[name for name, _ in given]}")
    least = args.steps + MARGIN_TOKENS
    if args.output_tokens < least:
        parser.error(f"argument --output-tokens: {args.steps} steps need at least {least}, found {args.output_tokens}")
    return args


def workload(args: argparse.Namespace) -> ProfileWorkload:
    """What the options ask for."""
    return ProfileWorkload(
        contexts=tuple(sorted(set(args.contexts))),
        batches=tuple(sorted(set(args.batches))),
        steps=args.steps,
        output_tokens=args.output_tokens,
        vocabulary=args.vocabulary,
        seed=args.seed,
    )


def of_servers(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Profiles of each server, and what it says of itself; all must be there before the first is measured."""
    load = workload(args)
    probes = {name: ProfileProbe(name, url, load, args.folder, args.timeout) for name, url in args.url.items()}
    results = {}
    for name, probe in probes.items():
        with tqdm(total=len(load.contexts) * len(load.batches), desc=name) as bar:
            profiles = probe.run(bar.update)
        results[name] = {"profiles": profiles, "server": {key: probe.info.get(key) for key in REPORTED_SETTINGS}}
    return results


def of_trace(path: Path, steps: int) -> dict[str, Any]:
    """The one profile of a trace: decode steps are counted where it names them, else `steps`."""
    trace = read_trace(path)
    count = (sum(trace.passes.values()) or steps) if trace.stage == DECODE else 1
    summary = summarise(trace, count)
    cell = {"context": None, "batch": None, "unmeasured": None, "error": None if summary else NO_KERNEL}
    return {"profiles": [{"stage": trace.stage, **cell, "summary": summary}]}


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit status."""
    args = parse_arguments(argv)
    try:
        if args.url:
            args.folder = (args.folder or Path(tempfile.mkdtemp(prefix="mosaic-profile-"))).resolve()
            args.folder.mkdir(parents=True, exist_ok=True)
            print(f"traces: {args.folder}", flush=True)
            results = of_servers(args)
        else:
            results = {name: of_trace(path, args.steps) for name, path in args.trace.items()}
    except (BenchmarkError, OSError) as error:
        print(f"step_profile: {error}", file=sys.stderr)
        return 2
    print(profile_summary.describe(results))
    return publish("step_profile", args, results, profile_summary.gate(results), profile_summary.draw)


if __name__ == "__main__":
    sys.exit(main())
