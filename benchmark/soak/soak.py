"""One soak: a server, its rude clients, one fault after the other, and what is left of it all."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests
from tqdm import tqdm

from benchmark.common import sglang_http
from benchmark.common.errors import BenchmarkError
from benchmark.common.leftovers import shared_memory_files
from benchmark.common.server_log import trouble
from benchmark.common.text import make_text
from benchmark.manager.fault_load import Reply, ask, difference
from benchmark.manager.own_server import make_server, statistics
from benchmark.manager.saboteur import wait_for
from benchmark.soak.faults import Faults
from benchmark.soak.rude_clients import Abuse, Job, plan
from benchmark.soak.watch import Watch, growth

ENVIRONMENT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    "SGLANG_TEST_RETRACT": "1",
    "SGLANG_TEST_RETRACT_INTERVAL": "40",
}
"""SGLang's own checks of its accounting, and a retraction every 40 steps."""
JITTER_PLUGIN = Path(__file__).parent / "jitter"
PROBES = {f"{tokens} tokens": make_text(tokens, f"probe {tokens}") for tokens in (60, 130, 300, 600, 900)}
PROBE_TOKENS = 8
WARM_UP = 6
"""Prompts of 600 tokens that have the codec calibrated before the first probe."""
REFUSALS = r"\[http_server\] Error: "
"""What the server says of the requests that it must refuse."""
DYING_S = 10.0
"""A server whose scheduler died takes its other processes with it after a while."""
BATCH = 50
"""Requests that are planned at a time."""


def probes(url: str) -> dict[str, Reply]:
    """Answers of a server with an empty cache that has nothing else to do."""
    sglang_http.flush_cache(url)
    return {name: ask(url, prompt, PROBE_TOKENS) for name, prompt in PROBES.items()}


def jobs(seed: int, stopped: threading.Event) -> Iterator[Job]:
    """Rude requests without end, until they are stopped."""
    for batch in itertools.count():
        for job in plan(BATCH, seed * 1000 + batch):
            if stopped.is_set():
                return
            yield job


@dataclasses.dataclass(frozen=True)
class Soak:
    """How long, and how hard."""

    minutes: float
    """Of load; then the last requests end."""
    clients: int
    """Requests at a time."""
    calm_s: float
    """Pause between two faults."""
    seed: int
    """Of requests and faults."""

    def run(self, model_path: str | None, server_args: str, folder: Path) -> dict[str, Any]:
        """Start a server, soak it, and look at what is left.

        Args:
            model_path: checkpoint folder; None: the embedded model.
            server_args: its flags, in one string.
            folder: for its log and its store.

        Raises:
            BenchmarkError: there is no result.
        """
        disk, jitter = folder / "store", folder / "jitter"
        path = os.pathsep.join(filter(None, (str(JITTER_PLUGIN), os.environ.get("PYTHONPATH"))))
        os.environ.update(ENVIRONMENT, PYTHONPATH=path, MOSAIC_JITTER=str(jitter))
        shm = shared_memory_files()
        with make_server(model_path, folder / "server.log", server_args, "--mosaic-disk", str(disk)) as server:
            url = server.url
            calibrate(url)
            before, audits = probes(url), statistics(url)["audits"]
            faults = Faults(url, server.pid, jitter)
            try:
                with Watch(server.pid, disk) as watch:
                    requests_made, faults_made = self._load_and_faults(url, faults, watch)
                    sglang_http.flush_cache(url, 120)
                    after = probes(url)
            except (requests.RequestException, BenchmarkError) as error:
                time.sleep(DYING_S)
                server.check_alive()
                raise BenchmarkError(f"a fault could not be made: {error}") from error
            sglang_http.flush_cache(url)
            wait_for(lambda: statistics(url)["audits"] > audits, "an audit")
            differing = {name: found for name in PROBES if (found := difference([before[name]], after[name]))}
            probes_wrong = [f"probe of {name}: {text}" for name, (text, tie) in differing.items() if not tie]
            result = {
                "requests": dict(requests_made.outcomes),
                "probes": {
                    "asked": len(PROBES),
                    "near_ties": [f"{name}: {text}" for name, (text, tie) in differing.items() if tie],
                },
                "wrong": [*requests_made.wrong, *faults.wrong, *probes_wrong],
                "faults": faults_made,
                "outcomes": {kind: dict(outcomes) for kind, outcomes in faults.outcomes.items()},
                "retracted": counted(url, "num_retracted_requests_total"),
                "evicted_tokens": counted(url, "evicted_tokens_total"),
                "stats": statistics(url),
                "growth": grown(watch),
                "samples": [dataclasses.asdict(sample) for sample in watch.samples],
                "trouble": trouble(server.log_path, REFUSALS),
            }
        half_written = [path.name for path in disk.rglob("*") if path.name.count(".") > 1]
        return {**result, "left_behind": sorted(shared_memory_files() - shm) + half_written}

    def _load_and_faults(self, url: str, faults: Faults, watch: Watch) -> tuple[Abuse, list[dict[str, Any]]]:
        until = time.monotonic() + 60 * self.minutes
        stopped = threading.Event()
        abuse = Abuse(url)
        made = []
        rng = random.Random(self.seed)
        with ThreadPoolExecutor(1) as pool, tqdm(total=round(60 * self.minutes), desc="soak", unit="s") as bar:
            clients = pool.submit(abuse.run, jobs(self.seed, stopped), self.clients)
            kinds: list[str] = []
            try:
                while time.monotonic() + self.calm_s < until and not clients.done():
                    time.sleep(self.calm_s)
                    if not kinds:
                        kinds = rng.sample(list(faults.kinds), len(faults.kinds))
                    kind, second = kinds.pop(), watch.second
                    bar.set_postfix_str(kind)
                    made.append({"second": second, "fault": kind, "outcome": faults.make(kind)})
                    bar.update(min(bar.total, round(60 * self.minutes - (until - time.monotonic()))) - bar.n)
            finally:
                # Clients end by themselves: none goes on for longer than its request.
                stopped.set()
            clients.result()
        return abuse, made


def calibrate(url: str) -> None:
    """Have the codec calibrated, or probes before and after would not be compressed alike.

    Raises:
        BenchmarkError: the pool is too large for that.
    """
    for i in range(WARM_UP):
        ask(url, make_text(600, f"warm-up {i}"), 4)
    if statistics(url)["epoch"] is None:
        raise BenchmarkError(f"{WARM_UP} prompts of 600 tokens compressed nothing: give less --mosaic-kv-mib")


def grown(watch: Watch) -> dict[str, dict[str, tuple[float, float]]]:
    """Memory and descriptors of every process in the second and the last quarter."""
    last = watch.samples[-1:]
    return {
        series: {role: growth(watch.samples, series, role) for sample in last for role in getattr(sample, series)}
        for series in ("memory_mib", "descriptors", "threads", "gpu_mib")
    }


def counted(url: str, name: str) -> float:
    """Sum of one of SGLang's Prometheus counters; 0 when it has not been counted yet."""
    lines = requests.get(f"{url}/metrics", timeout=60).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if re.match(rf"sglang:{name}[{{ ]", line))
