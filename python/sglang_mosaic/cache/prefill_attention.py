"""Attention of new tokens over the pool by kernels: flash attention, what is compressed decoded block by block.

The same results as mixed_attention.py, up to float16: its plain torch is the reference. All requests of a forward are
attended together: their uncompressed tokens in one call a layer, and compressed pages in one for all that read them,
such as users of one system prompt.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from mosaic_kernels.attend.launch import attend, attend_causally
from mosaic_kernels.attend.ragged import RaggedAttention
from mosaic_kernels.merge_lse.launch import merge_rows
from mosaic_kernels.rotate_rows.launch import rotate_rows
from mosaic_kernels.segment_decode.launch import decode_frames
from sglang_mosaic.cache.memory import PageMemory
from sglang_mosaic.cache.mixed_attention import Sequence, dense_rows
from sglang_mosaic.cache.segment_tables import SegmentTables

BLOCK_PAGES = 512
"""Compressed pages decoded at a time: bounds the scratch to 32k tokens of float16 K and V of one layer."""
DECODED = torch.float16
"""Type of decoded K and V."""
_TOGETHER = 31
"""Requests whose bits are put into one integer."""


class _Block(NamedTuple):
    frames: torch.Tensor
    """int64 [P], rows of the slab."""
    rows: slice | torch.Tensor
    """Of the batch's queries, those that read all of it; int64 [N] if they do not lie side by side."""


class PrefillAttention:
    """Planned once a forward, run once a layer.

    Args:
        memory: the pool; its epochs are `PlanesEpoch`s.
        tables: of the pool.
        rows: integer, rows of the dense slabs of the uncompressed tokens of all requests, one request after the other.
        news: new tokens of each request, the last ones of it.
        lengths: uncompressed tokens of each request, the new ones included.
        ragged: FlashInfer's attention, of one forward at a time; None: torch's.
    """

    def __init__(
        self,
        memory: PageMemory,
        tables: SegmentTables,
        rows: torch.Tensor,
        news: list[int],
        lengths: list[int],
        ragged: RaggedAttention | None = None,
    ) -> None:
        self._memory, self._tables, self._ragged = memory, tables, ragged
        self._rows = rows.to(memory.table.frames.device, non_blocking=True)
        # Compressed pages lie before every query, so masking the others alone is causal.
        self._starts = _starts(news), _starts(lengths)
        self._new, self._most = sum(news), (max(news), max(lengths))
        self._only_new = news == lengths
        """Whether every uncompressed token is a new one."""
        self._blocks: dict[int, list[_Block]] = {}
        """By slot of their epoch in the tables."""

    @classmethod
    def of(
        cls,
        memory: PageMemory,
        tables: SegmentTables,
        sequences: list[Sequence],
        ragged: RaggedAttention | None = None,
    ) -> PrefillAttention:
        """That of the requests of a batch, in the order of their queries."""
        compressed = [sequence.frames >= memory.table.first_mosaic for sequence in sequences]
        own = [dense_rows(s, mosaic) for s, mosaic in zip(sequences, compressed, strict=True)]
        news, lengths = [s.queries for s in sequences], [len(rows) for rows in own]
        found = cls(memory, tables, torch.cat(own), news, lengths, ragged)
        mosaic = [s.frames[which] for s, which in zip(sequences, compressed, strict=True)]
        if any(map(len, mosaic)):
            found._decode(sequences, mosaic)
        return found

    def _decode(self, sequences: list[Sequence], mosaic: list[torch.Tensor]) -> None:
        """Plan to read compressed pages, by sequence int64 [pages] frames."""
        memory, device = self._memory, self._memory.table.frames.device
        self._tables.update()
        spans = [range(s.first_query, s.first_query + s.queries) for s in sequences]
        for number, frames, readers in _shared(memory, mosaic):
            rows = _rows([spans[i] for i in readers], device)
            of_all = (frames - memory.table.first_mosaic).to(device, non_blocking=True)
            blocks = self._blocks.setdefault(memory.epochs.slots[number], [])
            blocks += [_Block(part, rows) for part in of_all.split(BLOCK_PAGES)]

    @property
    def compressed_pages(self) -> int:
        """That are decoded, each once."""
        return sum(len(block.frames) for blocks in self._blocks.values() for block in blocks)

    @functools.cached_property
    def _starts_there(self) -> tuple[torch.Tensor, torch.Tensor]:
        """On the device of the pool."""
        device, (queries, keys) = self._memory.table.frames.device, self._starts
        return queries.to(device, non_blocking=True), keys.to(device, non_blocking=True)

    def run(
        self, layer: int, q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """Attention of the new tokens, their K and V already written.

        Args:
            layer: index among this rank's layers.
            q: [new tokens, Hq, D], heads and channels contiguous.
            k, v: [new tokens, H, D], what was written; None: only the pool has them.
            scale: factor of the logits.

        Returns:
            [new tokens, Hq, D] in the type of q.
        """
        memory = self._memory
        if k is None or v is None or not self._only_new:
            k, v = memory.dense_k[layer][self._rows], memory.dense_v[layer][self._rows]
        # FlashInfer takes one type, and no rows that only fill up a graph.
        ragged = self._ragged if q.dtype == k.dtype and len(q) == self._new else None
        if ragged is None:
            out, lse = attend_causally(q, k, v, *self._starts_there, *self._most, scale)
        else:
            out, lse = ragged.attend_causally(q, k, v, self._starts, scale)
        if not self._blocks:
            return out
        tables = self._tables.layer(layer)
        for slot, blocks in self._blocks.items():
            rotated = rotate_rows(q, tables.q_basis[slot], DECODED)
            for frames, rows in blocks:
                k, v = decode_frames(memory.slab.frames, frames, tables.formats, slot, DECODED)
                found = (ragged.attend if ragged else attend)(rotated[rows], k.flatten(1, 2), v.flatten(1, 2), scale)
                if isinstance(rows, slice):
                    merge_rows(out[rows], lse[rows], *found, tables.v_unrotate[slot])
                else:
                    merge_rows(out, lse, *found, tables.v_unrotate[slot], rows)
        return out


def _shared(memory: PageMemory, chosen: list[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor, list[int]]]:
    """Mosaic frames `chosen[i]` of each sequence i, every frame once: those of one epoch that the same sequences read,
    and which sequences."""
    owner = torch.arange(len(chosen)).repeat_interleave(torch.tensor([len(frames) for frames in chosen]))
    frames, at = torch.unique(torch.cat(chosen), return_inverse=True)
    numbers = memory.epochs.numbers_of(frames)
    group = numbers
    for first in range(0, len(chosen), _TOGETHER):
        some = (owner >= first) & (owner < first + _TOGETHER)
        readers = torch.zeros_like(frames).index_add_(0, at[some], 1 << (owner[some] - first))
        group = torch.unique((group << _TOGETHER) + readers, return_inverse=True)[1]
    order = torch.argsort(group, stable=True)
    reads = torch.zeros(int(group.max()) + 1, len(chosen), dtype=torch.bool)
    reads[group[at], owner] = True
    for mine, who in zip(order.split(torch.bincount(group).tolist()), reads, strict=True):
        yield int(numbers[mine[0]]), frames[mine], who.nonzero().flatten().tolist()


def _rows(spans: list[range], device: torch.device) -> slice | torch.Tensor:
    """All of them, one after the other."""
    if all(one.stop == other.start for one, other in itertools.pairwise(spans)):
        return slice(spans[0].start, spans[-1].stop)
    return torch.cat([torch.arange(span.start, span.stop) for span in spans]).to(device, non_blocking=True)


def _starts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
