"""Page memory of one rank: decisions of the lifecycle, executed on the slabs at forward boundaries."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch

from sglang_mosaic.cache.audit import audit_frames, audit_free_list, audit_tree
from sglang_mosaic.cache.lifecycle import Encoding, PageLifecycle
from sglang_mosaic.codec.base import SegmentCodec
from sglang_mosaic.config import MosaicConfig
from sglang_mosaic.errors import InvariantError
from sglang_mosaic.layout import MemoryPlan
from sglang_mosaic.page import PAGE_SIZE
from sglang_mosaic.pool.page_table import PageTable
from sglang_mosaic.pool.slabs import MosaicSlabs

CALIBRATION_SAMPLE_PAGES = 64
"""Most dense pages (64 tokens each) whose keys and values calibrate the codec."""


class PageMemory:
    """Dense and mosaic frames behind logical pages.

    Args:
        plan: frames of each kind.
        config: encode policy.
        codec: compresses segments; calibrated here, from the first pages that exist.
        dense_k, dense_v: per layer ``[(dense_frames + 1) * 64, kv_heads, dim]``; written by the model's forwards.
    """

    def __init__(
        self,
        plan: MemoryPlan,
        config: MosaicConfig,
        codec: SegmentCodec,
        dense_k: list[torch.Tensor],
        dense_v: list[torch.Tensor],
    ) -> None:
        device = dense_k[0].device
        self.plan = plan
        self.config = config
        self.codec = codec
        self.dense_k = dense_k
        self.dense_v = dense_v
        self.table = PageTable(plan.logical_pages, plan.dense_frames, device)
        self.slabs = MosaicSlabs(len(dense_k), plan.mosaic_frames, codec.frame_bytes, device)
        self.lifecycle = PageLifecycle(plan)
        self.audits = 0
        self._audited: int | None = None
        self._written: list[torch.Tensor] = []

    def set_recent_pages(self, recent_pages: Callable[[], Collection[int]]) -> None:
        """Tell which pages lie in the recent windows of running requests."""
        self.lifecycle.recent_pages = recent_pages

    # Events of the allocator (schedule stream; host only).

    def allocate(self, pages: list[int], sinks: list[int]) -> None:
        """Pages were handed out; ``sinks`` are those that start a sequence."""
        self._seal_written()
        self.lifecycle.allocate(pages, sinks)

    def free(self, pages: list[int]) -> None:
        """Pages were taken back."""
        self.lifecycle.free(pages)

    def clear(self) -> None:
        """All pages were taken back; nothing is running."""
        self._written.clear()
        self.lifecycle.clear()

    # Events of the forward (its own stream).

    def begin_forward(self) -> None:
        """Apply what was decided since the last forward. Call first thing in the forward's stream."""
        if self.config.encode == "seal":
            self._seal_written()
            if self.codec.calibrated or len(self.lifecycle.sealed) >= self.config.calibration_pages:
                self.lifecycle.encode_cold()
        updates = self.lifecycle.take_updates()
        self._encode(updates.encodings)
        self.table.update(updates.table)

    def forward_launched(self, slots: torch.Tensor) -> None:
        """A forward that writes these logical slots (integer ``[tokens]``) has been launched."""
        self._written.append(slots)

    def dense_rows(self, layer: int, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V ``[frames, 64, kv_heads, dim]`` of dense frames, copied."""
        k, v = self.dense_k[layer], self.dense_v[layer]
        return (
            k.view(-1, PAGE_SIZE, *k.shape[1:])[frames],
            v.view(-1, PAGE_SIZE, *v.shape[1:])[frames],
        )

    def mosaic_segments(self, layer: int, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of mosaic frames, in the codec's rotated bases (see SegmentCodec.decode)."""
        data = self.slabs.layers[layer][frames - self.table.first_mosaic]
        return self.codec.decode(layer, data.view(len(frames), self.dense_k[layer].shape[1], -1))

    # Sight.

    @property
    def mosaic_bytes(self) -> int:
        """Bytes of the mosaic slabs and of the codec's tables."""
        return self.slabs.nbytes + self.codec.state_bytes

    def audit(self, free_pages: Iterable[int], tree_pages: Iterable[int]) -> None:
        """Check every invariant while nothing is running.

        Args:
            free_pages: SGLang's free list.
            tree_pages: pages that the prefix tree holds.

        Raises:
            InvariantError: names the first violation.
        """
        self._seal_written()
        audit_frames(self.lifecycle)
        audit_free_list(self.lifecycle, free_pages)
        audit_tree(self.lifecycle, tree_pages)
        self._audit_table()
        self.audits += 1
        self._audited = self.lifecycle.counters.events

    @property
    def changed_since_audit(self) -> bool:
        """Whether a page was allocated or freed since the last clean audit."""
        return self._audited != self.lifecycle.counters.events

    def stats(self) -> dict[str, object]:
        """Counters and gauges, JSON-serialisable; sizes in pages of 64 tokens unless the name says bytes."""
        pages = self.lifecycle
        return {
            "logical_pages": self.plan.logical_pages,
            "dense_frames": self.plan.dense_frames,
            "mosaic_frames": self.plan.mosaic_frames,
            "dense_frames_used": pages.dense.used,
            "mosaic_frames_used": pages.mosaic.used,
            "sealed_pages": len(pages.sealed),
            "frame_bytes_dense": self.plan.frame_bytes.dense,
            "frame_bytes_mosaic": self.plan.frame_bytes.mosaic,
            "kv_bytes": self.plan.total_bytes,
            "table_bytes": self.table.frames.nbytes + self.codec.state_bytes,
            "codec": self.codec.revision if self.codec.calibrated else None,
            "pages_allocated": pages.counters.allocated,
            "pages_freed": pages.counters.freed,
            "pages_encoded": pages.counters.encoded,
            "pages_encoded_sinks": pages.counters.encoded_sinks,
            "pages_encoded_recent": pages.counters.encoded_recent,
            "encodings_cancelled": pages.counters.cancelled,
            "audits": self.audits,
        }

    def _seal_written(self) -> None:
        # Must run before every allocation: read any later, a slot could name the next life of a page freed meanwhile.
        if not self._written:
            return
        slots = torch.cat(self._written)
        self._written.clear()
        last = slots[slots % PAGE_SIZE == PAGE_SIZE - 1]
        self.lifecycle.seal((last // PAGE_SIZE).tolist())

    def _encode(self, encodings: list[Encoding]) -> None:
        if not encodings:
            return
        if not self.codec.calibrated:
            self._calibrate([e.dense_frame for e in encodings])
        device = self.table.frames.device
        source = torch.tensor([e.dense_frame for e in encodings], device=device)
        target = torch.tensor([e.mosaic_frame for e in encodings], device=device) - self.table.first_mosaic
        for layer, slab in enumerate(self.slabs.layers):
            data = self.codec.encode(layer, *self.dense_rows(layer, source))
            slab[target] = data.flatten(1)

    def _calibrate(self, frames: list[int]) -> None:
        pages = self.lifecycle
        frames = [*frames, *(pages.frame[page] for page in pages.sealed)]
        stride = -(-len(frames) // CALIBRATION_SAMPLE_PAGES)
        sample = torch.tensor(frames[::stride], device=self.table.frames.device)
        for layer in range(len(self.dense_k)):
            k, v = self.dense_rows(layer, sample)
            self.codec.calibrate(layer, k.flatten(0, 1), v.flatten(0, 1))

    def _audit_table(self) -> None:
        pending = self.lifecycle.pending_pages
        for page, (found, expected) in enumerate(zip(self.table.frames.tolist(), self.lifecycle.frame, strict=True)):
            if page and page not in pending and found != expected:
                raise InvariantError(f"the page table has page {page} at frame {found} instead of {expected}")
