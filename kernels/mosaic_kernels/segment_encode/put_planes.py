"""Device code: codes -> the planes of their groups.

A thread has all 16 codes of a group and token as four words, one byte a code, and works on four at a time.
"""

import triton
import triton.language as tl


@triton.jit
def four_codes(codes, AXIS: tl.constexpr):
    """int32 codes, four neighbouring channels along the last axis -> a word of four bytes."""
    shift = tl.arange(0, 4) * 8
    # Bytes do not overlap: a sum is a union.
    return tl.sum(codes << shift, AXIS)


@triton.jit
def put_planes(segment, table, first, a, b, c, d, TILE: tl.constexpr, GROUPS: tl.constexpr):
    """Words int32 [GROUPS, TILE] of the channels 0 to 3, 4 to 7, 8 to 11 and 12 to 15 of every group, tokens from
    `first`.

    table: base, refinement and bits of the groups, int32 [GROUPS, 1] (segment_table).
    """
    base, refinement, bits = table
    base_bits, more_bits = bits & 0xFF, bits >> 8
    # Of four bits no byte passes into the next, of fewer neither: what is shifted out of a byte is masked.
    mask = ((1 << base_bits) - 1) * 0x01010101
    _put_plane(
        segment, base, base_bits, first,
        a >> more_bits & mask, b >> more_bits & mask, c >> more_bits & mask, d >> more_bits & mask, TILE, GROUPS,
    )  # fmt: skip
    mask = ((1 << more_bits) - 1) * 0x01010101
    _put_plane(segment, refinement, more_bits, first, a & mask, b & mask, c & mask, d & mask, TILE, GROUPS)


@triton.jit
def _put_plane(segment, plane, bits, first, a, b, c, d, TILE: tl.constexpr, GROUPS: tl.constexpr):
    """One plane of every group that has it; fields of `bits` [GROUPS, 1] in bytes."""
    start, stride = plane & 0xFFFF, plane >> 16
    t = tl.arange(0, TILE)[None, :]
    narrow, wide = bits == 1, bits == 4
    low = a | c << tl.where(wide, 4, 2 * bits)
    high = b | d << tl.where(wide, 4, 2 * bits)
    one = tl.where(wide, low, low | high << bits)
    # Of one bit, the odd token comes four places above the even one, into its word.
    both = tl.reshape(one << tl.where(t % 2 == 1, 4, 0), [GROUPS, TILE // 2, 2])
    both = tl.broadcast_to(tl.sum(both, 2, keep_dims=True), [GROUPS, TILE // 2, 2])
    one = tl.where(narrow, tl.reshape(both, [GROUPS, TILE]), one)
    row = first + t
    row = tl.where(narrow, row // 2, row)
    words = (segment + start + row * stride).to(tl.pointer_type(tl.int32))
    tl.store(words, one, mask=(bits > 1) | narrow & (t % 2 == 0))
    tl.store(words + 1, high, mask=wide)
