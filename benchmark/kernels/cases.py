"""Inputs of the kernels: a pool of compressed frames of one epoch, and batches that read it.

Pages of normal values are encoded by the reference and copied into as many frames as wanted. A batch has no frame
twice and its frames are in random order, as after days of serving: neither caches nor prefetching help.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from benchmark.kernels.server_inputs import (
    MOST_NEW,
    Contexts,
    NewTokens,
    Uncompressed,
    make_contexts,
    make_new_tokens,
    make_uncompressed,
    moved,
    plan_by_reference,
)
from benchmark.kernels.sizes import PAGE, SHARED_STEPS, Dims, Split
from mosaic_kernels.page_batch import LEAST_PAGES, Item, PageBatch, plan
from mosaic_kernels.plan_step.step import StepPlan, allocate
from mosaic_kernels.rotate_pages.table import RotationTable, make_rotation_table
from mosaic_kernels.scan.keys import keys_of
from mosaic_kernels.segment import GROUP, SegmentFormat
from mosaic_kernels.segment_choice.reference import HeadChoice
from mosaic_kernels.segment_choice.table import ChoiceTable, make_choice_table
from mosaic_kernels.segment_encode.reference import pack
from mosaic_kernels.segment_table import HeadFormats, SegmentTable, make_table
from mosaic_kernels.select.reference import choose_tokens, far_logits
from mosaic_kernels.select.selection import Selected, SelectionPlan, plan_selection

DISTINCT = 64
"""Pages that are encoded; the others are copies of them."""
MOST_ENCODED = 512
"""Pages that are encoded at a time: as many as a chunk of 32k new tokens fills."""
MOST_OBSERVED = 8192
"""Tokens whose queries are observed at a time: all that a calibration waits for."""
FAR_BIAS = -0.25
DENSE_LSE, PAGE_LSE = 6.0, 4.6
"""Usual log-sum-exp of the dense tokens and of a page, for logits of variance 1."""
_FORMATS = 2


class Rotated(NamedTuple):
    """Pages to encode, and where to."""

    keys: torch.Tensor
    """float32 [H, pages, PAGE, D]."""
    values: torch.Tensor
    numbers: torch.Tensor
    """int32 [H, pages], formats of the segments."""
    data: torch.Tensor
    """uint8 [pages, frame_bytes], zeroed."""


class Dense(NamedTuple):
    """Pages as they were written, and what an encoder knows of their layer."""

    keys: torch.Tensor
    """bfloat16 [pages, PAGE, H, D]."""
    values: torch.Tensor
    k_basis: torch.Tensor
    """float32 [H, D, D], orthogonal."""
    v_basis: torch.Tensor
    rotations: tuple[RotationTable, RotationTable]
    """Of the bases."""
    queries: torch.Tensor
    """bfloat16 [tokens, H * group, D]."""
    sums: torch.Tensor
    """float64 [H, D], 0: their statistics."""
    choices: tuple[HeadChoice, ...]
    """The pool's formats."""
    costs: ChoiceTable
    data: torch.Tensor
    """uint8 [pages, frame_bytes]: where errors are looked for."""


@dataclass(frozen=True)
class Pool:
    """Compressed frames."""

    data: torch.Tensor
    """uint8 [frames, frame_bytes]."""
    heads: tuple[HeadFormats, ...]
    table: SegmentTable

    @property
    def ratio(self) -> float:
        """bfloat16 bytes per compressed byte, everything in a frame counted."""
        return sum(head.formats[0].dense_bytes for head in self.heads) / self.data.shape[1]


@dataclass(frozen=True)
class Case:
    """Inputs of every op for one batch; B requests, I items, H KV heads, P pages, D channels.

    What an op of the middle of a step reads is made by references, so that ops are checked and timed one by one.
    """

    dims: Dims
    pool: Pool
    lengths: tuple[int, ...]
    """Pages of each item, known on the host: calls are captured as CUDA graphs and must not ask the device."""
    batch: PageBatch
    whole: PageBatch
    """The same, cut for reading everything."""
    plan: SelectionPlan
    q: torch.Tensor
    """float32 [I, H, group, D]."""
    dense_out: torch.Tensor
    """[B, H * group, D], of the tokens that are not compressed."""
    dense_lse: torch.Tensor
    """float32 [B, H * group]; also what a scan knows."""
    unrotate: torch.Tensor
    """float32 [1, H, D, D], orthogonal."""
    keys: torch.Tensor
    """int16 [H, P, PAGE]."""
    page_lse: torch.Tensor
    """float32 [H, P, group]."""
    selected: Selected
    dense: Dense
    rotated: Rotated
    """Both are at most MOST_ENCODED pages."""
    parts: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    """Results as of `attend_selected` and of `far_field`: over the pieces of `plan` and over those of `batch`."""
    kept: torch.Tensor
    """float32 [I, H, group], what a step before found of what it selected."""
    far_lse: torch.Tensor
    """As of `far_field` in that step: where it grows in place."""
    contexts: Contexts
    """Of the pool's frames of `batch`, and uncompressed pages."""
    buffers: StepPlan
    """Where `plan_step` writes its plan of them."""
    planned: StepPlan
    """That plan, whose items are those of `batch`."""
    uncompressed: Uncompressed
    new: NewTokens
    """At most MOST_NEW tokens."""

    @property
    def scale(self) -> float:
        """Factor of the logits."""
        return self.dims.dim**-0.5

    @cached_property
    def shared(self) -> Selected:
        """As `selected`, for SHARED_STEPS steps; made when an op asks for it, which most do not."""
        return select_by_reference(self.keys, self.page_lse, self.batch, self.plan, steps=SHARED_STEPS)


def make_formats(dims: Dims, seed: int = 0) -> tuple[HeadFormats, ...]:
    """Formats of every head, 4 bits on average: K spread from many to few, V flatter, all different in a head.

    Opposite groups get as many bits above 4 as below, no more in a group than in the one before it.
    """
    pairs = dims.dim // GROUP // 2
    spreads = [list(itertools.combinations_with_replacement(steps, pairs)) for steps in ((2, 1, 0), (1, 0))]
    drawn, heads, start = random.Random(seed), [], 0
    for _ in range(dims.heads):
        k, v = (drawn.sample(spread, _FORMATS) for spread in spreads)
        formats = tuple(
            SegmentFormat(page_size=PAGE, k_dim=dims.dim, v_dim=dims.dim, k_bits=_bits(a, dims), v_bits=_bits(b, dims))
            for a, b in zip(k, v, strict=True)
        )
        heads.append(HeadFormats(start, formats, dims.scan_channels, FAR_BIAS))
        start += max(fmt.segment_bytes for fmt in formats)
    return tuple(heads)


def _bits(spread: tuple[int, ...], dims: Dims) -> tuple[int, ...]:
    middle = [4] * (dims.dim // GROUP - 2 * len(spread))
    return tuple([4 + more for more in spread] + middle + [4 - less for less in reversed(spread)])


def make_pool(dims: Dims, frames: int, device: torch.device | str, distinct: int = DISTINCT, seed: int = 0) -> Pool:
    """A pool of copies of `distinct` pages, every segment in one of its head's formats."""
    heads = make_formats(dims, seed)
    last = heads[-1]
    frame_bytes = last.start + max(fmt.segment_bytes for fmt in last.formats)
    pages = torch.zeros(distinct, frame_bytes, dtype=torch.uint8, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for head in heads:
        k, v = (torch.randn(distinct, PAGE, dims.dim, generator=generator, device=device) for _ in range(2))
        number = torch.randint(len(head.formats), (distinct,), generator=generator, device=device)
        for n, fmt in enumerate(head.formats):
            mine = number == n
            data = torch.zeros(int(mine.sum()), fmt.segment_bytes, dtype=torch.uint8, device=device)
            if len(data):
                pack(k[mine], v[mine], fmt, data)
                data[:, 0] = n
                pages[mine, head.start : head.start + fmt.segment_bytes] = data
    which = torch.randint(distinct, (frames,), generator=generator, device=device)
    return Pool(pages[which], heads, make_table([heads], device))


def make_case(
    dims: Dims,
    pool: Pool,
    lengths: Sequence[int],
    frames: torch.Tensor,
    split: Split,
    dtype: torch.dtype,
    seed: int = 0,
) -> Case:
    """A batch of requests.

    Args:
        lengths: pages of each request; a request may have none.
        frames: int [sum of lengths], rows of the pool's data.
        dtype: of the dense output, and of the output of new tokens.
    """
    device = pool.data.device
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    of_requests = enumerate(frames.cpu().split(list(lengths)))
    items = [Item(request, 0, own) for request, own in of_requests if len(own)]
    batch = plan(items, len(lengths), dims.heads, split.programs, device, split.least_pages)
    most = [max(round(dims.select * PAGE * len(item.frames)), 1) for item in items]
    room = plan_selection(most, dims.heads, split.token_programs, device, split.least_tokens)
    query_heads, pages = dims.heads * dims.group, len(frames)
    logits = normal(dims.heads, 1, pages * PAGE) - DENSE_LSE
    keys = keys_of(logits, logits.new_zeros(dims.heads, 1), 1).view(dims.heads, pages, PAGE)
    page_lse = normal(dims.heads, pages, dims.group) * 0.3 + PAGE_LSE
    cuts = [(len(x.pieces), dims.heads, dims.group) for x in (room, batch)]
    contexts = make_contexts(lengths, frames, len(pool.data), split, seed)
    planned = plan_by_reference(contexts, dims, split)
    parts = tuple((normal(*cut, dims.dim), normal(*cut)) for cut in cuts)
    return Case(
        dims=dims,
        pool=pool,
        lengths=tuple(len(item.frames) for item in items),
        batch=batch,
        whole=plan(items, len(lengths), dims.heads, split.programs, device, min(split.least_pages, LEAST_PAGES)),
        plan=room,
        q=normal(len(items), dims.heads, dims.group, dims.dim),
        dense_out=normal(len(lengths), query_heads, dims.dim).to(dtype),
        dense_lse=normal(len(lengths), query_heads) + DENSE_LSE,
        unrotate=torch.linalg.qr(normal(1, dims.heads, dims.dim, dims.dim))[0].contiguous(),
        keys=keys,
        page_lse=page_lse,
        selected=select_by_reference(keys, page_lse, batch, room),
        dense=_dense(dims, pool, min(pages, MOST_ENCODED), generator),
        rotated=_rotated(dims, pool, min(pages, MOST_ENCODED), generator),
        parts=parts,
        kept=normal(len(items), dims.heads, dims.group) + DENSE_LSE,
        far_lse=parts[1][1].clone(),
        contexts=moved(contexts, device),
        buffers=allocate(planned.shape, device),
        planned=moved(planned, device),
        uncompressed=make_uncompressed(len(lengths), dims, generator),
        new=make_new_tokens(min(pages * PAGE, MOST_NEW), dims, dtype, generator),
    )


def _dense(dims: Dims, pool: Pool, pages: int, generator: torch.Generator) -> Dense:
    device = pool.data.device

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    choices = [HeadChoice(head.formats, 1e-4, (1e-4,) * dims.dim) for head in pool.heads]
    keys, values = (normal(pages, PAGE, dims.heads, dims.dim).bfloat16() for _ in range(2))
    bases = [torch.linalg.qr(normal(dims.heads, dims.dim, dims.dim))[0].contiguous() for _ in range(2)]
    return Dense(
        keys,
        values,
        *bases,
        rotations=tuple(map(make_rotation_table, bases)),
        queries=normal(min(pages * PAGE, MOST_OBSERVED), dims.heads * dims.group, dims.dim).bfloat16(),
        sums=torch.zeros(dims.heads, dims.dim, dtype=torch.float64, device=device),
        choices=tuple(choices),
        costs=make_choice_table(choices, device),
        data=torch.zeros(pages, pool.data.shape[1], dtype=torch.uint8, device=device),
    )


def _rotated(dims: Dims, pool: Pool, pages: int, generator: torch.Generator) -> Rotated:
    device = pool.data.device
    k, v = (torch.randn(dims.heads, pages, PAGE, dims.dim, generator=generator, device=device) for _ in range(2))
    numbers = torch.randint(_FORMATS, (dims.heads, pages), generator=generator, device=device, dtype=torch.int32)
    return Rotated(k, v, numbers, torch.zeros(pages, pool.data.shape[1], dtype=torch.uint8, device=device))


def select_by_reference(
    keys: torch.Tensor, page_lse: torch.Tensor, batch: PageBatch, room: SelectionPlan, **steps: int
) -> Selected:
    """What `select` finds with top_p 1. Unused room of the lists is 0.

    Args:
        steps: as of `select`. Left out, it is not passed on: --base may be a commit that does not know it.
    """
    heads, _, page_size = keys.shape
    first_page, first, most = batch.first_page.tolist(), room.first.tolist(), room.most.tolist()
    tokens = torch.zeros(heads, room.room, dtype=torch.int32, device=keys.device)
    counts = torch.zeros(heads, len(most), dtype=torch.int32, device=keys.device)
    far = torch.empty_like(page_lse)
    for item, limit in enumerate(most):
        pages = slice(first_page[item], first_page[item + 1])
        mine = keys[:, pages].flatten(1)
        chosen = choose_tokens(mine, 1.0, limit, **steps)
        count = min(limit, mine.shape[1])  # of every head
        found = chosen.nonzero()[:, 1].view(heads, count) + pages.start * page_size
        tokens[:, first[item] : first[item] + count] = found.int()
        counts[:, item] = count
        left = far_logits(mine[:, None], page_lse[:, pages].transpose(1, 2), chosen[:, None])
        far[:, pages] = left.transpose(1, 2) + FAR_BIAS
    return Selected(tokens, counts, far)
