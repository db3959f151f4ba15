"""A small server for the manager's benchmarks, on whatever machine they run."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import requests

from benchmark.codec.rate_distortion import embedded_model
from benchmark.common.report import environment, public_command, write_json
from benchmark.common.server import ServerProcess, free_port

HOST = "127.0.0.1"


def make_server(model_path: str | None, log: Path, flags: str, *more: str) -> ServerProcess:
    """A server of sglang_mosaic that is not started yet.

    Args:
        model_path: checkpoint folder; None: the embedded model.
        log: file for what it says.
        flags: of the server, in one string.
        more: further ones.
    """
    # More threads than idle cores make a server several times slower: they wait for each other spinning.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    port = free_port(HOST)
    argv = [sys.executable, "-m", "sglang_mosaic.launch_server", "--model-path", model_path or embedded_model()]
    argv += ["--host", HOST, "--port", str(port), *shlex.split(flags), *more]
    return ServerProcess(argv, f"http://{HOST}:{port}", log)


def statistics(url: str) -> dict[str, Any]:
    """The pool's counters and gauges."""
    info = requests.get(f"{url}/get_server_info", timeout=120).json()
    return info["internal_states"][0]["mosaic"]


def write_report(benchmark: str, args: argparse.Namespace, load: tuple[float, float, float], **figures: Any) -> None:
    """Write the --json of a script that starts its own server, if it is asked for.

    Args:
        benchmark: its name.
        args: its options; paths are left out or cut.
        load: averages of the machine when it began.
        figures: what it found.
    """
    if not args.json:
        return
    plain = {key: value for key, value in vars(args).items() if key not in ("json", "png", "model_path")}
    report = {
        "benchmark": benchmark,
        "environment": {**environment(), "load_average_at_start": load, "load_average_at_end": os.getloadavg()},
        "arguments": {**plain, "server_args": public_command([args.server_args])[0]},
        **figures,
    }
    write_json(args.json, report)
    print(f"wrote {args.json}")
