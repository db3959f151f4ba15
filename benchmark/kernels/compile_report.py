"""What the compiler makes of every kernel for a GPU: registers, spills, shared memory, instructions. Needs no GPU.

    python benchmark/kernels/compile_report.py --head-dims 64 128 --json report.json

Compiles as a server does that has no segments of the rare kinds (top-k, exceptions). Instructions are counted in the
machine code: of the whole kernel, and of its longest loop, which is what a page or a tile of tokens costs each warp.

Exit status: 0, or 1 when a kernel spills registers.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `import benchmark` when run by path

import triton
import triton.language as tl
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmark.common.options import integer
from benchmark.common.report import environment, write_json
from benchmark.common.stats import format_table
from benchmark.kernels.sizes import SHARED_STEPS
from mosaic_kernels import merge_pieces
from mosaic_kernels.attend_dense import launch as attend_dense
from mosaic_kernels.attend_dense.kernel import attend_dense_kernel, merge_pieces_kernel
from mosaic_kernels.attend_pages import launch as attend_pages
from mosaic_kernels.attend_pages.any_kernel import attend_any_pages_kernel
from mosaic_kernels.attend_pages.kernel import attend_pages_kernel
from mosaic_kernels.attend_selected import launch as attend_selected
from mosaic_kernels.attend_selected.kernel import attend_selected_kernel
from mosaic_kernels.combine import launch as combine
from mosaic_kernels.combine.kernel import combine_kernel, join_items_kernel
from mosaic_kernels.far_field import launch as far_field
from mosaic_kernels.far_field.kernel import far_field_kernel
from mosaic_kernels.far_share import launch as far_share
from mosaic_kernels.far_share.kernel import far_share_kernel
from mosaic_kernels.merge_lse import launch as merge_lse
from mosaic_kernels.merge_lse.kernel import merge_rows_kernel
from mosaic_kernels.plan_step import launch as plan_step
from mosaic_kernels.plan_step.kernel import count_pages_kernel, place_pages_kernel
from mosaic_kernels.plan_step.step import SHARE_BITS
from mosaic_kernels.query_squares import launch as query_squares
from mosaic_kernels.query_squares.kernel import add_squares_kernel
from mosaic_kernels.rotate_pages import launch as rotate_pages
from mosaic_kernels.rotate_pages.kernel import rotate_kernel
from mosaic_kernels.rotate_queries import launch as rotate_queries
from mosaic_kernels.rotate_queries.kernel import rotate_queries_kernel
from mosaic_kernels.rotate_rows import launch as rotate_rows
from mosaic_kernels.rotate_rows.kernel import rotate_rows_kernel
from mosaic_kernels.scan import launch as scan
from mosaic_kernels.scan.kernel import scan_kernel
from mosaic_kernels.segment_choice import launch as segment_choice
from mosaic_kernels.segment_choice.kernel import choose_kernel
from mosaic_kernels.segment_decode import launch as segment_decode
from mosaic_kernels.segment_decode.kernel import decode_kernel
from mosaic_kernels.segment_encode import launch as segment_encode
from mosaic_kernels.segment_encode.kernel import encode_kernel
from mosaic_kernels.segment_error import launch as segment_error
from mosaic_kernels.segment_error.kernel import error_kernel
from mosaic_kernels.segment_table import BYTE_KEYS, BYTE_VALUES, MOST_GROUP
from mosaic_kernels.select import launch as select
from mosaic_kernels.select.kernel import collect_kernel, count_kernel, threshold_kernel

TYPES = {
    "data": "*u8", "frame_bytes": "i64", "scale": "fp32", "top_p": "fp32", "keys": "*i16",
    "pages": "i32", "room": "i32", "items": "i32", "epoch": "i32", "heads": "i32", "first_mosaic": "i32",
    **dict.fromkeys(("capacity", "programs", "dense_programs", "least_pages", "share", "least_selected"), "i32"),
    **dict.fromkeys(("row_stride", "q_stride", "k_stride", "v_stride"), "i32"),
    "page_table": "*i64", "lengths": "*i64",
    "rows": "i32", "page_stride": "i64", "token_stride": "i64", "head_stride": "i64", "channel_stride": "i64",
    "x": "*bf16", "digits": "*i8",
    "k_out": "*bf16", "v_out": "*bf16", "dense_out": "*bf16", "result": "*bf16",
} | dict.fromkeys(
    ("q", "known_lse", "page_lse", "far", "far_bias", "unrotate", "dense_lse",
     "k_rot", "v_rot", "v_roots", "errors", "out", "lse", "out_a", "lse_a", "out_b", "lse_b", "joined",
     "joined_lse"), "*fp32",
) | dict.fromkeys(("sums", "shares", "k_weights", "v_weights"), "*fp64")  # fmt: skip
"""Of kernel arguments; the others are pointers to int32."""
_DIVISIBLE = "frame_bytes", "page_stride", "token_stride", "head_stride"
"""Of what are no pointers, multiples of 16."""
_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Kernel(NamedTuple):
    """A kernel and what its launch gives it."""

    function: Any
    launch: Any
    """The module that launches it: WARPS and, if it has it, STAGES."""
    tiles: tuple[tuple[str, int], ...] = ()
    warps: str = "WARPS"
    """Name of the module's number of warps."""
    exact: bool = False
    """Products and sums are not fused."""
    types: tuple[tuple[str, str], ...] = ()
    """Of arguments, instead of TYPES."""
    registers: int | None = None
    """That a thread may have, if its launch says so."""
    least_dim: int = 16
    """Heads of fewer channels of V, or of K for kernels that read no V, have another kernel."""

    def takes(self, k_dim: int, v_dim: int) -> bool:
        """Whether it is launched for such heads, and not the same for other widths of K or V."""
        both = {"DK", "DV"} <= set(self.function.arg_names)
        return v_dim >= self.least_dim and (both or k_dim == v_dim)


WIDE = "ROWS", MOST_GROUP
_STEP = ("T", 64), ("EPOCHS", 4), ("KINDS", 8), ("BLOCK", plan_step.BLOCK), ("SELECT", True), ("SHARE_BITS", SHARE_BITS)
_ROWS = (("requests", "*i64"),)
# Of one request.
_JOIN = ("COLUMNS", merge_pieces.TOGETHER // merge_pieces.MOST), ("PIECES", merge_pieces.MOST)
_RARE = ("ANY_TOPK", True), ("ANY_EXCEPTIONS", True)
KERNELS = {
    "query_squares": Kernel(
        add_squares_kernel,
        query_squares,
        (("ROWS", query_squares.ROWS), ("CHANNELS", query_squares.CHANNELS)),
        types=(("q", "*bf16"),),
    ),
    "rotate": Kernel(rotate_kernel, rotate_pages, (("DIGITS", 3), ("PAGES", 1), ("channel_stride", 1)), exact=True),
    "choose": Kernel(choose_kernel, segment_choice, (("EXACT", False),), exact=True),
    # Costs are computed of rare formats, too, as long as a head has any.
    "choose: rare": Kernel(choose_kernel, segment_choice, (*_RARE, ("EXACT", False)), exact=True),
    "choose: exact": Kernel(choose_kernel, segment_choice, (*_RARE, ("EXACT", True)), "EXACT_WARPS", exact=True),
    "encode": Kernel(encode_kernel, segment_encode, (("TILE", segment_encode.TILE),), exact=True),
    "error": Kernel(error_kernel, segment_error, (("TILE", segment_error.TILE),), exact=True),
    "decode": Kernel(decode_kernel, segment_decode, (("TILE", segment_decode.TILE),)),
    "attend_pages": Kernel(attend_pages_kernel, attend_pages, least_dim=BYTE_VALUES),
    "attend_pages: any": Kernel(attend_any_pages_kernel, attend_pages, (("TILE", attend_pages.TILE),)),
    "scan": Kernel(scan_kernel, scan, (("BYTES", True),), registers=scan.REGISTERS, least_dim=BYTE_KEYS),
    "scan: any": Kernel(scan_kernel, scan, (("BYTES", False),)),
    "select: count": Kernel(count_kernel, select, (("TILE", select.TILE), ("SHARED", SHARED_STEPS))),
    "select: threshold": Kernel(threshold_kernel, select, warps="THRESHOLD_WARPS"),
    "select: collect": Kernel(
        collect_kernel,
        select,
        (("PAGES", select.TILE_PAGES), ("PIECES", select.TILE_PIECES), ("SHARED", SHARED_STEPS)),
    ),
    "attend_selected": Kernel(attend_selected_kernel, attend_selected, (("TILE", attend_selected.TILE),)),
    "far_field": Kernel(far_field_kernel, far_field, (("PAGES", far_field.TILE_PAGES),)),
    "far_share": Kernel(
        far_share_kernel,
        far_share,
        (("PIECES", far_share.PIECES), ("COLUMNS", far_share.COLUMNS), ("FOLLOW", True)),
        types=(("kept", "*fp32"), ("far_lse", "*fp32")),
    ),
    "combine: join": Kernel(join_items_kernel, combine, _JOIN, "JOIN_WARPS"),
    "combine": Kernel(combine_kernel, combine, (("COLUMNS", combine.COLUMNS), WIDE)),
    "plan_step: count": Kernel(count_pages_kernel, plan_step, _STEP, types=_ROWS),
    "plan_step: place": Kernel(place_pages_kernel, plan_step, (*_STEP, ("CUT", plan_step.CUT), ("N", 64)), types=_ROWS),
    "rotate_queries": Kernel(
        rotate_queries_kernel,
        rotate_queries,
        (("COLUMNS", rotate_queries.COLUMNS), WIDE),
        types=(("q", "*bf16"), ("basis", "*fp32")),
    ),
    "rotate_rows": Kernel(
        rotate_rows_kernel,
        rotate_rows,
        (("ROWS", rotate_rows.ROWS), ("COLUMNS", rotate_rows.COLUMNS), ("PART", rotate_rows.PART)),
        types=(("basis", "*fp32"), ("out", "*fp16"), ("x_stride", "i32"), ("MOST", "fp32")),
    ),
    "merge_rows": Kernel(
        merge_rows_kernel,
        merge_lse,
        (("ROWS", merge_lse.ROWS), ("COLUMNS", merge_lse.COLUMNS), ("PART", merge_lse.PART), ("PLACED", True)),
        types=(
            ("out", "*bf16"), ("found", "*fp16"), ("found_lse", "*fp32"), ("basis", "*fp32"), ("places", "*i64"),
            *((name, "i32") for name in ("out_stride", "lse_stride", "lse_head", "found_stride", "found_head",
                                         "found_lse_stride", "found_lse_head")),
        ),
    ),
    "attend_dense": Kernel(
        attend_dense_kernel,
        attend_dense,
        (("T", 64), ("FACTOR", tl.bfloat16), WIDE),
        types=(("q", "*bf16"), ("k", "*bf16"), ("v", "*bf16"), ("factor", "fp32")),
    ),
    "attend_dense: merge": Kernel(
        merge_pieces_kernel,
        attend_dense,
        _JOIN,
        "MERGE_WARPS",
        types=(("result", "*bf16"), ("result_lse", "*fp32")),
    ),
}  # fmt: skip


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; exits with argparse's message on a bad one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--head-dims",
        type=dimensions,
        nargs="+",
        default=[(64, 64), (128, 128)],
        metavar="D",
        help="channels of K and V, or K/V, where only kernels that read both are compiled (default: 64 128)",
    )
    parser.add_argument("--group", type=integer(1), default=4, help="query heads per KV head (default %(default)s)")
    parser.add_argument("--arch", type=integer(80), default=90, help="compute capability (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and the environment")
    return parser.parse_args(argv)


def dimensions(text: str) -> tuple[int, int]:
    """Channels of K and of V."""
    k_dim, _, v_dim = text.partition("/")
    return integer(16)(k_dim), integer(16)(v_dim or k_dim)


def compile_kernel(kernel: Kernel, k_dim: int, v_dim: int, group: int, arch: int) -> dict[str, int]:
    """Figures of one kernel; sizes in bytes."""
    names, tiles = kernel.function.arg_names, dict(kernel.tiles)
    rows = attend_pages.digit_rows if tiles.get("BYTES", True) else attend_pages.query_rows
    constants = {
        "HEADS": 8, "GROUP": group, "ROWS": attend_pages.query_rows(group), "FORMATS": 3, "PADDED": 4, "T": 64,
        "R": rows(group), "DK": k_dim, "K_DIM": k_dim, "DV": v_dim, "V_DIM": v_dim,
        "DS": min(k_dim, 64), "D": k_dim, "DIM": k_dim, "INPUTS": k_dim,
        "OUTPUTS": min(k_dim, rotate_pages.OUTPUTS),
        "ANY_TOPK": False, "ANY_EXCEPTIONS": False, "TWO": True, "TOP_P": True, **tiles,
    }  # fmt: skip
    constants = {name: value for name, value in constants.items() if name in names}
    types = TYPES | dict(kernel.types)
    signature = {name: "constexpr" if name in constants else types.get(name, "*i32") for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in _DIVISIBLE
    }
    warps = getattr(kernel.launch, kernel.warps)
    options = {"num_warps": warps, "enable_fp_fusion": not kernel.exact, "maxnreg": kernel.registers}
    if hasattr(kernel.launch, "STAGES"):
        options["num_stages"] = kernel.launch.STAGES
    source = ASTSource(fn=kernel.function, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (_cuobjdump(option, file.name) for option in ("-res-usage", "-sass"))
    registers, stack = (int(re.findall(rf"{name}:(\d+)", usage)[0]) for name in ("REG", "STACK"))
    instructions, loop = count_instructions(code)
    return {
        "warps": warps,
        "registers": registers,
        "spilled_bytes": stack,
        "shared_bytes": compiled.metadata.shared,
        "instructions": instructions,
        "longest_loop": loop,
    }


def count_instructions(code: str) -> tuple[int, int]:
    """Instructions of a disassembled kernel, and those between the ends of its longest backward branch."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)]
    loops = [0]
    for at, text in lines:
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if target and (first := int(target.group(1), 16)) < at:
            loops.append(sum(first <= other <= at for other, _ in lines))
    return len(lines), max(loops)


def _cuobjdump(option: str, path: str) -> str:
    return subprocess.run([_BINARIES / "cuobjdump", option, path], capture_output=True, text=True, check=True).stdout


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit status."""
    args = parse_arguments(argv)
    rows: list[dict[str, Any]] = []
    for k_dim, v_dim in args.head_dims:
        kernels = {name: kernel for name, kernel in KERNELS.items() if kernel.takes(k_dim, v_dim)}
        head_dim = k_dim if k_dim == v_dim else f"{k_dim}/{v_dim}"
        for name, kernel in tqdm(kernels.items(), desc=f"head_dim {head_dim}", unit="kernel"):
            figures = compile_kernel(kernel, k_dim, v_dim, args.group, args.arch)
            rows.append({"kernel": name, "head_dim": head_dim, **figures})
    header = list(rows[0])
    print(format_table([name.replace("_", " ") for name in header], [[row[name] for name in header] for row in rows]))
    if args.json:
        report = {"benchmark": "compile_report", "arch": args.arch, "triton": triton.__version__}
        write_json(args.json, {**report, "environment": environment(), "rows": rows})
        print(f"wrote {args.json}")
    spilled = [f"{row['kernel']} at {row['head_dim']}" for row in rows if row["spilled_bytes"]]
    if spilled:
        print(f"compile_report: {', '.join(spilled)} spill registers", file=sys.stderr)
    return int(bool(spilled))


if __name__ == "__main__":
    sys.exit(main())
