"""Measure one running server, or stock SGLang and sglang_mosaic in turn at the same bytes of KV memory.

With host memory for evicted pages: stock without it, SGLang's HiCache and sglang_mosaic with the same bytes of it.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.common import sglang_http
from benchmark.common.errors import BenchmarkError
from benchmark.common.kv_bytes import kv_bytes_per_token, load_config
from benchmark.common.report import public_command
from benchmark.common.server import ServerProcess, free_port
from benchmark.common.stats import format_table, ratio

MIB, GIB = 1 << 20, 1 << 30
HOST = "127.0.0.1"
STOCK, HICACHE, MOSAIC, RUNNING = "stock", "hicache", "mosaic", "server"

# Allowed excess of sglang_mosaic's reported KV bytes over stock's: both report to about 1 MiB and hold a dummy page.
BYTES_SLACK = 0.02
BYTES_SLACK_MIB = 2

# Flags that the comparison sets itself, those under which the byte count from config.json would be wrong, and those
# whose value is what is compared.
SET_HERE = ("--model-path", "--model", "--host", "--port", "--max-total-tokens", "--enable-cache-report")
BF16_CACHE = re.compile(r"--kv-cache-dtype(=|\s+)(bfloat16|bf16)(?=\s|$)")
BREAKS_BYTES = ("--kv-cache-dtype", "--tp", "--tp-size", "--tensor-parallel-size", "--pp-size", "--dp", "--dp-size")
SELECTS_SYSTEM = (
    "--attention-backend",
    "--prefill-attention-backend",
    "--decode-attention-backend",
    "--radix-cache-backend",
)
SETS_HOST = ("--enable-hierarchical-cache", "--hicache-size", "--mosaic-host-gb")

# Copied from /server_info into the report.
REPORTED_SETTINGS = ("version", "attention_backend", "page_size", "max_total_num_tokens", "chunked_prefill_size")

# Takes the base URL of a healthy server; returns at least "summary": {figure: number or None}.
Measure = Callable[[str], dict[str, Any]]


@dataclass(frozen=True)
class System:
    """One server to start: its name in the tables, its command line without the address, its KV bytes."""

    name: str
    argv: tuple[str, ...]
    kv_bytes: int


def check_target(args: argparse.Namespace) -> None:
    """BenchmarkError unless the options name exactly one way to find a server, completely."""
    if args.compare == bool(args.url):
        found = "both" if args.compare else "neither"
        raise BenchmarkError(f"pass exactly one of --url and --compare, found {found}")
    if args.url:
        args.url = sglang_http.normalise_url(args.url)
        return
    for option, value in (("--model-path", args.model_path), ("--kv-tokens", args.kv_tokens)):
        if value is None:
            raise BenchmarkError(f"--compare needs {option}, found none")
    _check_server_args("--server-args", args.server_args)
    _check_server_args("--stock-args", args.stock_args)
    _check_server_args("--mosaic-args", args.mosaic_args)


def _check_server_args(option: str, text: str) -> None:
    flags = [word.partition("=")[0] for word in shlex.split(BF16_CACHE.sub("", text))]
    for flag in flags:
        if flag in SET_HERE:
            raise BenchmarkError(f"{option} contains {flag}, which the comparison sets itself; leave it out")
        if flag in SETS_HOST:
            raise BenchmarkError(f"{option} contains {flag}, which the comparison sets itself; use --host-gb")
        if flag in BREAKS_BYTES:
            raise BenchmarkError(
                f"{option} contains {flag}: equal memory is computed for a bf16 cache on one device; leave it out, or "
                "start the servers yourself and use --url"
            )
        if option == "--server-args" and flag in SELECTS_SYSTEM:
            raise BenchmarkError(f"--server-args contains {flag}, which selects the system; use --stock-args for it")
        if option != "--mosaic-args" and flag.startswith("--mosaic"):
            raise BenchmarkError(f"{option} contains {flag}, which is for sglang_mosaic only; use --mosaic-args")


def systems_to_compare(args: argparse.Namespace, bytes_per_token: int) -> list[System]:
    """Stock first, sglang_mosaic last, with exactly the same bytes of KV memory."""
    kv_bytes = args.kv_tokens * bytes_per_token
    shared = ("--model-path", args.model_path, "--enable-cache-report", *shlex.split(args.server_args))
    stock = (*shared, "--max-total-tokens", str(args.kv_tokens), *shlex.split(args.stock_args))
    # A number of bytes over 2^20 is exact in a float, and repr keeps every digit.
    mosaic = (*shared, "--mosaic-kv-mib", repr(kv_bytes / MIB), *shlex.split(args.mosaic_args))
    hicache = None
    if args.host_gb:
        # Both count memory on the host for themselves: SGLang in 10^9 bytes.
        hicache = (*stock, "--enable-hierarchical-cache", "--hicache-size", str(args.host_gb))
        mosaic = (*mosaic, "--mosaic-host-gb", repr(args.host_gb * 10**9 / GIB))
    commands = {STOCK: ("sglang", stock), HICACHE: ("sglang", hicache), MOSAIC: ("sglang_mosaic", mosaic)}
    return [
        System(name, (sys.executable, "-m", f"{package}.launch_server", *argv), kv_bytes)
        for name, (package, argv) in commands.items()
        if argv
    ]


def run(args: argparse.Namespace, measure: Measure) -> dict[str, dict[str, Any]]:
    """Call `measure` on every system, one server at a time; results by system name.

    Each result gains "server": the command line, the bytes of KV memory asked for and those the server reports.
    """
    if args.url:
        return {RUNNING: _measured(args.url, measure, argv=None, kv_bytes=None)}
    bytes_per_token = kv_bytes_per_token(load_config(args.model_path))
    log_dir = args.log_dir or Path(tempfile.mkdtemp(prefix="mosaic-benchmark-"))
    results = {}
    for system in systems_to_compare(args, bytes_per_token):
        port = free_port(HOST)
        argv = [*system.argv, "--host", HOST, "--port", str(port)]
        log_path = log_dir / f"{system.name}.log"
        print(f"starting {system.name} ({system.kv_bytes / MIB:.1f} MiB of KV), log: {log_path}", flush=True)
        with ServerProcess(argv, f"http://{HOST}:{port}", log_path, args.health_timeout) as server:
            results[system.name] = _measured(server.url, measure, argv, system.kv_bytes)
            server.check_alive()
    return results


def _measured(url: str, measure: Measure, argv: list[str] | None, kv_bytes: int | None) -> dict[str, Any]:
    info = sglang_http.server_info(url) or {}
    result = measure(url)
    result["server"] = {
        "command_line": argv and ["python", *public_command(argv[1:])],
        "kv_bytes_requested": kv_bytes,
        "kv_bytes_reported": sglang_http.reported_kv_bytes(info),
        **{key: info.get(key) for key in REPORTED_SETTINGS},
    }
    return result


def figures_table(results: dict[str, dict[str, Any]]) -> str:
    """One line per summary figure, one column per system, and ours/stock where both ran."""
    names = list(results)
    compared = STOCK in results and MOSAIC in results
    rows = []
    for figure in results[names[0]]["summary"]:
        values = [results[name]["summary"][figure] for name in names]
        rows.append([figure, *values, *([ratio(values[names.index(MOSAIC)], values[0])] if compared else [])])
    return format_table(["figure", *names, *([f"{MOSAIC}/{STOCK}"] if compared else [])], rows)


def ratios(results: dict[str, dict[str, Any]]) -> dict[str, float | None] | None:
    """sglang_mosaic / stock for every summary figure; None unless both ran."""
    if STOCK not in results or MOSAIC not in results:
        return None
    stock, mosaic = results[STOCK]["summary"], results[MOSAIC]["summary"]
    return {figure: ratio(mosaic[figure], stock[figure]) for figure in stock}


def unfair_comparison(results: dict[str, dict[str, Any]]) -> list[str]:
    """Why the systems were not what the table says, from the servers' own reports; empty when nothing shows it."""
    if STOCK not in results or MOSAIC not in results:
        return []
    stock, mosaic = results[STOCK]["server"], results[MOSAIC]["server"]
    failures = []
    for name, server, is_ours in ((STOCK, stock, False), (MOSAIC, mosaic, True)):
        backend = server["attention_backend"]
        if (backend == MOSAIC) != is_ours:
            failures.append(f"{name} runs with --attention-backend {backend}: it is the wrong system")
    stock_bytes, mosaic_bytes = stock["kv_bytes_reported"], mosaic["kv_bytes_reported"]
    if stock_bytes is None or mosaic_bytes is None:
        failures.append("a server does not report its KV memory in /server_info, so equal memory cannot be checked")
    elif mosaic_bytes > stock_bytes * (1 + BYTES_SLACK) + BYTES_SLACK_MIB * MIB:
        found = f"{MOSAIC} {mosaic_bytes / MIB:.1f} MiB, {STOCK} {stock_bytes / MIB:.1f} MiB"
        failures.append(f"the servers report KV memory that is not equal: {found}")
    return failures
