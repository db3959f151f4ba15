"""Dense frames as bytes: K, then V, layer after layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence

import torch

from sglang_mosaic.page import PAGE_SIZE


def dense_bytes(k: Sequence[torch.Tensor], v: Sequence[torch.Tensor], frames: torch.Tensor) -> torch.Tensor:
    """
    Args:
        k, v: of every layer, [frames * 64, kv_heads, dim].
        frames: int64 [P].

    Returns:
        uint8 [P, bytes of a dense frame], a copy.
    """
    return torch.cat([x[frames].flatten(1) for x in _by_frame(k, v)], 1).view(torch.uint8)


def dense_layers(
    row: torch.Tensor, k: Sequence[torch.Tensor], v: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """K [64, kv_heads, dim] of every layer, and V, of a row of `dense_bytes` (the same memory) of pages of k and v."""
    shapes = [(PAGE_SIZE, *x.shape[1:]) for layer in zip(k, v, strict=True) for x in layer]
    parts = row.view(k[0].dtype).split([math.prod(shape) for shape in shapes])
    found = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    return found[::2], found[1::2]


def write_dense_bytes(
    k: Sequence[torch.Tensor], v: Sequence[torch.Tensor], frames: torch.Tensor, data: torch.Tensor
) -> None:
    """The inverse of `dense_bytes`: data uint8 [P, bytes of a dense frame]."""
    values = data.view(k[0].dtype)
    start = 0
    for x in _by_frame(k, v):
        size = x[0].numel()
        x[frames] = values[:, start : start + size].reshape(len(frames), *x.shape[1:])
        start += size


def host_bytes(data: bytes | memoryview) -> torch.Tensor:
    """uint8 [bytes] on the host, the same memory: not to be written to where the bytes are not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(data, dtype=torch.uint8)


def _by_frame(k: Sequence[torch.Tensor], v: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    for layer in zip(k, v, strict=True):
        for x in layer:
            yield x.view(-1, PAGE_SIZE, *x.shape[1:])
