"""A server under load whose manager is killed and stopped, and which is killed itself while its directory is written.

    python benchmark/manager/faults.py --json faults.json

Nothing is compressed (--mosaic-encode off --mosaic-host-gb), so that restored pages are the bytes that were evicted and
every answer must have the tokens of a server that was left alone. The model computes in 32 bits: in bf16 the last digit
of a logit, up to .125, hangs on which part of a prompt is computed in one piece, also without faults. A first
difference at a near-tie (the two best log-probabilities less than .01 apart) is listed and not counted.

1. Each prompt is asked for twice, with the others' pages in the cache and with an empty one: these are the answers.
2. The manager is killed (SIGKILL) at --kills random moments, then stopped (SIGSTOP) for --stop-s seconds, while clients
   ask for the same prompts, which do not fit in the pool together.
3. The server and all its processes are killed --server-kills times, while its manager writes --mosaic-disk; the next
   one must find the directory consistent, restore from it and give the same answers.

Exit status: 0, 1 when anything was lost but hits, 2 when there is no result.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `import benchmark` when run by path

import psutil
import requests

from benchmark.common import sglang_http
from benchmark.common.cpu import EXACT_CPU_FLAGS
from benchmark.common.errors import BenchmarkError
from benchmark.common.leftovers import shared_memory_files
from benchmark.common.options import integer, number
from benchmark.common.server import ServerProcess
from benchmark.common.server_log import trouble
from benchmark.manager.fault_load import Expected, Load, answers, shared_prefix_prompts
from benchmark.manager.own_server import make_server, statistics, write_report
from benchmark.manager.saboteur import kill_managers, manager_of, stop_manager, wait_for, wait_for_work

SERVER_ARGS = (
    f"{EXACT_CPU_FLAGS} --max-running-requests 2 --chunked-prefill-size 256 "
    "--skip-server-warmup --sleep-on-idle --max-total-tokens 1024 --mosaic-host-gb 1 --mosaic-restart-s 0.2"
)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; exits with argparse's message on a bad one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", metavar="MODEL", help="checkpoint folder (default: the embedded SmolLM2)")
    parser.add_argument("--kills", type=integer(0), default=100, help="of the manager (default %(default)s)")
    parser.add_argument("--stop-s", type=number(0), default=30.0, help="0: it is not stopped (default %(default)g)")
    parser.add_argument("--server-kills", type=integer(0), default=3, help="(default %(default)s)")
    parser.add_argument("--families", type=integer(1), default=6, help="of prompts (default %(default)s)")
    parser.add_argument("--members", type=integer(1), default=2, help="prompts of each (default %(default)s)")
    parser.add_argument("--shared-tokens", type=integer(1), default=250, help="of a family (default %(default)s)")
    parser.add_argument("--own-tokens", type=integer(1), default=60, help="of each prompt (default %(default)s)")
    parser.add_argument("--output-tokens", type=integer(1), default=6, help="(default %(default)s)")
    parser.add_argument("--clients", type=integer(1), default=2, help="requests at a time (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of orders and moments (default %(default)s)")
    parser.add_argument(
        "--server-args", default=SERVER_ARGS, metavar="STRING", help="flags of the server (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and the environment")
    return parser.parse_args(argv)


class Site:
    """Where the servers run: their flags, logs, and what they may leave behind.

    Args:
        args: options of the script.
        folder: for logs and the managers' directory.
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._args = args
        self._folder = folder
        self._logs = 0
        self._shm = shared_memory_files()
        self._processes: set[psutil.Process] = set()

    def server(self, *more: str) -> ServerProcess:
        """A server that is not started yet."""
        self._logs += 1
        exact = ("--mosaic-encode", "off", "--mosaic-audit")
        log = self._folder / f"server-{self._logs}.log"
        return make_server(self._args.model_path, log, self._args.server_args, *exact, *more)

    def watch(self, server: ServerProcess) -> None:
        """Remember the processes that a server has now."""
        root = psutil.Process(server.pid)
        self._processes |= {root, *root.children(recursive=True)}

    def left_behind(self) -> list[str]:
        """Our files in /dev/shm, and processes, that servers have left."""
        files = [f"/dev/shm/{name}" for name in sorted(shared_memory_files() - self._shm)]
        _, alive = psutil.wait_procs(list(self._processes), timeout=10)
        return files + [f"process {process.pid}" for process in alive]


def audited(url: str) -> dict[str, Any]:
    """The pool's statistics after the cache was emptied and another audit passed; the server stops on a bad one."""
    sglang_http.flush_cache(url)
    before = statistics(url)["audits"]
    requests.post(
        f"{url}/generate", json={"text": "one more", "sampling_params": {"max_new_tokens": 1}}, timeout=60
    ).raise_for_status()
    wait_for(lambda: statistics(url)["audits"] > before, "another audit")
    sglang_http.flush_cache(url)
    return statistics(url)


def told(load: Load) -> dict[str, Any]:
    """What became of a load's requests."""
    return {
        "answered": load.answered,
        "cached_tokens": load.cached_tokens,
        "wrong": load.wrong,
        "near_ties": load.near_ties,
        "failed": load.failed,
    }


def harm_manager(args: argparse.Namespace, site: Site, prompts: dict[str, str]) -> tuple[dict[str, Any], Expected]:
    """Kills and a stop of the manager; the figures, and the answers of the server before."""
    with site.server() as server:
        expected = answers(server.url, prompts, args.output_tokens)
        wait_for(lambda: statistics(server.url)["host"]["connected"], "the manager's start")
        undisturbed = {}
        with Load(server.url, prompts, args.output_tokens, expected, args.clients, args.seed) as load:
            wait_for(lambda: load.answered >= 2 * len(prompts) or load.failed, "the undisturbed load", 600)
        undisturbed = told(load)

        def after(kill: int) -> None:
            site.watch(server)
            if kill % 10 == 0:
                print(f"{kill} kills, {load.answered} answers", flush=True)

        start = time.monotonic()
        with Load(server.url, prompts, args.output_tokens, expected, args.clients, args.seed + 1) as load:
            kill_managers(server.pid, args.kills, args.seed, after)
            killed_s = time.monotonic() - start
            # One that is still starting would only be started again.
            wait_for_work(server.pid, lambda: statistics(server.url)["host"])
            survived = stop_manager(server.pid, args.stop_s) if args.stop_s else None
            wait_for_work(server.pid, lambda: statistics(server.url)["host"])
            site.watch(server)
        stats = audited(server.url)
        host = stats["host"]
        result = {
            "undisturbed": undisturbed,
            "disturbed": told(load),
            "kills": args.kills,
            "kills_s": killed_s,
            "stopped_s": args.stop_s,
            "survived_the_stop": survived,
            "deaths_noticed": host["client"]["deaths"],
            "silences_noticed": host["client"]["silences"],
            "restored_pages": host["restored"],
            "missed_pages": host["missed"],
            "frames_left": stats["dense_frames_used"] + stats["mosaic_frames_used"],
            "audits": stats["audits"],
            "trouble": trouble(server.log_path),
        }
        manager = manager_of(server.pid)
        if manager is None:
            raise BenchmarkError("there is no manager at the end")
    return result, expected


def kill_server(
    args: argparse.Namespace, site: Site, prompts: dict[str, str], expected: Expected, disk: Path
) -> list[dict[str, Any]]:
    """Kills of the server at random moments while records are written; then what the next one finds."""
    rng = random.Random(args.seed)
    rows = []
    flags = ("--mosaic-disk", str(disk))
    for kill in range(args.server_kills + 1):
        with site.server(*flags) as server:
            wait_for(lambda url=server.url: statistics(url)["host"]["connected"], "the manager's start")
            found = statistics(server.url)["host"]["known_records"]
            with Load(server.url, prompts, args.output_tokens, expected, args.clients, args.seed + kill) as load:
                wait_for(lambda load=load: load.answered >= len(prompts) or load.failed, "the load", 600)
            host = statistics(server.url)["host"]
            row = {"records_found": found, **told(load), "restored_pages": host["restored"]}
            row["hits_disk"] = host["manager"].get("hits_disk", 0)
            row["refused_records"] = host["manager"].get("refused_records", 0)
            if kill < args.server_kills:
                # New prompts evict pages, which are written: it ends in the middle of that.
                fresh = shared_prefix_prompts(8, 1, args.shared_tokens, args.own_tokens + 7 * (kill + 1))
                with Load(server.url, fresh, args.output_tokens, {}, args.clients, kill) as load:
                    wait_for(growing(disk), "the writing of a record", 60)
                    time.sleep(rng.uniform(0.0, 0.2))
                    site.watch(server)
                    server.kill()
            else:
                audited(server.url)
                row["trouble"] = trouble(server.log_path)
                site.watch(server)
        row["half_written_left"] = len(list(disk.rglob("*.tmp*")))
        rows.append(row)
        print(f"server life {kill + 1}: {row['records_found']} records found, {row['hits_disk']} hits", flush=True)
    return rows


def growing(disk: Path) -> Callable[[], bool]:
    """Tells whether files have appeared since it was made."""
    before = len(list(disk.rglob("*")))
    return lambda: len(list(disk.rglob("*"))) > before


def failures(result: dict[str, Any]) -> list[str]:
    """What must not have happened."""
    found = []
    manager = result["manager"]
    loads = {"undisturbed": manager["undisturbed"], "manager killed": manager["disturbed"]}
    loads |= {f"server life {i + 1}": row for i, row in enumerate(result["server"])}
    for name, load in loads.items():
        found += [f"{name}: {line}" for line in (*load["wrong"], *load["failed"])]
    if manager["stopped_s"] and not manager["silences_noticed"]:
        found.append("the stop of the manager was not noticed")
    if manager["deaths_noticed"] < manager["kills"]:
        found.append(f"{manager['deaths_noticed']} deaths were noticed of {manager['kills']}")
    if manager["frames_left"]:
        found.append(f"{manager['frames_left']} frames leaked")
    found += manager["trouble"] + [line for row in result["server"] for line in row.get("trouble", ())]
    for row in result["server"][1:]:
        if not row["records_found"] or not row["hits_disk"]:
            found.append("a server found nothing in the directory of the one before")
    return found + [f"left behind: {name}" for name in result["left_behind"]]


def describe(result: dict[str, Any]) -> str:
    """A few lines."""
    manager = result["manager"]
    lines = [
        f"manager: {manager['kills']} kills in {manager['kills_s']:.0f} s, stopped for {manager['stopped_s']:g} s; "
        f"{manager['disturbed']['answered']} requests answered, {len(manager['disturbed']['wrong'])} wrong, "
        f"{len(manager['disturbed']['failed'])} failed, {len(manager['disturbed']['near_ties'])} near-ties "
        f"({len(manager['undisturbed']['near_ties'])} of {manager['undisturbed']['answered']} undisturbed); "
        f"{manager['restored_pages']} pages restored, {manager['missed_pages']} missed"
    ]
    for i, row in enumerate(result["server"]):
        lines.append(
            f"server life {i + 1}: found {row['records_found']} records, {row['hits_disk']} hits on disk, "
            f"{row['answered']} answered, {len(row['wrong'])} wrong, {len(row['near_ties'])} near-ties"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit status."""
    args = parse_arguments(argv)
    load = os.getloadavg()
    prompts = shared_prefix_prompts(args.families, args.members, args.shared_tokens, args.own_tokens)
    try:
        with tempfile.TemporaryDirectory(prefix="mosaic-faults-") as folder:
            site = Site(args, Path(folder))
            manager, expected = harm_manager(args, site, prompts)
            server = kill_server(args, site, prompts, expected, Path(folder) / "store") if args.server_kills else []
            result = {"manager": manager, "server": server, "left_behind": site.left_behind()}
    except BenchmarkError as error:
        print(f"faults: {error}", file=sys.stderr)
        return 2
    failed = failures(result)
    print(describe(result))
    for failure in failed:
        print(f"FAILED: {failure}", file=sys.stderr)
    write_report("faults", args, load, gate={"passed": not failed, "failures": failed}, **result)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
