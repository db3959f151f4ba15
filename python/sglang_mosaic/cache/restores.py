"""Pages that requests wait for: fetched from the manager in order, a few at a time, once for all who want them."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence

from sglang_mosaic.cache.host_page import HostPage, page_of
from sglang_mosaic.manager.client import Completion, ManagerClient, Status, Ticket

MOST_WAITING = 64
"""Pages of one request that may have arrived without being taken: the pool may have no room for more."""
FETCH_S = 2.0
"""Longest wait for one page: a manager that takes longer is not well."""


@dataclasses.dataclass
class _Restore:
    keys: Sequence[bytes]
    """What is still wanted, from `taken` on."""
    page_s: float
    """How long to wait for each."""
    deadline: float = 0.0
    taken: int = 0
    end: int = 0
    """Keys from here on are not to be had."""
    arrived: dict[bytes, HostPage] = dataclasses.field(default_factory=dict)

    def renew(self) -> None:
        """Wait from now on for what is left."""
        self.deadline = time.monotonic() + self.page_s * (len(self.keys) - self.taken)

    @property
    def wanted(self) -> Sequence[bytes]:
        return self.keys[self.taken : min(self.end, self.taken + MOST_WAITING)]

    def ready(self) -> list[bytes]:
        """Keys of the pages that can be taken."""
        return list(itertools.takewhile(self.arrived.__contains__, self.wanted))


class Restores:
    """
    Args:
        client: of the manager.
        at_once: pages under way at a time.
        own: finds pages that have not gone to the manager yet.
        readable: whether pages of an epoch can be read.
        adopt: makes pages of an epoch readable, given its bytes; False: they cannot be.
    """

    def __init__(
        self,
        client: ManagerClient,
        at_once: int,
        own: Callable[[bytes], HostPage | None],
        readable: Callable[[str], bool],
        adopt: Callable[[bytes], bool],
    ) -> None:
        self._client = client
        self._at_once = at_once
        self._own = own
        self._readable = readable
        self._adopt = adopt
        self._restores: dict[str, _Restore] = {}
        self._pages: dict[Ticket, bytes] = {}
        self._asked: set[bytes] = set()
        self._epochs: dict[Ticket, str] = {}
        self._unreadable: set[str] = set()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._restores)

    def begin(self, name: str, keys: Sequence[bytes], budget_s: float) -> None:
        """Bring pages back, in this order.

        Args:
            name: of the request.
            budget_s: seconds to wait for them at most; whenever some are taken, the share of the others, anew, as a
                request may stand in the queue for other reasons while its pages are there.
        """
        if not self._restores:
            self._unreadable.clear()
        restore = _Restore(keys, budget_s / max(len(keys), 1), end=len(keys))
        restore.renew()
        for other in self._restores.values():
            restore.arrived.update({key: other.arrived[key] for key in keys if key in other.arrived})
        self._restores[name] = restore
        self.ask()

    def take(self, name: str) -> list[HostPage]:
        """Pages that have arrived and follow those that were taken before. They can be read."""
        restore = self._restores[name]
        keys = restore.ready()
        pages = [restore.arrived[key] for key in keys]
        unknown = next((i for i, page in enumerate(pages) if not self._known(page.epoch)), len(pages))
        if unknown < len(pages) and pages[unknown].epoch in self._unreadable:
            restore.end = restore.taken + unknown
        for key in keys[:unknown]:
            del restore.arrived[key]
        restore.taken += unknown
        if unknown:
            restore.renew()
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
        wanted = {key for restore in self._restores.values() for key in restore.wanted}
        for ticket, key in list(self._pages.items()):
            if key not in wanted:
                self._client.cancel(ticket)
                self._forget(ticket)
        self.ask()

    def completed(self, completion: Completion) -> None:
        """Take an answer of the manager; one to somebody else's question is left alone."""
        ok = completion.status is Status.OK
        if completion.ticket in self._epochs:
            hash_ = self._epochs.pop(completion.ticket)
            if not ok or not self._adopt(completion.data):
                self._unreadable.add(hash_)
        elif completion.ticket in self._pages:
            key = self._pages[completion.ticket]
            self._forget(completion.ticket)
            meta = completion.meta
            self._arrived(key, page_of(meta, completion.data) if ok and meta is not None else None)

    def ask(self) -> None:
        """Ask for more, after the answers of a turn were taken."""
        now = time.monotonic()
        for restore in self._restores.values():
            if now > restore.deadline:
                continue
            for key in restore.wanted:
                if key in restore.arrived or key in self._asked:
                    continue
                page = self._own(key)
                if page is not None:
                    self._arrived(key, page)
                    continue
                # Without a manager they are misses at once.
                if len(self._pages) >= self._at_once or (self._client.connected and self._client.room == 0):
                    return
                ticket = self._client.fetch(key, timeout_s=min(restore.deadline - now, FETCH_S))
                self._pages[ticket] = key
                self._asked.add(key)

    def _arrived(self, key: bytes, page: HostPage | None) -> None:
        for restore in self._restores.values():
            if key in restore.wanted:
                if page is None:
                    restore.end = min(restore.end, restore.keys.index(key))
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
