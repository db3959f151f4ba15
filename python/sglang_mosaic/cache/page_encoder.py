"""Encodes dense frames in all layers: on a GPU, where they are few, by one CUDA graph.

Launching a dozen kernels a layer takes a host 17 ms for the 32 layers of an 8B model, whatever the number of pages, and
the forward that follows waits for it (docs/kernels.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mosaic_kernels.upload import upload
from sglang_mosaic.codec.base import Epoch
from sglang_mosaic.codec.planes import PlanesEpoch

PAGES = 16
"""Of a graph; fewer are filled up. So many are sealed at a time (adapter/kv_pool.py)."""
MOST = 2 * PAGES
"""Pages that graphs encode; of more, launching their kernels once takes no longer than running them."""

RowsOf = Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Of a layer and dense frames, int64 [P], K [P, 64, H, Dk] and V [P, 64, H, Dv]."""
PutBytes = Callable[[slice, slice, torch.Tensor], None]
"""Takes positions among the pages, a range of a frame's bytes, and these bytes, uint8 [positions, bytes], which change
when it has returned. Where it is given some twice, the last ones count."""


class PageEncoder:
    """
    Args:
        layers: of the pool.
        rows: of its dense frames.
    """

    def __init__(self, layers: int, rows: RowsOf) -> None:
        self._layers = layers
        self._rows = rows
        self._graph: EncodingGraph | None = None

    def encode(self, epoch: Epoch, frames: list[int], device: torch.device, put: PutBytes) -> torch.Tensor:
        """Encode these frames in the current stream; waits for it if a head of the epoch has formats of rare kinds.

        Returns:
            float32 [layers, P, H]: errors, as of `Epoch.encode`.
        """
        chosen = upload(frames, device)
        if isinstance(epoch, PlanesEpoch) and epoch.kernels_encode(device) and len(frames) <= MOST:
            return self._by_graph(epoch, chosen, put)
        everything = slice(0, len(frames))
        return epoch.encode_layers(
            self._layers,
            lambda layer: self._rows(layer, chosen),
            lambda layer, data: put(everything, epoch.span(layer), data),
        )

    def _by_graph(self, epoch: PlanesEpoch, frames: torch.Tensor, put: PutBytes) -> torch.Tensor:
        if self._graph is None or self._graph.epoch is not epoch:
            self._graph = EncodingGraph(epoch, self._layers, self._rows, frames.device)
        errors = []
        for first in range(0, len(frames), PAGES):
            part = slice(first, min(first + PAGES, len(frames)))
            data, of_part = self._graph(frames[part])
            put(part, slice(0, epoch.frame_bytes), data)
            errors.append(of_part)
        return torch.cat(errors, 1)


class EncodingGraph:
    """All launches that encode `PAGES` frames with one epoch. Takes the memory of their bytes, and some more.

    Args:
        epoch: whose pages kernels encode.
        layers, rows: as of `PageEncoder`; the frames stay where they are.
        device: of the frames.
    """

    def __init__(self, epoch: PlanesEpoch, layers: int, rows: RowsOf, device: torch.device) -> None:
        self.epoch = epoch
        self._layers = layers
        self._rows = rows
        self._frames = torch.zeros(PAGES, dtype=torch.int64, device=device)
        self._data = torch.empty(PAGES, epoch.frame_bytes, dtype=torch.uint8, device=device)
        self._launch()  # what it needs is made, compiled and loaded, none of which a capture may do
        self._graph = torch.cuda.CUDAGraph()
        current, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            # Other threads may copy pages meanwhile.
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._errors, self._rare = self._launch()
            finally:
                self._graph.capture_end()
        current.wait_stream(stream)

    def __call__(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Bytes uint8 [P, frame bytes], which the next call overwrites, and errors float32 [layers, P, H].

        Args:
            frames: int64 [P], 1 to `PAGES` of them.
        """
        count = len(frames)
        self._frames[:count] = frames
        self._frames[count:] = frames[-1]
        self._graph.replay()
        errors = self.epoch.encode_rare(self._rare, self._errors.clone(), self._rows_of, self._put)
        return self._data[:count], errors[:, :count]

    def _launch(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.epoch.encode_ordinary(self._layers, self._rows_of, self._put)

    def _rows_of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._rows(layer, self._frames)

    def _put(self, layer: int, data: torch.Tensor) -> None:
        self._data[:, self.epoch.span(layer)] = data
