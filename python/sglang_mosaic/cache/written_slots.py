"""Which slots forwards write, known on the host without waiting for those forwards."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_mosaic.page import PAGE_SIZE


class _Slots(NamedTuple):
    slots: torch.Tensor
    """In host memory."""
    done: torch.cuda.Event | None


class WrittenSlots:
    """On their way from the device to the host since `take` was called last."""

    def __init__(self) -> None:
        self._under_way: list[_Slots] = []

    def add(self, slots: torch.Tensor) -> None:
        """The forward that is launched next in the current stream writes these logical slots, integer [tokens].

        Copied before it runs: whoever asks for them then waits for the forward before it at most.
        """
        done = None
        if slots.is_cuda:
            host = torch.empty(slots.shape, dtype=slots.dtype, pin_memory=True)
            host.copy_(slots, non_blocking=True)
            slots, done = host, torch.cuda.current_stream(slots.device).record_event()
        self._under_way.append(_Slots(slots, done))

    def take(self) -> list[int]:
        """Pages whose last slot is among them; they are forgotten."""
        if not self._under_way:
            return []
        for _, done in self._under_way:
            if done is not None:
                done.synchronize()
        slots = torch.cat([slots for slots, _ in self._under_way])
        self._under_way.clear()
        return (slots[slots % PAGE_SIZE == PAGE_SIZE - 1] // PAGE_SIZE).tolist()

    def clear(self) -> None:
        """Forget them."""
        self._under_way.clear()
