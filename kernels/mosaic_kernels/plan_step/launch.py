"""Checks and grids of a step's plan. Two launches, nothing waits for the device, nothing is allocated."""

from __future__ import annotations

import torch

from mosaic_kernels.page_batch import LEAST_PAGES
from mosaic_kernels.plan_step.kernel import count_pages_kernel, place_pages_kernel
from mosaic_kernels.plan_step.step import SHARE_BITS, StepPlan
from mosaic_kernels.segment_table import padded

BLOCK, CUT, WARPS = 512, 64, 4


def plan_step(
    plan: StepPlan,
    req_to_token: torch.Tensor,
    requests: torch.Tensor,
    lengths: torch.Tensor,
    page_table: torch.Tensor,
    slots: torch.Tensor,
    first_mosaic: int,
    least_pages: int = LEAST_PAGES,
) -> None:
    """Write into a plan's buffers what a step reads.

    Args:
        plan: of `step.allocate`; the pages of all requests fit into it.
        req_to_token: int32 [rows, longest context]: slot (page * page_size + offset) of each token.
        requests: integer [requests], their rows.
        lengths: integer [requests], tokens of each, at least 1.
        page_table: int64 [pages]: frame of each page; those from `first_mosaic` on are compressed, others are not.
        slots: int32 [compressed frames]: slot of the epoch that each was written with; -1: it was not.
        first_mosaic: number of the first compressed frame.
        least_pages: of a piece of compressed pages.

    Raises:
        ValueError: shapes or types.
    """
    shape = plan.shape
    if requests.shape != (shape.requests,) or lengths.shape != (shape.requests,):
        raise ValueError(
            f"the plan is of {shape.requests} requests, got requests {tuple(requests.shape)} and lengths "
            f"{tuple(lengths.shape)}"
        )
    if req_to_token.dim() != 2 or req_to_token.dtype != torch.int32 or req_to_token.stride(1) != 1:
        raise ValueError(f"req_to_token must be int32 [rows, tokens], got {req_to_token.dtype} {req_to_token.shape}")
    if page_table.dtype != torch.int64 or slots.dtype != torch.int32 or requests.stride(0) != 1:
        raise ValueError(
            f"page_table must be int64, slots int32 and requests contiguous, got {page_table.dtype}, {slots.dtype} and "
            f"a stride of {requests.stride(0)}"
        )
    epochs, grid = shape.epochs, (shape.requests,)
    where = req_to_token, req_to_token.stride(0), requests, lengths, page_table, slots, first_mosaic, plan.counts
    count_pages_kernel[grid](
        *where, T=shape.page_size, EPOCHS=epochs, KINDS=padded(epochs + 1), BLOCK=BLOCK, num_warps=WARPS
    )
    mosaic, dense = plan.mosaic, plan.dense
    # Without a selection nothing is written there.
    selection = plan.selection[:4] if plan.selection else (mosaic.first_page,) * 4
    place_pages_kernel[grid](
        *where, *mosaic, *selection, *dense,
        shape.pieces, shape.heads, shape.programs, shape.dense_programs, least_pages, shape.share_units,
        shape.least_selected,
        T=shape.page_size, EPOCHS=epochs, N=padded(max(shape.requests * epochs, 2)), SELECT=plan.selection is not None,
        SHARE_BITS=SHARE_BITS, BLOCK=BLOCK, CUT=CUT, num_warps=WARPS,
    )  # fmt: skip
