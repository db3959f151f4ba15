"""Attention of decoding requests whose context is partly mosaic, straight from the compressed bytes (Triton).

The same results as mixed_attention.py, up to float16: its plain torch is the reference. Requests with long compressed
contexts select the tokens that they read; those of another epoch are selected among themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Several

import torch

from mosaic_kernels.attend.reference import attend
from mosaic_kernels.attend_pages.launch import attend_pages
from mosaic_kernels.attend_selected.launch import attend_selected
from mosaic_kernels.combine.launch import combine
from mosaic_kernels.far_field.launch import far_field
from mosaic_kernels.page_batch import LEAST_PAGES, LEAST_SCANNED, Item, PageBatch, plan
from mosaic_kernels.scan.launch import scan
from mosaic_kernels.segment_decode.launch import decode_frames
from mosaic_kernels.select.launch import select
from mosaic_kernels.select.selection import Selected, SelectionPlan, plan_selection
from sglang_mosaic.cache.memory import PageMemory
from sglang_mosaic.cache.mixed_attention import Decode, Sequence
from sglang_mosaic.cache.segment_tables import LayerTables, SegmentTables
from sglang_mosaic.page import PAGE_SIZE

PROGRAMS_PER_PROCESSOR = 16
"""Programs that keep a multiprocessor busy."""


@dataclasses.dataclass
class _Group:
    """Requests that are read alike, planned together."""

    sequences: list[Sequence]
    items: list[Item]
    batch: PageBatch
    selection: SelectionPlan | None
    """Room for what they select; None: they read all."""
    selected: dict[int, tuple[Selected, torch.Tensor]] = dataclasses.field(default_factory=dict)
    """By layer, what was selected and its log-sum-exp by item [items, H, group] in that step."""

    @property
    def signature(self) -> tuple:
        """Equal for the same pages of the same requests."""
        keys = tuple(sequence.key for sequence in self.sequences)
        return keys, tuple((item.request, item.epoch, tuple(item.frames)) for item in self.items)


def kernel_decoder(memory: PageMemory, tables: SegmentTables) -> Decode:
    """`Epoch.decode` of mosaic frames by the kernel, for `MixedAttention`."""

    def decode(layer: int, frames: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        of_layer = tables.layer(layer)
        rows = frames - memory.table.first_mosaic
        k, v = decode_frames(memory.slab.frames, rows, of_layer.formats, of_layer.slots[number])
        return k.transpose(0, 1), v.transpose(0, 1)

    return decode


class SharedSelections:
    """Selections that later steps of the same requests go on with (`--mosaic-select-steps`).

    Only while no further page of theirs is compressed: then they select anew.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._group: _Group | None = None

    def recall(self, group: _Group) -> _Group:
        """The group planned some steps ago, if it reads the same pages and is not too old; else this one, from now."""
        old, self._group = self._group, None
        if self._steps > 1 and group.selection is not None:
            self._group = group
            ages = [] if old is None else [
                new.tokens - then.tokens for new, then in zip(group.sequences, old.sequences, strict=False)
            ]  # fmt: skip
            if ages and old.signature == group.signature and all(0 < age < self._steps for age in ages):
                group.selected = old.selected
                self._group = old
        return group


class KernelAttention:
    """Planned once a forward, run once a layer.

    Args:
        memory: the pool; its epochs are `PlanesEpoch`s.
        tables: of the pool.
        sequences: decoding requests (one query each) with at least one mosaic page each.
        shared: selections of earlier steps.
    """

    def __init__(
        self, memory: PageMemory, tables: SegmentTables, sequences: list[Sequence], shared: SharedSelections
    ) -> None:
        self._memory, self._tables = memory, tables
        config = memory.config
        selects = [bool(config.select) and self._mosaic_tokens(s) >= max(config.select_from, 1) for s in sequences]
        self._groups: list[tuple[torch.Tensor, list[torch.Tensor], _Group]] = []
        """Rows of the queries and slots of the dense tokens of a group's requests."""
        for selecting in (False, True):
            mine = [sequence for sequence, chosen in zip(sequences, selects, strict=True) if chosen == selecting]
            if mine:
                group = self._plan(mine, selecting)
                # Once a forward: copies to the device wait.
                rows = torch.tensor([sequence.first_query for sequence in mine], device=memory.slab.frames.device)
                dense = [self._dense_slots(sequence) for sequence in mine]
                self._groups.append((rows, dense, shared.recall(group) if selecting else group))

    def run(self, layer: int, q: torch.Tensor, out: torch.Tensor, scale: float) -> None:
        """As `MixedAttention.run`."""
        tables = self._tables.layer(layer)
        for rows, dense, group in self._groups:
            queries = q[rows]
            dense_out, dense_lse = self._attend_dense(layer, queries, dense, scale)
            rotated = _rotate(queries, group.batch, tables)
            if group.selection is None:
                batch = group.batch
                found = attend_pages(rotated, self._memory.slab.frames, batch, tables.formats, scale)
                joined = combine([(*found, batch.first_piece)], batch, tables.v_unrotate, dense_out, dense_lse)
            else:
                joined = self._read_selected(layer, group, rotated, tables, dense_out, dense_lse, scale)
            out[rows] = joined.to(out.dtype)

    def _read_selected(
        self,
        layer: int,
        group: _Group,
        rotated: torch.Tensor,
        tables: LayerTables,
        dense_out: torch.Tensor,
        dense_lse: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        data, batch, room, formats = self._memory.slab.frames, group.batch, group.selection, tables.formats
        fresh = layer not in group.selected
        if fresh:
            keys, page_lse = scan(rotated, data, dense_lse, batch, formats, scale)
            chosen = select(keys, page_lse, batch, room, formats, self._memory.config.select_top_p)
        else:
            chosen, then = group.selected[layer]
        near = attend_selected(rotated, data, batch, room, chosen, formats, scale)
        now = _by_item(near[1], room.pieces, len(batch.epochs))
        far = chosen.far
        if fresh:
            group.selected[layer] = chosen, now
        else:
            # Queries of later steps have other logits; the far field is taken to keep its share.
            drift = torch.where(now.isfinite() & then.isfinite(), now - then, 0.0)
            lengths = torch.diff(batch.first_page).long()
            far = far + drift.repeat_interleave(lengths, 0, output_size=len(batch.frames)).transpose(0, 1)
        parts = (*near, room.first_piece), (*far_field(far, data, batch, formats), batch.first_piece)
        return combine(parts, batch, tables.v_unrotate, dense_out, dense_lse)

    def _plan(self, sequences: list[Sequence], selecting: bool) -> _Group:
        memory = self._memory
        device = memory.slab.frames.device
        slots = self._tables.layer(0).slots
        items = []
        for request, sequence in enumerate(sequences):
            by_slot: dict[int, list[int]] = {}
            for frame in sequence.frames[sequence.frames >= memory.table.first_mosaic].tolist():
                by_slot.setdefault(slots[memory.epochs.number(frame)], []).append(frame - memory.table.first_mosaic)
            items += [Item(request, slot, frames) for slot, frames in sorted(by_slot.items())]
        heads = memory.dense_k[0].shape[1]
        programs = PROGRAMS_PER_PROCESSOR * _processors(device)
        selection = None
        if selecting:
            most = [max(int(memory.config.select * len(item.frames) * PAGE_SIZE), 1) for item in items]
            selection = plan_selection(most, heads, programs, device)
        least = LEAST_SCANNED if selecting else LEAST_PAGES
        return _Group(sequences, items, plan(items, len(sequences), heads, programs, device, least), selection)

    def _mosaic_tokens(self, sequence: Sequence) -> int:
        return int((sequence.frames >= self._memory.table.first_mosaic).sum()) * PAGE_SIZE

    def _dense_slots(self, sequence: Sequence) -> torch.Tensor:
        slots = (sequence.frames[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()[: sequence.tokens]
        dense = slots[slots < self._memory.table.first_mosaic * PAGE_SIZE]
        return dense.to(self._memory.slab.frames.device)

    def _attend_dense(
        self, layer: int, queries: torch.Tensor, slots: Several[torch.Tensor], scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Over the dense tokens of each request: float32 [requests, Hq, Dv] and lse [requests, Hq]."""
        k, v = self._memory.dense_k[layer], self._memory.dense_v[layer]
        found = [
            attend(query[None], k[own].transpose(0, 1), v[own].transpose(0, 1), scale)
            for query, own in zip(queries, slots, strict=True)
        ]
        out, lse = (torch.cat(x) for x in zip(*found, strict=True))
        return out.contiguous(), lse.contiguous()


def _rotate(queries: torch.Tensor, batch: PageBatch, tables: LayerTables) -> torch.Tensor:
    """[requests, Hq, k_dim] any float -> float32 [items, H, group, k_dim] in the basis of each item."""
    heads = tables.q_basis.shape[1]
    rows = queries.float()[batch.requests.long()].unflatten(1, (heads, -1))
    # With one epoch, the usual case, all items share its bases.
    basis = tables.q_basis if len(tables.q_basis) == 1 else tables.q_basis[batch.epochs.long()]
    return torch.matmul(rows, basis).contiguous()


def _by_item(lse: torch.Tensor, pieces: torch.Tensor, items: int) -> torch.Tensor:
    """Log-sum-exp [pieces, H, group] of pieces -> of items [items, H, group]."""
    item = pieces[:, 0].long()
    index = item[:, None, None].expand_as(lse)
    top = lse.new_full((items, *lse.shape[1:]), -torch.inf).scatter_reduce(0, index, lse, "amax")
    shift = torch.where(top == -torch.inf, 0.0, top)
    return shift + torch.zeros_like(top).scatter_add(0, index, torch.exp(lse - shift[item])).log()


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
