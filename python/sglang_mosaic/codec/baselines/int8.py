"""Eight bits for every value, a scale per token and 32 channels: the usual quantised cache (as in arXiv 2401.18079,
section 2, without its refinements)."""

from __future__ import annotations

import torch

from sglang_mosaic.codec.baselines.plain import PlainCodec, as_bytes, take

BLOCK = 32


class Int8Codec(PlainCodec):
    """Symmetric; float16 scales."""

    @property
    def segment_bytes(self) -> int:
        dims = self.k_dim + self.v_dim
        return self.page_size * (dims + 2 * (-(-self.k_dim // BLOCK) + -(-self.v_dim // BLOCK)))

    def pack(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scales, codes = [], []
        for x in (k, v):
            for block in x.split(BLOCK, -1):
                scale = (block.abs().amax(-1, keepdim=True) / 127).half()
                scales.append(scale)
                codes.append((block / scale.float().clamp_min(1e-7)).round().clamp(-127, 127).char())
        return as_bytes(*scales, *codes)

    def unpack(self, layer: int, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        widths = [[block.numel() for block in torch.empty(dim).split(BLOCK)] for dim in (self.k_dim, self.v_dim)]
        at, scales, blocks = 0, [], []
        for _ in (*widths[0], *widths[1]):
            scale, at = take(data, at, (self.page_size, 1), torch.float16)
            scales.append(scale.float())
        for width, scale in zip((*widths[0], *widths[1]), scales, strict=True):
            codes, at = take(data, at, (self.page_size, width), torch.int8)
            blocks.append(codes * scale)
        return torch.cat(blocks[: len(widths[0])], -1), torch.cat(blocks[len(widths[0]) :], -1)
