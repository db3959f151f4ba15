"""Reference of the query statistics. Plain torch, any device."""

from __future__ import annotations

import torch


def add_squares(q: torch.Tensor, sums: torch.Tensor) -> None:
    """As `launch.add_squares`, up to the order of summation."""
    sums += q.float().double().square().unflatten(1, (len(sums), -1)).sum((0, 2))
