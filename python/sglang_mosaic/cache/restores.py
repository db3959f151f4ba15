"""Pages that requests wait for: fetched from the manager in order, all at once as far as there is room, and once for
all who want them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from sglang_mosaic.cache.host_page import HostPage, page_of
from sglang_mosaic.cache.restore_rate import RestoreRate
from sglang_mosaic.manager.client import Completion, ManagerClient, Status, Ticket

FETCH_S = 2.0
"""Longest wait for one page: a manager that takes longer is not well."""
LEAST_FETCH_S = 0.2
"""Shortest: a hiccup of the system is no reason to lose a page that others may want, too."""
TOGETHER = 64
"""Pages to be taken at a time, unless no more come: the prefix tree gets a node for each time, and every request that
reads the prefix goes through all of its nodes."""
PROBES, PROBE_EVERY_S = 8, 5.0
"""Pages that are asked for to see how long they take by now, and how often at most: they keep a server from its work
for some milliseconds, as long as they are copied."""


@dataclasses.dataclass
class _Restore:
    keys: Sequence[bytes]
    """What is still wanted, from `taken` on."""
    page_s: float
    """How long to wait for each."""
    deadline: float = 0.0
    taken: int = 0
    asked: int = 0
    """Keys before this one have arrived, or are under way."""
    end: int = 0
    """Keys from here on are not to be had."""
    arrived: dict[bytes, HostPage] = dataclasses.field(default_factory=dict)
    index: dict[bytes, int] = dataclasses.field(default_factory=dict)
    """Of every key."""

    def __post_init__(self) -> None:
        self.end = len(self.keys)
        self.index = {key: i for i, key in enumerate(self.keys)}

    def renew(self) -> None:
        """Wait from now on for what is left."""
        self.deadline = time.monotonic() + self.page_s * (len(self.keys) - self.taken)

    def wants(self, key: bytes) -> bool:
        return self.taken <= self.index.get(key, -1) < self.end

    def ready(self) -> list[bytes]:
        """Keys of the pages that can be taken."""
        end = self.taken
        while end < self.end and self.keys[end] in self.arrived:
            end += 1
        return list(self.keys[self.taken : end])


class Restores:
    """
    Args:
        client: of the manager.
        at_once: pages under way at a time.
        most_bytes: of pages that have arrived and were not taken, beyond which none is asked for: a queue may stand.
        own: finds pages that have not gone to the manager yet.
        readable: whether pages of an epoch can be read.
        adopt: makes pages of an epoch readable, given its bytes; False: they cannot be.
    """

    def __init__(
        self,
        client: ManagerClient,
        at_once: int,
        most_bytes: int,
        own: Callable[[bytes], HostPage | None],
        readable: Callable[[str], bool],
        adopt: Callable[[bytes], bool],
    ) -> None:
        self._client = client
        self.rate = RestoreRate(TOGETHER)
        self._at_once = at_once
        self._most_bytes = most_bytes
        self._own = own
        self._readable = readable
        self._adopt = adopt
        self._restores: dict[str, _Restore] = {}
        self._pages: dict[Ticket, bytes] = {}
        self._probes: set[Ticket] = set()
        self._probe_from = 0.0
        self._asked: set[bytes] = set()
        self._epochs: dict[Ticket, str] = {}
        self._unreadable: set[str] = set()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._restores)

    @property
    def ahead(self) -> int:
        """Pages that will be brought before those of another request."""
        missing = sum(restore.end - restore.taken - len(restore.arrived) for restore in self._restores.values())
        return max(missing, 0)

    def probe(self, keys: Sequence[bytes]) -> None:
        """Ask for some pages that nobody waits for, unless others are under way or were a moment ago: only to see how
        long they take."""
        now = time.monotonic()
        if self._pages or self._probes or now < self._probe_from:
            return
        self._probe_from = now + PROBE_EVERY_S
        for key in keys[:PROBES]:
            if self._own(key) is None and self._client.connected and self._client.room:
                self._probes.add(self._client.fetch(key, timeout_s=FETCH_S))

    def begin(self, name: str, keys: Sequence[bytes], budget_s: float) -> None:
        """Bring pages back, in this order.

        Args:
            name: of the request.
            budget_s: seconds to wait for them at most; whenever some are taken, the share of the others, anew, as a
                request may stand in the queue for other reasons while its pages are there.
        """
        if not self._restores:
            self._unreadable.clear()
        restore = _Restore(keys, budget_s / max(len(keys), 1))
        restore.renew()
        for other in self._restores.values():
            restore.arrived.update({key: other.arrived[key] for key in keys if key in other.arrived})
        self._restores[name] = restore
        self.ask()

    def take(self, name: str, hold: bool = False) -> list[HostPage]:
        """Pages that have arrived and follow those that were taken before, once they are many or nothing is to be
        waited for. They can be read.

        Args:
            hold: there is no place for any now; one that is waited for no longer takes them all the same.
        """
        restore = self._restores[name]
        keys = restore.ready()
        more_come = len(keys) < min(TOGETHER, restore.end - restore.taken)
        if (hold or (more_come and not self._full())) and time.monotonic() <= restore.deadline:
            return []
        pages = [restore.arrived[key] for key in keys]
        unknown = next((i for i, page in enumerate(pages) if not self._known(page.epoch)), len(pages))
        if unknown < len(pages) and pages[unknown].epoch in self._unreadable:
            restore.end = restore.taken + unknown
        for key in keys[:unknown]:
            del restore.arrived[key]
        restore.taken += unknown
        if unknown:
            restore.renew()
            # Now, not after the forward that comes next: it may last longer than bringing all of them.
            self.ask()
        return pages[:unknown]

    def done(self, name: str) -> bool:
        """Whether nothing more will come. Then the name is forgotten."""
        restore = self._restores[name]
        if time.monotonic() > restore.deadline:
            restore.end = min(restore.end, restore.taken)
        if restore.taken < restore.end:
            return False
        self.cancel(name)
        return True

    def cancel(self, name: str) -> None:
        """The request waits no longer. Nothing happens if it did not wait."""
        if self._restores.pop(name, None) is None:
            return
        for ticket, key in list(self._pages.items()):
            if not any(restore.wants(key) for restore in self._restores.values()):
                self._client.cancel(ticket)
                self._forget(ticket)
        self.ask()

    def completed(self, completion: Completion) -> None:
        """Take an answer of the manager; one to somebody else's question is left alone."""
        ok = completion.status is Status.OK
        if ok and (completion.ticket in self._pages or completion.ticket in self._probes):
            self.rate.answered(completion.seconds)
            self.rate.received(completion.copy_seconds)
        self._probes.discard(completion.ticket)
        if completion.ticket in self._epochs:
            hash_ = self._epochs.pop(completion.ticket)
            if not ok or not self._adopt(bytes(completion.data)):
                self._unreadable.add(hash_)
        elif completion.ticket in self._pages:
            key = self._pages[completion.ticket]
            self._forget(completion.ticket)
            meta = completion.meta
            self._arrived(key, page_of(meta, completion.data) if ok and meta is not None else None)

    def ask(self) -> None:
        """Ask for more, after the answers of a turn were taken."""
        now = time.monotonic()
        full = self._full()
        for restore in self._restores.values():
            restore.asked = max(restore.asked, restore.taken)
            if now > restore.deadline and restore.asked > restore.taken:
                continue
            while restore.asked < restore.end:
                key = restore.keys[restore.asked]
                page = None if key in restore.arrived or key in self._asked else self._own(key)
                if page is not None:
                    self._arrived(key, page)
                elif key not in restore.arrived and key not in self._asked:
                    full = full or not self._room()
                    if full:
                        if restore.asked == restore.taken:
                            restore.renew()  # the manager is not late with what it was not asked for
                        break
                    timeout_s = min(max(restore.deadline - now, LEAST_FETCH_S), FETCH_S)
                    self._pages[self._client.fetch(key, timeout_s=timeout_s)] = key
                    self._asked.add(key)
                restore.asked += 1

    def _room(self) -> bool:
        """Whether one more page may be asked for; without a manager any, as they are misses at once."""
        return len(self._pages) < self._at_once and (not self._client.connected or self._client.room > 0)

    def _full(self) -> bool:
        """Whether no page more may arrive before some are taken."""
        held = sum(len(page.data) for restore in self._restores.values() for page in restore.arrived.values())
        return held >= self._most_bytes

    def _arrived(self, key: bytes, page: HostPage | None) -> None:
        for restore in self._restores.values():
            if restore.wants(key):
                if page is None:
                    restore.end = min(restore.end, restore.index[key])
                else:
                    restore.arrived[key] = page

    def _forget(self, ticket: Ticket) -> None:
        self._asked.discard(self._pages.pop(ticket))

    def _known(self, epoch: str) -> bool:
        """Whether pages of an epoch can be read; if not, and that may change, asks for the epoch."""
        if not epoch or self._readable(epoch):
            return True
        if epoch not in self._unreadable and epoch not in self._epochs.values():
            self._epochs[self._client.fetch_epoch(epoch)] = epoch
        return False
