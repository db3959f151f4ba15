"""Which record goes when a tier is full."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator

from sglang_mosaic.manager.store.record import RecordId


class EvictionPolicy(ABC):
    """Order of the records of one tier. Holds no bytes and frees none."""

    @abstractmethod
    def use(self, record: RecordId) -> None:
        """The record was added, or read."""

    @abstractmethod
    def forget(self, record: RecordId) -> None:
        """The record is gone; nothing happens if it was not there."""

    @abstractmethod
    def order(self) -> Iterator[RecordId]:
        """All records, who goes first before the others."""

    @abstractmethod
    def victim(self) -> RecordId:
        """Who goes next; it stays until it is forgotten.

        Raises:
            LookupError: there is none.
        """


class LeastRecentlyUsed(EvictionPolicy):
    """The record that has not been used for the longest time."""

    def __init__(self) -> None:
        self._order: OrderedDict[RecordId, None] = OrderedDict()

    def use(self, record: RecordId) -> None:
        self._order[record] = None
        self._order.move_to_end(record)

    def forget(self, record: RecordId) -> None:
        self._order.pop(record, None)

    def order(self) -> Iterator[RecordId]:
        return iter(self._order)

    def victim(self) -> RecordId:
        for record in self._order:
            return record
        raise LookupError("no record")
