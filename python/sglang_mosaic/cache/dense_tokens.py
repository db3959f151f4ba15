"""Attention of decoding requests over those of their tokens that are not compressed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from mosaic_kernels.attend.launch import attend_each


class DenseTokens(NamedTuple):
    """Where the dense tokens of some requests lie, one request after the other."""

    rows: torch.Tensor
    """int64 [tokens of all], of the dense slabs."""
    starts: torch.Tensor
    """int32 [requests + 1]: where each request's begin, and the end."""
    lengths: tuple[int, ...]
    """Tokens of each."""

    @classmethod
    def of(cls, rows: Sequence[torch.Tensor], device: torch.device) -> DenseTokens:
        """
        Args:
            rows: of every request, int64 [tokens] on the host; some may have none.
        """
        lengths = torch.tensor([0, *map(len, rows)], dtype=torch.int32)
        starts = lengths.cumsum(0, dtype=torch.int32)
        return cls(torch.cat(list(rows)).to(device), starts.to(device), tuple(lengths[1:].tolist()))

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `attend` of mosaic_kernels/attend, of one query for each request.

        Args:
            q: [requests, Hq, Dk]; k: [rows, H, Dk] and v: [rows, H, Dv], the dense slabs; any float.
            scale: factor of the logits.

        Returns:
            out [requests, Hq, Dv] and lse [requests, Hq], float32; of a request without dense tokens 0 and -inf.
        """
        return attend_each(q, k[self.rows], v[self.rows], self.starts, self.lengths, scale)
