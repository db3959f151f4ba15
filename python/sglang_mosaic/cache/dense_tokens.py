"""Attention of decoding requests over those of their tokens that are not compressed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class DenseTokens(NamedTuple):
    """Where the dense tokens of some requests lie: all layers, and all requests at once, read them alike."""

    rows: torch.Tensor
    """int64 [requests, most tokens], of the dense slabs; beyond a request's own any."""
    absent: torch.Tensor
    """bool, the same shape: beyond a request's own."""

    @classmethod
    def of(cls, rows: Sequence[torch.Tensor], device: torch.device) -> DenseTokens:
        """
        Args:
            rows: of every request, int64 [tokens] on the host; some may have none.
        """
        lengths = torch.tensor([len(own) for own in rows])
        padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        absent = torch.arange(padded.shape[1]) >= lengths[:, None]
        return cls(padded.to(device), absent.to(device))

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `attend` of mosaic_kernels/attend/reference.py, of one query for each request.

        Args:
            q: [requests, Hq, Dk]; k: [rows, H, Dk] and v: [rows, H, Dv], the dense slabs; any float.
            scale: factor of the logits.

        Returns:
            out [requests, Hq, Dv] and lse [requests, Hq], float32; of a request without dense tokens 0 and -inf.
        """
        heads = k.shape[1]
        keys, values = (x[self.rows].float().transpose(1, 2) for x in (k, v))
        logits = (q.float() * scale).unflatten(1, (heads, -1)) @ keys.transpose(2, 3)
        logits.masked_fill_(self.absent[:, None, None], -torch.inf)
        # No weight, but what lies there may be no number.
        values.masked_fill_(self.absent[:, None, :, None], 0.0)
        lse = logits.logsumexp(-1)
        weights = torch.exp(logits - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
        return (weights @ values).flatten(1, 2), lse.flatten(1)
