"""Shared memory for payloads: an anonymous file of equal slots, mapped by the server and its manager.

The file has no name (memfd), so nothing of it can outlive the two processes. Its size is sealed: neither side can make
the other one fault by cutting it off. The server owns the slots and gives them away; the manager only ever touches one
that a request names. Every reader copies a payload out before it checks it, since the other side may still write.
"""

from __future__ import annotations

import dataclasses
import fcntl
import mmap
import os

import numpy as np
import xxhash

from sglang_mosaic.wire.messages import Payload, Slot, WireError

BACK_THREADS = max(min((os.cpu_count() or 1) // 2, 8), 1)
"""Threads that copy what comes back, of either side: .8 ms for a page of an 8B model, which steps wait for."""
OUT_THREADS = max(BACK_THREADS // 2, 1)
"""The same of what goes to the manager: nothing waits for it, but what comes back has as much make way."""


def checksum(key: bytes, data: bytes | memoryview) -> int:
    """64 bits of a record's key and bytes."""
    digest = xxhash.xxh3_64(key)
    digest.update(data)
    return digest.intdigest()


class SlotMemory:
    """The mapping. Close it after use.

    Args:
        fd: of the file; stays open with the mapping, and is closed with it.
        slots: number of slots.
        least_bytes: what each has to hold; both sides round it up to whole pages of the system.

    Raises:
        WireError: the file has another size.
    """

    def __init__(self, fd: int, slots: int, least_bytes: int) -> None:
        self.fd = fd
        self.slots = slots
        self.slot_bytes = _rounded(least_bytes)
        found = os.fstat(fd).st_size
        if found != slots * self.slot_bytes:
            raise WireError(f"shared memory of {found} bytes, expected {slots} slots of {self.slot_bytes}")
        self._map = mmap.mmap(fd, found)

    @classmethod
    def create(cls, slots: int, least_bytes: int) -> SlotMemory:
        """New memory with slots of at least so many bytes."""
        fd = os.memfd_create("sglang-mosaic-slots", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, slots * _rounded(least_bytes))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return cls(fd, slots, least_bytes)

    def touch(self, nbytes: int) -> None:
        """Have the system give the first so many bytes of every slot, and map them for this process: finding, clearing
        and mapping memory takes several times as long as filling it. What is in them stays."""
        for start in range(0, self.slots * self.slot_bytes, self.slot_bytes):
            self._map[start : start + min(nbytes, self.slot_bytes) : mmap.PAGESIZE]

    def write(self, slot: Slot, key: bytes, data: bytes | memoryview, known: int | None = None) -> Payload:
        """Put bytes into a slot. Other threads run meanwhile.

        Args:
            known: their `checksum`; None: compute it.

        Raises:
            WireError: there is no such slot, or they do not fit.
        """
        start = self._start(slot, len(data))
        np.copyto(self._bytes(start, len(data)), np.frombuffer(data, np.uint8))
        return Payload(slot, len(data), checksum(key, data) if known is None else known)

    def read(self, payload: Payload, key: bytes) -> memoryview:
        """A copy of the bytes of a payload. Other threads run meanwhile.

        Raises:
            WireError: there is no such slot, or the bytes are not those that were meant.
        """
        self._start(payload.slot, payload.length)  # before there is memory for so much
        data = np.empty(payload.length, np.uint8).data
        self.read_into(payload, key, data)
        return data

    def read_into(self, payload: Payload, key: bytes, data: memoryview) -> None:
        """The same, the copy where the caller wants it."""
        np.copyto(np.frombuffer(data, np.uint8), self._bytes(self._start(payload.slot, payload.length), payload.length))
        self._check(payload, key, data)

    def _bytes(self, start: int, length: int) -> np.ndarray:
        return np.frombuffer(self._map, np.uint8, length, start)

    def _check(self, payload: Payload, key: bytes, data: memoryview) -> None:
        if checksum(key, data) != payload.checksum:
            raise WireError(f"the bytes in slot {payload.slot.index} do not match their checksum")

    def _start(self, slot: Slot, length: int) -> int:
        if not 0 <= slot.index < self.slots:
            raise WireError(f"slot {slot.index} of {self.slots}")
        if not 0 <= length <= self.slot_bytes:
            raise WireError(f"{length} bytes in a slot of {self.slot_bytes}")
        return slot.index * self.slot_bytes

    def close(self) -> None:
        """Unmap and close; idempotent."""
        if not self._map.closed:
            self._map.close()
            os.close(self.fd)


def _rounded(nbytes: int) -> int:
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


@dataclasses.dataclass
class _Life:
    generation: int = 0
    ticket: int | None = None


class SlotAllocator:
    """Who has which slot. Owner side only.

    Args:
        slots: number of slots.
    """

    def __init__(self, slots: int) -> None:
        self._lives = [_Life() for _ in range(slots)]
        self._free = list(range(slots))
        self.stale = 0
        """Slots that somebody named after they had gone to somebody else."""

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, ticket: int) -> Slot | None:
        """A slot for a ticket, or None: all are in use."""
        if not self._free:
            return None
        index = self._free.pop()
        life = self._lives[index]
        life.generation += 1
        life.ticket = ticket
        return Slot(index, life.generation)

    def holds(self, ticket: int, slot: Slot) -> bool:
        """Whether the ticket has the slot now. False is counted: somebody speaks of a life that is over."""
        if 0 <= slot.index < len(self._lives):
            life = self._lives[slot.index]
            if life.ticket == ticket and life.generation == slot.generation:
                return True
        self.stale += 1
        return False

    def give_back(self, ticket: int, slot: Slot) -> bool:
        """End the ticket's use of the slot; False, and no change, if it does not have it."""
        if not self.holds(ticket, slot):
            return False
        self._lives[slot.index].ticket = None
        self._free.append(slot.index)
        return True
