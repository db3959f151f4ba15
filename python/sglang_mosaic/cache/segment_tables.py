"""What kernels need to know of the live epochs, layer by layer."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mosaic_kernels.segment_table import SegmentTable, make_table
from sglang_mosaic.cache.memory import PageMemory
from sglang_mosaic.codec.planes import planes_of


class LayerTables(NamedTuple):
    """One layer of the live epochs, E of them."""

    slots: dict[int, int]
    """Number of an epoch -> its index in the tensors."""
    formats: SegmentTable
    q_basis: torch.Tensor
    """float32 [E, H, k_dim, k_dim]: queries times this meet the stored keys."""
    v_unrotate: torch.Tensor
    """float32 [E, H, v_dim, v_dim]: outputs over stored values times this are outputs."""


class SegmentTables:
    """Tables of every layer, made anew when the live epochs change or a page has what none had before.

    Args:
        memory: the pool; its epochs are `PlanesEpoch`s.
    """

    def __init__(self, memory: PageMemory) -> None:
        self._memory = memory
        self._numbers: tuple[int, ...] = ()
        self._rare: frozenset[str] = frozenset()
        self._layers: dict[int, LayerTables] = {}

    def layer(self, layer: int) -> LayerTables:
        """The tables of a layer, for all epochs that are alive now."""
        numbers = self._memory.epochs.numbers
        rare = frozenset[str]().union(*(planes_of(epoch).rare for epoch in self._memory.epochs.live))
        if (numbers, rare) != (self._numbers, self._rare):
            self._numbers, self._rare = numbers, rare
            self._layers.clear()
        if layer not in self._layers:
            self._layers[layer] = self._make(layer)
        return self._layers[layer]

    def _make(self, layer: int) -> LayerTables:
        epochs = [planes_of(self._memory.epochs[number]) for number in self._numbers]
        bases = [epoch.layers[layer].basis for epoch in epochs]
        return LayerTables(
            {number: slot for slot, number in enumerate(self._numbers)},
            make_table(
                [epoch.head_formats(layer) for epoch in epochs],
                self._memory.slab.frames.device,
                topk="topk" in self._rare,
                exceptions="exceptions" in self._rare,
            ),
            torch.stack([basis.q_basis for basis in bases]),
            torch.stack([basis.v_unrotate for basis in bases]),
        )
