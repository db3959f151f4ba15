"""How many tokens stay in the prefix cache before eviction, measured over HTTP on a running SGLang server.

    python benchmark/serving/cache_capacity.py --url http://127.0.0.1:30000
    python benchmark/serving/cache_capacity.py --compare --model-path MODEL --kv-tokens 65536

Sends distinct prompts of random token ids until the cache must have evicted, then probes them from the latest backwards
and counts the cached tokens up to the first miss (capacity_probe.py says why in that order). The count is low by up to
one prompt and a page, so prompts should be short against the cache. It FLUSHES the server's cache, needs a server
without other traffic, and assumes SGLang's default LRU eviction. Exit status: 0, 1 when the count is only a lower
bound, 2 when there is no result.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `import benchmark` when run by path

from matplotlib.figure import Figure
from tqdm import tqdm

from benchmark.common import compare, sglang_http
from benchmark.common.errors import BenchmarkError
from benchmark.common.options import add_serving_options, integer, number
from benchmark.common.report import COLOURS, new_figure
from benchmark.common.script import run_script
from benchmark.common.stats import ratio
from benchmark.serving.capacity_probe import PAGE_TOKENS, Prompts, measure_held

# Above this share of the count, its uncertainty (one prompt and a page) is pointed out.
COARSE_SHARE = 0.02


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; exits with argparse's message on a bad one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    load = parser.add_argument_group("workload")
    load.add_argument(
        "--prompt-tokens",
        type=integer(2 * PAGE_TOKENS),
        default=513,
        metavar="L",
        help=f"length of a prompt (default %(default)s; a multiple of {PAGE_TOKENS} plus 1 counts every page, because "
        "the last token is always computed)",
    )
    load.add_argument(
        "--overfill",
        type=number(1.1),
        default=1.5,
        help="tokens sent, as a multiple of the server's max_total_num_tokens (default %(default)g)",
    )
    load.add_argument(
        "--token-range",
        type=integer(0),
        nargs=2,
        default=[1000, 30000],
        metavar=("LOW", "HIGH"),
        help="ids to draw from, half open, below the vocabulary's size (default %(default)s)",
    )
    load.add_argument("--seed", type=int, default=0, help="of the prompts (default %(default)s)")
    add_serving_options(parser)
    args = parser.parse_args(argv)
    low, high = args.token_range
    if high - low < 100:
        parser.error(f"argument --token-range: needs at least 100 ids, found [{low}, {high}); raise HIGH")
    return args


class _HttpServer:
    """The probe's view of an SGLang server."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url = url
        self._client = sglang_http.TokenClient(url, timeout_s)

    def flush(self) -> None:
        sglang_http.flush_cache(self._url)

    def prefill(self, input_ids: list[int]) -> int:
        return self._client.prefill(input_ids)

    def close(self) -> None:
        self._client.close()


def _track(phase: str, indices: Sequence[int]) -> Iterator[int]:
    yield from tqdm(indices, desc=phase, unit="prompt")


def measure(url: str, args: argparse.Namespace) -> dict[str, Any]:
    """Fill and probe one server: summary and raw probe rows."""
    info = sglang_http.server_info(url)
    if info is None or "max_total_num_tokens" not in info:
        raise BenchmarkError(f"{url}/server_info has no max_total_num_tokens; --url must be an SGLang server")
    capacity = info["max_total_num_tokens"]
    if args.prompt_tokens * 4 > capacity:
        raise BenchmarkError(
            f"--prompt-tokens {args.prompt_tokens} is more than a quarter of the cache ({capacity} tokens) and the "
            f"count is only good to about one prompt; pass at most {capacity // 4}"
        )
    longest = info.get("max_req_input_len")
    if longest is not None and args.prompt_tokens > longest:
        raise BenchmarkError(f"--prompt-tokens {args.prompt_tokens} is over the server's longest input, {longest}")
    prompts = Prompts(args.prompt_tokens, *args.token_range, args.seed)
    server = _HttpServer(url, args.timeout)
    try:
        held = measure_held(server, prompts, capacity, args.overfill, _track)
    finally:
        server.close()
    rows, overfilled = held.pop("rows"), held.pop("overfilled")
    summary = {
        **held,
        "max_total_num_tokens": capacity,
        "held_share_of_max": ratio(held["held_tokens"], capacity),
        "held_tokens_at_most": held["held_tokens"] + args.prompt_tokens + PAGE_TOKENS,
    }
    return {"summary": summary, "overfilled": overfilled, "rows": rows}


def add_bytes(results: dict[str, dict[str, Any]]) -> None:
    """Add KV bytes and tokens per MiB to the summaries: the bytes asked for, else those that the server reports."""
    for result in results.values():
        server = result["server"]
        kv_bytes = server["kv_bytes_requested"] or server["kv_bytes_reported"]
        kv_mib = kv_bytes and kv_bytes / compare.MIB
        result["summary"]["kv_mib"] = kv_mib
        result["summary"]["held_tokens_per_mib"] = ratio(result["summary"]["held_tokens"], kv_mib)


def gate(results: dict[str, dict[str, Any]]) -> list[str]:
    """Why the counts must not be used as capacities."""
    return [
        f"{name}: all {result['summary']['prompts_sent']} prompts were still cached, so the count is a lower bound; "
        "raise --overfill"
        for name, result in results.items()
        if not result["overfilled"]
    ]


def ratio_range(results: dict[str, dict[str, Any]]) -> tuple[float, float] | None:
    """Least and greatest sglang_mosaic/stock that the two counts allow; None unless both ran and held something."""
    if compare.STOCK not in results or compare.MOSAIC not in results:
        return None
    stock, mosaic = results[compare.STOCK]["summary"], results[compare.MOSAIC]["summary"]
    if not stock["held_tokens"]:
        return None
    return (
        mosaic["held_tokens"] / stock["held_tokens_at_most"],
        mosaic["held_tokens_at_most"] / stock["held_tokens"],
    )


def describe(results: dict[str, dict[str, Any]]) -> str:
    """The table, and how exact its counts are."""
    lines = ["", compare.figures_table(results)]
    bounds = ratio_range(results)
    if bounds is not None:
        lines.append(f"held tokens, {compare.MOSAIC}/{compare.STOCK}: between {bounds[0]:.3f} and {bounds[1]:.3f}")
    for name, result in results.items():
        held, at_most = (result["summary"][key] for key in ("held_tokens", "held_tokens_at_most"))
        if at_most - held > COARSE_SHARE * held:
            lines.append(
                f"{name}: the count is coarse, {held:,} to {at_most:,} tokens; for a finer one pass a smaller "
                "--prompt-tokens or give the server more KV memory"
            )
    return "\n".join(lines)


def draw(results: dict[str, dict[str, Any]]) -> Figure:
    """Bars: tokens held by each system and how many more it may be, with the count and the KV memory on them."""
    figure = new_figure(1)
    axis = figure.axes[0]
    summaries = {name: result["summary"] for name, result in results.items()}
    heights = [summary["held_tokens"] for summary in summaries.values()]
    slack = [summary["held_tokens_at_most"] - summary["held_tokens"] for summary in summaries.values()]
    bars = axis.bar(
        list(summaries),
        heights,
        yerr=[[0] * len(slack), slack],
        color=[COLOURS[name] for name in summaries],
        width=0.55,
        capsize=4,
    )
    mib = [summary["kv_mib"] for summary in summaries.values()]
    labels = [f"{h:,}" + (f"\nin {m:.0f} MiB" if m else "") for h, m in zip(heights, mib, strict=True)]
    axis.bar_label(bars, labels, padding=3)
    axis.set_ylabel("tokens held in the prefix cache")
    axis.margins(y=0.2)
    return figure


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit status."""
    args = parse_arguments(argv)

    return run_script(
        "cache_capacity",
        args,
        measure=lambda url: measure(url, args),
        gate=gate,
        describe=describe,
        draw=draw,
        complete=add_bytes,
    )


if __name__ == "__main__":
    sys.exit(main())
