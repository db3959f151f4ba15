"""The slots that a forward writes, on the host without waiting for that forward."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class WrittenSlots:
    """Logical slots, integer [tokens], in host memory or on their way there."""

    slots: torch.Tensor
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, slots: torch.Tensor) -> WrittenSlots:
        """Copy them in the order of the current stream: asked for before a forward is launched, the copy is there when
        that forward begins; after it, when it ends."""
        if not slots.is_cuda:
            return cls(slots, None)
        host = torch.empty(slots.shape, dtype=slots.dtype, pin_memory=True)
        host.copy_(slots, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return cls(host, arrived)

    def on_host(self) -> torch.Tensor:
        """The slots, waiting for the copy if need be."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.slots
