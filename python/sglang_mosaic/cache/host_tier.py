"""The pool's view of the host: pages that leave it go there, and pages that a request needs come back.

Nothing here waits. What finds no room is dropped and counted: its tokens are computed again.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from sglang_mosaic.cache.host_copies import HostCopies
from sglang_mosaic.cache.host_page import HostPage, Label, meta_of
from sglang_mosaic.cache.restores import Restores
from sglang_mosaic.manager.client import Lookup, ManagerClient, Status, Ticket
from sglang_mosaic.wire.buffers import Buffers


@dataclasses.dataclass
class HostCounters:
    """Totals since the server started, in pages."""

    offered: int = 0
    dropped: int = 0
    """Of the offered: nothing had room for them."""
    restored: int = 0
    recomputed: int = 0
    """Not asked for: computing them takes no longer than bringing them back."""
    missed: int = 0
    """Asked for and not restored: lost, damaged, unreadable, late, or without room in the pool."""


class HostTier:
    """
    Args:
        client: of the manager; closed here.
        most_bytes: of pages that wait for the manager, in host memory.
        most_back: of pages that have come back and were not taken, from which on no more are asked for.
        slots: payloads that the client can have under way.
        buffers: as of `HostCopies`.
        readable: whether pages of an epoch can be read.
        adopt: makes pages of an epoch readable, given its bytes; False: they cannot be.
    """

    def __init__(
        self,
        client: ManagerClient,
        most_bytes: int,
        most_back: int,
        slots: int,
        buffers: Buffers,
        readable: Callable[[str], bool],
        adopt: Callable[[bytes], bool],
    ) -> None:
        self.counters = HostCounters()
        self._client = client
        self._most_bytes = most_bytes
        self._spare_slots = slots // 2
        self._copies = HostCopies(buffers)
        self._outbox: OrderedDict[bytes, HostPage] = OrderedDict()
        self._outbox_bytes = 0
        self.restores = Restores(client, max(slots // 2, 1), most_back, self._outbox.get, readable, adopt)
        self._calibration: Ticket | None = None
        self._calibrated: bytes | None = None
        self._failed = False

    # Out.

    def room(self, page_bytes: int) -> int:
        """Pages that `keep` has room for."""
        return max(self._most_bytes - self._waiting_bytes, 0) // page_bytes

    @property
    def crowded(self) -> bool:
        """Whether what comes back should wait. It makes others leave, a whole node at a time, and faster than the
        manager takes them, which brings back first. An absent manager takes none, whoever waits."""
        return self._client.connected and self._waiting_bytes > self._most_bytes // 4

    def make_room(self, positions: Sequence[int], page_bytes: int) -> int:
        """Drop pages that wait and are farther from the starts of their sequences, the farthest first: a tree gives up
        sequences from their ends, and without a page those behind it are of no use.

        Args:
            positions: of the pages that are to have room, ascending.

        Returns:
            How many of these have room now, from the first on.
        """
        free = self._most_bytes - self._waiting_bytes
        waiting = sorted(self._outbox, key=lambda key: self._outbox[key].position)
        for i, position in enumerate(positions):
            farther = []
            while free < page_bytes and waiting and self._outbox[waiting[-1]].position > position:
                farther.append(waiting.pop())
                free += len(self._outbox[farther[-1]].data)
            if free < page_bytes:
                return i  # none goes for nothing
            for key in farther:
                self._outbox_bytes -= len(self._outbox.pop(key).data)
            self.counters.dropped += len(farther)
            free -= page_bytes
        return len(positions)

    def keep(self, labels: list[Label], rows: torch.Tensor) -> None:
        """Pages leave the pool.

        Args:
            labels: of each page.
            rows: uint8 [pages, bytes], on the pool's device; nobody else writes to them. At most `room` of them.
        """
        self._copies.start(labels, rows)

    # Back.

    def held(self, keys: Sequence[bytes]) -> int:
        """How many of the pages, from the first on, may be had."""
        for i, key in enumerate(keys):
            if key not in self._outbox and self._client.lookup(key) is Lookup.MISS:
                return i
        return len(keys)

    # Calibration.

    def put_epoch(self, hash_: str, data: bytes) -> None:
        """As `ManagerClient.put_epoch`."""
        self._client.put_epoch(hash_, data)

    @property
    def calibrating(self) -> bool:
        """Whether an epoch is being made."""
        return self._calibration is not None

    @property
    def calibrates(self) -> bool:
        """Whether an epoch can be had from the manager: it is there, and the last one did not fail."""
        return self._client.connected and not self._failed

    def calibrate(self, statistics: bytes) -> None:
        """Have an epoch made of statistics (codec/calibration_job.py)."""
        self._calibration = self._client.calibrate(statistics)

    def take_epoch(self) -> bytes | None:
        """The epoch that was made since this was asked last."""
        data, self._calibrated = self._calibrated, None
        return data

    # Turns.

    @property
    def busy(self) -> bool:
        """Whether `poll` has something to move on."""
        return bool(self._outbox or self._copies.nbytes or self.restores.waiting)

    @property
    def _waiting_bytes(self) -> int:
        """Of pages that the manager has not been given."""
        return self._outbox_bytes + self._copies.nbytes

    def poll(self) -> None:
        """Move everything on. Call once a step, and while idle a few times a second; more often while `busy`."""
        for key, page in self._copies.finished():
            if key not in self._outbox:
                self._outbox[key] = page
                self._outbox_bytes += len(page.data)
        for completion in self._client.poll():
            if completion.ticket == self._calibration:
                self._calibration = None
                self._failed = completion.status is not Status.OK
                self._calibrated = None if self._failed else bytes(completion.data)
            else:
                self.restores.completed(completion)
        self.restores.ask()
        self._put()

    def _put(self) -> None:
        """Hand pages to the manager. Restores have the other half of the slots."""
        while self._outbox and self._client.connected and self._client.room > self._spare_slots:
            key, page = self._outbox.popitem(last=False)
            self._outbox_bytes -= len(page.data)
            self.counters.dropped += not self._client.put(key, meta_of(page), page.data)

    def stats(self) -> dict[str, object]:
        """Counters and gauges, JSON-serialisable."""
        return {
            **dataclasses.asdict(self.counters),
            "outbox_pages": len(self._outbox),
            "outbox_bytes": self._waiting_bytes,
            "restores_waiting": self.restores.waiting,
            "restore_page_seconds": self.restores.rate.page_s,
            **self._client.stats(),
        }

    def close(self) -> None:
        """End the manager, which keeps what it was given."""
        self._client.close()
