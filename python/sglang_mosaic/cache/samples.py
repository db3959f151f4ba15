"""Pages of real traffic, kept for calibrations.

A codec that has seen one prompt alone serves other kinds of text badly (docs/codec.md), so what it is calibrated on is
an even sample of all pages so far: reservoir sampling, algorithm R (Vitter 1985, doi 10.1145/3147.3165).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from sglang_mosaic.codec.base import LayerSample

PAGES = 48
"""Most ordinary pages kept."""
SINK_PAGES = 16
"""Most starts of sequences kept."""


class SampledPage(NamedTuple):
    """One page, in host memory once it is copied."""

    k: list[torch.Tensor]
    """Of every layer, [64, H, Dk]."""
    v: list[torch.Tensor]
    """Of every layer, [64, H, Dv]."""
    copied: torch.cuda.Event | None = None
    """None: it is there."""


class Sample(NamedTuple):
    """Pages that start sequences, and others."""

    pages: list[SampledPage]
    sinks: int
    """How many of them start a sequence: the first ones."""

    def layers(self, device: torch.device) -> list[LayerSample]:
        """Layer by layer; all of it is copied, once it is there."""
        for page in self.pages:
            if page.copied is not None:
                page.copied.synchronize()
        return [
            LayerSample(
                torch.stack([page.k[layer] for page in self.pages]).to(device),
                torch.stack([page.v[layer] for page in self.pages]).to(device),
                self.sinks,
            )
            for layer in range(len(self.pages[0].k))
        ]


Read = Callable[[list[int]], list[SampledPage]]
"""Starts to copy dense frames to the host."""


class _Reservoir:
    """Each of the pages offered so far is among the kept ones with the same probability."""

    def __init__(self, most: int, seed: int) -> None:
        self.kept: list[SampledPage] = []
        self._most = most
        self._offered = 0
        self._random = random.Random(seed)

    def offer(self, frames: Iterable[int], read: Read) -> None:
        places: dict[int, int] = {}
        for frame in frames:
            self._offered += 1
            if self._offered <= self._most:
                places[self._offered - 1] = frame
            elif (place := self._random.randrange(self._offered)) < self._most:
                places[place] = frame
        for place, page in zip(places, read(list(places.values())) if places else [], strict=True):
            self.kept[place : place + 1] = [page]


class PageSamples:
    """What calibrations see.

    Args:
        read: starts to copy dense frames to the host.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        # Seeded: the same requests in the same order give the same calibrations.
        self._sinks, self._others = _Reservoir(SINK_PAGES, 0), _Reservoir(PAGES, 1)

    def offer(self, frames: Iterable[int], sinks: Iterable[int]) -> None:
        """Look at full pages in these dense frames; `sinks` are in those that start a sequence."""
        self._others.offer(frames, self._read)
        self._sinks.offer(sinks, self._read)

    @property
    def empty(self) -> bool:
        """Whether no page was kept so far."""
        return not (self._sinks.kept or self._others.kept)

    def pages(self, frames: Iterable[int]) -> Sample:
        """The sample, filled up from other dense frames as far as pages are missing."""
        missing = PAGES - len(self._others.kept)
        more = _spread(list(frames), missing) if missing > 0 else []
        pages = [*self._sinks.kept, *self._others.kept, *(self._read(more) if more else [])]
        return Sample(pages, len(self._sinks.kept))

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        # All pages have the same shapes, and whoever asks while serving should not have to count every layer of each.
        kept = [*self._sinks.kept, *self._others.kept]
        return len(kept) * sum(x.nbytes for x in (*kept[0].k, *kept[0].v)) if kept else 0


def _spread(frames: list[int], most: int) -> list[int]:
    """At most so many of them, evenly."""
    return frames[:: -(-len(frames) // most)] if frames else []
