"""Which calibration each mosaic frame was written with."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch

from mosaic_kernels.upload import upload
from sglang_mosaic.codec.base import Epoch

REFRESH_GROWTH = 2
"""Every epoch lasts this many times as many pages as the one before: bases settle, and calibrating costs time."""


class EpochTable:
    """The live epochs, newest last, and the epoch of every mosaic frame.

    Args:
        first_frame, frames: numbers of the mosaic frames.
        device: of what kernels read.
        refresh_pages: encoded pages after which the first epoch is followed by another; 0: never.
        most: epochs that may be alive at a time; the oldest ones die with their last page.
    """

    def __init__(
        self, first_frame: int, frames: int, refresh_pages: int, most: int, device: torch.device | str = "cpu"
    ) -> None:
        self._first = first_frame
        self._numbers = torch.full((frames,), -1)
        self.frame_slots = torch.full((frames,), -1, dtype=torch.int32, device=device)
        """Slot of the epoch of every mosaic frame, at a fixed address; -1: none was written to it."""
        self._slots: dict[int, int] = {}
        self._live: dict[int, Epoch] = {}
        self._refresh_pages = refresh_pages
        self._most = most
        self._next = itertools.count()
        self._current = -1
        self._left = 0
        self.started = 0
        """Calibrations that new pages were encoded with so far."""

    @property
    def current(self) -> Epoch | None:
        """The epoch that new pages are encoded with."""
        return self._live.get(self._current)

    @property
    def live(self) -> list[Epoch]:
        """Epochs that pages may need."""
        return list(self._live.values())

    @property
    def numbers(self) -> tuple[int, ...]:
        """Numbers of the live epochs."""
        return tuple(self._live)

    @property
    def slots(self) -> dict[int, int]:
        """Where tables have the live epochs, by number: 0 to `most` - 1, the same for as long as they live."""
        return self._slots

    @property
    def most(self) -> int:
        """Epochs that may be alive at a time."""
        return self._most

    def due(self, frames_in_use: Iterable[int]) -> bool:
        """Whether the next page wants a new epoch, and there is room for one. Drops epochs that no page needs."""
        if self._current < 0:
            return True
        if not self._refresh_pages or self._left > 0:
            return False
        return self._has_room(frames_in_use)

    def start(self, epoch: Epoch, lasting: bool = True) -> None:
        """Encode new pages with another epoch; if it does not last, the next is due at once."""
        self._current = self._add(epoch)
        self._left = self._refresh_pages * REFRESH_GROWTH**self.started if lasting else 0
        self.started += lasting

    def adopt(self, epoch: Epoch, frames_in_use: Iterable[int]) -> bool:
        """Make pages of an epoch readable that was made elsewhere; the first one is taken for new pages, too.

        Returns:
            False: too many are alive.
        """
        if self._current < 0:
            self.start(epoch)
        elif self.number(epoch.hash) is None:
            if not self._has_room(frames_in_use):
                return False
            self._add(epoch)
        return True

    def number(self, hash_: str) -> int | None:
        """Of a live epoch with this hash, if there is one."""
        return next((number for number, epoch in self._live.items() if epoch.hash == hash_), None)

    def written(self, frames: Iterable[int]) -> None:
        """Frames were encoded with the current epoch."""
        written = [*frames]
        self.assign(written, self._current)
        self._left -= len(written)

    def assign(self, frames: Iterable[int], number: int) -> None:
        """Frames are of a live epoch. In the order of the current stream."""
        rows = torch.tensor([*frames], dtype=torch.int64) - self._first
        self._numbers[rows] = number
        self.frame_slots[upload(rows, self.frame_slots.device)] = self._slots[number]

    def of(self, frame: int) -> Epoch:
        """The epoch that a mosaic frame was written with."""
        return self._live[int(self._numbers[frame - self._first])]

    def numbers_of(self, frames: torch.Tensor) -> torch.Tensor:
        """Numbers of the epochs of mosaic frames, int64, both [frames] on the host."""
        return self._numbers[frames - self._first]

    def __getitem__(self, number: int) -> Epoch:
        return self._live[number]

    def _add(self, epoch: Epoch) -> int:
        number = next(self._next)
        self._live[number] = epoch
        self._slots[number] = min({*range(self._most)} - {*self._slots.values()})
        return number

    def _has_room(self, frames_in_use: Iterable[int]) -> bool:
        """Whether another epoch may be alive, once those that no page needs are dropped."""
        needed = {*self.numbers_of(torch.tensor([*frames_in_use], dtype=torch.int64)).tolist(), self._current}
        self._live = {number: epoch for number, epoch in self._live.items() if number in needed}
        self._slots = {number: slot for number, slot in self._slots.items() if number in needed}
        return len(self._live) < self._most
