"""What kernels need to know of the live epochs, layer by layer, in tensors that stay where they are."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mosaic_kernels.segment_table import FORMATS, SegmentTable, empty_table, make_table
from sglang_mosaic.cache.memory import PageMemory
from sglang_mosaic.codec.planes import PlanesEpoch, planes_of
from sglang_mosaic.page import PAGE_SIZE


class LayerTables(NamedTuple):
    """One layer of the live epochs, E slots."""

    formats: SegmentTable
    q_basis: torch.Tensor
    """float32 [E, H, k_dim, k_dim]: queries times this meet the stored keys."""
    v_unrotate: torch.Tensor
    """float32 [E, H, v_dim, v_dim]: outputs over stored values times this are outputs."""


class Sizes(NamedTuple):
    """What kernels were compiled for, and a CUDA graph with them."""

    formats: int
    scanned: int
    """Channels of K that a scan reads at most."""
    topk: bool
    """Whether segments of top-k occur, or ones with exceptions."""
    exceptions: bool

    def holds(self, other: Sizes) -> bool:
        """Whether kernels of these sizes read what is of the others."""
        return all(mine >= theirs for mine, theirs in zip(self, other, strict=True))

    def union(self, other: Sizes) -> Sizes:
        return Sizes(
            max(self.formats, other.formats),
            max(self.scanned, other.scanned),
            self.topk or other.topk,
            self.exceptions or other.exceptions,
        )


class SegmentTables:
    """Tables of every layer. Those of an epoch are written into its slot; only for an epoch, or a page, that needs more
    than all before are they made anew.

    Args:
        memory: the pool; its epochs are `PlanesEpoch`s.
        scanned: channels of K that scans are made for before any epoch is known.
    """

    def __init__(self, memory: PageMemory, scanned: int = 0) -> None:
        self._memory = memory
        self._sizes = Sizes(FORMATS, scanned, False, False)
        self._written: dict[int, int] = {}
        self._layers: list[LayerTables] = []

    @property
    def sizes(self) -> Sizes:
        """As of the last `update`."""
        return self._sizes

    def update(self) -> None:
        """Make the live epochs readable. In the order of the current stream; once a forward."""
        epochs = self._memory.epochs
        wanted = self._sizes
        for epoch in epochs.live:
            wanted = wanted.union(_needs(planes_of(epoch)))
        if not self._layers or wanted != self._sizes:
            self._sizes = wanted
            self._written.clear()
            self._layers = [self._empty(layer) for layer in range(len(self._memory.dense_k))]
        for number, slot in epochs.slots.items():
            if self._written.get(slot) != number:
                self._write(number, slot)
                self._written[slot] = number

    def layer(self, layer: int) -> LayerTables:
        """The tables of a layer, as of the last `update`."""
        return self._layers[layer]

    def _empty(self, layer: int) -> LayerTables:
        sizes, epochs = self._sizes, self._memory.epochs.most
        k, v = self._memory.dense_k[layer], self._memory.dense_v[layer]
        heads = k.shape[1]
        table = empty_table(
            epochs, heads, sizes.formats, PAGE_SIZE, k.shape[2], v.shape[2], k.device,
            most_scanned=sizes.scanned, topk=sizes.topk, exceptions=sizes.exceptions,
        )  # fmt: skip
        return LayerTables(
            table, *(torch.zeros(epochs, heads, x.shape[2], x.shape[2], device=x.device) for x in (k, v))
        )

    def _write(self, number: int, slot: int) -> None:
        epoch, sizes = planes_of(self._memory.epochs[number]), self._sizes
        for layer, tables in enumerate(self._layers):
            formats = [epoch.head_formats(layer)]
            one = make_table(formats, "cpu", topk=sizes.topk, exceptions=sizes.exceptions, room=sizes.formats)
            tables.formats.put(slot, one)
            basis = epoch.layers[layer].basis
            tables.q_basis[slot] = basis.q_basis
            tables.v_unrotate[slot] = basis.v_unrotate


def _needs(epoch: PlanesEpoch) -> Sizes:
    # The scan reads a multiple of a group of channels; 0: all of them, of which tables know.
    return Sizes(epoch.most_formats, epoch.most_scanned, "topk" in epoch.rare, "exceptions" in epoch.rare)
