"""Argument types and the options that every serving benchmark has."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def integer(minimum: int) -> Callable[[str], int]:
    """An argparse type: an integer of at least `minimum`."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {minimum}, found {text!r}")
        return value

    return convert


def number(minimum: float) -> Callable[[str], float]:
    """An argparse type: a finite number of at least `minimum`."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not minimum <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a number of at least {minimum:g}, found {text!r}")
        return value

    return convert


def add_serving_options(parser: argparse.ArgumentParser) -> None:
    """What to measure (a running server, or a pair started here) and where the results go."""
    target = parser.add_argument_group("target: --url, or --compare with --model-path and --kv-tokens")
    target.add_argument("--url", help="a running server, as http://host:port; nothing is started")
    target.add_argument(
        "--compare",
        action="store_true",
        help="start stock SGLang, measure, stop it, then the same with sglang_mosaic at the same bytes of KV memory",
    )
    target.add_argument("--model-path", help="checkpoint folder or Hugging Face repository, for --compare")
    target.add_argument(
        "--kv-tokens",
        type=integer(64),
        metavar="S",
        help="KV memory of both servers, in bf16 tokens: stock gets --max-total-tokens S, sglang_mosaic the same bytes "
        "through --mosaic-kv-mib",
    )
    target.add_argument(
        "--host-gb",
        type=integer(1),
        metavar="GB",
        help="host memory for evicted pages, 10^9 bytes: of sglang_mosaic, and of a third server, stock SGLang with "
        "its hierarchical cache (default: none, and no third server)",
    )
    target.add_argument(
        "--server-args",
        default="",
        metavar="STRING",
        help="SGLang flags for both servers, in one string; write it with the equals sign: --server-args='--dtype ...'",
    )
    target.add_argument(
        "--stock-args",
        default="",
        metavar="STRING",
        help="further flags for stock SGLang only, such as '--attention-backend torch_native' on a CPU",
    )
    target.add_argument(
        "--mosaic-args", default="", metavar="STRING", help="further flags for sglang_mosaic only, --mosaic-* included"
    )
    target.add_argument(
        "--health-timeout",
        type=number(1),
        default=900.0,
        metavar="SECONDS",
        help="how long a server may take to start (default %(default)g)",
    )
    target.add_argument("--log-dir", type=Path, help="folder for the servers' logs (default: a new temporary one)")
    target.add_argument(
        "--timeout",
        type=number(1),
        default=600.0,
        metavar="SECONDS",
        help="longest silence of the server within one request (default %(default)g)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="write raw rows, summaries and the environment")
    output.add_argument("--png", type=Path, metavar="FILE", help="write a figure")
