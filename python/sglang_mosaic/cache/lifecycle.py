"""The life of every logical page: which frame it has, when it is encoded, what the next forward must apply.

Decisions are taken on the host while SGLang allocates and frees; nothing is touched on the device. They pile up as one
``Updates`` record that the next forward applies, in its own stream, before it reads or writes anything. A frame that
is given away here is therefore rewritten only after every forward that could read it, and the dense source of an
encoding is still intact when the encoding runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence

from sglang_mosaic.cache.victims import Victims, choose_victims
from sglang_mosaic.errors import CapacityError, InvariantError
from sglang_mosaic.layout import MemoryPlan
from sglang_mosaic.page import UNMAPPED, PageState
from sglang_mosaic.pool.frames import FrameList

ENCODE_BATCH = 8
"""Pages encoded together under pressure: one page at a time pays the launch of every layer for 64 tokens."""


@dataclasses.dataclass(frozen=True)
class Encoding:
    """One page to encode: read the dense frame, write the mosaic frame."""

    page: int
    dense_frame: int
    mosaic_frame: int


@dataclasses.dataclass(frozen=True)
class Updates:
    """What the next forward applies first: all encodings, then all table entries (page -> frame)."""

    encodings: list[Encoding]
    table: dict[int, int]


@dataclasses.dataclass
class Counters:
    """Totals since the server started, in pages."""

    allocated: int = 0
    freed: int = 0
    encoded: int = 0
    encoded_sinks: int = 0
    encoded_recent: int = 0
    encoded_costly: int = 0
    cancelled: int = 0

    @property
    def events(self) -> int:
        """Grows with every allocation and every release."""
        return self.allocated + self.freed


class PageLifecycle:
    """Host side of the pool. Pages are numbered 1 .. plan.logical_pages; page 0 is reserved and never appears here.

    Args:
        plan: frames of each kind.
        recent_pages: returns the pages in the recent windows of running requests; they are encoded last. Called only
            when victims are chosen, since it may have to read the device.
    """

    def __init__(self, plan: MemoryPlan, recent_pages: Callable[[], Collection[int]] = frozenset) -> None:
        self.plan = plan
        self.recent_pages = recent_pages
        self.dense = FrameList("dense", 1, plan.dense_frames)
        self.mosaic = FrameList("mosaic", plan.dense_frames + 1, plan.mosaic_frames)
        self.counters = Counters()
        self.clear()

    def clear(self) -> None:
        """Every page becomes FREE (SGLang's allocator cleared its pool). No forward may be in flight."""
        size = self.plan.logical_pages + 1
        self.state = [PageState.FREE] * size
        self.frame = [UNMAPPED] * size
        self.dense.reset()
        self.mosaic.reset()
        self.sealed: dict[int, None] = {}  # insertion order: oldest seal first
        self.sinks: set[int] = set()
        self.costly: set[int] = set()
        """Sealed pages that exceed the error limit; whoever judges pages adds them."""
        self._new: dict[int, None] = {}
        self._newly_sealed = False
        self._encodings: dict[int, Encoding] = {}
        self._table: dict[int, int] = {page: UNMAPPED for page in range(1, size)}

    def allocate(self, pages: Sequence[int], sinks: Iterable[int] = ()) -> None:
        """FREE -> OPEN; each page gets a dense frame, sealed pages are encoded where that takes room.

        Args:
            pages: logical pages that SGLang's allocator just handed out.
            sinks: those of them that hold the first tokens of a sequence (attention sinks): encoded last of all.

        Raises:
            CapacityError: the capacity theorem's premises do not hold.
        """
        if len(pages) > self.dense.free:
            self._make_room(len(pages))
        for page in pages:
            if self.state[page] is not PageState.FREE:
                raise InvariantError(f"page {page} was allocated twice: it is {self.state[page].name}")
            self.state[page] = PageState.OPEN
            self.frame[page] = self._table[page] = self.dense.take()
        self.sinks.update(sinks)
        self.counters.allocated += len(pages)

    def seal(self, pages: Iterable[int]) -> None:
        """OPEN -> SEALED for pages whose last token is written by a forward that has been launched.

        Pages in another state are left alone: padded writes name the reserved page, and a request that finished under
        overlap scheduling may still write to a page that was freed meanwhile.
        """
        for page in pages:
            if self.state[page] is PageState.OPEN:
                self.state[page] = PageState.SEALED
                self.sealed[page] = self._new[page] = None
                self._newly_sealed = True

    def take_new(self) -> list[int]:
        """Sealed pages that were not handed out by this method before."""
        pages, self._new = list(self._new), {}
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Any state -> FREE; the frame may be reused, a pending encoding is dropped.

        Raises:
            InvariantError: a page was free already (a slot freed by two paths).
        """
        for page in pages:
            state = self.state[page]
            if state is PageState.FREE:
                raise InvariantError(f"page {page} was freed twice")
            if state is PageState.ENCODING:
                del self._encodings[page]
                self.counters.cancelled += 1
            frames = self.dense if state in (PageState.OPEN, PageState.SEALED) else self.mosaic
            frames.give_back(self.frame[page])
            self.sealed.pop(page, None)
            self._new.pop(page, None)
            self.sinks.discard(page)
            self.costly.discard(page)
            self.state[page] = PageState.FREE
            self.frame[page] = self._table[page] = UNMAPPED
            self.counters.freed += 1

    def encode_cold(self) -> None:
        """SEALED -> ENCODING for every sealed page outside recent windows that is no sink, as far as frames allow.

        Looks only after another page was sealed: windows move with the pages that fill up, and finding them may have to
        read the device, which no decode step should wait for.
        """
        if self._newly_sealed and self.mosaic.free:
            self._newly_sealed = False
            self._reserve(self._victims(self.mosaic.free).cold)

    def take_updates(self) -> Updates:
        """Hand over what has been decided, and regard it as published: ENCODING -> MOSAIC."""
        updates = Updates(list(self._encodings.values()), self._table)
        for encoding in updates.encodings:
            self.state[encoding.page] = PageState.MOSAIC
        self.counters.encoded += len(updates.encodings)
        self._encodings, self._table = {}, {}
        return updates

    @property
    def pending_pages(self) -> Collection[int]:
        """Pages whose table entry the next forward will change."""
        return self._table.keys()

    def _make_room(self, needed: int) -> None:
        missing = needed - self.dense.free
        want = min(max(missing, ENCODE_BATCH), self.mosaic.free)
        victims = self._victims(want)
        chosen = [*victims.cold, *victims.recent, *victims.costly, *victims.sinks]
        if len(chosen) < missing:
            raise CapacityError(
                f"{needed} new pages need {missing} more dense frames, and only {len(chosen)} pages can be encoded "
                f"({len(self.sealed)} sealed, {self.mosaic.free} mosaic frames free, {self.plan.describe()}); "
                "raise --mosaic-kv-mib or lower --max-running-requests."
            )
        # Going beyond what is missing is for cold pages only: the others lose quality for nothing.
        chosen = chosen[: max(missing, len(victims.cold))]
        last = set(chosen)
        self.counters.encoded_recent += len(last.intersection(victims.recent))
        self.counters.encoded_costly += len(last.intersection(victims.costly))
        self.counters.encoded_sinks += len(last.intersection(victims.sinks))
        self._reserve(chosen)

    def _victims(self, limit: int) -> Victims:
        return choose_victims(self.sealed, self.sinks, self.costly, self.recent_pages(), limit)

    def _reserve(self, pages: Iterable[int]) -> None:
        for page in pages:
            encoding = Encoding(page, self.frame[page], self.mosaic.take())
            del self.sealed[page]
            self._new.pop(page, None)
            self.state[page] = PageState.ENCODING
            self._encodings[page] = encoding
            self.frame[page] = self._table[page] = encoding.mosaic_frame
            self.dense.give_back(encoding.dense_frame)
