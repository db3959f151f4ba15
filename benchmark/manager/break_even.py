"""Time to the first token of prompts whose pages come back from the host, against computing them.

    python benchmark/manager/break_even.py --json break-even.json --png break-even.png
    python benchmark/manager/break_even.py --url http://127.0.0.1:30000 --model-path MODEL --pages 16 64 256

For every length, so many different prompts are asked for in turn that each is evicted before its next turn comes. In
the first round they are computed, in the later ones they are restored, all but the last tokens, which are no whole
page, or computed again where the server finds that faster. Before it, as many others fill the pool, so that in every
round a prompt takes the place of one of its length. One request at a time; medians over prompts. "ratio": asked again /
computed. Exit status: 0, 1 when pages were lost, 2 when there is no result.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `import benchmark` when run by path

from matplotlib.figure import Figure
from tokenizers import Tokenizer

from benchmark.codec.rate_distortion import embedded_model
from benchmark.common import sglang_http
from benchmark.common.cpu import CPU_FLAGS
from benchmark.common.errors import BenchmarkError
from benchmark.common.options import integer
from benchmark.common.report import COLOURS, new_figure, write_png
from benchmark.common.sglang_http import TokenClient
from benchmark.common.stats import format_table, percentile
from benchmark.common.text import make_text
from benchmark.manager.own_server import make_server, statistics, write_report
from benchmark.manager.saboteur import wait_for

PAGE = 64
REST = 16
"""Tokens behind the last whole page."""
SERVER_ARGS = (
    f"{CPU_FLAGS} --max-running-requests 2 --chunked-prefill-size 512 "
    "--skip-server-warmup --sleep-on-idle --mosaic-host-gb 1 --mosaic-restore-from 1 --mosaic-encode seal "
    "--mosaic-refresh-pages 0 --max-total-tokens 2048"
)
COLUMNS = ("tokens", "prompts", "computed_ms", "restored_ms", "ratio", "restored_share", "recomputed_share")
COUNTERS = ("offered", "dropped", "restored", "recomputed", "missed", "restore_page_seconds")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; exits with argparse's message on a bad one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", metavar="MODEL", help="checkpoint folder (default: the embedded SmolLM2)")
    parser.add_argument(
        "--pages", type=integer(1), nargs="+", default=[1, 2, 4, 8, 16, 20], help="of 64 tokens (default %(default)s)"
    )
    parser.add_argument("--rounds", type=integer(1), default=2, help="of restored prompts (default %(default)s)")
    parser.add_argument(
        "--server-args",
        metavar="STRING",
        help=f"flags of the server; with --url for the report (default: {SERVER_ARGS})",
    )
    parser.add_argument(
        "--url", help="measure a server that runs already, has a host tier and no other traffic; its cache is FLUSHED"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows and the environment")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write a figure")
    args = parser.parse_args(argv)
    if args.server_args is None:
        args.server_args = "not told" if args.url else SERVER_ARGS
    return args


@contextlib.contextmanager
def server_url(args: argparse.Namespace) -> Iterator[str]:
    """The address of the server to measure, its cache empty."""
    if args.url:
        url = sglang_http.normalise_url(args.url)
        if not statistics(url)["host"]:
            raise BenchmarkError(f"--url: {url} has no host tier; start it with --mosaic-host-gb")
        sglang_http.flush_cache(url)
        yield url
        return
    with (
        tempfile.TemporaryDirectory(prefix="mosaic-break-even-") as folder,
        make_server(args.model_path, Path(folder) / "server.log", args.server_args) as server,
    ):
        yield server.url


def timed(client: TokenClient, prompts: list[list[int]]) -> tuple[list[float], list[int]]:
    """Seconds and cached tokens of each prompt."""
    seconds, cached = [], []
    for prompt in prompts:
        start = time.perf_counter()
        cached.append(client.prefill(prompt))
        seconds.append(time.perf_counter() - start)
    return seconds, cached


def measure(args: argparse.Namespace, url: str, pool_tokens: int) -> list[dict[str, Any]]:
    """A row for each length."""
    tokenizer = Tokenizer.from_file(str(Path(args.model_path or embedded_model()) / "tokenizer.json"))

    def prompt(tokens: int, seed: str) -> list[int]:
        return tokenizer.encode(make_text(2 * tokens + 64, seed)).ids[:tokens]

    client = TokenClient(url, 600.0)
    wait_for(lambda: statistics(url)["host"]["connected"], "the manager's start")
    # The codec is calibrated by the first prompts: not what is measured here.
    timed(client, [prompt(1100, f"warm-up {i}") for i in range(3)])
    rows = []
    for pages in args.pages:
        tokens = pages * PAGE
        count = pool_tokens // tokens + 2
        prompts = [prompt(tokens + REST, f"{pages} {i}") for i in range(count)]
        # Computing has to make room, too, as restoring has: for each prompt, not once for many.
        timed(client, [prompt(tokens + REST, f"fill {pages} {i}") for i in range(count)])
        computed, _ = timed(client, prompts)
        restored, cached = [], []
        before = statistics(url)["host"]["recomputed"]
        for _ in range(args.rounds):
            seconds, found = timed(client, prompts)
            restored += seconds
            cached += found
        host = statistics(url)["host"]
        recomputed, page_s = host["recomputed"] - before, host["restore_page_seconds"]
        ms = [percentile(seconds, 50) * 1e3 for seconds in (computed, restored)]
        rows.append(
            {
                "tokens": tokens,
                "prompts": count,
                "computed_ms": ms[0],
                "restored_ms": ms[1],
                "ratio": ms[1] / ms[0],
                "restored_share": sum(cached) / (len(cached) * tokens),
                "recomputed_share": recomputed / (len(cached) * pages),
                "computed_p90_ms": percentile(computed, 90) * 1e3,
                "restored_p90_ms": percentile(restored, 90) * 1e3,
                "page_ms": None if page_s is None else page_s * 1e3,
            }
        )
        print(format_table(COLUMNS, [[rows[-1][name] for name in COLUMNS]]).splitlines()[-1], flush=True)
    client.close()
    return rows


def break_even(rows: list[dict[str, Any]]) -> int | None:
    """Tokens from which on pages came back, faster, at every length that was measured; None: nowhere."""
    found = None
    for row in sorted(rows, key=lambda row: -row["tokens"]):
        if row["ratio"] >= 1 or row["recomputed_share"] > 0.5:
            break
        found = row["tokens"]
    return found


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Both times against the length."""
    figure = new_figure(1)
    axis = figure.axes[0]
    for name, colour in (("computed", COLOURS["stock"]), ("restored", COLOURS["mosaic"])):
        axis.plot([row["tokens"] for row in rows], [row[f"{name}_ms"] for row in rows], "o-", color=colour, label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("tokens of the prefix")
    axis.set_ylabel("time to the first token, ms, median")
    axis.legend(fontsize="small")
    return figure


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit status."""
    args = parse_arguments(argv)
    load = os.getloadavg()
    try:
        with server_url(args) as url:
            pool = statistics(url)["logical_pages"] * PAGE
            rows = measure(args, url, pool)
            host = statistics(url)["host"]
    except BenchmarkError as error:
        print(f"break_even: {error}", file=sys.stderr)
        return 2
    least = break_even(rows)
    print(format_table(COLUMNS, [[row[name] for name in COLUMNS] for row in rows]))
    print(f"restoring is faster from {least} tokens on" if least else "restoring is faster at no length")
    counters = {name: host[name] for name in COUNTERS}
    write_report("break_even", args, load, rows=rows, break_even_tokens=least, host=counters)
    if args.png:
        write_png(args.png, draw(rows))
    lost = [row for row in rows if row["restored_share"] + row["recomputed_share"] < 0.99]
    for row in lost:
        print(f"FAILED: of {row['tokens']} tokens only {row['restored_share']:.0%} came back", file=sys.stderr)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
