"""What the codec learns from running requests before it is calibrated."""

from __future__ import annotations

import torch


class SecondMoments:
    """Sums of q qᵀ per layer and KV head, averaged over the query heads that share it.

    Args:
        layers: number of layers.
        heads: KV heads of this rank, Hkv.
        dim: channels of a query, Dk.
        token_budget: tokens per layer after which nothing more is added; bounds the work, not the memory.
        device: where the moments live; queries must be there too.
    """

    def __init__(self, layers: int, heads: int, dim: int, token_budget: int, device: torch.device | str = "cpu"):
        self._shape = (heads, dim, dim)
        self._budget = token_budget
        self._device = torch.device(device)
        self._seen = [0] * layers
        self._sums: list[torch.Tensor | None] = [None] * layers

    def observe(self, layer: int, q: torch.Tensor) -> None:
        """Add queries [T, Hq, Dk] of any float dtype, Hq a multiple of Hkv, as far as the budget goes."""
        q = q[: self._budget - self._seen[layer]]
        tokens, q_heads, dim = q.shape
        if not tokens:
            return
        heads = self._shape[0]
        # [Hkv, tokens * group, Dk]: query head h shares KV head h // group.
        rows = q.float().view(tokens, heads, q_heads // heads, dim).permute(1, 0, 2, 3).reshape(heads, -1, dim)
        moment = torch.bmm(rows.transpose(1, 2), rows) / (q_heads // heads)
        if self._sums[layer] is None:
            self._sums[layer] = torch.zeros(self._shape, dtype=torch.float64, device=self._device)
        self._sums[layer] += moment
        self._seen[layer] += tokens

    def full(self, layer: int) -> bool:
        """The budget of a layer is used up."""
        return self._seen[layer] >= self._budget

    def moment(self, layer: int) -> torch.Tensor | None:
        """Mean q qᵀ of a layer, float64 [Hkv, Dk, Dk], or None if it saw no query."""
        total = self._sums[layer]
        return None if total is None else total / self._seen[layer]

    def forget(self, layer: int) -> None:
        """Free the memory of a layer and take no more of its queries."""
        self._sums[layer] = None
        self._seen[layer] = max(self._seen[layer], self._budget)

    @property
    def nbytes(self) -> int:
        """Bytes held at the moment, on the device."""
        return sum(s.nbytes for s in self._sums if s is not None)
