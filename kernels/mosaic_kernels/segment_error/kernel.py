"""Device code: encoded segments and what they stand for -> errors and headers."""

import triton
import triton.language as tl

from mosaic_kernels import segment_table as table
from mosaic_kernels.segment_decode.kernel import decode_keys, decode_values
from mosaic_kernels.segment_error import reference

_SCALARS, _KIND = tl.constexpr(table.SCALARS), tl.constexpr(table.KIND)
_FORMAT, _ERROR = tl.constexpr(reference.FORMAT), tl.constexpr(reference.ERROR)


# Compiled once for any number of pages: it takes seconds, in the middle of serving.
@triton.jit(do_not_specialize=["pages", "epoch"])
def error_kernel(
    k_rot, v_rot, data, frame_bytes, numbers, starts, scalars, k_words, v_words, k_weights, v_weights, errors,
    epoch, pages,
    HEADS: tl.constexpr, FORMATS: tl.constexpr, T: tl.constexpr, TILE: tl.constexpr,
    DK: tl.constexpr, K_DIM: tl.constexpr, DV: tl.constexpr, V_DIM: tl.constexpr,
    ANY_TOPK: tl.constexpr, ANY_EXCEPTIONS: tl.constexpr,
):  # fmt: skip
    """One program: one page and head, TILE tokens at a time. numbers int32 [HEADS, pages]; errors [pages, HEADS]."""
    page, head = tl.program_id(0), tl.program_id(1)
    number = tl.load(numbers + head * pages + page)
    of_head = epoch * HEADS + head
    row = of_head * FORMATS + number
    kind = tl.load(scalars + row * _SCALARS + _KIND)
    segment = data + page.to(tl.int64) * frame_bytes + tl.load(starts + of_head)
    k_channel, v_channel = tl.arange(0, DK)[:, None], tl.arange(0, DV)[:, None]
    v_weight = tl.load(v_weights + head * V_DIM + v_channel, mask=v_channel < V_DIM, other=0)
    of_keys, of_values = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
    for first in range(0, T, TILE):
        t = (first + tl.arange(0, TILE))[None, :]
        at = (head * pages + page).to(tl.int64) * T + t
        y = tl.load(k_rot + at * K_DIM + k_channel, mask=k_channel < K_DIM, other=0)
        y -= decode_keys(segment, scalars, k_words, row, kind, t, DK, K_DIM, ANY_TOPK, ANY_EXCEPTIONS)
        wide = tl.where(k_channel < K_DIM, y, 0.0).to(tl.float64)
        of_keys += tl.sum(tl.sum(wide * wide, 1), 0)
        y = tl.load(v_rot + at * V_DIM + v_channel, mask=v_channel < V_DIM, other=0)
        y -= decode_values(segment, scalars, v_words, row, kind, t, DV, V_DIM, ANY_TOPK, ANY_EXCEPTIONS)
        wide = tl.where(v_channel < V_DIM, y, 0.0).to(tl.float64)
        of_values += tl.sum(tl.sum(wide * wide * v_weight, 1), 0)
    squared = of_keys * tl.load(k_weights + head) + of_values
    bits = tl.sqrt(squared).to(tl.float32).to(tl.int32, bitcast=True)
    # To bfloat16, halves to even; the interpreter's conversion cuts off.
    error = (bits + 0x7FFF + (bits >> 16 & 1) & -0x10000).to(tl.float32, bitcast=True)
    error = tl.where(squared == squared, error, float("nan"))
    tl.store(errors + page * HEADS + head, error)
    tl.store(segment + _FORMAT, number.to(tl.uint8))
    tl.store((segment + _ERROR).to(tl.pointer_type(tl.float32)), error)
