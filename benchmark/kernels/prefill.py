"""Attention of new tokens of a prefill on one GPU: FlashInfer's against torch's flash attention, in the same run.

    python benchmark/kernels/prefill.py --json prefill.json

"new": the tokens of one request attend causally to its context, uncompressed; "decoded": to compressed pages before
them, as they are decoded block by block. What disagrees is not timed. Medians of CUDA events around CUDA graphs, the L2
cache read over in between. "ratio": FlashInfer / torch; "fa3": whether it was its FlashAttention-3.

Exit status: 0; 1 when results disagreed; 2 when there is no result.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `import benchmark` when run by path
sys.path.append(str(Path(__file__).resolve().parents[2] / "kernels"))  # where nothing is installed

import torch

from benchmark.common.options import integer
from benchmark.common.report import environment, write_json
from benchmark.common.stats import format_table
from benchmark.kernels.timing import Clock
from benchmark.kernels.tolerances import WEIGHTS, by_row, elementwise, worst
from mosaic_kernels.attend.launch import attend, attend_causally
from mosaic_kernels.attend.ragged import RaggedAttention

Call = Callable[[], tuple[torch.Tensor, torch.Tensor]]
SHAPES = ((64, 2048), (64, 8192), (64, 32768), (1024, 1024), (1024, 32768), (8192, 8192), (8192, 32768))
COLUMNS = ("keys", "new_tokens", "context", "torch_us", "flashinfer_us", "ratio", "fa3")
LSE = 1e-3


def shape(text: str) -> tuple[int, int]:
    """An argparse type: NEWxCONTEXT."""
    new, _, context = text.partition("x")
    if not (new.isdigit() and context.isdigit() and 0 < int(new) <= int(context)):
        raise argparse.ArgumentTypeError(
            f"expected NEWxCONTEXT, such as 64x8192, the new tokens included, found {text!r}"
        )
    return int(new), int(context)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; exits with argparse's message on a bad one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=shape, nargs="+", default=list(SHAPES), metavar="NEWxCONTEXT")
    parser.add_argument("--heads", type=integer(1), default=8, help="KV heads (default %(default)s)")
    parser.add_argument("--group", type=integer(1), default=4, help="query heads of a KV head (default %(default)s)")
    parser.add_argument("--head-dim", type=integer(8), default=128, help="channels (default %(default)s)")
    parser.add_argument("--repeats", type=integer(1), default=20, help="timed calls (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows and the environment")
    return parser.parse_args(argv)


def calls(args: argparse.Namespace, ragged: RaggedAttention, keys: str, new: int, context: int) -> tuple[Call, Call]:
    """Torch's and FlashInfer's."""
    generator = torch.Generator("cuda").manual_seed(new + context)
    scale = args.head_dim**-0.5

    def normal(tokens: int, heads: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(tokens, heads, args.head_dim, generator=generator, device="cuda").to(dtype)

    dtype = torch.bfloat16 if keys == "new" else torch.float16
    q, k, v = (normal(n, h, dtype) for n, h in ((new, args.heads * args.group), *[(context, args.heads)] * 2))
    if keys == "decoded":
        # Heads first, as the decoder writes them.
        k, v = (x.transpose(0, 1).contiguous() for x in (k, v))
        return lambda: attend(q, k, v, scale), lambda: ragged.attend(q, k, v, scale)
    starts = tuple(torch.tensor([0, tokens], dtype=torch.int32) for tokens in (new, context))
    there = [x.cuda() for x in starts]
    return (
        lambda: attend_causally(q, k, v, *there, new, context, scale),
        lambda: ragged.attend_causally(q, k, v, starts, scale),
    )


def disagreement(found: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor]) -> float:
    """In units of what is tolerated: both round weights to the type of V."""
    out = by_row(found[0].float(), wanted[0].float(), 2 * WEIGHTS)
    return worst(out, elementwise(found[1], wanted[1], 0.0, LSE))


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each kind of keys and shape; one without times where results disagree."""
    ragged = RaggedAttention(torch.device("cuda"), args.heads * args.group, args.heads, args.head_dim)
    clock, rows = Clock(args.repeats), []
    for keys in ("new", "decoded"):
        for new, context in args.shapes:
            by_torch, by_flashinfer = calls(args, ragged, keys, new, context)
            row: dict[str, Any] = {"keys": keys, "new_tokens": new, "context": context, "fa3": ragged.fills(new)}
            row["disagreement"] = disagreement(by_flashinfer(), by_torch())
            if row["disagreement"] <= 1:
                row["torch_us"], row["flashinfer_us"] = (clock.median_us([call]) for call in (by_torch, by_flashinfer))
                row["ratio"] = row["flashinfer_us"] / row["torch_us"]
            rows.append(row)
            print(format_table(COLUMNS, [[row.get(name) for name in COLUMNS]]).splitlines()[-1], flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit status."""
    args = parse_arguments(argv)
    if not torch.cuda.is_available():
        print("prefill: needs a CUDA device with FlashInfer, found none", file=sys.stderr)
        return 2
    rows = measure(args)
    print(format_table(COLUMNS, [[row.get(name) for name in COLUMNS] for row in rows]))
    if args.json:
        write_json(args.json, {"benchmark": "prefill", "environment": environment(), "rows": rows})
    wrong = [row for row in rows if not row["disagreement"] <= 1]
    for row in wrong:
        print(f"FAILED: {row['keys']} {row['new_tokens']}x{row['context']}: {row['disagreement']:.2f}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
