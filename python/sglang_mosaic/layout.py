"""The memory plan: how many frames of each kind fit into the KV memory, and the smallest plan that cannot fail.

Capacity theorem. With D dense and C mosaic frames (pages), R running requests, a recent window of w pages and at most
``chunk`` new prefill tokens per forward, serve L = C + D logical pages. Every allocation that the logical pool grants
finds a dense frame if ``D >= R + pages(chunk)``: pages that cannot be encoded are only the R open tail pages and the
pages of one chunk; each other dense page is sealed, and as long as a logical page is free (L - in use >= 1) a dense or
a mosaic frame is free too, so encoding a sealed page frees a frame. Recent windows stay dense as well if
``D >= R * w + max(pages(chunk), R)``.
"""

from __future__ import annotations

import dataclasses

from sglang_mosaic.errors import ConfigError
from sglang_mosaic.page import PAGE_SIZE, pages_for

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class FrameBytes:
    """Bytes of one frame, all layers of this rank together."""

    dense: int
    mosaic: int


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Frames of one rank. Dense frame 0 (padded writes) comes on top of ``dense_frames``."""

    dense_frames: int
    mosaic_frames: int
    max_running_requests: int
    frame_bytes: FrameBytes
    table_bytes: int = 0
    """Bytes of the codec's tables."""

    @property
    def logical_pages(self) -> int:
        return self.dense_frames + self.mosaic_frames

    @property
    def logical_tokens(self) -> int:
        return self.logical_pages * PAGE_SIZE

    @property
    def total_bytes(self) -> int:
        """Bytes of everything: all frames, the reserved one included, and the codec's tables."""
        dense, mosaic = self.frame_bytes.dense, self.frame_bytes.mosaic
        return (self.dense_frames + 1) * dense + self.mosaic_frames * mosaic + self.table_bytes

    def describe(self) -> str:
        dense_only = self.total_bytes // self.frame_bytes.dense * PAGE_SIZE
        return (
            f"{self.logical_tokens} logical tokens, {self.total_bytes / MIB:.1f} MiB: {self.dense_frames} dense frames "
            f"({self.frame_bytes.dense} B) + {self.mosaic_frames} mosaic frames ({self.frame_bytes.mosaic} B), "
            f"{self.logical_tokens / max(dense_only, 1):.2f}x the tokens of a dense pool, "
            f"at most {self.max_running_requests} running requests"
        )


def minimum_dense_frames(running: int, chunk_tokens: int) -> int:
    """Dense frames below which an allocation can fail (see the module's docstring)."""
    return running + pages_for(chunk_tokens)


def reserve_dense_frames(running: int, chunk_tokens: int, window_pages: int) -> int:
    """Dense frames with which recent windows stay dense too."""
    return running * window_pages + max(pages_for(chunk_tokens), running)


def plan_memory(
    *,
    kv_bytes: int,
    frame_bytes: FrameBytes,
    chunk_tokens: int,
    window_pages: int,
    dense_fraction: float,
    max_running_requests: int | None,
    max_total_tokens: int | None = None,
    compress: bool = True,
    prefer_dense: bool = True,
    table_bytes: int = 0,
) -> MemoryPlan:
    """Share ``kv_bytes`` out over dense and mosaic frames.

    Args:
        kv_bytes: bytes for all frames of this rank.
        chunk_tokens: largest number of new prefill tokens in one forward.
        max_running_requests: R of the capacity theorem; None chooses the largest R, at most 256, whose reserve fits
            into ``dense_fraction`` or a quarter of the memory, whichever is more.
        max_total_tokens: upper limit of logical tokens (SGLang's --max-total-tokens).
        compress: False plans dense frames only.
        table_bytes: bytes of the codec's tables, taken out of ``kv_bytes`` first if anything is to be compressed.
        prefer_dense: if ``max_total_tokens`` fit uncompressed, plan no mosaic frames: nobody needs the memory.

    Raises:
        ConfigError: the memory cannot hold the reserve; names the smallest size that works.
    """
    usable = kv_bytes - frame_bytes.dense  # the reserved frame for padded writes
    limit = None if max_total_tokens is None else max_total_tokens // PAGE_SIZE
    if not compress:
        dense = max(usable, 0) // frame_bytes.dense
        dense = dense if limit is None else min(dense, limit)
        needed = minimum_dense_frames(max_running_requests or 1, 1)
        if dense < needed:
            raise _too_small(kv_bytes, limit, needed, frame_bytes, 0, max_running_requests or 1, 1)
        return MemoryPlan(dense, 0, max_running_requests or dense, frame_bytes)

    usable -= table_bytes
    affordable = max(usable, 0) // frame_bytes.dense
    wanted = int((affordable if limit is None else min(affordable, limit)) * dense_fraction)
    running = max_running_requests or _fitting_requests(max(wanted, affordable // 4), chunk_tokens, window_pages)
    minimum = minimum_dense_frames(running, chunk_tokens)
    dense = min(max(wanted, reserve_dense_frames(running, chunk_tokens, window_pages)), affordable)
    if limit is not None:
        dense = limit if prefer_dense and limit <= affordable else min(dense, limit)
    if dense < minimum:
        raise _too_small(kv_bytes, limit, minimum, frame_bytes, table_bytes, running, chunk_tokens)
    mosaic = (usable - dense * frame_bytes.dense) // frame_bytes.mosaic
    if limit is not None:
        mosaic = min(mosaic, limit - dense)
    return MemoryPlan(dense, mosaic, running, frame_bytes, table_bytes)


def _fitting_requests(dense_frames: int, chunk_tokens: int, window_pages: int) -> int:
    return min(max((dense_frames - pages_for(chunk_tokens)) // window_pages, 1), 256)


def _too_small(
    kv_bytes: int,
    limit: int | None,
    minimum: int,
    frame_bytes: FrameBytes,
    table_bytes: int,
    running: int,
    chunk_tokens: int,
) -> ConfigError:
    needed_mib = ((minimum + 1) * frame_bytes.dense + table_bytes) / MIB
    found = f"KV memory of {kv_bytes / MIB:.1f} MiB"
    if limit is not None and limit < minimum:
        found = f"--max-total-tokens {limit * PAGE_SIZE}"
    return ConfigError(
        f"{found} is too small for {running} running requests and prefill chunks of {chunk_tokens} tokens: the "
        f"smallest size that works is {minimum * PAGE_SIZE} tokens ({needed_mib + 0.05:.1f} MiB). Raise "
        "--mosaic-kv-mib, --mem-fraction-static or --max-total-tokens, or lower --max-running-requests or "
        "--chunked-prefill-size."
    )
