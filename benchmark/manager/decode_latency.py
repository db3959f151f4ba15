"""Time between the tokens of a server beside a manager that compresses all the time, and beside one with nothing to do.

    python benchmark/manager/decode_latency.py --json decode-latency.json

One server, one request at a time; the manager is a process like the server's own, and gets more pages than it can make
coarser in every other phase. Phases alternate, in pairs whose order alternates, too: what other work takes of the
machine falls on both. Intervals are those at which a client sees the tokens. "change" is of the medians of pairs, the
middle one. Exit status: 0, 2 when there is no result.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `import benchmark` when run by path

import requests

from benchmark.common.cpu import CPU_FLAGS
from benchmark.common.errors import BenchmarkError
from benchmark.common.options import integer
from benchmark.common.stats import format_table, percentile
from benchmark.common.text import make_text
from benchmark.manager.own_server import make_server, write_report
from benchmark.manager.saturated import SaturatedManager

SERVER_ARGS = (
    f"{CPU_FLAGS} --max-running-requests 2 --chunked-prefill-size 512 "
    "--skip-server-warmup --sleep-on-idle --max-total-tokens 2048 --mosaic-host-gb 1"
)
COLUMNS = ("nice", "pairs", "idle_p50_ms", "busy_p50_ms", "idle_p99_ms", "busy_p99_ms", "change_p50", "compressed")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; exits with argparse's message on a bad one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", metavar="MODEL", help="checkpoint folder (default: the embedded SmolLM2)")
    parser.add_argument("--nice", type=integer(0), nargs="+", default=[10, 19], help="levels (default %(default)s)")
    parser.add_argument("--pairs", type=integer(1), default=8, help="of phases (default %(default)s)")
    parser.add_argument("--tokens", type=integer(2), default=64, help="of a phase (default %(default)s)")
    parser.add_argument(
        "--server-args", default=SERVER_ARGS, metavar="STRING", help="flags of the server (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows and the environment")
    return parser.parse_args(argv)


def intervals(url: str, prompt: str, tokens: int) -> list[float]:
    """Seconds between the tokens of one answer."""
    body = {
        "text": prompt,
        "sampling_params": {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True},
        "stream": True,
    }
    times = []
    with requests.post(f"{url}/generate", json=body, stream=True, timeout=300) as response:
        response.raise_for_status()
        for line in response.iter_lines(chunk_size=1):
            if line.startswith(b"data: {"):
                seen = json.loads(line[6:])["meta_info"]["completion_tokens"]
                times.append((seen, time.perf_counter()))
    if not times or times[-1][0] != tokens:
        raise BenchmarkError(f"an answer ended after {times[-1][0] if times else 0} of {tokens} tokens")
    # Tokens that come together share the time since the one before.
    return [
        (at - before) / (seen - last)
        for (last, before), (seen, at) in itertools.pairwise(times)
        if seen > last
        for _ in range(seen - last)
    ]


def measure(url: str, nice: int, pairs: int, tokens: int) -> dict[str, Any]:
    """Figures of one nice level."""
    prompt = make_text(100, "decode")
    found: dict[bool, list[list[float]]] = {False: [], True: []}
    with SaturatedManager(nice) as manager:
        manager.settle(busy=True)
        intervals(url, prompt, tokens)
        compressed = 0
        for pair in range(pairs):
            for busy in (False, True) if pair % 2 else (True, False):
                manager.settle(busy)
                before = manager.compressed
                found[busy].append(intervals(url, prompt, tokens))
                compressed += manager.compressed - before
    flat = {busy: [x * 1e3 for phase in phases for x in phase] for busy, phases in found.items()}
    changes = [percentile(b, 50) / percentile(a, 50) - 1 for a, b in zip(found[False], found[True], strict=True)]
    return {
        "nice": nice,
        "pairs": pairs,
        "idle_p50_ms": percentile(flat[False], 50),
        "busy_p50_ms": percentile(flat[True], 50),
        "idle_p99_ms": percentile(flat[False], 99),
        "busy_p99_ms": percentile(flat[True], 99),
        "change_p50": percentile(changes, 50),
        "changes": changes,
        "compressed": compressed,
    }


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit status."""
    args = parse_arguments(argv)
    load = os.getloadavg()
    try:
        with (
            tempfile.TemporaryDirectory(prefix="mosaic-decode-") as folder,
            make_server(args.model_path, Path(folder) / "server.log", args.server_args) as server,
        ):
            rows = [measure(server.url, nice, args.pairs, args.tokens) for nice in args.nice]
    except (BenchmarkError, requests.RequestException) as error:
        print(f"decode_latency: {error}", file=sys.stderr)
        return 2
    print(format_table(COLUMNS, [[row[name] for name in COLUMNS] for row in rows]))
    write_report("decode_latency", args, load, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
