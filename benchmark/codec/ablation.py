"""What every part of the codec is worth: its error on real Q, K, V with one part changed at a time.

    python benchmark/codec/ablation.py --ratios 4.5 6.4 --offline-text stdlib --json ablation.json

Takes the options of rate_distortion.py, with the same meaning and the same captures. A part is changed by replacing a
constant of the codec for the time of one measurement. The table gives mean errors as multiples of the codec's own:
above 1 the part helps.

Exit status: 0, or 2 when there is no result.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `import benchmark` when run by path

import torch
from tqdm import tqdm

from benchmark.codec.capture import CaptureOptions, capture, read_text, tokenise
from benchmark.codec.methods import OFFLINE, ONLINE, Method, measure, problems
from benchmark.codec.rate_distortion import OFFLINE_NOVEL, TEST_NOVEL, embedded_model, parse_arguments, public_arguments
from benchmark.common.errors import BenchmarkError
from benchmark.common.report import environment, write_json
from benchmark.common.stats import format_table
from mosaic_kernels.segment import WIDTHS
from mosaic_kernels.segment_choice import reference as choice
from mosaic_kernels.segment_encode import quantise
from sglang_mosaic.codec import allocation, basis, calibration


class Change(NamedTuple):
    """One part of the codec, changed."""

    name: str
    constants: tuple[tuple[Any, str, Any], ...]
    """Module, constant, value instead."""


def _k_shares(**shares: float) -> tuple[tuple[Any, str, Any], ...]:
    """Other shares of K's error, by `bitsN`, wherever they are used."""
    changed = {int(name.removeprefix("bits")): share for name, share in shares.items()}
    return tuple((module, "K_SHARES", choice.K_SHARES | changed) for module in (choice, allocation))


def _without(*widths: int) -> tuple[tuple[Any, str, Any], ...]:
    return ((allocation, "WIDTHS", tuple(w for w in WIDTHS if w not in widths)),)


CHANGES = (
    Change("queries not looked at", ((basis, "_rms", torch.ones_like),)),
    Change("dropped K counts four times", _k_shares(bits0=1 / 5)),
    Change("2 bits of K span the whole range", ((quantise, "K_COVERS", {1: 0.5}), *_k_shares(bits2=1 / 12 / 9))),
    Change("no 1 bit", _without(1)),
    Change("no 1, 3, 5 and 6 bits", _without(1, 3, 5, 6)),
    Change("one scale of V tried", ((quantise, "V_TRIED", (1,)),)),
    Change("one format per head", ((calibration, "FORMATS", 1), (calibration, "SINK_FORMATS", 0))),
    Change("no exception tokens", ((calibration, "EXCEPTIONS", (0,)),)),
    Change("the same bytes for every head", ((calibration, "SMALLEST", 1.0), (calibration, "LARGEST", 1.0))),
)


@contextlib.contextmanager
def changed(change: Change) -> Iterator[None]:
    """The codec with a part changed."""
    with contextlib.ExitStack() as stack:
        for module, name, value in change.constants:
            stack.enter_context(mock.patch.object(module, name, value))
        yield


def measure_model(model_path: str, args: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Errors of one model: as it is, and with every change."""
    texts = {
        ONLINE: tokenise(model_path, read_text(args.text, TEST_NOVEL), args.tokens),
        OFFLINE: tokenise(model_path, read_text(args.offline_text, OFFLINE_NOVEL), args.calibration_tokens),
    }
    options = CaptureOptions(args.layer_stride, cache, shlex.split(args.server_args), args.health_timeout, args.timeout)
    layers = {name: list(text.layers.values()) for name, text in capture(model_path, texts, options).items()}
    asked = problems(layers[ONLINE], args.queries)
    methods = [Method("planes", ratio, basis) for basis in (ONLINE, OFFLINE) for ratio in args.ratios]
    rows = []
    for change in tqdm((Change("as it is", ()), *CHANGES), desc=Path(model_path).name, unit="change"):
        with changed(change):
            errors = [
                measure(method, asked, layers[method.basis], args.calibration_tokens)["error_mean"]
                for method in methods
            ]
        rows.append({"change": change.name, "errors": errors})
    return {"model": Path(model_path).name, "columns": [f"{m.basis} {m.ratio:g}" for m in methods], "rows": rows}


def describe(model: dict[str, Any]) -> str:
    """The table of one model."""
    base, *others = model["rows"]
    lines = [[base["change"], *(f"{error:.4f}" for error in base["errors"])]]
    for row in others:
        shares = (error / own for error, own in zip(row["errors"], base["errors"], strict=True))
        lines.append([row["change"], *(f"x {share:.2f}" for share in shares)])
    return f"{model['model']}\n{format_table(['changed', *model['columns']], lines)}"


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit status."""
    args = parse_arguments(argv)
    models = []
    try:
        with tempfile.TemporaryDirectory(prefix="mosaic-capture-") as temporary:
            for path in args.model_path or [embedded_model()]:
                models.append(measure_model(path, args, args.cache or Path(temporary)))
                print(describe(models[-1]), end="\n\n")
    except BenchmarkError as error:
        print(f"ablation: {error}", file=sys.stderr)
        return 2
    if args.json:
        report = {"benchmark": "ablation", "environment": environment(), "arguments": public_arguments(args)}
        write_json(args.json, {**report, "models": models})
        print(f"wrote {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
