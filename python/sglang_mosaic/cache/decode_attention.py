"""Attention of decoding requests over the pool, straight from the compressed bytes (Triton).

The same results as mixed_attention.py, up to float16: its plain torch is the reference. What a step reads is planned on
the device (mosaic_kernels/plan_step), in buffers of fixed size and address, so that neither the host waits for the page
table nor a CUDA graph cares what is compressed. Long compressed contexts may select the tokens that they read; those of
another epoch are selected among themselves.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from mosaic_kernels.attend_dense.launch import attend_dense
from mosaic_kernels.attend_pages.launch import attend_pages
from mosaic_kernels.attend_selected.launch import attend_selected
from mosaic_kernels.combine.launch import combine
from mosaic_kernels.far_field.launch import far_field
from mosaic_kernels.far_share.launch import keep_share, selected_lse
from mosaic_kernels.page_batch import LEAST_PAGES, LEAST_SCANNED
from mosaic_kernels.plan_step.launch import plan_step
from mosaic_kernels.plan_step.step import Shape, StepPlan, allocate
from mosaic_kernels.rotate_queries.launch import rotate_queries
from mosaic_kernels.scan.launch import scan
from mosaic_kernels.select.launch import select
from mosaic_kernels.select.selection import Selected
from sglang_mosaic.cache.memory import PageMemory
from sglang_mosaic.cache.reading import Reading
from sglang_mosaic.cache.segment_tables import LayerTables, SegmentTables
from sglang_mosaic.cache.side_stream import SideStream
from sglang_mosaic.page import PAGE_SIZE

PROGRAMS_PER_PROCESSOR = 16
"""Programs that keep a multiprocessor busy."""
CROSSOVER, CROSSOVER_SHARED = 1 << 21, 1 << 19
"""Tokens times KV heads of a batch below which reading all takes no longer than selecting in every step, and than steps
that share a selection (measured at 1, 8 and 32 requests, docs/kernels.md)."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """A selection of one layer that later steps go on with."""

    selected: Selected
    lse: torch.Tensor
    """float32 [items, H, group] of what was selected, in the step that selected it."""


@dataclasses.dataclass(frozen=True)
class DecodeStep:
    """Buffers of a step of so many requests."""

    plan: StepPlan
    kept: list[Kept]
    """By layer; empty if no step goes on with another's selection."""


class DecodeAttention:
    """Planned once a step, run once a layer; the same calls whether they are captured or not.

    Args:
        memory: the pool; its epochs are `PlanesEpoch`s.
        tables: of the pool.
        group: query heads per KV head.
    """

    def __init__(self, memory: PageMemory, tables: SegmentTables, group: int) -> None:
        self._memory, self._tables, self._group = memory, tables, group
        self._heads = memory.dense_k[0].shape[1]
        self._programs = PROGRAMS_PER_PROCESSOR * _processors(memory.slab.frames.device)
        self._side = SideStream(memory.slab.frames.device)
        self._selects = bool(memory.config.select)
        self._kept: list[list[torch.Tensor]] = []

    def allocate(self, requests: int, pages: int) -> DecodeStep:
        """Buffers for steps of so many requests, which together have at most so many pages."""
        config = self._memory.config
        shape = Shape(
            requests, self._memory.epochs.most, pages, self._heads, self._programs, PAGE_SIZE,
            share=config.select, least_selected=config.least_selected if self._selects else 0,
        )  # fmt: skip
        keeps = self._selects and config.select_steps > 1
        return DecodeStep(allocate(shape, self._memory.slab.frames.device), self._keep(shape) if keeps else [])

    def plan(
        self,
        step: DecodeStep,
        reading: Reading,
        req_to_token: torch.Tensor,
        requests: torch.Tensor,
        lengths: torch.Tensor,
    ) -> None:
        """Put into a step's buffers what its requests read; the last three as of `plan_step`."""
        memory = self._memory
        self._tables.update()
        plan_step(
            step.plan, req_to_token, requests, lengths,
            memory.table.frames, memory.epochs.frame_slots, memory.table.first_mosaic,
            LEAST_PAGES if reading in (Reading.NOTHING, Reading.ALL) else LEAST_SCANNED,
        )  # fmt: skip

    def reading(self, lengths: Sequence[int]) -> Reading:
        """What a step of contexts of so many tokens reads; where it is `SELECTED`, it may also go on with another's."""
        if not self._memory.lifecycle.mosaic.used:
            return Reading.NOTHING
        if not self._selects:
            return Reading.ALL
        config = self._memory.config
        long = sum(tokens for tokens in lengths if tokens >= config.least_selected)
        crossover = CROSSOVER_SHARED if config.select_steps > 1 else CROSSOVER
        if not long or (config.select_from is None and long * self._heads < crossover):
            return Reading.ALL
        return Reading.SELECTED

    @property
    def readings(self) -> list[Reading]:
        """Those that occur."""
        if not self._memory.config.compresses:
            return [Reading.NOTHING]
        found = [Reading.NOTHING, Reading.ALL]
        if self._selects:
            found.append(Reading.SELECTED)
        if self._selects and self._memory.config.select_steps > 1:
            found.append(Reading.AS_BEFORE)
        return found

    def run(self, step: DecodeStep, reading: Reading, layer: int, q: torch.Tensor, scale: float) -> torch.Tensor:
        """Attention of one layer, K and V of the new tokens already written.

        Args:
            step: planned.
            reading: of all layers of the step.
            layer: index among this rank's layers.
            q: [requests, Hq, k_dim], heads and channels contiguous.
            scale: factor of the logits.

        Returns:
            [requests, Hq, v_dim] in the type of q.
        """
        slabs = self._memory.dense_k[layer], self._memory.dense_v[layer]
        if reading is Reading.NOTHING:
            return attend_dense(q, *slabs, step.plan.dense, scale, PAGE_SIZE, q.dtype)[0]
        with self._side.beside():
            dense_out, dense_lse = attend_dense(q, *slabs, step.plan.dense, scale, PAGE_SIZE)
        tables = self._tables.layer(layer)
        batch, data = step.plan.mosaic, self._memory.slab.frames
        rotated = rotate_queries(q, tables.q_basis, batch)
        if reading is Reading.ALL:
            found = attend_pages(rotated, data, batch, tables.formats, scale)
            parts = [(*found, batch.first_piece)]
        else:
            parts = self._read_selected(step, reading, layer, rotated, tables, dense_lse, scale)
        self._side.join()
        return combine(parts, batch, tables.v_unrotate, dense_out, dense_lse, q.dtype)

    def _read_selected(
        self,
        step: DecodeStep,
        reading: Reading,
        layer: int,
        rotated: torch.Tensor,
        tables: LayerTables,
        dense_lse: torch.Tensor,
        scale: float,
    ) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        data, formats = self._memory.slab.frames, tables.formats
        batch, room = step.plan.mosaic, step.plan.selection
        assert room is not None, "the step was allocated without a selection"
        if reading is Reading.SELECTED:
            self._side.join()
            keys, page_lse = scan(rotated, data, dense_lse, batch, formats, scale)
            keep = step.kept[layer].selected if step.kept else None
            config = self._memory.config
            chosen = select(keys, page_lse, batch, room, formats, config.select_top_p, keep, config.select_steps)
        else:
            chosen = step.kept[layer].selected
        with self._side.beside():
            out, lse = far_field(chosen.far, data, batch, formats)
        near = attend_selected(rotated, data, batch, room, chosen, formats, scale)
        if step.kept and reading is Reading.SELECTED:
            selected_lse(near[1], room.first_piece, step.kept[layer].lse)
        elif step.kept:
            self._side.join()
            keep_share(near[1], room.first_piece, step.kept[layer].lse, lse, batch.first_piece)
        return [(*near, room.first_piece), (out, lse, batch.first_piece)]

    def _keep(self, shape: Shape) -> list[Kept]:
        """Room for every layer's selection, which all steps share: only the last one's is ever gone on with."""
        items, device = shape.requests * shape.epochs, self._memory.slab.frames.device
        shapes = (
            (self._heads, shape.room),
            (self._heads, items),
            (self._heads, shape.pages, self._group),
            (items, self._heads, self._group),
        )
        types = torch.int32, torch.int32, torch.float32, torch.float32
        sizes = [math.prod(size) for size in shapes]
        if not self._kept or any(len(x) < size for x, size in zip(self._kept[0], sizes, strict=True)):
            self._kept = [
                [torch.zeros(size, dtype=dtype, device=device) for size, dtype in zip(sizes, types, strict=True)]
                for _ in self._memory.dense_k
            ]
        kept = []
        for of_layer in self._kept:
            *selected, lse = (x[: math.prod(size)].view(size) for x, size in zip(of_layer, shapes, strict=True))
            kept.append(Kept(Selected(*selected), lse))
        return kept


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
