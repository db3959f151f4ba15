"""Global channel drop, after ThinK (arXiv 2407.21018): half of the channels are dropped for all tokens alike.

ThinK drops key channels by the product of query and key norms; here values lose the channels of least norm, too, so
that both halves of the cache shrink. The kept ones stay bfloat16.
"""

from __future__ import annotations

import hashlib

import torch

from sglang_mosaic.codec.base import Epoch, LayerSample
from sglang_mosaic.codec.baselines.plain import PlainCodec, as_bytes, take
from sglang_mosaic.codec.statistics import QueryStatistics


class ChannelDropCodec(PlainCodec):
    """Args as PlainCodec's, and device: where queries are."""

    def __init__(
        self,
        layers: int,
        heads: int,
        k_dim: int,
        v_dim: int,
        *,
        page_size: int = 64,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(layers, heads, k_dim, v_dim, page_size=page_size)
        self._queries = QueryStatistics(layers, heads, k_dim, 8192, device)
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def hash(self) -> str:
        kept = hashlib.sha256(repr([(k.tolist(), v.tolist()) for k, v in self._kept]).encode())
        return f"{super().hash}-{kept.hexdigest()[:16]}"

    @property
    def segment_bytes(self) -> int:
        return self.page_size * (self.k_dim // 2 + self.v_dim // 2) * 2

    def observe_queries(self, layer: int, q: torch.Tensor) -> None:
        if not self._queries.full(layer):
            self._queries.observe(layer, q)

    def calibrate(self, samples: list[LayerSample], quick: bool = False) -> Epoch:
        if not self._kept:  # later epochs would give the bytes another meaning
            for layer, sample in enumerate(samples):
                k, v = (x.float().square().mean((0, 1)) for x in (sample.keys, sample.values))
                energy = self._queries.energy(layer)
                if energy is not None:
                    k = k * energy.float()
                k, v = (x.topk(x.shape[-1] // 2, -1).indices.sort(-1).values for x in (k, v))
                self._kept.append((k, v))
        return self

    def pack(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        parts = []
        for x, kept in zip((k, v), self._kept[layer], strict=True):
            index = kept[None, :, None].expand(len(x), -1, self.page_size, -1)
            parts.append(x.gather(-1, index).bfloat16())
        return as_bytes(*parts)

    def unpack(self, layer: int, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        at, results = 0, []
        for dim, kept in zip((self.k_dim, self.v_dim), self._kept[layer], strict=True):
            part, at = take(data, at, (self.page_size, dim // 2), torch.bfloat16)
            full = torch.zeros(*part.shape[:-1], dim, device=data.device)
            index = kept[None, :, None].expand(len(part), -1, self.page_size, -1)
            results.append(full.scatter_(-1, index, part.float()))
        return results[0], results[1]
