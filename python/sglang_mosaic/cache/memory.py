"""Page memory of one rank: decisions of the lifecycle, executed on the slabs at forward boundaries."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch

from mosaic_kernels.upload import upload
from sglang_mosaic.cache.audit import audit_epochs, audit_frames, audit_free_list, audit_table, audit_tree
from sglang_mosaic.cache.calibration_process import CalibrationProcess
from sglang_mosaic.cache.canary import PageCanary
from sglang_mosaic.cache.dense_bytes import dense_bytes, dense_layers
from sglang_mosaic.cache.encoding_errors import EncodingErrors
from sglang_mosaic.cache.epochs import EpochTable
from sglang_mosaic.cache.host_page import HostPage
from sglang_mosaic.cache.host_tier import HostTier
from sglang_mosaic.cache.host_traffic import HostTraffic
from sglang_mosaic.cache.lifecycle import Copy, Encoding, Operation, PageLifecycle
from sglang_mosaic.cache.page_encoder import PageEncoder
from sglang_mosaic.cache.samples import PageSamples, SampledPage
from sglang_mosaic.cache.written_slots import WrittenSlots
from sglang_mosaic.codec.base import Codec, Epoch
from sglang_mosaic.codec.calibration_job import statistics_to_bytes
from sglang_mosaic.codec.planes import planes_codec_of, planes_of
from sglang_mosaic.codec.storage import epoch_from_bytes, epoch_to_bytes
from sglang_mosaic.config import MosaicConfig
from sglang_mosaic.errors import ConfigError
from sglang_mosaic.layout import MemoryPlan
from sglang_mosaic.page import PAGE_SIZE, PageState
from sglang_mosaic.pool.page_table import PageTable
from sglang_mosaic.pool.slabs import MosaicSlab

AHEAD_PAGES = 64
"""Full pages from which on the first calibration is made, where another process makes it and pages are encoded without
need; half of the dense frames if those are fewer. What all prompts begin with stays as the first one encodes it."""
SAMPLED_TOGETHER = 8
"""Pages that are gathered for a calibration at a time: twice their bytes are taken on the device meanwhile."""


class PageMemory:
    """Dense and mosaic frames behind logical pages.

    Args:
        plan: frames of each kind.
        config: encode policy.
        codec: compresses pages; calibrated here, on a sample of the pages so far.
        dense_k, dense_v: per layer ``[(dense_frames + 1) * 64, kv_heads, dim]``; written by the model's forwards.
        epoch: a calibration to begin with; None: make one when the first page is encoded.
        on_epoch: told about every calibration that is made here.
        beside: where calibrations are made while this goes on, if no manager makes them; None: here, and all waits.
        least_cold: as of `PageLifecycle`.
    """

    def __init__(
        self,
        plan: MemoryPlan,
        config: MosaicConfig,
        codec: Codec,
        dense_k: list[torch.Tensor],
        dense_v: list[torch.Tensor],
        *,
        epoch: Epoch | None = None,
        on_epoch: Callable[[Epoch], None] = lambda epoch: None,
        beside: CalibrationProcess | None = None,
        least_cold: int = 1,
    ) -> None:
        device = dense_k[0].device
        self.plan = plan
        self.config = config
        self.codec = codec
        self.dense_k = dense_k
        self.dense_v = dense_v
        self.table = PageTable(plan.logical_pages, plan.dense_frames, device)
        self.slab = MosaicSlab(plan.mosaic_frames, codec.frame_bytes, device)
        self.epochs = EpochTable(
            self.table.first_mosaic, plan.mosaic_frames, config.refresh_pages, config.live_epochs, device
        )
        if epoch is not None:
            self.epochs.start(epoch)
        self.encoder = PageEncoder(len(dense_k), self.dense_rows)
        self._on_epoch = on_epoch
        self._beside = beside
        self._samples = PageSamples(self._read)
        self._unjudged: list[int] = []
        self._errors = EncodingErrors(len(dense_k), device)
        self.lifecycle = PageLifecycle(plan, least_cold=least_cold)
        self.host: HostTraffic | None = None
        self._stream: torch.cuda.Stream | None = None
        """Of forwards."""
        self.audits = self.step_audits = 0
        self._audited: int | None = None
        self._canary = PageCanary(self) if config.audit else None
        self._written = WrittenSlots()

    def set_recent_pages(self, recent_pages: Callable[[], Collection[int]]) -> None:
        """Tell which pages lie in the recent windows of running requests."""
        self.lifecycle.recent_pages = recent_pages

    def connect(self, tier: HostTier) -> None:
        """Let evicted pages go to the host and come back from it."""
        self.host = HostTraffic(self, tier)
        for epoch in self.epochs.live:
            tier.put_epoch(epoch.hash, epoch_to_bytes(planes_of(epoch)))

    # Events of the allocator (schedule stream; host only).

    def allocate(self, pages: list[int], sinks: list[int]) -> None:
        """Pages were handed out; ``sinks`` are those that start a sequence."""
        self.seal_written()
        self.lifecycle.allocate(pages, sinks)

    def seal_written(self) -> None:
        """Note which pages have their last token. Waits for the forward before the last one at most."""
        # Must run before every allocation: read any later, a slot could name the next life of a page freed meanwhile.
        self.lifecycle.seal(self._written.take())

    def free(self, pages: list[int]) -> None:
        """Pages were taken back."""
        self.lifecycle.free(pages)
        if self._canary is not None:
            self._canary.forget(pages)

    def clear(self) -> None:
        """All pages were taken back; nothing is running."""
        self._written.clear()
        self._unjudged.clear()
        self.lifecycle.clear()
        if self._canary is not None:
            self._canary.clear()

    def restore(self, pages: Sequence[int], contents: Sequence[HostPage], sequence_start: bool) -> None:
        """As `HostTraffic.restore`. They are on their way at once, so that their host memory is free for the next."""
        self.seal_written()
        self._connected.restore(pages, contents, sequence_start)
        self._apply_now()

    def adopt(self, data: bytes) -> bool:
        """Make pages of an epoch from the host readable; False: it is not of this cache, or too many are alive."""
        try:
            epoch = epoch_from_bytes(data, self.table.frames.device)
        except ConfigError:
            return False
        return planes_codec_of(self.codec).fits(epoch) and self.epochs.adopt(epoch, self._mosaic_in_use())

    # Events of the forward (its own stream).

    def begin_forward(self) -> None:
        """Apply what was decided since the last forward. Call first thing in the forward's stream."""
        seal = self.config.encode == "seal"
        early = seal or self.config.max_error is not None
        if early:
            self.seal_written()
        self._look_at(self.lifecycle.take_new())
        # Sealed pages may all be from the host, on their way into their frames.
        if self.epochs.current is None and not self._samples.empty:
            self._calibrate_ahead(early)
        if self.config.max_error is not None and self.epochs.current is not None:
            self._judge(self.config.max_error)
        if seal and self.epochs.current is not None:
            self.lifecycle.encode_cold()
        self._take_epoch()
        self._apply_updates()
        if self.table.frames.is_cuda:
            self._stream = torch.cuda.current_stream(self.table.frames.device)

    def will_write(self, slots: torch.Tensor) -> None:
        """The forward that follows writes these logical slots (integer ``[tokens]``). Call last thing before it."""
        self._written.add(slots)

    def dense_rows(self, layer: int, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V ``[frames, 64, kv_heads, dim]`` of dense frames, copied."""
        k, v = self.dense_k[layer], self.dense_v[layer]
        return (
            k.view(-1, PAGE_SIZE, *k.shape[1:])[frames],
            v.view(-1, PAGE_SIZE, *v.shape[1:])[frames],
        )

    def mosaic_data(self, layer: int, frames: torch.Tensor, number: int) -> torch.Tensor:
        """Bytes of one layer ``[frames, bytes]`` of mosaic frames of one epoch, for the epoch's decoders."""
        rows = frames - self.table.first_mosaic
        return self.slab.frames[:, self.epochs[number].span(layer)][rows]

    # Sight.

    @property
    def _codec_bytes(self) -> int:
        return self.codec.state_bytes + sum(epoch.nbytes for epoch in self.epochs.live)

    @property
    def mosaic_bytes(self) -> int:
        """Bytes of the mosaic slab and of the codec's tables."""
        return self.slab.nbytes + self._codec_bytes

    def audit(self, free_pages: Iterable[int], tree_pages: Iterable[int]) -> None:
        """Check every invariant while nothing is running.

        Args:
            free_pages: SGLang's free list.
            tree_pages: pages that the prefix tree holds.

        Raises:
            InvariantError: names the first violation.
        """
        self._check(free_pages, tree_pages)
        self.audits += 1
        self._audited = self.lifecycle.counters.events

    def audit_step(self, free_pages: Iterable[int], tree_pages: Iterable[int]) -> None:
        """The same between two steps, in the thread that launches them.

        Raises:
            InvariantError: names the first violation.
        """
        self._check(free_pages, tree_pages)
        self.step_audits += 1

    def _check(self, free_pages: Iterable[int], tree_pages: Iterable[int]) -> None:
        self.seal_written()
        if self.table.frames.is_cuda:
            # The table and the pages are what the last step makes of them.
            torch.cuda.synchronize(self.table.frames.device)
        audit_frames(self.lifecycle)
        audit_free_list(self.lifecycle, free_pages)
        audit_tree(self.lifecycle, tree_pages)
        audit_table(self.lifecycle, self.table.frames.tolist())
        audit_epochs(self.lifecycle, self.epochs, self.table.first_mosaic)
        if self._canary is not None:
            self._canary.check()

    @property
    def changed_since_audit(self) -> bool:
        """Whether a page was allocated or freed since the last clean audit."""
        return self._audited != self.lifecycle.counters.events

    def stats(self) -> dict[str, object]:
        """Counters and gauges, JSON-serialisable; sizes in pages of 64 tokens unless the name says bytes.

        Does not wait for the device.
        """
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
            "table_bytes": self.table.frames.nbytes + self._codec_bytes,
            "codec": self.config.codec,
            "ratio": self.plan.frame_bytes.dense / self.plan.frame_bytes.mosaic,
            "epoch": None if self.epochs.current is None else self.epochs.current.hash,
            "epochs_started": self.epochs.started,
            "sample_bytes": self._samples.nbytes,
            **self._errors.stats(),
            "pages_allocated": pages.counters.allocated,
            "pages_freed": pages.counters.freed,
            "pages_encoded": pages.counters.encoded,
            "pages_encoded_sinks": pages.counters.encoded_sinks,
            "pages_encoded_recent": pages.counters.encoded_recent,
            "pages_encoded_over_error": pages.counters.encoded_costly,
            "encodings_cancelled": pages.counters.cancelled,
            "audits": self.audits,
            "step_audits": self.step_audits,
            "host": None if self.host is None else self.host.tier.stats(),
        }

    def _apply_now(self) -> None:
        """Apply what was decided without waiting for the next forward, in the stream of the last one: behind it, and
        before all that come. Before the first one nothing happens."""
        if not self.table.frames.is_cuda:
            self._apply_updates()
        elif self._stream is not None:
            # As forwards do: what is applied may use what the caller's stream has made.
            self._stream.wait_stream(torch.cuda.current_stream(self.table.frames.device))
            with torch.cuda.stream(self._stream):
                self._apply_updates()

    def _apply_updates(self) -> None:
        updates = self.lifecycle.take_updates()
        for kind, run in itertools.groupby(updates.operations, type):
            self._apply(kind, list(run))
        self.table.update(updates.table)

    def _apply(self, kind: type[Operation], operations: list[Any]) -> None:
        if kind is Encoding:
            self._encode(operations)
        elif kind is Copy:
            self._connected.copy_out(operations)
        else:
            self._connected.bring_back(operations)

    def _encode(self, encodings: list[Encoding]) -> None:
        dense = [e.dense_frame for e in encodings]
        # What is encoded now has no number yet and cannot hold on to an old epoch.
        target = {e.mosaic_frame for e in encodings}
        if self.epochs.due(frame for frame in self._mosaic_in_use() if frame not in target):
            self._calibrate(dense)
        device = self.table.frames.device
        rows = upload([e.mosaic_frame - self.table.first_mosaic for e in encodings], device)

        def put(positions: slice, span: slice, data: torch.Tensor) -> None:
            self.slab.frames[:, span].index_copy_(0, rows[positions], data)

        self._errors.add(self.encoder.encode(self._newest, dense, device, put))
        self.epochs.written(e.mosaic_frame for e in encodings)

    @property
    def _connected(self) -> HostTraffic:
        assert self.host is not None  # who asks for it has been given pages of it
        return self.host

    @property
    def _newest(self) -> Epoch:
        assert self.epochs.current is not None  # pages are encoded and judged once there is one
        return self.epochs.current

    def _mosaic_in_use(self) -> Iterable[int]:
        return (frame for frame in self.lifecycle.frame if frame >= self.table.first_mosaic)

    def _look_at(self, pages: list[int]) -> None:
        """Sample newly sealed pages for calibrations to come."""
        if self.config.max_error is not None:
            self._unjudged += pages
        if self.config.compresses and (self.config.refresh_pages or self.epochs.current is None):
            frame, sinks = self.lifecycle.frame, self.lifecycle.sinks
            self._samples.offer(
                [frame[page] for page in pages if page not in sinks], [frame[page] for page in pages if page in sinks]
            )

    def _judge(self, limit: float) -> None:
        """Mark pages that would exceed the error limit: they go last."""
        pages = [page for page in self._unjudged if self.lifecycle.state[page] is PageState.SEALED]
        self._unjudged.clear()
        if not pages:
            return
        frames = [self.lifecycle.frame[page] for page in pages]
        errors = self.encoder.encode(self._newest, frames, self.table.frames.device, lambda *_: None)
        over = (errors.double().square().mean((0, 2)).sqrt() > limit).tolist()
        self.lifecycle.costly.update(page for page, exceeds in zip(pages, over, strict=True) if exceeds)

    def _calibrate_ahead(self, early: bool) -> None:
        """Have the first epoch before a page has to be encoded.

        Args:
            early: pages are encoded without pressure, too.
        """
        pages = self.lifecycle
        if self._beside is None or not self._beside.calibrates or not self.config.refresh_pages:
            if early and len(pages.sealed) >= self.config.calibration_pages:
                self._calibrate(())
            return
        half = pages.plan.dense_frames // 2
        wanted = max(min(AHEAD_PAGES, half), self.config.calibration_pages)
        if len(pages.sealed) >= wanted if early else pages.dense.used >= half:
            self._calibrate_elsewhere(())

    def _calibrate(self, frames: Iterable[int]) -> None:
        """Start an epoch from the sampled pages, and from pages about to be encoded where those are few."""
        first = self.epochs.current is None
        # Where there is an epoch already, nothing waits for the next one: pages are encoded with the last meanwhile.
        if not first and self._calibrate_elsewhere(frames):
            return
        # All waits for the first one; where another follows at once it is a quick one.
        quick = first and self._beside is not None and bool(self.config.refresh_pages)
        sample = self._samples.pages(frames).layers(self.table.frames.device)
        self._start(self.codec.calibrate(sample, quick), lasting=not quick)

    def _calibrate_elsewhere(self, frames: Iterable[int]) -> bool:
        """Have an epoch made by the manager or another process, unless one is under way; False: nobody can."""
        tier, beside = None if self.host is None else self.host.tier, self._beside
        if (tier is not None and tier.calibrating) or (beside is not None and beside.calibrating):
            return True
        sample, device = self._samples.pages(frames), self.table.frames.device
        if tier is not None and tier.calibrates:
            tier.calibrate(statistics_to_bytes(planes_codec_of(self.codec).statistics(sample.layers(device))))
        elif beside is not None and beside.calibrates:
            # Hundreds of MB for a large model: another thread copies them, and not to the device and back.
            codec = planes_codec_of(self.codec)
            queries = [of_layer.cpu() for of_layer in codec.take_queries()]
            beside.calibrate(lambda: codec.statistics(sample.layers(torch.device("cpu")), queries))
        else:
            return False
        return True

    def _take_epoch(self) -> None:
        """Start an epoch that was made elsewhere, if there is still room for it."""
        made = None if self.host is None else self.host.tier.take_epoch()
        if made is None and self._beside is not None:
            made = self._beside.take_epoch()
        if made is not None and self.epochs.due(self._mosaic_in_use()):
            self._start(epoch_from_bytes(made, self.table.frames.device))

    def _start(self, epoch: Epoch, lasting: bool = True) -> None:
        self.epochs.start(epoch, lasting)
        self._on_epoch(epoch)
        if self.host is not None:
            self.host.tier.put_epoch(epoch.hash, epoch_to_bytes(planes_of(epoch)))

    def _read(self, frames: list[int]) -> list[SampledPage]:
        """Copies of pages on their way to the host: no forward waits for them."""
        pages: list[SampledPage] = []
        for some in upload(frames, self.table.frames.device).split(SAMPLED_TOGETHER):
            rows = [
                torch.empty(row.shape, dtype=row.dtype, pin_memory=row.is_cuda).copy_(row, non_blocking=True)
                for row in dense_bytes(self.dense_k, self.dense_v, some)
            ]
            copied = torch.cuda.current_stream(some.device).record_event() if some.is_cuda else None
            pages += [SampledPage(*dense_layers(row, self.dense_k, self.dense_v), copied) for row in rows]
        return pages
