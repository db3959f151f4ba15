"""Which attention reads mosaic pages: Triton kernels on a GPU, the torch reference elsewhere."""

from __future__ import annotations

from typing import Protocol

import torch

from mosaic_kernels.segment_table import kernels_can
from sglang_mosaic.cache.memory import PageMemory
from sglang_mosaic.cache.mixed_attention import MixedAttention, Sequence
from sglang_mosaic.cache.segment_tables import SegmentTables
from sglang_mosaic.cache.selection import Selections


class Mixed(Protocol):
    """Attention of one forward."""

    def run(self, layer: int, q: torch.Tensor, out: torch.Tensor, scale: float) -> None:
        """As `MixedAttention.run`."""


class Readers:
    """Plans the attention of forwards, and remembers selections between them.

    Args:
        memory: the pool.
        group: query heads per KV head.
    """

    def __init__(self, memory: PageMemory, group: int) -> None:
        self._memory = memory
        config = memory.config
        self._selections = Selections(config) if config.select else None
        # Only the codec of this project has kernels; the baselines are there to be compared with.
        self._tables = None
        dims = memory.dense_k[0].shape[-1], memory.dense_v[0].shape[-1]
        if memory.slab.frames.is_cuda and config.codec == "planes" and kernels_can(*dims, group):
            # Imported here: Triton needs a GPU's driver.
            from sglang_mosaic.cache.kernel_attention import SharedSelections

            self._tables, self._shared = SegmentTables(memory), SharedSelections(config.select_steps)

    def plan(self, sequences: list[Sequence], decoding: bool) -> Mixed:
        """Attention of requests with at least one mosaic page each.

        Args:
            decoding: each has one new token.
        """
        if self._tables is None:
            return MixedAttention(self._memory, sequences, self._selections)
        from sglang_mosaic.cache.kernel_attention import KernelAttention, kernel_decoder

        if decoding:
            return KernelAttention(self._memory, self._tables, sequences, self._shared)
        return MixedAttention(
            self._memory, sequences, self._selections, decode=kernel_decoder(self._memory, self._tables)
        )
