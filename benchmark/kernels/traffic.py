"""Bytes that an op must move between memory and the GPU, if everything is read and written once.

Of compressed data only what the op needs is counted, not the rest of the sectors (32 bytes) that hold it: an op that
reads a few bytes here and there moves more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmark.kernels.cases import Case
from benchmark.kernels.sizes import PAGE
from mosaic_kernels.segment import GROUP, HEADER, SegmentFormat
from mosaic_kernels.select.selection import Selected

_FLOAT, _INT, _HALF = 4, 4, 2


def observe_bytes(case: Case) -> int:
    """The queries, and their sums twice."""
    return _sizes(case.dense.queries, case.dense.sums, case.dense.sums)


def rotate_bytes(case: Case) -> int:
    """K and V as written, the digits of the bases, rotated K and V."""
    tables = (table.digits for table in case.dense.rotations)
    exponents = (table.exponents for table in case.dense.rotations)
    return _sizes(case.dense.keys, case.dense.values, *tables, *exponents, case.rotated.keys, case.rotated.values)


def choose_bytes(case: Case) -> int:
    """Rotated K and V, the formats' numbers and their costs."""
    return _sizes(case.rotated.keys, case.rotated.values, case.rotated.numbers, *case.dense.costs)


def encode_bytes(case: Case) -> int:
    """Rotated K and V of the pages, and the bytes of their segments."""
    return _sizes(*case.rotated[:3]) + _encoded(case)


def error_bytes(case: Case) -> int:
    """The same, headers and errors."""
    return encode_bytes(case) + (HEADER + _FLOAT) * case.rotated.numbers.numel()


def decode_bytes(case: Case) -> int:
    """The segments of the first request and its K and V in bfloat16."""
    return _of_segments(case, lambda fmt: fmt.segment_bytes + fmt.dense_bytes, slice(case.lengths[0]))


def attend_pages_bytes(case: Case) -> int:
    """All bytes of all segments, the queries and the results of the pieces."""
    return _of_segments(case, lambda fmt: fmt.segment_bytes) + _sizes(case.q) + _results(case, len(case.whole.pieces))


def scan_bytes(case: Case) -> int:
    """`scanned_segment` of all segments, the queries, what is known; keys and log-sum-exps."""
    channels = case.dims.scan_channels
    read = _of_segments(case, lambda fmt: scanned_segment(fmt, channels))
    return read + _sizes(case.q, case.dense_lse, case.keys, case.page_lse)


def scanned_segment(fmt: SegmentFormat, channels: int) -> int:
    """Of a segment: header, scales, offsets and base planes of K's leading channels."""
    tables = 2 * min(fmt.k.coded, channels) + 2 * channels
    groups = channels // GROUP
    # A code of b bits of a group of 16 channels is 2 b bytes.
    read = ((min(groups - plane.first, plane.groups), plane.bits) for plane in fmt.k.base if plane.first < groups)
    return HEADER + tables + PAGE * sum(2 * bits * count for count, bits in read)


def select_bytes(case: Case) -> int:
    """The keys twice, to count and to collect, and the log-sum-exps; the lists and the far field's logits."""
    taken = int(case.selected.counts.sum())
    return _sizes(case.keys, case.keys, case.page_lse, case.selected.far, case.selected.counts) + _INT * taken


def attend_selected_bytes(case: Case) -> int:
    """The lists, `token_bytes` of the selected tokens, `page_bytes` of the pages that have any; queries and results."""
    return _of_selection(case, case.selected)


def attend_shared_bytes(case: Case) -> int:
    """The same of a selection that steps share: its tokens follow each other, so they are of fewer pages."""
    return _of_selection(case, case.shared)


def token_bytes(fmt: SegmentFormat) -> int:
    """Of one token of a segment: its codes and the scale of its V."""
    codes = sum(2 * plane.bits * plane.groups for x in (fmt.k, fmt.v) for plane in (*x.base, *x.refinement))
    return codes + (fmt.v.coded > 0)


def page_bytes(fmt: SegmentFormat) -> int:
    """Of a segment, what its selected tokens share: header, scales and offsets of K, and mean V where it stands for
    channels."""
    means = fmt.v_dim + 1 if fmt.v.coded < fmt.v_dim else 0
    return HEADER + 2 * fmt.k.coded + 2 * fmt.k_dim + means


def far_field_bytes(case: Case) -> int:
    """Header and mean V of all segments and the logits; the results of the pieces."""
    means = _of_segments(case, lambda fmt: HEADER + fmt.v_dim + 1)
    return means + _sizes(case.selected.far) + _results(case, len(case.batch.pieces))


def combine_bytes(parts: int) -> Callable[[Case], int]:
    """Results of the pieces of 1 (all pages) or 2 parts (selected tokens, far field), dense results and basis."""

    def count(case: Case) -> int:
        pieces = len(case.batch.pieces) + len(case.plan.pieces) if parts == 2 else len(case.whole.pieces)
        return _results(case, pieces) + _sizes(case.dense_out, case.dense_out, case.dense_lse, case.unrotate)

    return count


def plan_step_bytes(case: Case) -> int:
    """Slot and frame of every page, epochs of the compressed ones, contexts; the plan, every page listed once."""
    plan, contexts = case.buffers, case.contexts
    pages = len(contexts.page_table) - 1
    read = pages * (_INT + contexts.page_table.element_size()) + _INT * len(case.batch.frames)
    # Frames come first in a batch.
    others = *plan.mosaic[1:], *plan.selection[:4], *plan.dense[1:], plan.counts
    return read + _sizes(contexts.requests, contexts.lengths) + _INT * pages + _sizes(*others)


def attend_dense_bytes(case: Case) -> int:
    """K and V of the uncompressed tokens, the queries, the results of the pieces twice and those of the requests."""
    q, k, _ = case.uncompressed
    tokens, pieces = int(case.planned.dense.tokens.sum()), int(case.planned.dense.first_piece[-1])
    read = tokens * case.dims.heads * 2 * case.dims.dim * k.element_size() + _sizes(q)
    return read + 2 * _results(case, pieces) + _results(case, len(q))


def rotate_queries_bytes(case: Case) -> int:
    """The queries, the basis, the items' queries."""
    return _sizes(case.uncompressed.q, case.unrotate, case.q)


def rotate_rows_bytes(case: Case) -> int:
    """The queries, the basis, and float16."""
    return _sizes(case.new.q, case.unrotate) + _HALF * case.new.q.numel()


def merge_rows_bytes(case: Case) -> int:
    """What is merged, the basis, where to; what it is merged into twice."""
    new = case.new
    return _sizes(new.found, new.found_lse, new.places, case.unrotate, *(new.out, new.lse) * 2)


def far_share_bytes(case: Case) -> int:
    """What is compared and where pieces begin; the far field's twice."""
    starts = case.plan.first_piece, case.batch.first_piece
    return _sizes(case.parts[0][1], case.kept, *starts, case.far_lse, case.far_lse)


def dense_bytes(case: Case, element: int) -> int:
    """K and V of all tokens uncompressed, in elements of so many bytes."""
    return len(case.batch.frames) * PAGE * case.dims.heads * 2 * case.dims.dim * element


def total(*parts: Callable[[Case], int]) -> Callable[[Case], int]:
    """Bytes of ops one after the other."""
    return lambda case: sum(part(case) for part in parts)


def _encoded(case: Case) -> int:
    written = 0
    for head, of_head in zip(case.pool.heads, case.rotated.numbers.tolist(), strict=True):
        written += sum(head.formats[number].segment_bytes for number in of_head)
    return written


def _of_segments(case: Case, nbytes: Callable[[SegmentFormat], int], pages: slice = slice(None)) -> int:
    numbers = _numbers(case)[pages]
    return sum(_by_format(head.formats, numbers[:, h], nbytes) for h, head in enumerate(case.pool.heads))


def _of_selection(case: Case, selected: Selected) -> int:
    taken = total = 0
    first = case.plan.first.tolist()
    numbers = _numbers(case)
    for h, head in enumerate(case.pool.heads):
        counts = selected.counts[h].tolist()
        lists = [selected.tokens[h, first[item] : first[item] + count] for item, count in enumerate(counts)]
        pages = torch.cat(lists).long() // PAGE
        taken += len(pages)
        total += _by_format(head.formats, numbers[pages, h], token_bytes)
        total += _by_format(head.formats, numbers[pages.unique(), h], page_bytes)
    return total + _INT * taken + _sizes(case.q) + _results(case, len(case.plan.pieces))


def _by_format(formats: tuple, numbers: torch.Tensor, nbytes: Callable[[SegmentFormat], int]) -> int:
    counts = torch.bincount(numbers, minlength=len(formats)).tolist()
    return sum(count * nbytes(fmt) for count, fmt in zip(counts, formats, strict=True))


def _numbers(case: Case) -> torch.Tensor:
    """Format of every segment, int64 [P, H]."""
    return case.pool.data[case.batch.frames.long()[:, None], case.pool.table.starts[0].long()[None]].long()


def _results(case: Case, pieces: int) -> int:
    return pieces * case.dims.heads * case.dims.group * (case.dims.dim + 1) * _FLOAT


def _sizes(*tensors: torch.Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
