"""Small kernels beside large ones: what does not fill a GPU leaves room for others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class SideStream:
    """A second stream of a device; without a GPU everything is done in turn.

    Whoever goes on with what was made there calls `join` first, and nothing is left unjoined. So no memory is reused
    too early: what one stream frees is only used by what it does later, which waits for all that came before.

    Args:
        device: that the work is done on.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """What is launched here follows what was launched before, and goes on beside what is launched next."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What is launched from now on follows what was launched there."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
