"""Every op: its shapes, the bytes that it must move, its gate and a call to time.

B requests, I items, H KV heads, R = H * group query heads, P pages of 64 tokens, D channels, N selected tokens,
T new tokens.
A gate gives the largest error in units of what is tolerated (tolerances.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmark.kernels import expected, server_ops, traffic
from benchmark.kernels.cases import Case, Rotated
from benchmark.kernels.sizes import SHARED_STEPS
from benchmark.kernels.tolerances import (
    LOGITS,
    MERGED,
    OTHER_KEYS,
    OUTPUT,
    ROUNDED_LOGITS,
    by_row,
    elementwise,
    equal,
    of_attention,
    worst,
)
from mosaic_kernels.attend_pages import reference as attend_reference
from mosaic_kernels.attend_pages.launch import attend_pages
from mosaic_kernels.attend_selected.launch import attend_selected
from mosaic_kernels.combine import reference as combine_reference
from mosaic_kernels.combine.launch import combine
from mosaic_kernels.far_field import reference as far_reference
from mosaic_kernels.far_field.launch import far_field
from mosaic_kernels.query_squares import reference as squares_reference
from mosaic_kernels.query_squares.launch import add_squares
from mosaic_kernels.rotate_pages.launch import rotate
from mosaic_kernels.scan import reference as scan_reference
from mosaic_kernels.scan.launch import scan
from mosaic_kernels.segment_choice import reference as choice_reference
from mosaic_kernels.segment_choice.launch import choose
from mosaic_kernels.segment_decode.launch import decode_frames
from mosaic_kernels.segment_encode.launch import encode_pages
from mosaic_kernels.segment_encode.reference import rotate_pages
from mosaic_kernels.segment_error.launch import write_errors
from mosaic_kernels.select.launch import select
from mosaic_kernels.select.selection import Selected

Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""What `combine` takes: out, lse and where an item's pieces begin."""


@dataclass(frozen=True)
class Op:
    """One op, or a chain of them."""

    name: str
    shapes: str
    nbytes: Callable[[Case], int]
    gate: Callable[[Case, expected.Decoded], float]
    call: Callable[[Case], object]
    attends: bool = True
    """It stands for dense attention or a part of it: compared with that."""
    streams: bool = False
    """Compared with a plain read of as many bytes."""


def _decode(case: Case, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    return decode_frames(case.pool.data, case.batch.frames[: case.lengths[0]], case.pool.table, dtype=dtype)


def _observe(case: Case) -> torch.Tensor:
    add_squares(case.dense.queries, case.dense.sums)
    return case.dense.sums


def _rotate(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    k_rotation, v_rotation = case.dense.rotations
    return rotate(case.dense.keys, k_rotation), rotate(case.dense.values, v_rotation)


def _choose(case: Case, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return choose(keys, values, case.dense.costs, case.pool.table)


def _pack(case: Case) -> torch.Tensor:
    encode_pages(*case.rotated, case.pool.table)
    return case.rotated.data


def _write_errors(case: Case, rotated: Rotated) -> torch.Tensor:
    return write_errors(*rotated, case.dense.costs, case.pool.table)


def _encode(case: Case) -> tuple[Rotated, torch.Tensor]:
    """What PlanesEpoch.encode does on a GPU with a plan that has no format of a rare kind."""
    keys, values = _rotate(case)
    rotated = Rotated(keys, values, _choose(case, keys, values), torch.zeros_like(case.dense.data))
    encode_pages(*rotated, case.pool.table)
    return rotated, _write_errors(case, rotated)


def _attend_pages(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    return attend_pages(case.q, case.pool.data, case.whole, case.pool.table, case.scale)


def _scan(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    return scan(case.q, case.pool.data, case.dense_lse, case.batch, case.pool.table, case.scale)


def _select(case: Case, keys: torch.Tensor, page_lse: torch.Tensor, **steps: int) -> Selected:
    # One step is not passed: kernels of --base may be of a commit that does not know `steps`.
    return select(keys, page_lse, case.batch, case.plan, case.pool.table, **steps)


def _select_given(case: Case, **steps: int) -> Selected:
    return _select(case, case.keys, case.page_lse, **steps)


def _attend_selected(case: Case, selected: Selected) -> tuple[torch.Tensor, torch.Tensor]:
    return attend_selected(case.q, case.pool.data, case.batch, case.plan, selected, case.pool.table, case.scale)


def _far_field(case: Case, selected: Selected) -> tuple[torch.Tensor, torch.Tensor]:
    return far_field(selected.far, case.pool.data, case.batch, case.pool.table)


def _combine(case: Case, *parts: Part) -> torch.Tensor:
    return combine(parts, case.batch, case.unrotate, case.dense_out, case.dense_lse)


def _of_selected(case: Case, result: tuple[torch.Tensor, torch.Tensor]) -> Part:
    return *result, case.plan.first_piece


def _of_pages(case: Case, result: tuple[torch.Tensor, torch.Tensor]) -> Part:
    return *result, case.batch.first_piece


def _given(case: Case) -> tuple[Part, Part]:
    return _of_selected(case, case.parts[0]), _of_pages(case, case.parts[1])


def _full(case: Case) -> torch.Tensor:
    return _combine(case, (*_attend_pages(case), case.whole.first_piece))


def _reuse(case: Case, selected: Selected) -> torch.Tensor:
    attended, far = _attend_selected(case, selected), _far_field(case, selected)
    return _combine(case, _of_selected(case, attended), _of_pages(case, far))


def _step(case: Case, **steps: int) -> torch.Tensor:
    return _reuse(case, _select(case, *_scan(case), **steps))


def _decode_gate(case: Case, pages: expected.Decoded) -> float:
    count = case.lengths[0]
    found = _decode(case, torch.float32)
    same = all(torch.equal(x, y[:, :count]) for x, y in zip(found, (pages.keys, pages.values), strict=True))
    return 0.0 if same else math.inf


def _observe_gate(case: Case, _: expected.Decoded) -> float:
    wanted = torch.zeros_like(case.dense.sums)
    squares_reference.add_squares(case.dense.queries, wanted)
    case.dense.sums.zero_()
    return elementwise(_observe(case), wanted, 1e-13, 0.0)


def _rotate_gate(case: Case, _: expected.Decoded) -> float:
    keys, values, k_basis, v_basis = (x.cpu() for x in case.dense[:4])
    wanted = rotate_pages(keys, k_basis), rotate_pages(values, v_basis)
    return equal(zip(_rotate(case), wanted, strict=True))


def _choose_gate(case: Case, _: expected.Decoded) -> float:
    keys, values = case.rotated[:2]
    wanted = choice_reference.choose(keys.cpu(), values.cpu(), case.dense.choices)
    return equal([(_choose(case, keys, values), wanted)])


def _pack_gate(case: Case, _: expected.Decoded) -> float:
    return equal([(_pack(case), expected.encoded(case, case.rotated))])


def _error_gate(case: Case, _: expected.Decoded) -> float:
    rotated = case.rotated._replace(data=expected.encoded(case, case.rotated))
    wanted = expected.with_headers(case, rotated, rotated.data)
    errors = _write_errors(case, rotated)
    return equal(zip((rotated.data, errors), wanted, strict=True))


def _encode_gate(case: Case, _: expected.Decoded) -> float:
    rotated, errors = _encode(case)
    wanted = expected.with_headers(case, rotated, expected.encoded(case, rotated))
    numbers = choice_reference.choose(rotated.keys.cpu(), rotated.values.cpu(), case.dense.choices)
    return equal([(rotated.data, wanted[0]), (errors, wanted[1]), (rotated.numbers, numbers)])


def _attend_pages_gate(case: Case, pages: expected.Decoded) -> float:
    wanted = attend_reference.attend_pages(case.q, pages.keys, pages.values, case.whole, case.scale)
    return of_attention(_attend_pages(case), wanted, LOGITS)


def _scan_gate(case: Case, pages: expected.Decoded) -> float:
    keys, lse = _scan(case)
    wanted = scan_reference.scan(case.q, pages.scanned, case.dense_lse, case.batch, case.scale)
    steps = float((keys.int() - wanted[0].int()).abs().max())
    other = float((keys != wanted[0]).float().mean()) / OTHER_KEYS
    return worst(steps, other, float((lse - wanted[1]).abs().max()) / ROUNDED_LOGITS)


def _select_gate(case: Case, _: expected.Decoded) -> float:
    return _selection_error(case, _select_given(case), case.selected)


def _select_shared_gate(case: Case, _: expected.Decoded) -> float:
    return _selection_error(case, _select_given(case, steps=SHARED_STEPS), case.shared)


def _selection_error(case: Case, found: Selected, wanted: Selected) -> float:
    same = torch.equal(found.counts, wanted.counts)
    for item, first in enumerate(case.plan.first[:-1].tolist()):
        own = slice(first, first + int(wanted.counts[0, item]))
        same = same and torch.equal(found.tokens[:, own], wanted.tokens[:, own])
    return elementwise(found.far, wanted.far, 1e-4, 1e-4) if same else math.inf


def _attend_selected_gate(case: Case, pages: expected.Decoded) -> float:
    found = expected.joined(_attend_selected(case, case.selected), case.plan.first_piece)
    return of_attention(found, expected.over_selected(case, pages, case.selected, far=False), ROUNDED_LOGITS)


def _far_field_gate(case: Case, pages: expected.Decoded) -> float:
    wanted = far_reference.far_field(case.selected.far, pages.means, case.batch)
    out, lse = _far_field(case, case.selected)
    return worst(by_row(out, wanted[0], OUTPUT), elementwise(lse, wanted[1], 1e-5, 1e-5))


def _combine_gate(case: Case, _: expected.Decoded) -> float:
    wanted = combine_reference.combine(_given(case), case.batch, case.unrotate, case.dense_out, case.dense_lse)
    return elementwise(_combine(case, *_given(case)), wanted, 1e-4, 1e-5)


def _full_gate(case: Case, pages: expected.Decoded) -> float:
    return by_row(_full(case), expected.with_dense(case, expected.over_all(case, pages)), MERGED)


def _reuse_gate(case: Case, pages: expected.Decoded) -> float:
    wanted = expected.with_dense(case, expected.over_selected(case, pages, case.selected, far=True))
    return by_row(_reuse(case, case.selected), wanted, MERGED)


def _step_gate(case: Case, pages: expected.Decoded, **steps: int) -> float:
    # A key that is off by one chooses another token: the references read what the kernels chose.
    selected = _select(case, *_scan(case), **steps)
    wanted = expected.with_dense(case, expected.over_selected(case, pages, selected, far=True))
    return by_row(_step(case, **steps), wanted, MERGED)


_AROUND = traffic.far_field_bytes, traffic.combine_bytes(2)
_REUSE = traffic.attend_selected_bytes, *_AROUND
_SELECTING = traffic.scan_bytes, traffic.select_bytes

OPS = (
    Op("query_squares", "queries bf16 [tokens, R, D] -> sums of squares float64 [H, D]",
       traffic.observe_bytes, _observe_gate, _observe, attends=False, streams=True),
    Op("rotate", "K, V bf16 [pages, 64, H, D], bases [H, D, D] -> rotated K, V float32 [H, pages, 64, D]",
       traffic.rotate_bytes, _rotate_gate, _rotate, attends=False),
    Op("segment_choice", "rotated K, V float32 [H, pages, 64, D] -> formats [H, pages]",
       traffic.choose_bytes, _choose_gate, lambda case: _choose(case, *case.rotated[:2]), attends=False),
    Op("segment_encode", "rotated K, V float32 [H, pages, 64, D], formats [H, pages] -> segments without headers",
       traffic.encode_bytes, _pack_gate, _pack, attends=False),
    Op("segment_error", "rotated K, V float32 [H, pages, 64, D], segments -> errors [pages, H], headers",
       traffic.error_bytes, _error_gate,
       lambda case: _write_errors(case, case.rotated._replace(data=case.dense.data)), attends=False),
    Op("encode", "rotate, segment_choice, segment_encode, segment_error: K, V bf16 [pages, 64, H, D] -> segments",
       traffic.total(traffic.rotate_bytes, traffic.choose_bytes, traffic.encode_bytes, traffic.error_bytes),
       _encode_gate, _encode, attends=False),
    Op("segment_decode", "pages of one request -> K, V bf16 [H, pages, 64, D]",
       traffic.decode_bytes, _decode_gate, _decode, attends=False),
    Op("rotate_rows", "queries bf16 [T, R, D], basis [H, D, D] -> rotated float16 [T, R, D]",
       traffic.rotate_rows_bytes, server_ops.turn_new_gate, server_ops.turn_new, attends=False),
    Op("merge_rows", "out [T, R, D], lse, rotated out float16 [T, R, D], lse, basis [H, D, D] -> out, lse, in place",
       traffic.merge_rows_bytes, server_ops.merge_new_gate, server_ops.merge_new, attends=False),
    Op("plan_step", "slots of tokens [B, context], page table -> lists and pieces of P pages and of uncompressed ones",
       traffic.plan_step_bytes, server_ops.plan_gate, server_ops.plan, attends=False),
    Op("attend_dense", "q bf16 [B, R, D], a few uncompressed pages a request -> out [B, R, D], lse",
       traffic.attend_dense_bytes, server_ops.attend_uncompressed_gate, server_ops.attend_uncompressed, attends=False,
       streams=True),
    Op("rotate_queries", "q bf16 [B, R, D], basis [H, D, D] -> q [I, H, group, D]",
       traffic.rotate_queries_bytes, server_ops.turn_queries_gate, server_ops.turn_queries, attends=False),
    Op("attend_pages", "q [I, H, group, D], P pages -> out [pieces, H, group, D], lse",
       traffic.attend_pages_bytes, _attend_pages_gate, _attend_pages),
    Op("scan", "q [I, H, group, D], scan channels of P pages -> keys int16 [H, P, 64], lse [H, P, group]",
       traffic.scan_bytes, _scan_gate, _scan, streams=True),
    Op("select", "keys [H, P, 64], lse [H, P, group] -> tokens [H, N], far [H, P, group]",
       traffic.select_bytes, _select_gate, _select_given),
    Op("select_shared", f"select for {SHARED_STEPS} decode steps that share it",
       traffic.select_bytes, _select_shared_gate, partial(_select_given, steps=SHARED_STEPS)),
    Op("attend_selected", "q [I, H, group, D], tokens [H, N] -> out [pieces, H, group, D], lse",
       traffic.attend_selected_bytes, _attend_selected_gate, lambda case: _attend_selected(case, case.selected)),
    Op("far_field", "far [H, P, group], mean V of P pages -> out [pieces, H, group, D], lse",
       traffic.far_field_bytes, _far_field_gate, lambda case: _far_field(case, case.selected)),
    Op("far_share", "lse of selected pieces [pieces, H, group], kept [I, H, group] -> lse of the far field, in place",
       traffic.far_share_bytes, server_ops.keep_far_share_gate, server_ops.keep_far_share, attends=False),
    Op("combine", "two outs [pieces, H, group, D], dense out [B, R, D] -> out [B, R, D]",
       traffic.combine_bytes(2), _combine_gate, lambda case: _combine(case, *_given(case))),
    Op("full", "attend_pages, combine: a step that reads everything",
       traffic.total(traffic.attend_pages_bytes, traffic.combine_bytes(1)), _full_gate, _full),
    Op("step", "scan, select, attend_selected, far_field, combine: a step that selects afresh",
       traffic.total(*_SELECTING, *_REUSE), _step_gate, _step),
    Op("step_shared",
       f"scan, select_shared, attend_selected, far_field, combine: a step that selects for {SHARED_STEPS}",
       traffic.total(*_SELECTING, traffic.attend_shared_bytes, *_AROUND),
       partial(_step_gate, steps=SHARED_STEPS), partial(_step, steps=SHARED_STEPS)),
    Op("reuse", "attend_selected, far_field, combine: a step that reuses a selection",
       traffic.total(*_REUSE), _reuse_gate, lambda case: _reuse(case, case.selected)),
)  # fmt: skip
BY_NAME = {op.name: op for op in OPS}
