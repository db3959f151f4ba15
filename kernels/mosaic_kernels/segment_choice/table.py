"""Costs of formats as numbers, for a kernel that weighs any formats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from mosaic_kernels.segment import GROUP, SegmentFormat
from mosaic_kernels.segment_choice.reference import HeadChoice, cost_shares
from mosaic_kernels.segment_table import padded


class ChoiceTable(NamedTuple):
    """What errors cost in the KV heads H of one layer; formats are in the order of the layer's `SegmentTable`."""

    shares: torch.Tensor
    """float64 [H, groups of K and of V, formats filled up to a power of two], of planes: `cost_shares`."""
    k_weights: torch.Tensor
    """float64 [H]: what a squared error of K counts."""
    v_weights: torch.Tensor
    """float64 [H, v_dim]: what one of each channel of V counts."""
    v_roots: torch.Tensor
    """float32 [H, v_dim]: square roots of v_weights."""


def make_choice_table(heads: Sequence[HeadChoice], device: torch.device | str, room: int = 0) -> ChoiceTable:
    """The table of one layer, with room for so many formats of a head at least."""
    first = heads[0].formats[0]
    most = max(room, *(len(head.formats) for head in heads))
    shares = torch.zeros(len(heads), (first.k_dim + first.v_dim) // GROUP, padded(most), dtype=torch.float64)
    for of_head, head in zip(shares, heads, strict=True):
        for i, fmt in enumerate(head.formats):
            if isinstance(fmt, SegmentFormat):
                of_head[:, i] = torch.tensor(cost_shares(fmt, head.k_weight), dtype=torch.float64)
    weights = [head.v_weights for head in heads]
    return ChoiceTable(
        shares.to(device),
        torch.tensor([head.k_weight for head in heads], dtype=torch.float64, device=device),
        torch.tensor(weights, dtype=torch.float64, device=device),
        torch.tensor([list(map(math.sqrt, row)) for row in weights], dtype=torch.float32, device=device),
    )
