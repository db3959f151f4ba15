"""Small constant tensors, made once per device: making one on a GPU waits for the device."""

from __future__ import annotations

import functools

import torch


@functools.lru_cache(maxsize=4096)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The values as a tensor [len(values)]; shared, never to be written to."""
    return torch.tensor(values, dtype=dtype, device=device)
