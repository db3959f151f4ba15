"""The options of the kernel benchmark."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmark.common.options import integer, number
from benchmark.kernels.ops import BY_NAME, OPS
from benchmark.kernels.sizes import PAGE, Dims, Shape, Split
from mosaic_kernels.segment import GROUP

SHAPES = (Shape(8, 131072), Shape(32, 32768), Shape(1, 131072), Shape(1, 32768))
QUICK_SHAPES = (Shape(8, 32768), Shape(1, 32768))
REPEATS, QUICK_REPEATS = 50, 10
PROGRAMS = 16  # of a multiprocessor, as in a server
CROSSOVER_BATCHES = (1, 8, 32)
CROSSOVER_CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
MOST_QUERY_HEADS = 16  # of a KV head


def shape(text: str) -> Shape:
    """An argparse type: BATCHxCONTEXT."""
    batch, cross, context = text.partition("x")
    if not (cross and batch.isdigit() and context.isdigit() and int(batch) and int(context)):
        raise argparse.ArgumentTypeError(f"expected BATCHxCONTEXT such as 8x131072, found {text!r}")
    return Shape(int(batch), _whole(int(context), text))


def context(text: str) -> int:
    """An argparse type: tokens of whole pages."""
    return _whole(integer(1)(text), text)


def _whole(tokens: int, text: str) -> int:
    if tokens % PAGE:
        raise argparse.ArgumentTypeError(f"expected a context of whole pages of {PAGE} tokens, found {text!r}")
    return tokens


def parse_arguments(doc: str | None, argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked; exits with argparse's message on a bad one."""
    epilog = "ops:\n" + "\n".join(f"  {op.name:16} {op.shapes}" for op in OPS)
    parser = argparse.ArgumentParser(
        description=doc, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=shape, nargs="+", metavar="BATCHxCONTEXT", help="(default: four shapes)")
    parser.add_argument("--ops", nargs="+", choices=BY_NAME, default=list(BY_NAME), metavar="OP", help="(default: all)")
    model = parser.add_argument_group("model")
    model.add_argument("--heads", type=integer(1), default=8, help="KV heads (default %(default)s)")
    model.add_argument("--group", type=integer(1), default=4, help="query heads of a KV head (default %(default)s)")
    model.add_argument("--head-dim", type=integer(32), default=128, help="channels of K and V (default %(default)s)")
    model.add_argument("--scan-channels", type=integer(GROUP), help="that a scan reads (default: half of them)")
    model.add_argument(
        "--select", type=number(0), default=0.05, metavar="SHARE",
        help="of the tokens that a step selects (default %(default)g)",
    )  # fmt: skip
    run = parser.add_argument_group("run")
    run.add_argument("--repeats", type=integer(1), help=f"timed calls of each op (default {REPEATS})")
    run.add_argument("--quick", action="store_true", help=f"small shapes, {QUICK_REPEATS} repeats")
    run.add_argument("--gate-only", action="store_true", help="no timing; works in Triton's interpreter, too")
    run.add_argument("--no-dense", action="store_true", help="without FlashInfer")
    run.add_argument("--eager", action="store_true", help="without CUDA graphs: launches count")
    run.add_argument(
        "--programs", type=integer(1), default=PROGRAMS, metavar="N",
        help="of a multiprocessor, that pages are cut for (default %(default)s)",
    )  # fmt: skip
    run.add_argument(
        "--token-programs", type=integer(1), default=PROGRAMS, metavar="N",
        help="likewise for selected tokens (default %(default)s)",
    )  # fmt: skip
    run.add_argument("--base", metavar="REF", help="a git ref, or folder with mosaic_kernels, to compare with")
    cross = parser.add_argument_group("crossover")
    cross.add_argument("--crossover", action="store_true", help="from which context on full and step beat dense")
    cross.add_argument("--crossover-batches", type=integer(1), nargs="+", default=list(CROSSOVER_BATCHES))
    cross.add_argument("--crossover-contexts", type=context, nargs="+", default=list(CROSSOVER_CONTEXTS))
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="write rows, gates and the environment")
    output.add_argument("--png", type=Path, metavar="FILE", help="draw how many times faster than dense the ops are")
    args = parser.parse_args(argv)
    args.shapes = args.shapes or list(QUICK_SHAPES if args.quick else SHAPES)
    args.repeats = args.repeats or (QUICK_REPEATS if args.quick else REPEATS)
    args.scan_channels = args.scan_channels or args.head_dim // 2 // GROUP * GROUP
    if args.head_dim % GROUP or args.scan_channels % GROUP or args.scan_channels > args.head_dim:
        parser.error(
            f"--head-dim and --scan-channels must be multiples of {GROUP}, --scan-channels at most --head-dim, "
            f"found {args.head_dim} and {args.scan_channels}"
        )
    if not 0 < args.select <= 1:
        parser.error(f"--select must be above 0 and at most 1, found {args.select:g}")
    if args.group > MOST_QUERY_HEADS:
        parser.error(f"--group must be at most {MOST_QUERY_HEADS}, found {args.group}")
    return args


def dims_of(args: argparse.Namespace) -> Dims:
    """The layer."""
    return Dims(args.heads, args.group, args.head_dim, args.scan_channels, args.select)


def split_of(args: argparse.Namespace, multiprocessors: int) -> Split:
    """The pieces."""
    return Split(args.programs * multiprocessors, args.token_programs * multiprocessors)


def base_options(args: argparse.Namespace) -> list[str]:
    """Options of the run over the base's kernels: what is measured alike, without dense attention."""
    options = ["--no-dense", "--shapes", *map(str, args.shapes), "--ops", *args.ops]
    for name in ("heads", "group", "head_dim", "scan_channels", "select", "repeats", "programs", "token_programs"):
        options += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return [*options, *(["--eager"] if args.eager else [])]


def crossover_shapes(args: argparse.Namespace) -> list[Shape]:
    """Shapes of the crossover; none without --crossover."""
    if not args.crossover:
        return []
    return [Shape(batch, tokens) for batch in args.crossover_batches for tokens in sorted(args.crossover_contexts)]
