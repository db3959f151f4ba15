"""Attention of requests whose context is partly dense, partly mosaic.

Mosaic pages are decoded block by block into scratch, once per block for all requests of the batch that share them, and
attended in the rotated bases of their epoch; dense tokens are attended exactly; log-sum-exp joins the parts. All in
plain torch, the reference of decode_attention.py and prefill_attention.py. Requests with long compressed contexts may
select the tokens that they read (selection.py).
"""

from __future__ import annotations

import dataclasses

import torch

from mosaic_kernels.attend.reference import attend
from mosaic_kernels.merge_lse.reference import merge
from sglang_mosaic.cache.memory import PageMemory
from sglang_mosaic.cache.selection import SelectionPlan, Selections
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
        key: of a decoding request, the same in all of its steps and of no other that runs beside it; None: it does not
            decode.
    """

    frames: torch.Tensor
    tokens: int
    first_query: int
    queries: int
    key: int | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """Dense tokens of one sequence, and its rows among the batch's queries."""

    rows: slice
    dense_slots: torch.Tensor
    causal_offset: int


@dataclasses.dataclass(frozen=True)
class Block:
    """Mosaic frames of one epoch, decoded together; ``readers`` are (sequence, its pages among them or None for all of
    them)."""

    epoch: int
    frames: torch.Tensor
    readers: list[tuple[int, torch.Tensor | None]]


class MixedAttention:
    """Planned once a forward, run once a layer.

    Args:
        memory: the pool.
        sequences: requests with at least one mosaic page each.
        selections: how requests choose the tokens that they read; None: they read all.
    """

    def __init__(self, memory: PageMemory, sequences: list[Sequence], selections: Selections | None = None) -> None:
        self.memory = memory
        device = memory.table.frames.device
        first_mosaic = memory.table.first_mosaic
        is_mosaic = [s.frames >= first_mosaic for s in sequences]
        self._blocks = _blocks(memory, [s.frames[m] for s, m in zip(sequences, is_mosaic, strict=True)])
        self._parts = []
        for sequence, mosaic in zip(sequences, is_mosaic, strict=True):
            dense = dense_rows(sequence, mosaic)
            self._parts.append(
                Part(
                    rows=slice(sequence.first_query, sequence.first_query + sequence.queries),
                    dense_slots=dense.to(device),
                    # Mosaic pages lie before every query, so masking the dense tokens alone is causal.
                    causal_offset=len(dense) - sequence.queries,
                )
            )
        self._selecting = None if selections is None else selections.plan(memory, sequences, self._blocks)

    @property
    def compressed_pages(self) -> int:
        """That are decoded, each once."""
        return sum(len(block.frames) for block in self._blocks)

    def run(self, layer: int, q: torch.Tensor, out: torch.Tensor, scale: float) -> None:
        """Attend with the planned rows of ``q``, K and V of their new tokens already written.

        Args:
            layer: index among this rank's layers.
            q: ``[tokens, query_heads, k_dim]``, the whole batch.
            out: ``[tokens, query_heads, v_dim]``; the planned rows are written.
            scale: factor of the logits.
        """
        memory = self.memory
        results = [self._dense(layer, q[part.rows], part, scale) for part in self._parts]
        rotated = {
            (i, block.epoch): memory.epochs[block.epoch].rotate_queries(layer, q[self._parts[i].rows])
            for block in self._blocks
            for i, _ in block.readers
        }
        if self._selecting is not None:
            self._selecting.choose(layer, rotated, [lse for _, lse in results], scale)
        mosaic: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        for b, block in enumerate(self._blocks):
            k, v = self._decode(layer, block)  # [pages, heads, 64, dim]
            for i, pages in block.readers:
                key = i, block.epoch
                k_rows, v_rows = head_major(k, pages), head_major(v, pages)
                if self._selecting is not None and self._selecting.selects(i):
                    piece = self._selecting.attend(b, i, rotated[key], k_rows, v_rows, scale)
                else:
                    piece = attend(rotated[key], k_rows, v_rows, scale)
                mosaic[key] = merge(*mosaic[key], *piece) if key in mosaic else piece
        if self._selecting is not None:
            self._add_far(self._selecting, layer, mosaic)
        for (i, number), (rotated_out, lse) in mosaic.items():
            piece = memory.epochs[number].unrotate_output(layer, rotated_out), lse
            results[i] = merge(*results[i], *piece)
        for part, (result, _) in zip(self._parts, results, strict=True):
            out[part.rows] = result.to(out.dtype)

    @staticmethod
    def _add_far(
        selecting: SelectionPlan, layer: int, mosaic: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        for i in selecting.readers:
            for number, piece in selecting.far(layer, i).items():
                mosaic[i, number] = merge(*mosaic[i, number], *piece)

    def _decode(self, layer: int, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
        data = self.memory.mosaic_data(layer, block.frames, block.epoch)
        return self.memory.epochs[block.epoch].decode(layer, data)

    def _dense(self, layer: int, q: torch.Tensor, part: Part, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        k = self.memory.dense_k[layer][part.dense_slots].transpose(0, 1)
        v = self.memory.dense_v[layer][part.dense_slots].transpose(0, 1)
        return attend(q, k, v, scale, causal_offset=part.causal_offset)


def dense_rows(sequence: Sequence, is_mosaic: torch.Tensor) -> torch.Tensor:
    """Rows of the dense slabs, int64, of every uncompressed token of a request in order; is_mosaic bool [pages]."""
    frames = sequence.frames[~is_mosaic]
    # The page that is being written is the last one, and never compressed.
    count = sequence.tokens - PAGE_SIZE * int(is_mosaic.sum())
    return (frames[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()[:count]


def _blocks(memory: PageMemory, chosen: list[torch.Tensor]) -> list[Block]:
    """Blocks of the mosaic frames ``chosen[i]`` of each sequence i, every frame once, one epoch to a block."""
    unique, index = torch.unique(torch.cat(chosen), return_inverse=True)
    device = memory.table.frames.device
    numbers = memory.epochs.numbers_of(unique)
    # Frames in order of their epochs, so that a block is a range.
    order = torch.argsort(numbers, stable=True)
    unique, numbers = unique[order], numbers[order]
    indexes = torch.argsort(order)[index].split([len(frames) for frames in chosen])
    blocks = []
    for number in numbers.unique().tolist():
        first, last = (numbers == number).nonzero().aminmax()
        for start in range(int(first), int(last) + 1, BLOCK_PAGES):
            stop = min(start + BLOCK_PAGES, int(last) + 1)
            blocks.append(Block(number, unique[start:stop].to(device), _readers(indexes, start, stop, device)))
    return blocks


def _readers(
    indexes: tuple[torch.Tensor, ...], start: int, stop: int, device: torch.device
) -> list[tuple[int, torch.Tensor | None]]:
    """Which sequences read the unique mosaic pages from ``start`` to ``stop``, and which of them."""
    readers: list[tuple[int, torch.Tensor | None]] = []
    for i, index in enumerate(indexes):
        # In the order of the block: what is equally attended is chosen by order, whatever else is in the batch.
        inside = index[(index >= start) & (index < stop)].sort().values - start
        if len(inside) == stop - start:
            readers.append((i, None))
        elif len(inside):
            readers.append((i, inside.to(device)))
    return readers


def head_major(x: torch.Tensor, pages: torch.Tensor | None) -> torch.Tensor:
    """``[pages, heads, 64, dim]`` -> ``[heads, tokens, dim]`` of the chosen pages, in any order: softmax has none."""
    if pages is not None:
        x = x[pages]
    return x.transpose(0, 1).flatten(1, 2)
