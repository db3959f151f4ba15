"""Small tensors of the host on a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def upload(values: torch.Tensor | Sequence[int], device: torch.device) -> torch.Tensor:
    """A tensor, or numbers as int64, on a device. Nothing waits for a GPU; `torch.tensor(values, device=device)` waits
    for all that its current stream has to do, in front of a forward for the whole one before."""
    there = values if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=torch.int64)
    if device.type == "cuda":
        there = there.pin_memory()
    return there.to(device, non_blocking=True)
