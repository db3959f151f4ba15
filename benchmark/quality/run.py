"""Answer quality of a running server, and of a compressed KV cache against full KV, sample by sample.

    python benchmark/quality/run.py --url http://127.0.0.1:30000 --model-path MODEL --run runs/stock \
        --suite ruler,needles,recall,rules,perplexity --lengths 4096,16384 --samples 50
    (the same against a server of sglang_mosaic with --mosaic-encode seal, --run runs/seal)
    python benchmark/quality/run.py --compare runs/stock runs/seal --markdown quality.md --png quality.png

Every sample is a context, a question and an answer. The context is sent alone first, so the server can compress it
without knowing the question; the question then finds it in the prefix cache. Scores are by default forced: the right
answer is given token by token, and counts when each token is the model's first choice. With ``--score generate`` the
model writes the answer, and RULER's string matching scores it.

A run goes on where it was interrupted when its command is repeated. Runs are never overwritten.

Suites: ruler (RULER, arXiv 2404.06654, by its own generators), needles (numbers in novels, several questions on one
prefix), recall (facts of early chat turns), rules (rules of a long system prompt), perplexity (running text, with KL to
full KV).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `import benchmark` when run by path

from benchmark.common import sglang_http
from benchmark.common.errors import BenchmarkError
from benchmark.common.options import integer, number
from benchmark.common.report import environment, write_json, write_png
from benchmark.quality import comparison, needles, perplexity, recall, ruler, rules
from benchmark.quality.client import Client
from benchmark.quality.measure import FORCED, GENERATE, measure
from benchmark.quality.prompting import Prompter
from benchmark.quality.ruler_package import ruler_package
from benchmark.quality.run_folder import RunFolder
from benchmark.quality.samples import Group
from benchmark.quality.workload import Workload

SUITES: dict[str, Callable[[Workload, int], list[Group]]] = {
    needles.SUITE: needles.groups,
    recall.SUITE: recall.groups,
    rules.SUITE: rules.groups,
    perplexity.SUITE: perplexity.groups,
}
SUITE_NAMES = (ruler.SUITE, *SUITES)

# What tells compared servers apart, from /server_info. Sizes of memory are not in it: they vary from start to start.
SERVER_SETTINGS = ("version", "attention_backend", "page_size", "kv_cache_dtype", "dtype", "quantization")


def one_of(names: Sequence[str]) -> Callable[[str], list[str]]:
    """An argparse type: some of the names, separated by commas; in the order of `names`."""

    def convert(text: str) -> list[str]:
        asked = [name.strip() for name in text.split(",") if name.strip()]
        for name in asked:
            if name not in names:
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(names)}, found {name!r}")
        if not asked:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(names)}, found {text!r}")
        return [name for name in names if name in asked]

    return convert


def lengths(text: str) -> list[int]:
    """An argparse type: lengths in tokens, separated by commas."""
    return sorted({integer(256)(part) for part in text.split(",")})


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; exits with argparse's message on a bad one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_argument_group("what to do: --url measures a server, --prepare needs none, --compare only reads")
    mode.add_argument("--url", help="a running server, as http://host:port")
    mode.add_argument("--prepare", action="store_true", help="only generate and keep the samples, for a later run")
    mode.add_argument(
        "--compare", nargs="+", type=Path, metavar="RUN", help="folders of runs: full KV first, then those to compare"
    )
    load = parser.add_argument_group("workload")
    load.add_argument("--model-path", help="folder or repository of the served model's tokenizer")
    load.add_argument("--run", type=Path, metavar="FOLDER", help="where the run is kept: new, or the same run before")
    load.add_argument(
        "--suite", type=one_of(SUITE_NAMES), default=list(SUITE_NAMES), metavar="NAMES",
        help=f"some of {','.join(SUITE_NAMES)} (default: all)",
    )  # fmt: skip
    load.add_argument("--tasks", type=one_of(ruler.TASKS), metavar="NAMES", help="tasks of RULER (default: all 13)")
    load.add_argument(
        "--lengths", type=lengths, default=[4096], metavar="TOKENS", help="of the prompts (default: 4096)"
    )
    load.add_argument("--samples", type=integer(1), default=50, help="per task and length (default %(default)s)")
    load.add_argument("--seed", type=integer(0), default=0, help="of the prompts (default %(default)s)")
    load.add_argument(
        "--score", choices=(FORCED, GENERATE), default=FORCED,
        help="how answers are judged; running text is always forced (default %(default)s)",
    )  # fmt: skip
    load.add_argument(
        "--data", type=Path, metavar="PATH",
        help="the wheel with RULER, or a folder with it and the one of wonderwords (default: downloaded once)",
    )  # fmt: skip
    load.add_argument(
        "--label", default="", metavar="TEXT",
        help="how the server was started, for the tables; /server_info does not tell every flag",
    )  # fmt: skip
    load.add_argument("--concurrency", type=integer(1), default=4, help="contexts at a time (default %(default)s)")
    load.add_argument(
        "--timeout", type=number(1), default=600.0, metavar="SECONDS",
        help="longest silence of the server within one request (default %(default)g)",
    )  # fmt: skip
    load.add_argument(
        "--keep-cache", action="store_true",
        help="do not empty the server's prefix cache first; needed where others use the server",
    )  # fmt: skip
    output = parser.add_argument_group("output of --compare")
    output.add_argument(
        "--floor", type=number(0), default=80.0, metavar="PERCENT",
        help="the average counts tasks where full KV scores at least this much (default %(default)g)",
    )  # fmt: skip
    output.add_argument("--json", type=Path, metavar="FILE", help="write all figures and both environments")
    output.add_argument("--png", type=Path, metavar="FILE", help="write a figure")
    output.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    args = parser.parse_args(argv)
    if bool(args.url) + args.prepare + bool(args.compare) != 1:
        parser.error("pass exactly one of --url, --prepare and --compare")
    if args.compare:
        if len(args.compare) < 2:
            parser.error("argument --compare: needs the run with full KV and at least one other")
        return args
    if not args.model_path:
        parser.error("argument --model-path: needed for the tokenizer")
    if args.url and not args.run:
        parser.error("argument --run: needed, the folder that keeps the run")
    if args.tasks and ruler.SUITE not in args.suite:
        parser.error("argument --tasks: names tasks of RULER, but --suite leaves ruler out")
    return args


def make_groups(args: argparse.Namespace, prompter: Prompter) -> tuple[list[Group], str | None]:
    """All contexts in the order in which they are sent, and the version of RULER's data."""
    work = Workload(prompter, args.samples, args.seed)
    package = ruler_package(args.data) if ruler.SUITE in args.suite else None
    groups = []
    for length in args.lengths:
        for suite in args.suite:
            print(f"preparing {suite} at {length} tokens", flush=True)
            if package is not None and suite == ruler.SUITE:
                groups += ruler.groups(work, length, args.tasks or ruler.TASKS, package)
            else:
                groups += SUITES[suite](work, length)
    return groups, package and package.version


def server_settings(info: dict[str, Any], label: str) -> dict[str, Any]:
    """What decides how this server computes and keeps its KV cache."""
    mosaic = {key: value for key, value in sorted(info.items()) if key.startswith("mosaic")}
    return {"label": label or None} | {key: info.get(key) for key in SERVER_SETTINGS} | mosaic


def measure_server(args: argparse.Namespace) -> int:
    """Measure one server into its folder; the exit status."""
    url = sglang_http.normalise_url(args.url)
    info = sglang_http.server_info(url)
    if info is None:
        raise BenchmarkError(f"--url: {url}/server_info does not answer as an SGLang server's; check the address")
    prompter = Prompter(args.model_path)
    groups, data = make_groups(args, prompter)
    settings = {
        "model": Path(args.model_path).name,
        "tokenizer": prompter.fingerprint,
        "suites": args.suite,
        "tasks": (args.tasks or list(ruler.TASKS)) if data else None,
        "lengths": args.lengths,
        "samples": args.samples,
        "seed": args.seed,
        "score": args.score,
        "data": data,
        comparison.COMPARED: server_settings(info, args.label),
    }
    with RunFolder(args.run, settings, {"environment": environment()}) as run:
        if not args.keep_cache:
            sglang_http.flush_cache(url)
        session: dict[str, Any] = {"began": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "concurrency": args.concurrency}
        start, before = time.monotonic(), len(run.done)
        try:
            measure(Client(url, args.timeout), groups, run, args.score, args.concurrency)
            # Its state tells whether anything was compressed. An interrupted session does without.
            session |= _state(url)
        finally:
            session |= {"seconds": round(time.monotonic() - start, 1), "measured": len(run.done) - before}
            run.end_session(session)
    print(f"{args.run}: complete, {len(run.done)} samples, {session['measured']} of them now")
    return 0


def _state(url: str) -> dict[str, Any]:
    states = (sglang_http.server_info(url) or {}).get("internal_states") or [{}]
    mosaic = states[0].get("mosaic") or {}
    return {"pages_encoded": mosaic.get("pages_encoded", 0), "server_state": mosaic}


def compare_runs(args: argparse.Namespace) -> int:
    """Print the comparison and write what was asked for; the exit status: 1 when something makes it doubtful."""
    about, found = comparison.compare(args.compare, args.floor / 100)
    print(comparison.text(found))
    if args.json:
        write_json(args.json, comparison.as_json(about, found))
    if args.png:
        write_png(args.png, comparison.figure(found))
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(comparison.markdown(about, found))
    for path in (args.json, args.png, args.markdown):
        if path:
            print(f"wrote {path}")
    return 1 if any(one.warnings for one in found) else 0


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    # The tokenizer is used before threads are started, and never by several of them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        if args.compare:
            return compare_runs(args)
        if args.prepare:
            groups, _ = make_groups(args, Prompter(args.model_path))
            print(f"{sum(len(group.samples) for group in groups)} samples are ready")
            return 0
        return measure_server(args)
    except BenchmarkError as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("quality: interrupted; repeat the command to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
