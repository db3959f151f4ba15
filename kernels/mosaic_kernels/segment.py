"""Byte layout of one compressed segment: one page of tokens, one layer, one KV head."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

GROUP = 16  # channels that share a bit width
WIDTHS = (0, 2, 4, 8)  # bits per value that a group may get
V_BLOCK = 32  # channels of one token's V that share a scale and an offset
OFFSET_STEPS = 64  # units of V's offsets in the range of a code: a unit is 2^bits / 64 scales
ALIGNMENT = 16  # bytes; a segment's length is a multiple of it (one vector load of a GPU)


@dataclass(frozen=True)
class TensorPlanes:
    """Where the parts of K or of V lie in a segment. Offsets are bytes from the start of the segment.

    Channels are ordered by bit width: [0, wide) have 8 bits, [wide, nibble) have 4, [nibble, coded) have 2 and
    [coded, dim) have none. Planes are token-major, so that one token's codes are consecutive:

    - `nibbles` [page_size, nibble/2] uint8: the 4 leading bits; byte j holds channel j (low half) and j + nibble/2;
    - `crumbs` [page_size, (coded-nibble)/4] uint8: 2 bits; byte j holds channels j + i*(coded-nibble)/4, i = 0..3,
      lowest bits first, counted from channel `nibble`;
    - `low_nibbles` [page_size, wide/2] uint8: the 4 trailing bits of 8-bit channels, packed as `nibbles`.

    A decoded value is affine in its code, per channel for K and per token and block of 32 channels for V:

    - K: `offset + code * scale`, `scales` [coded] float16, `offsets` [dim] float16 (the value itself without a code);
    - V: `(code + offset * 2^bits / 64) * scale`, `scales` [page_size, blocks] uint8, `offsets` of that shape, int8. A
      scale byte holds the upper bits of a positive float16, `byte << 7`; channels without a code are 0.
    """

    dim: int
    wide: int
    nibble: int
    coded: int
    blocks: int
    nibbles: int
    crumbs: int
    low_nibbles: int
    scales: int
    offsets: int


@dataclass(frozen=True, kw_only=True)
class SegmentFormat:
    """Fixed format of a segment; equal formats have equal bytes.

    Args:
        page_size: tokens per segment.
        k_dim, v_dim: channels of K and V, multiples of 16.
        k_bits, v_bits: bits per value of each 16-channel group, from {0, 2, 4, 8}, never increasing (the bases sort
            channels by energy). The two groups of a block of 32 channels of V have the same.

    Raises:
        ValueError: naming the argument.
    """

    page_size: int = 64
    k_dim: int
    v_dim: int
    k_bits: tuple[int, ...]
    v_bits: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.page_size < 1:
            raise ValueError(f"page_size must be at least 1 token, got {self.page_size}")
        for name in ("k", "v"):
            _check_bits(name, getattr(self, f"{name}_dim"), getattr(self, f"{name}_bits"))
        if any(a != b for a, b in zip(self.v_bits[::2], self.v_bits[1::2], strict=False)):
            raise ValueError(f"v_bits must be equal within each block of {V_BLOCK} channels, got {self.v_bits}")

    @cached_property
    def k(self) -> TensorPlanes:
        """Layout of the keys."""
        return self._layout[0]

    @cached_property
    def v(self) -> TensorPlanes:
        """Layout of the values."""
        return self._layout[1]

    @cached_property
    def segment_bytes(self) -> int:
        """Bytes of one segment, padding to a multiple of 16 included."""
        return -(-self._layout[2] // ALIGNMENT) * ALIGNMENT

    @property
    def dense_bytes(self) -> int:
        """Bytes of the same tokens, layer and head as bfloat16 K and V."""
        return self.page_size * (self.k_dim + self.v_dim) * 2

    @property
    def ratio(self) -> float:
        """bfloat16 bytes per compressed byte, everything counted."""
        return self.dense_bytes / self.segment_bytes

    @cached_property
    def _layout(self) -> tuple[TensorPlanes, TensorPlanes, int]:
        at = 0

        def take(nbytes: int) -> int:
            nonlocal at
            at += nbytes
            return at - nbytes

        def planes(dim: int, bits: tuple[int, ...], per_token: bool) -> TensorPlanes:
            wide, nibble, coded = (sum(b >= w for b in bits) * GROUP for w in (8, 4, 2))
            blocks = -(-coded // V_BLOCK)
            starts = [take(self.page_size * n) for n in (nibble // 2, (coded - nibble) // 4, wide // 2)]
            sizes = [self.page_size * blocks] * 2 if per_token else [2 * coded, 2 * dim]
            return TensorPlanes(dim, wide, nibble, coded, blocks, *starts, *(take(n) for n in sizes))

        # K first: all of its parts are even, so its float16 parts are aligned.
        return planes(self.k_dim, self.k_bits, False), planes(self.v_dim, self.v_bits, True), at


def _check_bits(name: str, dim: int, bits: tuple[int, ...]) -> None:
    if dim <= 0 or dim % GROUP:
        raise ValueError(f"{name}_dim must be a positive multiple of {GROUP}, got {dim}")
    if not isinstance(bits, tuple):
        raise ValueError(f"{name}_bits must be a tuple of ints, got {type(bits).__name__}")
    if len(bits) != dim // GROUP:
        raise ValueError(f"{name}_bits must name {dim // GROUP} groups for {name}_dim={dim}, got {len(bits)}: {bits}")
    if any(b not in WIDTHS for b in bits):
        raise ValueError(f"{name}_bits must be from {WIDTHS}, got {bits}")
    if any(a < b for a, b in itertools.pairwise(bits)):
        raise ValueError(f"{name}_bits must never increase, got {bits}")
