"""The second codec: coarser codes on the same levels (coarsen.py), entropy-coded (packing.py)."""

from __future__ import annotations

import numpy as np

from sglang_mosaic.manager.recompress.base import FrameCodec, Packed
from sglang_mosaic.manager.recompress.coarsen import coarsen
from sglang_mosaic.manager.recompress.groups import FrameLayout
from sglang_mosaic.manager.recompress.packing import pack, unpack


class PlanesPacking(FrameCodec):
    """
    Args:
        layout: of the epoch's frames.
    """

    def __init__(self, layout: FrameLayout) -> None:
        self._layout = layout

    def pack(self, frame: np.ndarray, max_error: float) -> Packed:
        result = coarsen(self._layout, frame, max_error)
        return Packed(pack(self._layout, result.frame, result.rungs), result.frame)

    def unpack(self, data: bytes) -> np.ndarray:
        return unpack(self._layout, data)
