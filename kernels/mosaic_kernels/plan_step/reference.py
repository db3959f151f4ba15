"""Reference of a step's plan. Plain torch and Python, any device; waits for it."""

from __future__ import annotations

import itertools

import torch

from mosaic_kernels.page_batch import LEAST_PAGES, PageBatch, piece_size
from mosaic_kernels.plan_step.step import SHARE_BITS, DenseBatch, Shape, StepPlan
from mosaic_kernels.select.selection import SelectionPlan


def plan_step(
    shape: Shape,
    req_to_token: torch.Tensor,
    requests: torch.Tensor,
    lengths: torch.Tensor,
    page_table: torch.Tensor,
    slots: torch.Tensor,
    first_mosaic: int,
    least_pages: int = LEAST_PAGES,
) -> StepPlan:
    """As `launch.plan_step`, into new tensors, buffers beyond what there is zero or -1."""
    size, dense, items, counts = shape.page_size, [], [], []
    tokens = []
    for r, (request, length) in enumerate(zip(requests.tolist(), lengths.tolist(), strict=True)):
        pages = -(-length // size)
        frames = page_table[req_to_token[request, : pages * size : size].long() // size].tolist()
        by_slot: list[list[int]] = [[] for _ in range(shape.epochs + 1)]
        for frame in frames:
            slot = int(slots[frame - first_mosaic]) if frame >= first_mosaic else -1
            if slot >= 0:
                by_slot[slot].append(frame - first_mosaic)
            else:
                # What has no bytes stands for padding, which nobody reads.
                by_slot[-1].append(frame if 0 <= frame < first_mosaic else 0)
        items += [(r, slot, own) for slot, own in enumerate(by_slot[:-1]) if own]
        dense.append(by_slot[-1])
        tokens.append(max(len(by_slot[-1]) * size - (pages * size - length), 0))
        counts.append([len(own) for own in by_slot])
    lengths_of = [len(own) for *_, own in items]
    most = [_most(shape, pages * size) for pages in lengths_of]
    device = page_table.device

    def integers(values, count: int, fill: int = 0) -> torch.Tensor:
        values = [*values]
        return torch.tensor(values + [fill] * (count - len(values)), dtype=torch.int32, device=device)

    count = shape.requests * shape.epochs
    of_item = [sum(r < request for r, *_ in items) for request in range(shape.requests + 1)]
    pieces, first_piece, first_page = _cut(shape, lengths_of, shape.programs, least_pages)
    mosaic = PageBatch(
        integers(itertools.chain(*(own for *_, own in items)), shape.pages),
        integers((slot for _, slot, _ in items), count, -1),
        integers((r for r, *_ in items), count),
        pieces.to(device),
        integers(first_page, count + 1),
        integers(first_piece, count + 1),
        integers(of_item, shape.requests + 1),
    )
    selection = None
    if shape.share:
        pieces, first_piece, first = _cut(shape, most, shape.programs, size)
        selection = SelectionPlan(
            integers(most, count),
            integers(first, count + 1),
            pieces.to(device),
            integers(first_piece, count + 1),
            shape.room,
        )
    pieces, first_piece, first_page = _cut(shape, [len(own) for own in dense], shape.dense_programs, 1)
    return StepPlan(
        shape,
        mosaic,
        selection,
        DenseBatch(
            integers(itertools.chain(*dense), shape.pages),
            integers(first_page, shape.requests + 1),
            integers(tokens, shape.requests),
            pieces.to(device),
            integers(first_piece, shape.requests + 1),
        ),
        torch.tensor(counts, dtype=torch.int32, device=device),
    )


def _most(shape: Shape, tokens: int) -> int:
    if tokens < shape.least_selected:
        return tokens
    return max(tokens * shape.share_units >> SHARE_BITS, 1)


def _cut(shape: Shape, lengths: list[int], programs: int, least: int) -> tuple[torch.Tensor, list[int], list[int]]:
    """Pieces, where each length's begin, and where it begins itself."""
    size = piece_size(lengths, shape.heads, programs, least)
    pieces, first_piece, first = [], [0], [0]
    for i, length in enumerate(lengths):
        count = -(-length // size)
        pieces += [(i, first[-1] + length * n // count, first[-1] + length * (n + 1) // count) for n in range(count)]
        first_piece.append(len(pieces))
        first.append(first[-1] + length)
    found = torch.full((shape.pieces, 3), -1, dtype=torch.int32)
    if pieces:
        found[: len(pieces)] = torch.tensor(pieces, dtype=torch.int32)
    return found, first_piece, first
