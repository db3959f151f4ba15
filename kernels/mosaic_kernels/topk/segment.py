"""Byte layout of a segment of per-vector important elements."""

from __future__ import annotations

from dataclasses import dataclass

from mosaic_kernels.segment import ALIGNMENT, HEADER


@dataclass(frozen=True, kw_only=True)
class TopKFormat:
    """For every token the `keep` channels of largest magnitude, in the form of MosaicKV (arXiv 2607.00760).

    After a header of 16 bytes, for K and then for V: `scales` [page_size] float16, `bitmap` [page_size, dim / 8] uint8
    (bit i of byte j is channel 8 j + i), `values` [page_size, keep] int8 in rising order of channels. A value is
    `byte * scale`; channels that are not in the bitmap are 0.

    Args:
        page_size: tokens per segment.
        k_dim, v_dim: channels, multiples of 16.
        k_keep, v_keep: channels kept per token.

    Raises:
        ValueError: naming the argument.
    """

    page_size: int = 64
    k_dim: int
    v_dim: int
    k_keep: int
    v_keep: int

    def __post_init__(self) -> None:
        for name in ("k", "v"):
            dim, keep = getattr(self, f"{name}_dim"), getattr(self, f"{name}_keep")
            if dim <= 0 or dim % 16:
                raise ValueError(f"{name}_dim must be a positive multiple of 16, got {dim}")
            if not 1 <= keep <= dim:
                raise ValueError(f"{name}_keep must be 1 to {name}_dim={dim} channels, got {keep}")
        if self.page_size < 1:
            raise ValueError(f"page_size must be at least 1 token, got {self.page_size}")

    @property
    def parts(self) -> tuple[tuple[int, int, int, int, int], ...]:
        """(dim, keep, start of scales, start of bitmap, start of values) of K and of V."""
        at, parts = HEADER, []
        for dim, keep in ((self.k_dim, self.k_keep), (self.v_dim, self.v_keep)):
            bitmap = at + 2 * self.page_size
            values = bitmap + self.page_size * dim // 8
            parts.append((dim, keep, at, bitmap, values))
            at = values + self.page_size * keep
            at += at % 2
        return tuple(parts)

    @property
    def segment_bytes(self) -> int:
        """Bytes of one segment, a multiple of 16."""
        _, keep, _, _, values = self.parts[1]
        return -(-(values + self.page_size * keep) // ALIGNMENT) * ALIGNMENT

    @classmethod
    def fitting(cls, segment_bytes: int, k_dim: int, v_dim: int, page_size: int = 64) -> TopKFormat | None:
        """The format that keeps most in so many bytes, the same share of K and of V; None if nothing fits."""
        smallest = cls(page_size=page_size, k_dim=k_dim, v_dim=v_dim, k_keep=1, v_keep=1)
        spare = (segment_bytes - smallest.segment_bytes) // page_size
        if spare < 0:
            return None
        k_keep = min(1 + spare * k_dim // (k_dim + v_dim), k_dim)
        v_keep = min(1 + spare - (k_keep - 1), v_dim)
        return cls(page_size=page_size, k_dim=k_dim, v_dim=v_dim, k_keep=k_keep, v_keep=v_keep)
