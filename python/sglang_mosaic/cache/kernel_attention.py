"""Attention of decoding requests whose context is partly mosaic, straight from the compressed bytes (Triton).

The same results as mixed_attention.py, up to float16: its plain torch is the reference. Requests with long compressed
contexts select the tokens that they read; those of another epoch are selected among themselves.
"""

from __future__ import annotations

import dataclasses

import torch

from mosaic_kernels.attend_pages.launch import attend_pages
from mosaic_kernels.attend_selected.launch import attend_selected
from mosaic_kernels.combine.launch import combine
from mosaic_kernels.far_field.launch import far_field
from mosaic_kernels.page_batch import LEAST_PAGES, LEAST_SCANNED, Item, PageBatch, plan
from mosaic_kernels.scan.launch import scan
from mosaic_kernels.segment_decode.launch import decode_frames
from mosaic_kernels.select.launch import select
from mosaic_kernels.select.selection import Selected, SelectionPlan, plan_selection
from sglang_mosaic.cache.dense_tokens import DenseTokens
from sglang_mosaic.cache.memory import PageMemory
from sglang_mosaic.cache.mixed_attention import Decode, Sequence
from sglang_mosaic.cache.segment_tables import LayerTables, SegmentTables
from sglang_mosaic.page import PAGE_SIZE

PROGRAMS_PER_PROCESSOR = 16
"""Programs that keep a multiprocessor busy."""
CROSSOVER = 1 << 19
"""Compressed tokens times KV heads of a batch below which reading all takes no longer than selecting (measured at 1, 8
and 32 requests, docs/kernels.md)."""


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

    def reads_as(self, other: _Group) -> bool:
        """Whether it reads the same pages of the same requests."""
        mine, others = ([sequence.key for sequence in group.sequences] for group in (self, other))
        return (mine, len(self.items)) == (others, len(other.items)) and all(
            a[:2] == b[:2] and torch.equal(torch.as_tensor(a.frames), torch.as_tensor(b.frames))
            for a, b in zip(self.items, other.items, strict=True)
        )


def kernel_decoder(memory: PageMemory, tables: SegmentTables) -> Decode:
    """`Epoch.decode` of mosaic frames by the kernel, for `MixedAttention`, in float16: scales and offsets are, too."""

    def decode(layer: int, frames: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        of_layer = tables.layer(layer)
        rows = frames - memory.table.first_mosaic
        k, v = decode_frames(memory.slab.frames, rows, of_layer.formats, of_layer.slots[number], torch.float16)
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
            if old is not None and ages and old.reads_as(group) and all(0 < age < self._steps for age in ages):
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
        tokens = [self._mosaic_tokens(sequence) for sequence in sequences]
        selects = [bool(config.select) and own >= config.least_selected for own in tokens]
        selectable = sum(own for own, chosen in zip(tokens, selects, strict=True) if chosen)
        if config.select_from is None and selectable * memory.dense_k[0].shape[1] < CROSSOVER:
            selects = [False] * len(sequences)
        self._groups: list[tuple[torch.Tensor, DenseTokens, _Group]] = []
        """Rows of the queries and dense tokens of a group's requests."""
        for selecting in (False, True):
            mine = [sequence for sequence, chosen in zip(sequences, selects, strict=True) if chosen == selecting]
            if mine:
                group = self._plan(mine, selecting)
                # Once a forward: copies to the device wait.
                rows = torch.tensor([sequence.first_query for sequence in mine], device=memory.slab.frames.device)
                dense = DenseTokens.of([self._dense_rows(sequence) for sequence in mine], rows.device)
                self._groups.append((rows, dense, shared.recall(group) if selecting else group))

    def run(self, layer: int, q: torch.Tensor, out: torch.Tensor, scale: float) -> None:
        """As `MixedAttention.run`."""
        tables = self._tables.layer(layer)
        for rows, dense, group in self._groups:
            queries = q[rows]
            slabs = self._memory.dense_k[layer], self._memory.dense_v[layer]
            dense_out, dense_lse = dense.attend(queries, *slabs, scale)
            rotated = _rotate(queries, group.batch, tables)
            if group.selection is None:
                batch = group.batch
                found = attend_pages(rotated, self._memory.slab.frames, batch, tables.formats, scale)
                joined = combine([(*found, batch.first_piece)], batch, tables.v_unrotate, dense_out, dense_lse)
            else:
                joined = self._read_selected(
                    layer, group, group.selection, rotated, tables, dense_out, dense_lse, scale
                )
            out[rows] = joined.to(out.dtype)

    def _read_selected(
        self,
        layer: int,
        group: _Group,
        room: SelectionPlan,
        rotated: torch.Tensor,
        tables: LayerTables,
        dense_out: torch.Tensor,
        dense_lse: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        data, batch, formats = self._memory.slab.frames, group.batch, tables.formats
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
            mosaic = sequence.frames[sequence.frames >= memory.table.first_mosaic]
            of_frame = memory.epochs.numbers_of(mosaic)
            found = {slots[number]: of_frame == number for number in of_frame.unique().tolist()}
            frames = mosaic - memory.table.first_mosaic
            items += [Item(request, slot, frames[own]) for slot, own in sorted(found.items(), key=lambda x: x[0])]
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

    def _dense_rows(self, sequence: Sequence) -> torch.Tensor:
        rows = (sequence.frames[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()[: sequence.tokens]
        return rows[rows < self._memory.table.first_mosaic * PAGE_SIZE]


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
