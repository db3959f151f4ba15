"""KIVI (arXiv 2402.02750): keys quantised per channel over the page, values per token over 32 channels.

Asymmetric, float16 scale and minimum. The paper's residual of recent full-precision tokens is what the recent window of
dense pages is here. Codes are stored as a stream of bits, so that 3 bits take 3.
"""

from __future__ import annotations

import torch

from sglang_mosaic.codec.baselines.plain import PlainCodec, as_bytes, take

BLOCK = 32


class KiviCodec(PlainCodec):
    """Args as PlainCodec's, and bits: 2, 3 or 4 per value."""

    def __init__(self, layers: int, heads: int, k_dim: int, v_dim: int, *, bits: int = 4, page_size: int = 64) -> None:
        if bits not in (2, 3, 4):
            raise ValueError(f"bits must be 2, 3 or 4, got {bits}")
        if v_dim % BLOCK:
            raise ValueError(f"v_dim must be a multiple of {BLOCK} for KIVI, got {v_dim}")
        super().__init__(layers, heads, k_dim, v_dim, page_size=page_size)
        self.bits = bits

    @property
    def segment_bytes(self) -> int:
        values = self.page_size * (self.k_dim + self.v_dim)
        return values * self.bits // 8 + 4 * self.k_dim + 4 * self.page_size * self.v_dim // BLOCK

    def pack(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k_codes, *k_tables = self._quantise(k, -2)
        v_codes, *v_tables = self._quantise(v.unflatten(-1, (-1, BLOCK)), -1)
        codes = torch.cat((k_codes.flatten(2), v_codes.flatten(2)), -1)
        return as_bytes(*k_tables, *v_tables, self._to_stream(codes))

    def unpack(self, layer: int, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = self.v_dim // BLOCK
        k_scale, at = take(data, 0, (1, self.k_dim), torch.float16)
        k_low, at = take(data, at, (1, self.k_dim), torch.float16)
        v_scale, at = take(data, at, (self.page_size, blocks, 1), torch.float16)
        v_low, at = take(data, at, (self.page_size, blocks, 1), torch.float16)
        codes = self._from_stream(data[..., at:]).float()
        k, v = codes.split((self.page_size * self.k_dim, self.page_size * self.v_dim), -1)
        k = k.unflatten(-1, (self.page_size, self.k_dim)) * k_scale.float() + k_low.float()
        v = v.unflatten(-1, (self.page_size, blocks, BLOCK)) * v_scale.float() + v_low.float()
        return k, v.flatten(-2)

    def _quantise(self, x: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
        scale, low = ((high - low) / (2**self.bits - 1)).half(), low.half()
        codes = ((x - low.float()) / scale.float().clamp_min(1e-7)).round().clamp(0, 2**self.bits - 1)
        return codes.byte(), scale, low

    def _to_stream(self, codes: torch.Tensor) -> torch.Tensor:
        """uint8 codes [..., 8 n] -> bytes [..., bits * n]: eight codes to a group of `bits` bytes."""
        word = torch.stack([codes[..., i::8].long() << self.bits * i for i in range(8)]).sum(0)
        return torch.stack([(word >> 8 * i & 255).byte() for i in range(self.bits)], -1).flatten(-2)

    def _from_stream(self, stream: torch.Tensor) -> torch.Tensor:
        parts = stream.unflatten(-1, (-1, self.bits)).long()
        word = sum(parts[..., i] << 8 * i for i in range(self.bits))
        codes = [word >> self.bits * i & 2**self.bits - 1 for i in range(8)]
        return torch.stack(codes, -1).flatten(-2)
