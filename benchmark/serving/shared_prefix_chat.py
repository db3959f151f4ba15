"""Chats of N users x T turns over one long shared system prompt, against any OpenAI-compatible server.

    python benchmark/serving/shared_prefix_chat.py --url http://127.0.0.1:30000
    python benchmark/serving/shared_prefix_chat.py --compare --model-path MODEL --kv-tokens 65536

A closed loop: each user waits for its reply, keeps the whole history (the server's own replies included) and sends the
next message. The second form runs stock SGLang and sglang_mosaic in turn at the same bytes of KV memory. Hit rates need
a server started with --enable-cache-report. Exit status: 0, 1 when a request failed (the figures then compare
different work), 2 when there is no result.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `import benchmark` when run by path

from tqdm import tqdm

from benchmark.common import compare, sglang_http
from benchmark.common.options import add_serving_options, integer, number
from benchmark.common.script import run_script
from benchmark.serving import chat_summary
from benchmark.serving.chat_workload import ChatWorkload, run_chat


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; exits with argparse's message on a bad one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    load = parser.add_argument_group("workload")
    load.add_argument("--model", help="model name in the requests (default: the first of /v1/models)")
    load.add_argument("--users", type=integer(1), default=16, help="conversations (default %(default)s)")
    load.add_argument("--turns", type=integer(1), default=4, help="messages per user (default %(default)s)")
    load.add_argument(
        "--system-tokens",
        type=integer(1),
        default=4000,
        help="approximate size of the shared system prompt (default %(default)s)",
    )
    load.add_argument(
        "--user-tokens", type=integer(1), default=100, help="approximate size of a message (default %(default)s)"
    )
    load.add_argument(
        "--first-tokens", type=integer(1), help="of a user's first message, such as a document (default: --user-tokens)"
    )
    load.add_argument(
        "--warm-turns",
        type=integer(0),
        default=0,
        metavar="N",
        help="turns that all users finish first and that do not count in the summary (default %(default)s)",
    )
    load.add_argument(
        "--output-tokens",
        type=integer(1),
        default=100,
        help="tokens per reply, exact where the server takes ignore_eos (default %(default)s)",
    )
    load.add_argument(
        "--concurrency", type=integer(1), help="requests in flight at most (default: as many as there are users)"
    )
    load.add_argument(
        "--think-time",
        type=number(0),
        default=0.0,
        metavar="SECONDS",
        help="pause of a user between a reply and its next message (default %(default)g)",
    )
    load.add_argument("--seed", type=int, default=0, help="of texts and order (default %(default)s)")
    load.add_argument(
        "--flush", action="store_true", help="with --url: empty the server's prefix cache first (--compare always does)"
    )
    add_serving_options(parser)
    args = parser.parse_args(argv)
    if args.warm_turns >= args.turns:
        parser.error(f"argument --warm-turns: found {args.warm_turns} of {args.turns} turns: nothing would count")
    return args


def measure(url: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run the workload on one server: summary, figures by turn, raw rows."""
    workload = ChatWorkload(
        model=args.model or sglang_http.first_model(url),
        users=args.users,
        turns=args.turns,
        system_tokens=args.system_tokens,
        user_tokens=args.user_tokens,
        first_tokens=args.first_tokens or args.user_tokens,
        output_tokens=args.output_tokens,
        concurrency=args.concurrency or args.users,
        think_time_s=args.think_time,
        warm_turns=args.warm_turns,
        seed=args.seed,
    )
    info = sglang_http.server_info(url) or {}

    def before() -> None:
        if args.compare or args.flush:
            sglang_http.flush_cache(url)

    with tqdm(total=args.users * args.turns, desc="turns", unit="turn") as bar:
        run = asyncio.run(run_chat(url, workload, args.timeout, before, bar.update))
    reports_cache = info.get("enable_cache_report")
    counted = [row for row in run.rows if row["turn"] >= args.warm_turns]
    return {
        "summary": chat_summary.summarise(counted, run.wall_s, reports_cache),
        "by_turn": chat_summary.by_turn(run.rows, args.turns, reports_cache),
        "ignore_eos": run.ignore_eos,
        "rows": run.rows,
    }


def describe(results: dict[str, dict[str, Any]]) -> str:
    """The tables, and what is missing from them."""
    notes = [
        f"{name}: the server does not take ignore_eos; replies may be shorter than --output-tokens"
        for name, result in results.items()
        if not result["ignore_eos"]
    ]
    notes += [
        f"{name}: no hit rate, the server does not report cached tokens (SGLang: --enable-cache-report)"
        for name, result in results.items()
        if result["summary"]["hit_rate"] is None
    ]
    return "\n".join(["", chat_summary.turn_table(results), "", compare.figures_table(results), *notes])


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit status."""
    args = parse_arguments(argv)
    return run_script(
        "shared_prefix_chat",
        args,
        measure=lambda url: measure(url, args),
        gate=lambda results: chat_summary.gate(results, args.users * (args.turns - args.warm_turns)),
        describe=describe,
        draw=chat_summary.draw,
    )


if __name__ == "__main__":
    sys.exit(main())
