"""Fixed-size mosaic frames."""

from __future__ import annotations

import torch

POISON = 0xFF
"""Byte that fills new mosaic frames: as a scale it is NaN and as a format it is unknown, so reading a frame that was
never encoded cannot pass for data."""


class MosaicSlab:
    """Compressed frames, `frames` uint8 ``[mosaic_frames, frame_bytes]``: all layers of a page lie together, so that an
    epoch can give each layer the bytes that it needs."""

    def __init__(self, frames: int, frame_bytes: int, device: torch.device | str) -> None:
        self.frames = torch.full((frames, frame_bytes), POISON, dtype=torch.uint8, device=device)

    @property
    def nbytes(self) -> int:
        return self.frames.numel()
