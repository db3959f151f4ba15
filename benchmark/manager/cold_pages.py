"""A server whose host tier codes what stays cold: how small pages become there, and what they still answer.

    python benchmark/manager/cold_pages.py --json cold-pages.json

For each limit a server of its own: users with passages of a novel behind one system prompt fill a small pool, their
pages go to the manager, and those who came first come back once their pages have been coded again. Each time the
server says how probable it finds the next tokens of the passage: "nats" is the mean of minus the logarithm. With the
limit 0 they stay as they come, in as much memory as that takes.

Exit status: 0, 1 when pages were lost or none was coded, 2 when there is no result.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `import benchmark` when run by path

from tokenizers import Tokenizer

from benchmark.codec.rate_distortion import embedded_model
from benchmark.common.cpu import CPU_FLAGS
from benchmark.common.errors import BenchmarkError
from benchmark.common.novels import novels
from benchmark.common.options import integer, number
from benchmark.common.server_log import trouble
from benchmark.common.stats import format_table
from benchmark.common.text import make_text
from benchmark.manager.own_server import make_server, statistics, write_report
from benchmark.manager.saboteur import wait_for
from benchmark.quality.client import Client

PAGE = 64
ROOMY_GB = 1.0
"""Host memory of the server that codes nothing."""
FULL = 0.8
"""Share of the host memory at which the next user waits until pages have been made smaller."""
STILL_S = 10.0
"""Without another page coded, after which those that are left count as too hard."""
PATIENCE_S = 900.0
SERVER_ARGS = (
    f"{CPU_FLAGS} --max-running-requests 2 --chunked-prefill-size 512 --skip-server-warmup --sleep-on-idle "
    "--max-total-tokens 2048 --mosaic-encode seal --mosaic-refresh-pages 0 --mosaic-restore-from 1 --mosaic-audit"
)
COLUMNS = ("limit", "pages", "ratio", "bytes_per_token", "nats_before", "nats_after", "change", "cached", "restore_ms")


class User(NamedTuple):
    """Token ids."""

    prompt: list[int]
    answer: list[int]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; exits with argparse's message on a bad one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", metavar="MODEL", help="checkpoint folder (default: the embedded SmolLM2)")
    parser.add_argument(
        "--limits", type=number(0), nargs="+", default=[0, 0.15, 0.2], help="of the error (default %(default)s)"
    )
    parser.add_argument("--host-gb", type=number(0), default=0.1, help="where pages are coded (default %(default)g)")
    parser.add_argument("--users", type=integer(2), default=40, help="half of them come back (default %(default)s)")
    parser.add_argument("--user-pages", type=integer(1), default=8, help="of each passage (default %(default)s)")
    parser.add_argument("--scored-tokens", type=integer(1), default=24, help="after each (default %(default)s)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="English prose (default: a novel)")
    parser.add_argument(
        "--server-args", default=SERVER_ARGS, metavar="STRING", help="flags of the server (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and the environment")
    return parser.parse_args(argv)


def make_users(args: argparse.Namespace) -> list[User]:
    """
    Raises:
        BenchmarkError: the text is too short.
    """
    tokenizer = Tokenizer.from_file(str(Path(args.model_path or embedded_model()) / "tokenizer.json"))
    text = args.text.read_text() if args.text else novels()[0]
    # A page that all share is read exactly, as sink, and lies on the host but once.
    system = tokenizer.encode(make_text(2 * PAGE, "system")).ids[:PAGE]
    # One token more than whole pages: the last of a prompt is never cached.
    tokens = args.user_pages * PAGE + 1
    length = args.users * (tokens + args.scored_tokens)
    ids = tokenizer.encode(text[: 8 * length]).ids
    if len(ids) < length:
        raise BenchmarkError(f"--text has {len(ids)} tokens, {args.users} users need {length}: give more of it")
    starts = range(0, length, tokens + args.scored_tokens)
    return [User(system + ids[i : i + tokens], ids[i + tokens : i + tokens + args.scored_tokens]) for i in starts]


def ask(client: Client, user: User) -> tuple[float, int]:
    """Nats a token of the answer, and cached tokens."""
    scores = client.score(user.prompt, user.answer, top=1)
    return -sum(scores.own) / len(scores.own), scores.cached_tokens


def wait_until_settled(url: str, host_bytes: float) -> None:
    """Wait until the manager has room for another user, or can make none; with 0 bytes until it has nothing to do.

    Raises:
        BenchmarkError: neither comes.
    """
    done, since = -1, time.monotonic()

    def settled() -> bool:
        nonlocal done, since
        manager = statistics(url)["host"]["manager"]
        if manager["transformed"] + manager["recompressed"] != done:
            done, since = manager["transformed"] + manager["recompressed"], time.monotonic()
        # Learning takes minutes, in which nothing is done.
        still = manager["transformed"] > 0 and time.monotonic() - since > STILL_S
        time.sleep(0.5)
        return manager["memory_bytes"] <= FULL * host_bytes or still

    wait_for(settled, "room in host memory", PATIENCE_S)


def hits(manager: dict[str, Any]) -> int:
    """Records that it gave back."""
    return manager["hits_memory"] + manager["hits_disk"]


def measure(args: argparse.Namespace, users: list[User], limit: float, log: Path) -> dict[str, Any]:
    """Figures of one limit."""
    gigabytes = args.host_gb if limit else ROOMY_GB
    flags = ("--mosaic-host-gb", str(gigabytes), "--mosaic-cold-max-error", str(limit))
    with make_server(args.model_path, log, args.server_args, *flags) as server:
        client = Client(server.url, 600.0)
        wait_for(lambda: statistics(server.url)["host"]["connected"], "the manager's start")
        before = []
        for count, user in enumerate(users, start=1):
            before.append(ask(client, user)[0])
            wait_until_settled(server.url, gigabytes * 2**30)
            print(f"limit {limit:g}: {count} of {len(users)} users", end="\r", flush=True)
        print(flush=True)
        if limit:
            wait_until_settled(server.url, 0)
        stats = statistics(server.url)
        made, came = stats["host"]["manager"], stats["host"]["restored"]
        returning = users[: len(users) // 2]
        again = [ask(client, user) for user in returning]
        stats = statistics(server.url)
        now = stats["host"]["manager"]
    after = [nats for nats, _ in again]
    kind = ("transformed", "transformed_to") if limit else ("memory_records", "memory_bytes")
    pages, nbytes = (made[name] for name in kind)
    token = nbytes / pages / PAGE if pages else 0.0
    return {
        "limit": limit,
        "pages": pages,
        "bytes_per_token": token,
        "ratio": stats["frame_bytes_dense"] / PAGE / token if pages else 0.0,
        "nats_before": sum(before[: len(after)]) / len(after),
        "nats_after": sum(after) / len(after),
        "change": (sum(after) - sum(before[: len(after)])) / len(after),
        "changes": [b - a for a, b in zip(before, after, strict=False)],
        "cached": sum(cached for _, cached in again) / sum(len(user.prompt) - 1 for user in returning),
        "cached_by_user": [cached for _, cached in again],
        "restored_pages": stats["host"]["restored"] - came,
        "missed_pages": stats["host"]["missed"],
        "restore_ms": 1e3 * (now["restore_seconds"] - made["restore_seconds"]) / max(hits(now) - hits(made), 1),
        "evicted_from_host": now["evicted"],
        "manager": now,
        "trouble": trouble(log),
    }


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """What must not have happened."""
    found = []
    for row in rows:
        if not row["pages"]:
            found.append(f"limit {row['limit']:g}: no page was made smaller")
        lost = row["missed_pages"] + row["evicted_from_host"]
        if lost or not row["restored_pages"]:
            found.append(f"limit {row['limit']:g}: {lost} pages were lost, {row['restored_pages']} came back")
        found += row["trouble"]
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit status."""
    args = parse_arguments(argv)
    load = os.getloadavg()
    try:
        users = make_users(args)
        with tempfile.TemporaryDirectory(prefix="mosaic-cold-") as folder:
            rows = [measure(args, users, limit, Path(folder) / f"{limit:g}.log") for limit in args.limits]
    except BenchmarkError as error:
        print(f"cold_pages: {error}", file=sys.stderr)
        return 2
    failed = failures(rows)
    print(format_table(COLUMNS, [[row[name] for name in COLUMNS] for row in rows]))
    for failure in failed:
        print(f"FAILED: {failure}", file=sys.stderr)
    write_report("cold_pages", args, load, gate={"passed": not failed, "failures": failed}, rows=rows)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
