"""The manager on real frames: bytes, error and time of recompression, compressors, and round trips through its process.

    python benchmark/manager/run.py --json manager.json --png manager.png

A server of sglang_mosaic prefills a passage of a novel and writes K and V (benchmark/codec/capture.py); the codec,
calibrated on the start of the passage, encodes it; its frames are what the manager gets. All times are of one thread.

Columns: "limit": the error that a recompressed page may be expected to make; "error": ||o - o_ref|| / ||o_ref|| of the
attention output that was measured, mean over heads, first and last page exact; "MB/s": of bf16 bytes. Every restored
frame is compared with what was packed.

Exit status: 0, or 2 when there is no result.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `import benchmark` when run by path

import torch
from matplotlib.figure import Figure

from benchmark.codec.capture import CaptureOptions, capture, read_text, tokenise
from benchmark.codec.methods import PAGE
from benchmark.codec.rate_distortion import TEST_NOVEL, embedded_model
from benchmark.common.errors import BenchmarkError
from benchmark.common.kv_bytes import load_config
from benchmark.common.options import integer, number
from benchmark.common.report import COLOURS, environment, new_figure, public_command, write_json, write_png
from benchmark.common.stats import format_table
from benchmark.manager.frames import encode, encode_others
from benchmark.manager.latency import measure_latency
from benchmark.manager.recompression import layout_of, measure_cold, measure_compressors, measure_limits
from sglang_mosaic.manager.recompress.cold_pages import SAMPLE
from sglang_mosaic.manager.recompress.rope import Rope

LIMITS = (0.0, 0.1, 0.15, 0.2, 0.3, 0.4)
COLD_LIMITS = (0.12, 0.15, 0.2, 0.25, 0.3, 0.4)
LEARNT_NOVELS = 1, 2
"""Novels whose first pages the transform of cold pages is learnt from, in equal parts; the passage is from another."""
TABLES = {
    "limits": {
        "codec": "codec",
        "limit": "limit",
        "bytes_per_token": "bytes a token",
        "ratio": "ratio to bf16",
        "error": "error",
        "pack_ms": "pack ms a page",
        "pack_mb_s": "MB/s",
        "restore_ms": "restore ms a page",
        "restore_mb_s": "MB/s",
    },
    "compressors": {
        "compressor": "compressor",
        "bytes": "bytes",
        "of_raw": "of the frame",
        "compress_mb_s": "compress MB/s",
        "decompress_mb_s": "decompress MB/s",
    },
    "trips": {"trip": "round trip, ms", "count": "count", "p50": "p50", "p90": "p90", "p99": "p99", "max": "max"},
    "calls": {"call": "call, microseconds", "count": "count", "p50": "p50", "p90": "p90", "p99": "p99", "max": "max"},
}
HIDDEN = ("json", "png", "cache", "model_path", "server_args")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; exits with argparse's message on a bad one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", metavar="MODEL", help="checkpoint folder (default: the embedded SmolLM2)")
    parser.add_argument("--text", metavar="FILE", help="a long text (default: a novel)")
    parser.add_argument("--tokens", type=integer(8 * PAGE), default=4096, help="of the passage (default %(default)s)")
    parser.add_argument("--queries", type=integer(1), default=256, help="last tokens, which ask (default %(default)s)")
    parser.add_argument(
        "--calibration-tokens", type=integer(2 * PAGE), default=2048, help="at the start (default %(default)s)"
    )
    parser.add_argument("--ratio", type=number(1.5), default=4.0, help="of the frames to bf16 (default %(default)g)")
    parser.add_argument("--limits", type=number(0), nargs="+", default=list(LIMITS), help="(default %(default)s)")
    parser.add_argument(
        "--cold-limits", type=number(0), nargs="+", default=list(COLD_LIMITS), help="of transform coding (%(default)s)"
    )
    parser.add_argument("--repeats", type=integer(10), default=500, help="round trips of a kind (default %(default)s)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep captures here (default: a temporary folder)")
    parser.add_argument(
        "--server-args", default="", metavar="STRING", help="further flags of the capturing server, in one string"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows and the environment")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write a figure")
    args = parser.parse_args(argv)
    if args.tokens - args.queries < args.calibration_tokens:
        parser.error("--tokens: give at least --queries and --calibration-tokens together")
    return args


def rope_of(model_path: str) -> Rope:
    """How the model's keys are turned.

    Raises:
        BenchmarkError: with scaling, which this benchmark does not know.
    """
    config = load_config(model_path)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default":
        raise BenchmarkError(f"{model_path} scales RoPE by {rope['rope_type']}; give a model that does not")
    theta = rope.get("rope_theta") or config["rope_theta"]
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return Rope([theta ** (-i / dim) for i in range(0, dim, 2)])


def measure(args: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """All rows."""
    model_path = args.model_path or embedded_model()
    ids = tokenise(model_path, read_text(args.text, TEST_NOVEL), args.tokens)
    options = CaptureOptions(1, cache, shlex.split(args.server_args))
    texts = {"passage": ids}
    learnt = SAMPLE // len(LEARNT_NOVELS)
    for novel in LEARNT_NOVELS:
        texts[f"novel {novel}"] = tokenise(model_path, read_text(None, novel), learnt * PAGE)
    captured = capture(model_path, texts, options)
    torch.set_num_threads(1)
    real = encode(captured["passage"], args.ratio, args.queries, args.calibration_tokens)
    layout = layout_of(real)
    sample = [page for novel in LEARNT_NOVELS for page in encode_others(real, captured[f"novel {novel}"], learnt)]
    cold, transform = measure_cold(real, args.cold_limits, rope_of(model_path), sample)
    compressors, missing = measure_compressors(real, layout, 16)
    trips, calls, ready_s = measure_latency(real, args.repeats)
    return {
        "model": Path(model_path).name,
        "pages": len(real.frames),
        "frame_bytes": real.frames.shape[1],
        "limits": measure_limits(real, args.limits, layout) + cold,
        "transform": transform,
        "compressors": compressors,
        "not_installed": missing,
        "trips": trips,
        "calls": calls,
        "ready_s": ready_s,
    }


def describe(result: dict[str, Any]) -> str:
    """The tables."""
    lines = [
        f"{result['model']}: {result['pages']} frames of {result['frame_bytes']:,} bytes; a manager is ready after "
        f"{result['ready_s']:.2f} s"
    ]
    for name, columns in TABLES.items():
        lines += ["", format_table(list(columns.values()), [[row[key] for key in columns] for row in result[name]])]
    if result["not_installed"]:
        lines.append(f"not installed: {', '.join(result['not_installed'])}")
    return "\n".join(lines)


def draw(result: dict[str, Any]) -> Figure:
    """Error against bytes, and round trips."""
    figure = new_figure(2)
    curve, bars = figure.axes
    for codec, colour in (("coarser", COLOURS["stock"]), ("transform", COLOURS["mosaic"])):
        rows = [row for row in result["limits"] if row["codec"] == codec]
        curve.plot([row["ratio"] for row in rows], [row["error"] for row in rows], "o-", color=colour, label=codec)
    curve.legend(fontsize="small")
    curve.set_xlabel("bf16 bytes per byte stored")
    curve.set_ylabel("mean relative error of the attention output")
    curve.set_title(f"{result['model']}, recompressed pages")
    names = [row["trip"] for row in result["trips"]]
    for quantile, colour in (("p99", COLOURS["stock"]), ("p50", COLOURS["mosaic"])):
        bars.barh(names, [row[quantile] for row in result["trips"]], color=colour, label=quantile)
    bars.set_xlabel("ms")
    bars.set_title("round trips")
    bars.legend(fontsize="small")
    return figure


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit status."""
    args = parse_arguments(argv)
    load = os.getloadavg()
    try:
        with tempfile.TemporaryDirectory(prefix="mosaic-capture-") as temporary:
            result = measure(args, args.cache or Path(temporary))
    except BenchmarkError as error:
        print(f"manager: {error}", file=sys.stderr)
        return 2
    print(describe(result))
    if args.json:
        plain = {key: value for key, value in vars(args).items() if key not in HIDDEN}
        report = {
            "benchmark": "manager",
            "environment": {**environment(), "load_average_at_start": load},
            "arguments": {**plain, "text": args.text and public_command([args.text])[0]},
            **result,
        }
        write_json(args.json, report)
        print(f"wrote {args.json}")
    if args.png:
        write_png(args.png, draw(result))
        print(f"wrote {args.png}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
