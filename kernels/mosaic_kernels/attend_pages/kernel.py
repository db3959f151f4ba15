"""Device code: attention over all tokens of a piece of an item, of segments of planes, in integers."""

import triton
import triton.language as tl

from mosaic_kernels.digits import MOST, from_digits, half_of, inverse_of, to_digits
from mosaic_kernels.load_bytes import BYTE_WORDS, SECOND, channel_means, fetch_bytes, token_scales, value_bytes
from mosaic_kernels.load_piece import find_segment, load_piece, of_one, prefetch
from mosaic_kernels.load_segment import find_row, load_number, value_channels
from mosaic_kernels.load_words import load_four
from mosaic_kernels.page_logits import load_chunks, page_logits
from mosaic_kernels.tile_attention import LOG2_E


@triton.jit
def attend_pages_kernel(
    q, data, frame_bytes, frames, pieces, epochs, starts, scalars, k_bytes, v_bytes, out, lse, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr, FORMATS: tl.constexpr, T: tl.constexpr,
    DK: tl.constexpr, K_DIM: tl.constexpr, DV: tl.constexpr, V_DIM: tl.constexpr,
):  # fmt: skip
    """One program: a piece and a KV head. q [items, HEADS, GROUP, K_DIM]; out [pieces, HEADS, GROUP, V_DIM]."""
    piece, head = tl.program_id(0), tl.program_id(1)
    item, first, last = load_piece(pieces, piece)
    if item < 0:
        return
    of_head = tl.load(epochs + item) * HEADS + head
    r, t = tl.arange(0, R), tl.arange(0, T)[None, :]
    # In the order in which the weights of a thread's tokens lie side by side.
    EIGHTHS: tl.constexpr = T // 8
    turned = t % EIGHTHS * 8 + t // EIGHTHS
    q += (item * HEADS + head) * GROUP * K_DIM
    chunks = load_chunks(q, r, scale * LOG2_E, K_DIM, DK, GROUP, K_DIM)
    GROUPS: tl.constexpr = DV // 16
    groups = tl.arange(0, GROUPS)[:, None]
    # Channels in the order of `value_bytes`.
    group = tl.arange(0, DV)[:, None] % GROUPS
    channel = group * 16 + tl.arange(0, DV)[:, None] // GROUPS
    top, total = tl.full([R], float("-inf"), tl.float32), tl.zeros([R], tl.float32)
    summed = tl.zeros([DV, R], tl.float32)
    start = tl.load(starts + of_head)
    data += start
    # Four and a half bits a value, scales included: what is more belongs to the next head, which reads it, too. No
    # further than the frame, which may be the last of the pool.
    ahead = tl.minimum(T * (K_DIM + V_DIM) // 16 * 9, frame_bytes - start)
    # A power of two that holds them, whatever the dimensions.
    LINES: tl.constexpr = T * 2 * (DK if DK > DV else DV) // 128
    # Loaded a page or two before they are used: each waits for the one before.
    segment = find_segment(data, frame_bytes, frames, first)
    next_segment = find_segment(data, frame_bytes, frames, tl.minimum(first + 1, last - 1))
    number = load_number(segment)
    for page in range(first, last):
        next_number = load_number(next_segment)
        after = find_segment(data, frame_bytes, frames, tl.minimum(page + 2, last - 1))
        prefetch(next_segment, ahead, LINES)
        row, kind = find_row(number, scalars, of_head * FORMATS, FORMATS)
        _, _, levels, _ = load_four(tl.broadcast_to(v_bytes + (row * GROUPS + group) * BYTE_WORDS + SECOND, [DV, R]))
        logits = page_logits(chunks, of_one(segment), scalars, k_bytes, of_one(row), kind, t, K_DIM, True, DK, R, DK)
        # Weights are those of the page, against its largest; so are its sums, until they are added.
        here = tl.max(logits, 0)
        new_top = tl.maximum(top, here)
        mine, decay = tl.exp2(here - new_top), tl.exp2(top - new_top)
        weights = tl.exp2(logits - here[None, :])
        top, total = new_top, total * decay + tl.sum(weights, 0) * mine
        scales = token_scales(segment, scalars, row, tl.broadcast_to(tl.trans(t), [T, R]))
        most = tl.max(scales, 0)
        high, low, rounded = to_digits(weights * scales, inverse_of(most)[None, :])
        # [EIGHTHS, 8, R, 2] -> [8, EIGHTHS, R, 2]
        digits = tl.permute(tl.reshape(tl.join(high, low), [EIGHTHS, 8, R, 2]), 1, 0, 2, 3)
        fetched = fetch_bytes(of_one(segment), v_bytes, of_one(row), groups, turned, True, DV)
        found = tl.dot(value_bytes(fetched), tl.reshape(digits, [T, 2 * R]), out_dtype=tl.int32)
        unit = mine * (most / MOST)
        summed = summed * decay[None, :] + half_of(levels, 1) * (tl.sum(rounded, 0) * unit)[None, :]
        summed += from_digits(found, DV, R) * (half_of(levels, 0) * unit[None, :])
        if value_channels(scalars, row) < V_DIM:
            mean = channel_means(segment, scalars, row, tl.broadcast_to(channel, [DV, R]), V_DIM)
            summed += mean * (tl.sum(weights, 0) * mine)[None, :]
        segment, next_segment, number = next_segment, after, next_number
    at = (piece * HEADS + head) * GROUP
    summed = tl.where((total > 0)[None, :], summed / total[None, :], summed)
    tl.store(out + (at + r[None, :]) * V_DIM + channel, summed, (r < GROUP)[None, :] & (channel < V_DIM))
    tl.store(lse + at + r, (top + tl.log2(total)) / LOG2_E, r < GROUP)
