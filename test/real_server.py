"""Real servers for the tests marked `server`: how each is started, and what a test can ask of it."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import requests

from answers import Answer
from benchmark.common import sglang_http
from benchmark.common.cpu import CPU_FLAGS, EXACT_CPU_FLAGS
from benchmark.common.server import ServerProcess, free_port
from benchmark.common.server_log import trouble
from benchmark.soak.soak import JITTER_PLUGIN

HOST = "127.0.0.1"
MOST_ALIVE = 2
"""Servers alive at a time: each takes about 2 GB and, while it serves, all of a small machine's cores."""

ENVIRONMENT = {
    # More threads than idle cores make a server several times slower: they wait for each other spinning.
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # SGLang's own accounting, checked at every step instead of when idle.
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}

COMMON = (
    *("--host", HOST, *CPU_FLAGS.split()),
    *("--max-running-requests", "8", "--chunked-prefill-size", "512"),
    *("--skip-server-warmup", "--enable-cache-report", "--enable-metrics"),
    # An idle scheduler would spin on a core.
    "--sleep-on-idle",
)


@dataclasses.dataclass(frozen=True)
class Launch:
    """How a server is started: Python module, flags besides model and port, and variables of its own."""

    module: str
    flags: tuple[str, ...]
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    jitter: bool = False
    """Loads the plugin that makes it pause while `Servers.jitter` is there (benchmark/soak/jitter)."""
    model: Path | None = None
    """Checkpoint folder, None: that of the embedded default model."""

    @property
    def headers(self) -> dict[str, str]:
        """What its clients must send."""
        if "--api-key" not in self.flags:
            return {}
        return {"authorization": f"Bearer {self.flags[self.flags.index('--api-key') + 1]}"}


LAUNCHES = {
    # SGLang without us, and ours with nothing compressed, equal in every other flag. The pool is so small that the
    # identity prompts evict one another.
    "stock": Launch(
        "sglang.launch_server",
        (*COMMON, "--max-total-tokens", "6144", "--attention-backend", "torch_native", "--page-size", "64"),
    ),
    "off": Launch(
        "sglang_mosaic.launch_server",
        (*COMMON, "--max-total-tokens", "6144", "--mosaic-encode", "off", "--mosaic-audit"),
    ),
    # Pages are compressed as soon as they leave the recent window; 12,800 logical tokens. Calibrated once, here and
    # below: tests compare answers before and after other traffic.
    "seal": Launch(
        "sglang_mosaic.launch_server",
        (*COMMON, "--mosaic-encode", "seal", "--mosaic-refresh-pages", "0", "--mosaic-kv-mib", "111", "--mosaic-audit"),
        jitter=True,
    ),
    # Pages are compressed when memory runs out (the default); 4,096 logical tokens. Started as a drop-in by SGLang's
    # own launcher, made to retract a running request now and then, and audited between steps.
    "pressure": Launch(
        "sglang.launch_server",
        (
            *("--attention-backend", "mosaic", "--radix-cache-backend", "mosaic"),
            *(*COMMON, "--mosaic-refresh-pages", "0", "--mosaic-kv-mib", "57", "--mosaic-audit", "20"),
        ),
        {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "20"},
        jitter=True,
    ),
    # Evicted pages go to the host; 1,024 logical tokens, which is two prompts of test_server_host_tier.py. Nobody is
    # served without the key.
    "host": Launch(
        "sglang_mosaic.launch_server",
        (
            *(*COMMON, "--max-running-requests", "2", "--chunked-prefill-size", "256", "--mosaic-kv-mib", "24"),
            *("--mosaic-encode", "seal", "--mosaic-calibration-pages", "7", "--mosaic-refresh-pages", "0"),
            *("--mosaic-host-gb", "0.25", "--mosaic-audit", "--api-key", "only-for-tests"),
        ),
    ),
    # Nothing is compressed and nothing is rounded to 16 bits, so that pages which come back from the host, and prompts
    # that are computed in other pieces, give the very same tokens; 1,024 logical tokens, which is three prompts of
    # test_server_faults.py.
    "exact": Launch(
        "sglang_mosaic.launch_server",
        (
            *(*COMMON, *EXACT_CPU_FLAGS.split(), "--max-running-requests", "2", "--chunked-prefill-size", "256"),
            *("--max-total-tokens", "1024", "--mosaic-encode", "off", "--mosaic-host-gb", "0.25"),
            *("--mosaic-restart-s", "0.2", "--mosaic-audit", "20"),
        ),
        jitter=True,
    ),
    # The smallest pool that the refusal of a smaller one names (test_server_errors.py).
    "smallest": Launch("sglang_mosaic.launch_server", (*COMMON, "--mosaic-kv-mib", "36.6", "--mosaic-audit")),
}


class Server:
    """One running server."""

    def __init__(self, name: str, process: ServerProcess, headers: dict[str, str]) -> None:
        self.name = name
        self.url = process.url
        self.process = process
        self.headers = headers

    def generate(self, prompt: str | list[int], max_new_tokens: int, **more: Any) -> Answer:
        """Greedy answer to a text or to token ids, exactly `max_new_tokens` long."""
        body = sglang_http.generate_body(prompt, max_new_tokens, **more)
        response = requests.post(f"{self.url}/generate", json=body, headers=self.headers, timeout=300)
        assert response.ok, f"{self.name}: HTTP {response.status_code}: {response.text[:500]}"
        return Answer.of(response.json())

    def chat(self, messages: list[dict[str, str]], max_tokens: int = 24, **more: Any) -> tuple[str, int, int]:
        """Greedy chat completion; its text, prompt tokens, and how many of those came from the cache."""
        body = {"model": "default", "messages": messages, "max_tokens": max_tokens, "temperature": 0, **more}
        response = requests.post(f"{self.url}/v1/chat/completions", json=body, headers=self.headers, timeout=300)
        assert response.ok, f"{self.name}: HTTP {response.status_code}: {response.text[:500]}"
        reply = response.json()
        usage = reply["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return reply["choices"][0]["message"]["content"], usage["prompt_tokens"], cached

    def flush(self) -> None:
        """Empty the prefix cache, once nothing runs any more."""
        sglang_http.flush_cache(self.url)

    def stats(self) -> dict[str, Any]:
        """The pool's counters and gauges."""
        return self._info()["internal_states"][0]["mosaic"]

    def pool_tokens(self) -> int:
        """Logical tokens of the pool."""
        return self._info()["max_total_num_tokens"]

    def exposition(self) -> str:
        """What /metrics shows."""
        return requests.get(f"{self.url}/metrics", timeout=60).text

    def metric(self, name: str) -> float:
        """Sum of a Prometheus counter over its labels, 0 when it has not been counted yet."""
        lines = self.exposition().splitlines()
        return sum(float(line.split()[-1]) for line in lines if re.match(rf"sglang:{name}[{{ ]", line))

    def wait_for_audit(self, audits_before: int, patience_s: float = 120) -> dict[str, Any]:
        """The pool's statistics after it went idle and passed another audit."""
        deadline = time.monotonic() + patience_s
        while True:
            self.process.check_alive()
            stats, load = self.stats(), self.get("/v1/loads").json()["loads"][0]
            if stats["audits"] > audits_before and not load["num_running_reqs"] and not load["num_waiting_reqs"]:
                return stats
            assert time.monotonic() < deadline, f"{self.name}: no audit in {patience_s} s; {stats}, {load}"
            time.sleep(0.5)

    def trouble(self) -> list[str]:
        """Lines of the log that tell of an exception, a leak or a violated invariant."""
        return trouble(self.process.log_path)

    def get(self, path: str) -> requests.Response:
        """Answer to a GET of a path."""
        return requests.get(f"{self.url}{path}", headers=self.headers, timeout=60)

    def _info(self) -> dict[str, Any]:
        return self.get("/get_server_info").json()


class Servers:
    """Starts servers when they are asked for, and stops the one unused the longest to make room."""

    def __init__(self, model: Path, log_dir: Path) -> None:
        self._model = model
        self._log_dir = log_dir
        self._starts = 0
        self._alive: dict[str, Server] = {}  # last used last
        self.launches = dict(LAUNCHES)
        self.jitter = log_dir / "jitter"

    def __getitem__(self, name: str) -> Server:
        if name in self._alive:
            self._alive[name] = self._alive.pop(name)
            self._alive[name].process.check_alive()
            return self._alive[name]
        self.make_room()
        self._starts += 1
        launch, port = self.launches[name], free_port(HOST)
        url = f"http://{HOST}:{port}"
        # SGLang draws one near the server's, and so may the server that another worker starts at the same moment.
        ports = "--port", str(port), "--nccl-port", str(free_port(HOST))
        address = "--model-path", str(launch.model or self._model), *ports
        environment = dict(launch.environment)
        if launch.jitter:
            environment.update(PYTHONPATH=str(JITTER_PLUGIN), MOSAIC_JITTER=str(self.jitter))
        argv = python("-m", launch.module, *launch.flags, *address, **environment)
        process = ServerProcess(argv, url, self._log_dir / f"{self._starts}-{name}.log", health_timeout_s=300)
        process.__enter__()
        self._alive[name] = Server(name, process, launch.headers)
        return self._alive[name]

    def make_room(self) -> None:
        """Leave room for one more server."""
        while len(self._alive) >= MOST_ALIVE:
            self.stop(next(iter(self._alive)))

    def stop(self, name: str) -> None:
        """Stop a server if it runs."""
        server = self._alive.pop(name, None)
        if server is not None:
            server.process.stop()

    def stop_all(self) -> None:
        """Stop every server."""
        for name in list(self._alive):
            self.stop(name)


def python(*arguments: str, **environment: str) -> list[str]:
    """Command line of Python in the servers' environment, plus some variables."""
    settings = [f"{name}={value}" for name, value in {**ENVIRONMENT, **environment}.items()]
    # Without bytecode every process would compile all of SGLang anew.
    return ["env", "-u", "PYTHONDONTWRITEBYTECODE", *settings, sys.executable, *arguments]


def run_python(*arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """Run Python in the servers' environment; stdout and stderr come back together, as they would be read."""
    return subprocess.run(
        python(*arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )
