"""Attention of requests whose context is partly dense, partly mosaic, in plain torch.

Mosaic pages are decoded block by block into scratch, once per block for all requests of the batch that share them, and
attended in the codec's rotated bases; dense tokens are attended exactly; log-sum-exp joins the parts (the reference
for the kernels to come).
"""

from __future__ import annotations

import dataclasses

import torch

from mosaic_kernels.attend.reference import attend
from mosaic_kernels.merge_lse.reference import merge
from sglang_mosaic.cache.memory import PageMemory
from sglang_mosaic.page import PAGE_SIZE

BLOCK_PAGES = 256
"""Mosaic pages decoded at a time: bounds the scratch to 256 x 64 tokens of fp32 K and V of one layer."""


@dataclasses.dataclass(frozen=True)
class Sequence:
    """One request of a batch.

    Attributes:
        frames: int64 ``[pages]`` on the host, frame of each of its pages in order.
        tokens: context length including the new tokens.
        first_query, queries: its rows in the batch's query tensor; the last ``queries`` tokens of the context.
    """

    frames: torch.Tensor
    tokens: int
    first_query: int
    queries: int


@dataclasses.dataclass(frozen=True)
class _Part:
    """Dense tokens of one sequence, and its rows among the batch's queries."""

    rows: slice
    dense_slots: torch.Tensor
    causal_offset: int


@dataclasses.dataclass(frozen=True)
class _Block:
    """Mosaic frames decoded together; ``readers`` are (sequence, its pages among them or None for all of them)."""

    frames: torch.Tensor
    readers: list[tuple[int, torch.Tensor | None]]


class MixedAttention:
    """Planned once a forward, run once a layer.

    Args:
        memory: the pool.
        sequences: requests with at least one mosaic page each.
    """

    def __init__(self, memory: PageMemory, sequences: list[Sequence]) -> None:
        self.memory = memory
        device = memory.table.frames.device
        first_mosaic = memory.table.first_mosaic
        is_mosaic = [s.frames >= first_mosaic for s in sequences]
        chosen = torch.cat([s.frames[m] for s, m in zip(sequences, is_mosaic, strict=True)])
        unique, index = torch.unique(chosen, return_inverse=True)
        indexes = index.split([int(m.sum()) for m in is_mosaic])
        self._blocks = [
            _Block(unique[start : start + BLOCK_PAGES].to(device), _readers(indexes, start, len(unique), device))
            for start in range(0, len(unique), BLOCK_PAGES)
        ]
        self._parts = []
        for sequence, mosaic in zip(sequences, is_mosaic, strict=True):
            slots = (sequence.frames[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()[: sequence.tokens]
            dense = slots[~mosaic.repeat_interleave(PAGE_SIZE)[: sequence.tokens]]
            self._parts.append(
                _Part(
                    rows=slice(sequence.first_query, sequence.first_query + sequence.queries),
                    dense_slots=dense.to(device),
                    # Mosaic pages lie before every query, so masking the dense tokens alone is causal.
                    causal_offset=len(dense) - sequence.queries,
                )
            )

    def run(self, layer: int, q: torch.Tensor, out: torch.Tensor, scale: float) -> None:
        """Attend with the planned rows of ``q``, K and V of their new tokens already written.

        Args:
            layer: index among this rank's layers.
            q: ``[tokens, query_heads, k_dim]``, the whole batch.
            out: ``[tokens, query_heads, v_dim]``; the planned rows are written.
            scale: factor of the logits.
        """
        codec = self.memory.codec
        rotated = [codec.rotate_queries(layer, q[part.rows]) for part in self._parts]
        mosaic: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for block in self._blocks:
            k, v = self.memory.mosaic_segments(layer, block.frames)  # [pages, heads, 64, dim]
            for i, pages in block.readers:
                piece = attend(rotated[i], *_head_major(k, v, pages), scale)
                mosaic[i] = merge(*mosaic[i], *piece) if i in mosaic else piece
        for i, part in enumerate(self._parts):
            rotated_out, lse = mosaic[i]
            piece = codec.unrotate_output(layer, rotated_out), lse
            out[part.rows] = merge(*self._dense(layer, q[part.rows], part, scale), *piece)[0].to(out.dtype)

    def _dense(self, layer: int, q: torch.Tensor, part: _Part, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        k = self.memory.dense_k[layer][part.dense_slots].transpose(0, 1)
        v = self.memory.dense_v[layer][part.dense_slots].transpose(0, 1)
        return attend(q, k, v, scale, causal_offset=part.causal_offset)


def _readers(
    indexes: tuple[torch.Tensor, ...], start: int, unique: int, device: torch.device
) -> list[tuple[int, torch.Tensor | None]]:
    """Which sequences read the block of unique mosaic pages that begins at ``start``, and which of its pages."""
    stop = min(start + BLOCK_PAGES, unique)
    readers: list[tuple[int, torch.Tensor | None]] = []
    for i, index in enumerate(indexes):
        inside = index[(index >= start) & (index < stop)] - start
        if len(inside) == stop - start:
            readers.append((i, None))
        elif len(inside):
            readers.append((i, inside.to(device)))
    return readers


def _head_major(k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """``[pages, heads, 64, dim]`` -> ``[heads, tokens, dim]`` of the chosen pages, in any order: softmax has none."""
    if pages is not None:
        k, v = k[pages], v[pages]
    return k.transpose(0, 1).flatten(1, 2), v.transpose(0, 1).flatten(1, 2)
