"""Pages between the pool's frames and the host: what is decided, and how forwards carry it out."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from mosaic_kernels.upload import upload
from sglang_mosaic.cache.dense_bytes import dense_bytes, host_bytes, write_dense_bytes
from sglang_mosaic.cache.host_page import HostPage, Label
from sglang_mosaic.cache.host_tier import HostTier
from sglang_mosaic.cache.lifecycle import Copy, Restore
from sglang_mosaic.codec.base import Epoch
from sglang_mosaic.codec.planes import planes_of
from sglang_mosaic.page import PAGE_SIZE

if TYPE_CHECKING:
    from sglang_mosaic.cache.memory import PageMemory


class HostTraffic:
    """
    Args:
        memory: the pool.
        tier: the host.
    """

    def __init__(self, memory: PageMemory, tier: HostTier) -> None:
        self.tier = tier
        self._memory = memory
        self._arriving: deque[tuple[list[Restore], torch.cuda.Event]] = deque()
        """Host memory that the device reads from, and must not be used for other pages until then."""

    # Decisions (schedule stream; host only).

    def evicted(self, pages: Iterable[int], keys: Iterable[bytes], position: int) -> None:
        """Pages that were just freed left the prefix tree: keep those on the host that it has not, under these keys.

        Args:
            position: of the first page's first token in its sequence.
        """
        for i, (page, key) in enumerate(zip(pages, keys, strict=True)):
            if self.tier.held([key]):
                continue
            self._memory.lifecycle.copy_out(page, key, position + i * PAGE_SIZE, self._memory.epochs.of)

    def valid(self, pages: Sequence[HostPage]) -> int:
        """How many of these pages, from the first on, hold what they should."""
        count = 0
        for epoch, run in itertools.groupby(pages, lambda page: page.epoch):
            alike = list(run)
            valid = self._valid_of(epoch, alike)
            count += valid
            if valid < len(alike):
                break
        return count

    def missing_frames(self, pages: Sequence[HostPage]) -> int:
        """Mosaic frames that these pages need and that are not free."""
        return max(sum(bool(page.epoch) for page in pages) - self._memory.lifecycle.mosaic.free, 0)

    def restore(self, pages: Sequence[int], contents: Sequence[HostPage], sequence_start: bool) -> None:
        """Pages were handed out for what comes back from the host: valid pages, no frame missing.

        Args:
            sequence_start: the first of them starts a sequence.
        """
        lifecycle, epochs = self._memory.lifecycle, self._memory.epochs
        mosaic = [(page, content) for page, content in zip(pages, contents, strict=True) if content.epoch]
        for epoch, run in itertools.groupby(mosaic, lambda one: one[1].epoch):
            number = epochs.number(epoch)
            assert number is not None  # valid pages are of a live epoch
            epochs.assign([lifecycle.restore_mosaic(page, content.data) for page, content in run], number)
        # Dense pages last: making room for one takes mosaic frames.
        for i, (page, content) in enumerate(zip(pages, contents, strict=True)):
            if not content.epoch:
                lifecycle.restore_dense(page, content.data, sink=sequence_start and i == 0)

    # Their execution (stream of a forward).

    def copy_out(self, copies: list[Copy]) -> None:
        """Hand pages to the host, as many as it has room for: those near the start of a sequence first, as without them
        the others are of no use."""
        counters = self.tier.counters
        counters.offered += len(copies)
        # Not run by run: launching what encodes one page takes as long as for all, and sequences begin with exact ones.
        kinds: dict[tuple[Epoch | None, bool], list[Copy]] = {}
        for copy in sorted(copies, key=lambda copy: copy.position):
            kinds.setdefault((copy.epoch, copy.exact), []).append(copy)
        for (epoch, exact), alike in kinds.items():
            page_bytes = self._bytes(epoch, exact)
            if self.tier.room(page_bytes) < len(alike):
                room = self.tier.make_room([copy.position for copy in alike], page_bytes)
                counters.dropped += len(alike) - room
                alike = alike[:room]
            if alike:
                self._copy_alike(alike, epoch, exact)

    def bring_back(self, restores: list[Restore]) -> None:
        """Write the bytes of pages into their frames. Does not wait for them."""
        memory, first = self._memory, self._memory.table.first_mosaic
        while self._arriving and self._arriving[0][1].query():
            self._arriving.popleft()
        for restore in restores:
            data = host_bytes(restore.data)
            if restore.frame >= first:
                memory.slab.frames[restore.frame - first, : len(data)].copy_(data, non_blocking=True)
            else:
                frames = upload([restore.frame], memory.table.frames.device)
                rows = data.to(frames.device, non_blocking=True)[None]
                write_dense_bytes(memory.dense_k, memory.dense_v, frames, rows)
        if memory.table.frames.is_cuda:
            self._arriving.append((restores, torch.cuda.current_stream(memory.table.frames.device).record_event()))

    def _bytes(self, epoch: Epoch | None, exact: bool) -> int:
        """Of a page as it is kept."""
        frames = self._memory.plan.frame_bytes
        return frames.dense if epoch is None and self._encoder(exact) is None else frames.mosaic

    def _encoder(self, exact: bool) -> Epoch | None:
        """What dense frames are encoded with; None: they are kept as they are, before the first calibration, too: a
        server without pressure may never need one."""
        return None if exact or not self._memory.config.compresses else self._memory.epochs.current

    def _copy_alike(self, copies: list[Copy], epoch: Epoch | None, exact: bool) -> None:
        """Copies of one kind: dense frames as they are, mosaic frames of an epoch, or dense frames to encode."""
        memory, current = self._memory, self._encoder(exact)
        numbers, device = [copy.frame for copy in copies], memory.table.frames.device
        if epoch is not None:
            used = memory.slab.frames[:, : planes_of(epoch).frame_bytes]
            rows, hash_ = used[upload(numbers, device) - memory.table.first_mosaic], epoch.hash
        elif current is None:
            rows, hash_ = dense_bytes(memory.dense_k, memory.dense_v, upload(numbers, device)), ""
        else:
            nbytes = current.span(len(memory.dense_k) - 1).stop
            encoded = torch.empty(len(copies), nbytes, dtype=torch.uint8, device=device)

            def put(positions: slice, span: slice, data: torch.Tensor) -> None:
                encoded[positions, span] = data

            memory.encoder.encode(current, numbers, device, put)
            rows, hash_ = encoded, current.hash
        self.tier.keep([Label(copy.key, hash_, copy.position) for copy in copies], rows)

    def _valid_of(self, hash_: str, pages: list[HostPage]) -> int:
        """The same of pages of one epoch: bytes of the right number, and formats that the epoch has."""
        frame_bytes, number = self._memory.plan.frame_bytes.dense, None
        if hash_:
            number = self._memory.epochs.number(hash_)
            if number is None:
                return 0
            epoch = planes_of(self._memory.epochs[number])
            frame_bytes = epoch.frame_bytes
        whole = list(itertools.takewhile(lambda data: len(data) == frame_bytes, (page.data for page in pages)))
        return len(whole) if number is None or not whole else epoch.admit(whole)
