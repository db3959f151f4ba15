"""Inputs of what a server runs around its compressed pages: a step's plan, uncompressed pages, new tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch

from benchmark.kernels.sizes import PAGE, Dims, Split
from mosaic_kernels.plan_step import reference
from mosaic_kernels.plan_step.step import Shape, StepPlan

DENSE_PAGES = 4
"""Last pages of a request, which are not compressed, as with --mosaic-encode seal; one is being written."""
MOST_NEW = 1024
"""New tokens of a prefill."""
EPOCHS = 3
"""Slots of epochs, as a server has by default; the pages are of the first one."""
_UNFILLED = 23
"""Tokens that the last page of the first request lacks, twice as many of the second, modulo PAGE."""
T = TypeVar("T")


class Contexts(NamedTuple):
    """Where the tokens of a batch are: what `plan_step` reads, in its order."""

    req_to_token: torch.Tensor
    """int32 [B, longest context]."""
    requests: torch.Tensor
    """int64 [B], their rows."""
    lengths: torch.Tensor
    """int64 [B], tokens; compressed pages come first."""
    page_table: torch.Tensor
    """int64 [pages + 1], frames of the pages, in random order; page 0 is padding."""
    slots: torch.Tensor
    """int32 [frames of the pool], 0."""
    first_mosaic: int
    least_pages: int


class Uncompressed(NamedTuple):
    """Queries of a step, and the slabs of what is not compressed."""

    q: torch.Tensor
    """bfloat16 [B, H * group, D]."""
    k: torch.Tensor
    """bfloat16 [(B * DENSE_PAGES + 1) * PAGE, H, D]; the first page is padding."""
    v: torch.Tensor


class NewTokens(NamedTuple):
    """N new tokens, and their attention over two sets of tokens, the second of which is rotated."""

    q: torch.Tensor
    """bfloat16 [N, H * group, D], a view of the product that has K and V too."""
    out: torch.Tensor
    """[N, H * group, D]."""
    lse: torch.Tensor
    """float32 [N, H * group], heads first in memory, as of flash attention."""
    found: torch.Tensor
    """float16 [N, H * group, D]."""
    found_lse: torch.Tensor
    """As `lse`."""
    places: torch.Tensor
    """int64 [N], rows of `out`, in random order."""


def make_contexts(lengths: Sequence[int], frames: torch.Tensor, pool_frames: int, split: Split, seed: int) -> Contexts:
    """On the CPU.

    Args:
        lengths: compressed pages of each request; every one has DENSE_PAGES more.
        frames: int [sum of lengths], of the pool, which has `pool_frames`.
    """
    generator = torch.Generator().manual_seed(seed)

    def order(count: int) -> torch.Tensor:
        return torch.randperm(count, generator=generator)

    requests = len(lengths)
    # Frame 0 is padding, too.
    first_mosaic = requests * DENSE_PAGES + 1
    dense = (order(requests * DENSE_PAGES) + 1).split(DENSE_PAGES)
    pages = [length + DENSE_PAGES for length in lengths]
    rows, numbers = order(requests), (order(sum(pages)) + 1).split(pages)
    req_to_token = torch.zeros(requests, max(pages) * PAGE, dtype=torch.int32)
    page_table = torch.zeros(sum(pages) + 1, dtype=torch.int64)
    for row, own, mosaic, last in zip(rows, numbers, frames.cpu().split(list(lengths)), dense, strict=True):
        page_table[own] = torch.cat((mosaic + first_mosaic, last))
        req_to_token[row, : len(own) * PAGE] = (own[:, None] * PAGE + torch.arange(PAGE)).flatten()
    tokens = [count * PAGE - _UNFILLED * (r + 1) % PAGE for r, count in enumerate(pages)]
    slots = torch.zeros(pool_frames, dtype=torch.int32)
    return Contexts(req_to_token, rows, torch.tensor(tokens), page_table, slots, first_mosaic, split.least_pages)


def plan_by_reference(contexts: Contexts, dims: Dims, split: Split) -> StepPlan:
    """What `plan_step` finds."""
    pages = len(contexts.page_table) - 1
    shape = Shape(len(contexts.lengths), EPOCHS, pages, dims.heads, split.programs, PAGE, share=dims.select)
    return reference.plan_step(shape, *contexts)


def moved(x: T, device: torch.device | str) -> T:
    """A tensor, or named tuples of tensors, on a device; everything else as it is."""
    if isinstance(x, torch.Tensor):
        return x.to(device)
    return type(x)(*(moved(part, device) for part in x)) if isinstance(x, tuple) else x


def make_uncompressed(requests: int, dims: Dims, generator: torch.Generator) -> Uncompressed:
    """On the generator's device."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=generator.device).bfloat16()

    rows = (requests * DENSE_PAGES + 1) * PAGE
    k, v = (normal(rows, dims.heads, dims.dim) for _ in range(2))
    return Uncompressed(normal(requests, dims.heads * dims.group, dims.dim), k, v)


def make_new_tokens(tokens: int, dims: Dims, dtype: torch.dtype, generator: torch.Generator) -> NewTokens:
    """On the generator's device; `dtype` is that of `out`."""
    heads, device = dims.heads * dims.group, generator.device

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    product = normal(tokens, (heads + 2 * dims.heads) * dims.dim).bfloat16()
    out, found = (normal(tokens, heads, dims.dim) for _ in range(2))
    return NewTokens(
        q=product[:, : heads * dims.dim].view(tokens, heads, dims.dim),
        out=out.to(dtype),
        lse=normal(heads, tokens).T,
        found=found.half(),
        found_lse=normal(heads, tokens).T,
        places=torch.randperm(tokens, generator=generator, device=device),
    )
