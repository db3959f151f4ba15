"""Attention of new tokens over the pool by kernels: flash attention, what is compressed decoded block by block.

The same results as mixed_attention.py, up to float16: its plain torch is the reference. All requests of a forward are
attended together: their uncompressed tokens in one call a layer, and a block of compressed pages in one for all that
read it whole, such as users of one system prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Sequence_
from typing import NamedTuple

import torch

from mosaic_kernels.attend.launch import attend, attend_causally
from mosaic_kernels.merge_lse.launch import merge_rows
from mosaic_kernels.rotate_rows.launch import rotate_rows
from mosaic_kernels.segment_decode.launch import decode_frames
from sglang_mosaic.cache.memory import PageMemory
from sglang_mosaic.cache.mixed_attention import Sequence, blocks_of, head_major
from sglang_mosaic.cache.segment_tables import SegmentTables
from sglang_mosaic.page import PAGE_SIZE

BLOCK_PAGES = 512
"""Compressed pages decoded at a time: bounds the scratch to 32k tokens of float16 K and V of one layer."""


class _Readers(NamedTuple):
    """Requests that read the same pages of a block."""

    rows: slice | torch.Tensor
    """Their rows among the batch's queries; int64 [N] if they do not lie side by side."""
    pages: torch.Tensor | None
    """int64, of the block; None: all."""


class _Block(NamedTuple):
    slot: int
    """Of the epoch, in the tables."""
    rows: torch.Tensor
    """int64 [P], of the slab."""
    readers: list[_Readers]


class PrefillAttention:
    """Planned once a forward, run once a layer.

    Args:
        memory: the pool; its epochs are `PlanesEpoch`s.
        tables: of the pool.
        sequences: all requests of the batch, in the order of their queries.
    """

    def __init__(self, memory: PageMemory, tables: SegmentTables, sequences: Sequence_[Sequence]) -> None:
        self._memory, self._tables = memory, tables
        device = memory.table.frames.device
        compressed = [sequence.frames >= memory.table.first_mosaic for sequence in sequences]
        own = [_dense_rows(s, mosaic) for s, mosaic in zip(sequences, compressed, strict=True)]
        news, lengths = [s.queries for s in sequences], [len(rows) for rows in own]
        self._rows = torch.cat(own).to(device, non_blocking=True)
        self._queries = _starts(news, device)
        # Compressed pages lie before every query, so masking the others alone is causal.
        self._keys = _starts(lengths, device)
        self._most = max(news), max(lengths)
        self._only_new = news == lengths
        """Whether every uncompressed token is a new one."""
        self._blocks: dict[int, list[_Block]] = {}
        """By epoch."""
        mosaic = [s.frames[which] for s, which in zip(sequences, compressed, strict=True)]
        if any(map(len, mosaic)):
            tables.update()
            for block in blocks_of(memory, mosaic, BLOCK_PAGES):
                readers = _group(block.readers, sequences, device)
                rows = block.frames - memory.table.first_mosaic
                self._blocks.setdefault(block.epoch, []).append(_Block(memory.epochs.slots[block.epoch], rows, readers))

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
        out, lse = attend_causally(q, k, v, self._queries, self._keys, *self._most, scale)
        if not self._blocks:
            return out
        tables = self._tables.layer(layer)
        for blocks in self._blocks.values():
            # As K and V are decoded.
            rotated = rotate_rows(q, tables.q_basis[blocks[0].slot], torch.float16)
            for slot, frames, readers in blocks:
                k, v = decode_frames(memory.slab.frames, frames, tables.formats, slot, torch.float16)
                for rows, pages in readers:
                    found = attend(rotated[rows], _tokens(k, pages), _tokens(v, pages), scale)
                    if isinstance(rows, slice):
                        merge_rows(out[rows], lse[rows], *found, tables.v_unrotate[slot])
                    else:
                        merge_rows(out, lse, *found, tables.v_unrotate[slot], rows)
        return out


def _dense_rows(sequence: Sequence, compressed: torch.Tensor) -> torch.Tensor:
    """int64, of the dense slabs, of every uncompressed token of a request in order."""
    frames = sequence.frames[~compressed]
    # The page that is being written is the last one, and never compressed.
    count = sequence.tokens - PAGE_SIZE * int(compressed.sum())
    return (frames[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()[:count]


def _group(
    readers: Sequence_[tuple[int, torch.Tensor | None]], sequences: Sequence_[Sequence], device: torch.device
) -> list[_Readers]:
    """Those that read all of a block together, each of the others for itself."""
    spans = [range(s.first_query, s.first_query + s.queries) for s in sequences]
    found = [_Readers(slice(spans[i].start, spans[i].stop), pages) for i, pages in readers if pages is not None]
    whole = [spans[i] for i, pages in readers if pages is None]
    if whole:
        apart = any(one.stop != other.start for one, other in itertools.pairwise(whole))
        rows = torch.tensor([row for span in whole for row in span]).to(device) if apart else None
        found.append(_Readers(slice(whole[0].start, whole[-1].stop) if rows is None else rows, None))
    return found


def _tokens(x: torch.Tensor, pages: torch.Tensor | None) -> torch.Tensor:
    """[H, pages, 64, D] -> [H, tokens, D] of the chosen pages."""
    return head_major(x.transpose(0, 1), pages)


def _starts(lengths: Sequence_[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
