"""Per-vector important elements alone: MosaicKV's packed form (arXiv 2607.00760), as Mustafar's pruning
(arXiv 2505.22913), in the model's own basis."""

from __future__ import annotations

import torch

from mosaic_kernels.topk import reference
from mosaic_kernels.topk.segment import TopKFormat
from sglang_mosaic.codec.baselines.plain import PlainCodec


class TopKCodec(PlainCodec):
    """Args as PlainCodec's, and ratio: bfloat16 bytes per byte; as many channels are kept as that leaves room for."""

    def __init__(
        self, layers: int, heads: int, k_dim: int, v_dim: int, *, ratio: float = 3.1, page_size: int = 64
    ) -> None:
        super().__init__(layers, heads, k_dim, v_dim, page_size=page_size)
        fmt = TopKFormat.fitting(int(page_size * (k_dim + v_dim) * 2 / ratio), k_dim, v_dim, page_size)
        if fmt is None:
            raise ValueError(f"ratio {ratio} leaves no room for one channel per token")
        self.format = fmt

    @property
    def segment_bytes(self) -> int:
        return self.format.segment_bytes

    def pack(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        data = torch.zeros(k.shape[0] * self.heads, self.segment_bytes, dtype=torch.uint8, device=k.device)
        reference.pack(k.flatten(0, 1).contiguous(), v.flatten(0, 1).contiguous(), self.format, data)
        return data.unflatten(0, (-1, self.heads))

    def unpack(self, layer: int, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = reference.decode(data.flatten(0, 1), self.format)
        return k.unflatten(0, (-1, self.heads)), v.unflatten(0, (-1, self.heads))
