"""Fixed-size slabs of mosaic frames, one per layer."""

from __future__ import annotations

import torch

POISON = 0xFF
"""Byte that fills new mosaic frames: as a scale it is NaN, so reading a frame that was never encoded cannot pass for
data."""


class MosaicSlabs:
    """Compressed frames, uint8 ``[mosaic_frames, frame_bytes]`` per layer.

    Args:
        layers: number of layers of this rank.
        frames: mosaic frames.
        frame_bytes: bytes of one frame of one layer.
    """

    def __init__(self, layers: int, frames: int, frame_bytes: int, device: torch.device | str) -> None:
        self.layers = [
            torch.full((frames, frame_bytes), POISON, dtype=torch.uint8, device=device) for _ in range(layers)
        ]

    @property
    def nbytes(self) -> int:
        return sum(slab.numel() for slab in self.layers)
