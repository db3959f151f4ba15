"""Which attention reads mosaic pages: Triton kernels on a GPU, the torch reference elsewhere."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from mosaic_kernels.segment_table import kernels_can
from sglang_mosaic.cache.memory import PageMemory
from sglang_mosaic.cache.mixed_attention import MixedAttention, Sequence
from sglang_mosaic.cache.selection import Selections

if TYPE_CHECKING:
    from mosaic_kernels.attend.ragged import RaggedAttention
    from sglang_mosaic.cache.decode_attention import DecodeAttention
    from sglang_mosaic.cache.prefill_attention import PrefillAttention
    from sglang_mosaic.cache.segment_tables import SegmentTables

logger = logging.getLogger(__name__)


class Readers:
    """Plans the attention of forwards, and remembers selections between them.

    Args:
        memory: the pool.
        group: query heads per KV head.
    """

    decoding: DecodeAttention | None = None
    """Attention of decode steps by kernels; None: there are none for this pool, `plan` plans everything. Prefills then
    are by `prefill`."""

    def __init__(self, memory: PageMemory, group: int) -> None:
        self._memory = memory
        config = memory.config
        self._tables: SegmentTables | None = None
        self._ragged: RaggedAttention | None = None
        self._selections: Selections | None = None
        k, v = memory.dense_k[0], memory.dense_v[0]
        # Only the codec of this project has kernels; the baselines are there to be compared with.
        if memory.slab.frames.is_cuda and config.codec == "planes" and kernels_can(k.shape[-1], v.shape[-1], group):
            # Imported here: Triton needs a GPU's driver.
            from sglang_mosaic.cache.decode_attention import DecodeAttention
            from sglang_mosaic.cache.segment_tables import SegmentTables

            # A CUDA graph may be captured before there is an epoch to tell what scans will read.
            self._tables = SegmentTables(memory, scanned=k.shape[-1] if not memory.epochs.live else 0)
            self.decoding = DecodeAttention(memory, self._tables, group)
            self._ragged = _flash(memory, group)
            if config.compresses:
                from sglang_mosaic.cache.warm_up import warm_up

                warm_up(memory, memory.dense_k[0].shape[1] * group, self._ragged)
        elif config.select:
            self._selections = Selections(config)

    def table_sizes(self) -> object:
        """What kernels are compiled for now; CUDA graphs captured for something else read wrong. Only with kernels."""
        assert self._tables is not None, "there are no kernels for this pool"
        self._tables.update()
        return self._tables.sizes

    def prefill(self, sequences: list[Sequence]) -> PrefillAttention:
        """Attention of a forward's new tokens, all of its requests in the order of their queries. Only with kernels."""
        from sglang_mosaic.cache.prefill_attention import PrefillAttention

        assert self._tables is not None, "there are no kernels for this pool"
        return PrefillAttention.of(self._memory, self._tables, sequences, self._ragged)

    def prefill_new(self, rows: torch.Tensor, news: list[int]) -> PrefillAttention:
        """The same where no request has an earlier token. Does not wait for the device.

        Args:
            rows: integer [new tokens], where they are written to.
            news: tokens of each request.
        """
        from sglang_mosaic.cache.prefill_attention import PrefillAttention

        assert self._tables is not None, "there are no kernels for this pool"
        return PrefillAttention(self._memory, self._tables, rows, news, news, self._ragged)

    def plan(self, sequences: list[Sequence]) -> MixedAttention:
        """Attention of requests with at least one mosaic page each, by the reference."""
        return MixedAttention(self._memory, sequences, self._selections)


def _flash(memory: PageMemory, group: int) -> RaggedAttention | None:
    """FlashInfer's attention of new tokens, compiled; None: torch's has to do."""
    from mosaic_kernels.attend.ragged import RaggedAttention
    from sglang_mosaic.cache.prefill_attention import DECODED

    k, v = memory.dense_k[0], memory.dense_v[0]
    if not RaggedAttention.can(k.device, k.dtype, k.shape[-1], v.shape[-1]):
        return None
    logger.info("sglang_mosaic: FlashInfer attends new tokens; what it compiles for that takes minutes the first time")
    try:
        ragged = RaggedAttention(k.device, k.shape[1] * group, k.shape[1], k.shape[-1])
        ragged.compile(k.dtype, DECODED, k.device)
    except Exception as error:  # without it, without a compiler, on a chip that it does not know: torch does the same
        logger.warning(
            "sglang_mosaic: FlashInfer cannot attend new tokens here (%s: %s); torch does, more slowly",
            type(error).__name__, str(error).strip().partition("\n")[0],
        )  # fmt: skip
        return None
    return ragged
