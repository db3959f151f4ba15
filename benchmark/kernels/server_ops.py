"""What a server runs around its compressed pages: calls, none of which waits for the device, and gates."""

from __future__ import annotations

import dataclasses

import torch

from benchmark.kernels.cases import Case
from benchmark.kernels.expected import Decoded
from benchmark.kernels.sizes import PAGE
from benchmark.kernels.tolerances import HALF, TURNED, WEIGHTS, by_row, elementwise, equal, worst
from mosaic_kernels.attend_dense import reference as dense_reference
from mosaic_kernels.attend_dense.launch import attend_dense
from mosaic_kernels.far_share import reference as share_reference
from mosaic_kernels.far_share.launch import keep_share
from mosaic_kernels.merge_lse import reference as merge_reference
from mosaic_kernels.merge_lse.launch import merge_rows
from mosaic_kernels.plan_step.launch import plan_step
from mosaic_kernels.plan_step.step import StepPlan
from mosaic_kernels.rotate_queries import reference as queries_reference
from mosaic_kernels.rotate_queries.launch import rotate_queries
from mosaic_kernels.rotate_rows import reference as rows_reference
from mosaic_kernels.rotate_rows.launch import rotate_rows


def plan(case: Case) -> StepPlan:
    """Into the same buffers every time, as `DecodeAttention.plan`."""
    plan_step(case.buffers, *case.contexts)
    return case.buffers


def attend_uncompressed(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """float32, as where compressed pages follow."""
    return attend_dense(*case.uncompressed, case.planned.dense, case.scale, PAGE)


def turn_queries(case: Case) -> torch.Tensor:
    """Those of a step."""
    return rotate_queries(case.uncompressed.q, case.unrotate, case.planned.mosaic)


def turn_new(case: Case) -> torch.Tensor:
    """Those of new tokens, as float16, as K and V are decoded."""
    return rotate_rows(case.new.q, case.unrotate[0], torch.float16)


def merge_new(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """In place: what is merged again and again stays finite."""
    new = case.new
    merge_rows(new.out, new.lse, new.found, new.found_lse, case.unrotate[0], new.places)
    return new.out, new.lse


def keep_far_share(case: Case) -> torch.Tensor:
    """In place, so that it grows with every call, by as much each time."""
    (_, lse), far = case.parts[0], case.far_lse
    keep_share(lse, case.plan.first_piece, case.kept, far, case.batch.first_piece)
    return far


def plan_gate(case: Case, _: Decoded) -> float:
    return equal(zip(_read(plan(case)), _read(case.planned), strict=True))


def attend_uncompressed_gate(case: Case, _: Decoded) -> float:
    out, lse = attend_uncompressed(case)
    wanted = dense_reference.attend_dense(*case.uncompressed, case.planned.dense, case.scale, PAGE)
    return worst(by_row(out, wanted[0], WEIGHTS), elementwise(lse, wanted[1], 1e-5, 1e-5))


def turn_queries_gate(case: Case, _: Decoded) -> float:
    batch = case.planned.mosaic
    wanted = queries_reference.rotate_queries(case.uncompressed.q, case.unrotate, batch)
    there = batch.epochs >= 0
    return by_row(turn_queries(case)[there], wanted[there], TURNED)


def turn_new_gate(case: Case, _: Decoded) -> float:
    wanted = rows_reference.rotate_rows(case.new.q, case.unrotate[0], torch.float16)
    return elementwise(turn_new(case).float(), wanted.float(), HALF, TURNED)


def merge_new_gate(case: Case, _: Decoded) -> float:
    new = case.new
    out, lse = new.out.clone(), new.lse.clone()
    merge_reference.merge_rows(out, lse, new.found, new.found_lse, case.unrotate[0], new.places)
    # Which the next call reads.
    copy = new._replace(out=new.out.clone(), lse=new.lse.clone())
    found = merge_new(dataclasses.replace(case, new=copy))
    return worst(elementwise(found[0], out, 1e-4, TURNED), elementwise(found[1], lse, 1e-5, 1e-5))


def keep_far_share_gate(case: Case, _: Decoded) -> float:
    wanted = case.far_lse.clone()
    share_reference.keep_share(case.parts[0][1], case.plan.first_piece, case.kept, wanted, case.batch.first_piece)
    copy = dataclasses.replace(case, far_lse=case.far_lse.clone())
    return elementwise(keep_far_share(copy), wanted, 1e-5, 1e-5)


def _read(of: StepPlan) -> list[torch.Tensor]:
    """What a step reads of a plan; the rest of its buffers is arbitrary."""
    mosaic, dense, room = of.mosaic, of.dense, of.selection
    items = int(mosaic.first_item[-1])
    firsts = mosaic.first_page, mosaic.first_piece, room.first, room.first_piece
    return [
        of.counts,
        mosaic.frames[: int(mosaic.first_page[items])],
        mosaic.epochs,
        mosaic.requests[:items],
        mosaic.first_item,
        room.most[:items],
        *(first[: items + 1] for first in firsts),
        dense.frames[: int(dense.first_page[-1])],
        dense.first_page,
        dense.tokens,
        dense.first_piece,
        *(torch.where(x.pieces[:, :1] < 0, -1, x.pieces) for x in (mosaic, room, dense)),
    ]
