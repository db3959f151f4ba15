"""The life of every logical page: which frame it has, when it is encoded, what the next forward must apply.

Decisions are taken on the host while SGLang allocates and frees; nothing is touched on the device. They pile up as one
``Updates`` record that the next forward applies, in its own stream, before it reads or writes anything, unless pages
that come back from the host have had it applied there before. A frame that is given away here is therefore rewritten
only after every forward that could read it, and what an operation reads is still intact when it runs, as operations run
in the order in which they were decided.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Sequence

from sglang_mosaic.cache.victims import Victims, choose_victims
from sglang_mosaic.codec.base import Epoch
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
class Copy:
    """Bytes of a page that leaves the pool, to copy out before its frame is rewritten."""

    key: bytes
    """Of the host's record."""
    position: int
    """Of the page's first token in its sequence."""
    frame: int
    epoch: Epoch | None
    """That a mosaic frame was written with; None: the frame is dense."""
    exact: bool
    """A dense frame to keep as it is: its page is one of those that are encoded last."""


@dataclasses.dataclass(frozen=True)
class Restore:
    """Bytes that come back from the host into a frame."""

    frame: int
    data: bytes | memoryview


Operation = Encoding | Copy | Restore


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the bytes of a page are to be found, by the operation of a certain turn."""

    frame: int
    mosaic: bool
    last: bool
    """Encoded last of all: a sink, or over the error limit."""
    turn: int | None = None
    """Of the encoding that would have read them; None: they stay until the next forward."""


@dataclasses.dataclass(frozen=True)
class Updates:
    """What the next forward applies first: the operations, in this order, then all table entries (page -> frame)."""

    operations: list[Operation]
    table: dict[int, int]

    @property
    def encodings(self) -> list[Encoding]:
        return [operation for operation in self.operations if isinstance(operation, Encoding)]


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
    copied: int = 0
    restored: int = 0

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
        least_cold: pages that must have been sealed before `encode_cold` looks again.
    """

    def __init__(
        self, plan: MemoryPlan, recent_pages: Callable[[], Collection[int]] = frozenset, *, least_cold: int = 1
    ) -> None:
        self.plan = plan
        self.recent_pages = recent_pages
        self._least_cold = least_cold
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
        self._newly_sealed = 0
        self._operations: dict[int, Operation] = {}
        """By turn."""
        self._turns = itertools.count()
        self._under_way: dict[int, int] = {}
        """Page -> turn of the encoding or restoring that it waits for."""
        self._left: dict[int, Place] = {}
        """Where pages are that were freed since the last forward."""
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
                self._newly_sealed += 1

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
            self._leave(page)
            if page in self._under_way:
                del self._operations[self._under_way.pop(page)]
                self.counters.cancelled += state is PageState.ENCODING
            frames = self.dense if state in (PageState.OPEN, PageState.SEALED) else self.mosaic
            frames.give_back(self.frame[page])
            self.sealed.pop(page, None)
            self._new.pop(page, None)
            self.sinks.discard(page)
            self.costly.discard(page)
            self.state[page] = PageState.FREE
            self.frame[page] = self._table[page] = UNMAPPED
            self.counters.freed += 1

    def copy_out(self, page: int, key: bytes, position: int, epoch_of: Callable[[int], Epoch]) -> None:
        """Keep the bytes of a page that was just freed.

        Nothing happens if it was restored since the last forward: the host has it.

        Args:
            key: of the host's record.
            position: of its first token in its sequence.
            epoch_of: tells the epoch of a mosaic frame.
        """
        place = self._left.pop(page, None)
        if place is None or self.state[page] is not PageState.FREE:
            return
        turn = next(self._turns) if place.turn is None else place.turn
        epoch = epoch_of(place.frame) if place.mosaic else None
        self._operations[turn] = Copy(key, position, place.frame, epoch, exact=place.last and not place.mosaic)
        self.counters.copied += 1

    def restore_mosaic(self, page: int, data: bytes | memoryview) -> int:
        """FREE -> MOSAIC, with bytes of a mosaic frame from the host; gives the frame.

        Raises:
            CapacityError: no mosaic frame is free.
        """
        return self._restore(page, PageState.MOSAIC, self.mosaic.take(), data)

    def restore_dense(self, page: int, data: bytes | memoryview, sink: bool) -> int:
        """FREE -> SEALED, with bytes of a dense frame from the host; gives the frame.

        Args:
            sink: the page starts a sequence; if not, it is over the error limit.

        Raises:
            CapacityError: the capacity theorem's premises do not hold.
        """
        if not self.dense.free:
            self._make_room(1)
        frame = self._restore(page, PageState.SEALED, self.dense.take(), data)
        self.sealed[page] = None
        (self.sinks if sink else self.costly).add(page)
        return frame

    def encode_cold(self) -> None:
        """SEALED -> ENCODING for every sealed page outside recent windows that is no sink, as far as frames allow.

        Looks only after other pages were sealed: windows move with the pages that fill up, and finding them may have to
        read the device, which no decode step should wait for.
        """
        if self._newly_sealed >= self._least_cold and self.mosaic.free:
            self._newly_sealed = 0
            self._reserve(self._victims(self.mosaic.free).cold)

    def take_updates(self) -> Updates:
        """Hand over what has been decided, and regard it as published: ENCODING -> MOSAIC."""
        updates = Updates([self._operations[turn] for turn in sorted(self._operations)], self._table)
        for encoding in updates.encodings:
            self.state[encoding.page] = PageState.MOSAIC
        self.counters.encoded += len(updates.encodings)
        self._operations, self._table = {}, {}
        self._under_way.clear()
        self._left.clear()
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
            self._begin(page, encoding)
            self.frame[page] = self._table[page] = encoding.mosaic_frame
            self.dense.give_back(encoding.dense_frame)

    def _restore(self, page: int, state: PageState, frame: int, data: bytes | memoryview) -> int:
        if self.state[page] is not PageState.FREE:
            raise InvariantError(f"page {page} was restored while it was {self.state[page].name}")
        self.state[page] = state
        self.frame[page] = self._table[page] = frame
        self._begin(page, Restore(frame, data))
        self.counters.allocated += 1
        self.counters.restored += 1
        return frame

    def _begin(self, page: int, operation: Operation) -> None:
        self._under_way[page] = next(self._turns)
        self._operations[self._under_way[page]] = operation

    def _leave(self, page: int) -> None:
        """Remember where a page's bytes are, for `copy_out`."""
        turn = self._under_way.get(page)
        operation = None if turn is None else self._operations[turn]
        last = page in self.sinks or page in self.costly
        if operation is None:
            self._left[page] = Place(self.frame[page], self.state[page] is PageState.MOSAIC, last)
        elif isinstance(operation, Encoding):
            # Another page may have the dense frame by now, so the copy takes the turn of the encoding.
            self._left[page] = Place(operation.dense_frame, False, last, turn)
        else:
            self._left.pop(page, None)
