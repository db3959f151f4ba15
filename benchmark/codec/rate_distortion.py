"""Error of the attention output against bytes, on real Q, K and V, for every codec and budget.

    python benchmark/codec/rate_distortion.py --json rate-distortion.json --png rate-distortion.png
    python benchmark/codec/rate_distortion.py --model-path MODEL --model-path OTHER --offline-text stdlib \
        --layer-stride 3

A server of sglang_mosaic prefills a passage of a novel and the offline calibration text, with compression off, and
writes what its attention backend is given (capture_server.py). Then every codec is calibrated, encodes, decodes and is
attended here, through the interface that serving uses (methods.py). Online: calibrated on the start of the passage
itself; offline: on the other text. Ratio: bf16 bytes of a page per byte of its frame, scales and headers included; the
bases are not in it, they are one table per model. Error: ||o - o_ref|| / ||o_ref|| of each query head, over all
queries; the first and last 64 tokens of the keys are exact in every method.

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
from tqdm import tqdm

from benchmark.codec.capture import STDLIB, Captured, CaptureOptions, capture, read_text, tokenise
from benchmark.codec.curve import acceptance, add_kivi
from benchmark.codec.methods import OFFLINE, ONLINE, PAGE, RATIOS, measure, methods, problems
from benchmark.common.errors import BenchmarkError
from benchmark.common.kv_bytes import load_config
from benchmark.common.options import integer, number
from benchmark.common.report import COLOURS, environment, new_figure, public_command, write_json, write_png
from benchmark.common.stats import format_table

# Novels that the passage and the offline text come from, unless files are given.
TEST_NOVEL, OFFLINE_NOVEL = 4, 1

COLUMNS = {
    "method": "method",
    "ratio": "ratio",
    "error_mean": "mean",
    "error_median": "median",
    "error_max": "max",
    "to_kivi": "of KIVI's",
    "predicted": "predicted",
    "encode_us": "encode us",
    "decode_us": "decode us",
    "encode_share": "of prefill",
}
BASELINES = {
    "kivi": ("KIVI 4, 3, 2", "s"),
    "topk": ("top-k", "^"),
    "int8": ("int8", "D"),
    "channel": ("channel drop", "v"),
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; exits with argparse's message on a bad one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--model-path",
        action="append",
        metavar="MODEL",
        help="checkpoint folder or Hugging Face repository, once for each model (default: the embedded SmolLM2)",
    )
    data.add_argument("--text", metavar="FILE", help="a long text to measure on (default: a novel)")
    data.add_argument(
        "--offline-text",
        metavar="FILE",
        help=f"the text of the offline calibration, or {STDLIB!r}: the source code of Python's standard library "
        "(default: another novel)",
    )
    data.add_argument("--tokens", type=integer(4 * PAGE), default=4096, help="of the passage (default %(default)s)")
    data.add_argument(
        "--queries", type=integer(1), default=256, help="last tokens of it, which ask (default %(default)s)"
    )
    data.add_argument(
        "--calibration-tokens",
        type=integer(2 * PAGE),
        default=2048,
        help="that a calibration sees; online they are the start of the passage (default %(default)s)",
    )
    data.add_argument(
        "--layer-stride", type=integer(1), default=1, metavar="N", help="measure every N-th layer (default %(default)s)"
    )
    data.add_argument(
        "--ratios", type=number(1.5), nargs="+", default=list(RATIOS), help="budgets of planes (default %(default)s)"
    )
    data.add_argument("--cache", type=Path, metavar="DIR", help="keep captures here (default: a temporary folder)")
    server = parser.add_argument_group("server that captures")
    server.add_argument(
        "--server-args",
        default="",
        metavar="STRING",
        help="further SGLang flags in one string; write it with the equals sign: --server-args='--dtype ...'",
    )
    server.add_argument(
        "--health-timeout",
        type=number(1),
        default=900.0,
        metavar="SECONDS",
        help="how long a server may take to start (default %(default)g)",
    )
    server.add_argument(
        "--timeout", type=number(1), default=600.0, metavar="SECONDS", help="of one prefill (default %(default)g)"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="write raw rows, comparisons and the environment")
    output.add_argument("--png", type=Path, metavar="FILE", help="write a figure")
    args = parser.parse_args(argv)
    if args.tokens - args.queries < 3 * PAGE:
        parser.error(f"argument --queries: {args.queries} of {args.tokens} tokens leave fewer than {3 * PAGE} keys")
    if args.calibration_tokens > args.tokens - args.queries:
        parser.error("argument --calibration-tokens: more than the keys, which would calibrate online on the queries")
    return args


def measure_model(model_path: str, args: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """All rows of one model, and what they were measured on."""
    texts = {
        ONLINE: tokenise(model_path, read_text(args.text, TEST_NOVEL), args.tokens),
        OFFLINE: tokenise(model_path, read_text(args.offline_text, OFFLINE_NOVEL), args.calibration_tokens),
    }
    options = CaptureOptions(args.layer_stride, cache, shlex.split(args.server_args), args.health_timeout, args.timeout)
    captured = capture(model_path, texts, options)
    prefill_s = captured[ONLINE].prefill_s
    model_layers = load_config(model_path)["num_hidden_layers"]
    rows, skipped = measure_methods(captured, args)
    heads = next(iter(captured[ONLINE].layers.values())).k.shape[1]
    add_kivi(rows)
    for row in rows:
        # A page of all layers against the prefill of its 64 tokens.
        row["encode_share"] = row["encode_us"] * 1e-6 * heads * model_layers / (prefill_s * PAGE / args.tokens)
    return {
        "model": Path(model_path).name,
        "layers": sorted(captured[ONLINE].layers),
        "model_layers": model_layers,
        "kv_heads": heads,
        "prefill_s": prefill_s,
        "rows": rows,
        "comparisons": acceptance(rows),
        "skipped": skipped,
    }


def measure_methods(captured: dict[str, Captured], args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """A row of every method, and why the others have none."""
    layers = {basis: list(text.layers.values()) for basis, text in captured.items()}
    asked = problems(layers[ONLINE], args.queries)
    rows, skipped = [], []
    for method in tqdm(methods(args.ratios), desc="codecs", unit="method"):
        try:
            rows.append(measure(method, asked, layers[method.basis], args.calibration_tokens))
        except ValueError as error:
            skipped.append(f"{method.label} {method.ratio or ''}: {error}")
    return rows, skipped


def describe(model: dict[str, Any]) -> str:
    """The tables of one model."""
    lines = [
        f"{model['model']}: {len(model['layers'])} of {model['model_layers']} layers, "
        f"{model['kv_heads']} KV heads, prefill {model['prefill_s']:.1f} s",
        format_table(list(COLUMNS.values()), [[row[key] for key in COLUMNS] for row in model["rows"]]),
        "",
        format_table(
            ["errors compared", "wanted at most", "found"],
            [[line["comparison"], line["wanted_at_most"], line["found"]] for line in model["comparisons"]],
        ),
        *(f"not measured: {reason}" for reason in model["skipped"]),
    ]
    return "\n".join(lines)


def draw(models: list[dict[str, Any]]) -> Figure:
    """Error against ratio, a panel for each model."""
    figure = new_figure(len(models))
    for axis, model in zip(figure.axes, models, strict=True):
        for basis, style in ((ONLINE, "o-"), (OFFLINE, "o--")):
            points = [row for row in model["rows"] if row["codec"] == "planes" and row["basis"] == basis]
            _plot(axis, points, style, COLOURS["mosaic"], f"planes, {basis} basis", filled=basis == ONLINE)
        for codec, (label, marker) in BASELINES.items():
            points = [row for row in model["rows"] if row["codec"].startswith(codec)]
            _plot(axis, points, marker, COLOURS["stock"], label, filled=codec == "kivi")
        axis.set_yscale("log")
        axis.set_title(model["model"])
        axis.set_xlabel("bf16 bytes per byte stored")
        axis.set_ylabel("mean relative error of the attention output")
        axis.legend(fontsize="small")
    return figure


def _plot(axis: Any, rows: list[dict[str, Any]], style: str, colour: str, label: str, filled: bool) -> None:
    ratios, errors = [row["ratio"] for row in rows], [row["error_mean"] for row in rows]
    axis.plot(ratios, errors, style, color=colour, label=label, markersize=5, mfc=colour if filled else "white")


def public_arguments(args: argparse.Namespace) -> dict[str, Any]:
    values = {key: str(value) if isinstance(value, Path) else value for key, value in sorted(vars(args).items())}
    return {
        key: public_command([value])[0] if isinstance(value, str) else value
        for key, value in values.items()
        if key not in ("model_path", "cache")
    }


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit status."""
    args = parse_arguments(argv)
    load = os.getloadavg()
    try:
        with tempfile.TemporaryDirectory(prefix="mosaic-capture-") as temporary:
            models = []
            for path in args.model_path or [embedded_model()]:
                models.append(measure_model(path, args, args.cache or Path(temporary)))
                print(describe(models[-1]), end="\n\n")
    except BenchmarkError as error:
        print(f"rate_distortion: {error}", file=sys.stderr)
        return 2
    if args.json:
        report = {
            "benchmark": "rate_distortion",
            "environment": {**environment(), "threads": torch.get_num_threads(), "load_average_at_start": load},
            "arguments": public_arguments(args),
            "models": models,
        }
        write_json(args.json, report)
        print(f"wrote {args.json}")
    if args.png:
        write_png(args.png, draw(models))
        print(f"wrote {args.png}")
    return 0


def embedded_model() -> str:
    from sglang_mosaic.embedded_model import ensure_model

    return str(ensure_model())


if __name__ == "__main__":
    sys.exit(main())
