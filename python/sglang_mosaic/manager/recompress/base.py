"""What every second codec of frames offers to the store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np


class Packed(NamedTuple):
    """A frame made smaller."""

    data: bytes
    frame: np.ndarray
    """uint8 [frame bytes]: what `unpack` will give."""


class FrameCodec(ABC):
    """Packs frames of one epoch, with an expected error of the attention output up to a limit. Pure."""

    @abstractmethod
    def pack(self, frame: np.ndarray, max_error: float) -> Packed:
        """
        Args:
            frame: uint8 [frame bytes].
            max_error: largest relative error of the attention output that the result may be expected to make, what the
                frame makes already included; 0: nothing may be lost.

        Raises:
            FrameError: the frame is not of this epoch.
        """

    @abstractmethod
    def unpack(self, data: bytes) -> np.ndarray:
        """A valid frame, uint8 [frame bytes].

        Raises:
            FrameError: they are not the bytes of a frame of this epoch.
        """
