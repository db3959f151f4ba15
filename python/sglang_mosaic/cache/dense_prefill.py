"""Prefills of requests without a compressed page, by flash attention, all of them in one call a layer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from mosaic_kernels.attend.launch import attend_causally


class DensePrefill:
    """Planned once a forward, run once a layer.

    Args:
        rows: integer [requests, longest context], of the dense slabs, of every token.
        prefixes: tokens of each request that were there before.
        news: tokens of each that are computed now.
    """

    def __init__(self, rows: torch.Tensor, prefixes: Sequence[int], news: Sequence[int]) -> None:
        lengths = [prefix + new for prefix, new in zip(prefixes, news, strict=True)]
        self._news, self._lengths = news, lengths
        self._queries = _starts(news, rows.device)
        # Without a prefix, the keys are those of the new tokens.
        self._rows = torch.cat([own[:n] for own, n in zip(rows, lengths, strict=True)]) if any(prefixes) else None
        self._keys = self._queries if self._rows is None else _starts(lengths, rows.device)

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        slabs: tuple[torch.Tensor, torch.Tensor],
        scale: float,
    ) -> torch.Tensor:
        """Attention of the new tokens, their K and V already written.

        Args:
            q: [new tokens of all, Hq, D]; k, v: [new tokens, H, D], bfloat16 or float16.
            slabs: K and V of the pool, [rows, H, D].
            scale: factor of the logits.

        Returns:
            [new tokens, Hq, D] in the type of q.
        """
        if self._rows is not None:
            k, v = (slab[self._rows] for slab in slabs)
        return attend_causally(q, k, v, self._queries, self._keys, max(self._news), max(self._lengths), scale)


def _starts(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
