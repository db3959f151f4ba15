"""Times of every kernel on one GPU, against FlashInfer's paged decode and against reading the same bytes.

    python benchmark/kernels/run.py --crossover --json kernels.json --png kernels.png

First every op is checked against its reference on a small case; one that is wrong is not timed. Then medians of CUDA
events around CUDA graphs, on page lists that take turns, with the L2 cache read over between two calls. The compressed
pages have about 4 bits a value. What a step plans, rotates and reads uncompressed is measured by itself and no part of
`full`, `step` and `reuse`.

Columns: "x bf16" and "x fp8": how many times faster than dense attention over the same tokens (for a part of a step:
than all of dense attention); MB: what must be moved (traffic.py); "of read": share of the read bandwidth measured in
the same run; "plain reads": time in plain reads of the same bytes.

Exit status: 0; 1 when a gate failed; 2 when there is no result.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `import benchmark` when run by path
sys.path.append(str(Path(__file__).resolve().parents[2] / "kernels"))  # where nothing is installed, and no --base

import torch
import triton

from benchmark.common.errors import BenchmarkError
from benchmark.common.report import environment, public_command, write_json
from benchmark.kernels import gates, tables
from benchmark.kernels.base import measure_base
from benchmark.kernels.dense import Dense
from benchmark.kernels.measure import make_cases, measure_shape, pool_for
from benchmark.kernels.ops import BY_NAME, Op
from benchmark.kernels.options import base_options, crossover_shapes, dims_of, parse_arguments, split_of
from benchmark.kernels.timing import Clock


def check_device(args: argparse.Namespace) -> bool:
    """Whether kernels run on a CUDA device; False: in Triton's interpreter, which only gates can.

    Raises:
        BenchmarkError: neither.
    """
    interpreted = triton.knobs.runtime.interpret
    if interpreted and not args.gate_only:
        raise BenchmarkError("needs a CUDA device, found TRITON_INTERPRET=1: unset it, or pass --gate-only")
    if not interpreted and not torch.cuda.is_available():
        raise BenchmarkError("needs a CUDA device, found none; TRITON_INTERPRET=1 with --gate-only checks on a CPU")
    return not interpreted


def run_gates(args: argparse.Namespace, on_device: bool) -> list[gates.Verdict]:
    """Verdicts on all ops that will be timed."""
    names = [*args.ops, *(name for name in tables.COMPARED if args.crossover and name not in args.ops)]
    ops = [BY_NAME[name] for name in names]
    if on_device:
        return gates.run_gates(ops, dims_of(args), gates.LENGTHS, "cuda")
    return gates.run_gates(ops, gates.TINY, gates.TINY_LENGTHS, "cpu")


def measure(args: argparse.Namespace, right: set[str]) -> dict[str, Any]:
    """Times of the ops that are right; printed as they come."""
    dims, crossing = dims_of(args), crossover_shapes(args)
    clock = Clock(args.repeats, args.eager)
    pool = pool_for(dims, [*args.shapes, *crossing], clock.l2_bytes, "cuda")
    dense = None if args.no_dense else Dense(dims, len(pool.data), clock)
    split = split_of(args, torch.cuda.get_device_properties(0).multi_processor_count)
    print(
        f"{torch.cuda.get_device_name()}: reads {clock.read_bandwidth / 1e12:.2f} TB/s, L2 {clock.l2_bytes >> 20} MiB; "
        f"pool of {len(pool.data):,} frames, {pool.ratio:.2f} times smaller than bf16\n"
    )

    def measured(shape, names) -> dict[str, Any]:
        ops: list[Op] = [BY_NAME[name] for name in names if name in right]
        return measure_shape(shape, make_cases(dims, pool, shape, split), ops, clock, dense)

    report: dict[str, Any] = {"read_bandwidth": clock.read_bandwidth, "ratio": pool.ratio, "shapes": []}
    for shape in args.shapes:
        report["shapes"].append(measured(shape, args.ops))
        print(tables.describe_shape(report["shapes"][-1]), end="\n\n", flush=True)
    report["crossover"] = [measured(shape, tables.COMPARED) for shape in crossing]
    if crossing:
        print(tables.describe_crossover(report["crossover"]), end="\n\n", flush=True)
    return report


def gpu_environment() -> dict[str, Any]:
    """What else decides what a kernel becomes."""
    return {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}


def public_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The options without folders."""
    plain = {name: value for name, value in vars(args).items() if name not in ("json", "png", "base")}
    return {
        **plain,
        "shapes": [str(shape) for shape in args.shapes],
        "base": args.base and public_command([args.base])[0],
    }


def write(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """The report, if wanted."""
    if args.json:
        write_json(args.json, report)
        print(f"wrote {args.json}")


def run(args: argparse.Namespace) -> int:
    """Gates, times, files; returns the exit status."""
    on_device = check_device(args)
    verdicts = run_gates(args, on_device)
    print(gates.describe(verdicts), end="\n\n", flush=True)
    failed = [verdict.op for verdict in verdicts if not verdict.passed]
    report: dict[str, Any] = {"benchmark": "kernels", "arguments": public_arguments(args)}
    report["environment"] = environment() | (gpu_environment() if on_device else {})
    report["gates"] = [gates.as_json(verdict) for verdict in verdicts]
    report["ops"] = {name: BY_NAME[name].shapes for name in args.ops}
    if not args.gate_only:
        report |= measure(args, {verdict.op for verdict in verdicts if verdict.passed})
        if args.png:
            tables.plot(args.png, report["shapes"])
            print(f"wrote {args.png}")
    write(args, report)
    if args.base and not args.gate_only:
        # Written before, too: another commit's kernels may give no result.
        base = measure_base(args.base, Path(__file__), base_options(args))
        rows = tables.compare_with_base(report["shapes"], base["shapes"])
        print(tables.describe_base(args.base, base["gates"], rows), end="\n\n")
        report["base"] = {"gates": base["gates"], "rows": rows}
        write(args, report)
    if failed:
        print(f"kernels: not timed, because their gates failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit status."""
    args = parse_arguments(__doc__, argv)
    try:
        return run(args)
    except BenchmarkError as error:
        print(f"kernels: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
