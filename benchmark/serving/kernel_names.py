"""Which kind of work a GPU kernel does, by the name that torch's profiler gives it."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from benchmark.common.report import REPOSITORY

KERNELS = REPOSITORY / "kernels" / "mosaic_kernels"
_LAUNCH = re.compile(r"^\s+(\w+_kernel)\[.+?\]\(", re.MULTILINE)

COPIES, OTHER, IDLE = "copies", "other", "idle"
# The first pattern that is found counts. Flash attention is built from CUTLASS, and torch's own operations carry the
# names of what they do inside of at::native: both come before what their names also fit.
_PATTERNS = {
    "attention": r"(?i)Batch(Decode|Prefill)With|PrefillWithKVCache|merge_?states?|VariableLength|flash_|flash::"
    r"|FlashAttn|fmha|sdpa|attention|\b_fwd_(grouped_)?kernel",
    "norms, activations, rotary": r"(?i)rms_?norm|layer_?norm|qk_?norm|silu|gelu|swiglu|act_and_mul|rotary|rope(?!r)",
    "KV writes": r"(?i)store_?(kv_?)?cache|store_kv|set_kv_buffer|reshape_and_cache|append_?paged_?kv|index_(put|copy)",
    "communication": r"(?i)nccl|all_?reduce|all_?gather|reduce_?scatter",
    "matrix products": r"(?i)gemm|gemv|cutlass|nvjet|cublas|xmma|split_?k|matmul|scaled_mm|marlin",
    "sampling": r"(?i)sampling|arg_?max|softmax|top_?k|top_?p|multinomial|sort|penalt",
    "slots, indices": r"alloc_(decode|extend)_kernel|write_req_to_token|compute_position|kv_indices|get_last_loc",
    COPIES: r"(?i)copy_kernel|CatArray|memcpy|memset",
    "torch": r"at::native|at_cuda_detail|at::cuda|c10::|elementwise|cub::|triton_(poi|red|per)_",
}
_COMPILED = {category: re.compile(pattern) for category, pattern in _PATTERNS.items()}


@functools.cache
def mosaic_ops(folder: Path = KERNELS) -> dict[str, str]:
    """The op of every kernel that is launched from `folder`: the name of its subfolder."""
    return {
        kernel: path.parent.name
        for path in sorted(folder.glob("*/launch.py"))
        for kernel in _LAUNCH.findall(path.read_text())
    }


@functools.cache
def categories() -> tuple[str, ...]:
    """All there are, in the order of tables and figures."""
    ours = dict.fromkeys(f"mosaic {op}" for op in mosaic_ops().values())
    return (*_PATTERNS, *ours, OTHER, IDLE)


def category(name: str, kind: str = "kernel") -> str:
    """Of an event by its name and chrome "cat", one of `categories()` but for IDLE.

    Triton's kernels bear the names of their functions, so ours are found by the whole name.
    """
    if kind != "kernel":
        return COPIES
    if name in mosaic_ops():
        return f"mosaic {mosaic_ops()[name]}"
    return next((found for found, pattern in _COMPILED.items() if pattern.search(name)), OTHER)
