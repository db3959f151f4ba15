"""Byte layout of one compressed segment: one page of tokens, one layer, one KV head."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

GROUP = 16  # channels that share a bit width
WIDTHS = (0, 2, 4, 8)  # bits per value that a group may get
ALIGNMENT = 16  # bytes; a segment starts and ends on such a border (one vector load of a GPU)
EXCEPTION_BYTES = 2  # bytes per channel of an exception vector (bfloat16)


@dataclass(frozen=True)
class TensorPlanes:
    """Where the parts of K or of V lie in a segment. Offsets are bytes from the start of the segment.

    Channels are ordered by bit width: [0, wide) have 8 bits, [wide, nibble) have 4, [nibble, coded) have 2 and
    [coded, dim) have none, only their offset. Planes are token-major, so that one token's codes are consecutive:

    - `nibbles` [page_size, nibble/2] uint8: the 4 leading bits; byte j holds channel j (low half) and j + nibble/2;
    - `crumbs` [page_size, (coded-nibble)/4] uint8: 2 bits; byte j holds channels j + i*(coded-nibble)/4, i = 0..3,
      lowest bits first, counted from channel `nibble`;
    - `low_nibbles` [page_size, wide/2] uint8: the 4 trailing bits of 8-bit channels, packed as `nibbles`;
    - `scales` [coded] float16 and `offsets` [dim] float16: value = offset + code * scale;
    - `exception` [dim] bfloat16 and `exception_index` [1] uint8, present if the format has exceptions.
    """

    dim: int
    wide: int
    nibble: int
    coded: int
    nibbles: int
    crumbs: int
    low_nibbles: int
    scales: int
    offsets: int
    exception: int
    exception_index: int


@dataclass(frozen=True, kw_only=True)
class SegmentFormat:
    """Fixed format of a segment; equal formats have equal bytes.

    Args:
        page_size: tokens per segment, 1 to 256.
        k_dim, v_dim: channels of K and V, multiples of 16.
        k_bits, v_bits: bits per value of each 16-channel group, from {0, 2, 4, 8}, never increasing (the bases sort
            channels by energy).
        exceptions: keep one token's K and one token's V at bfloat16 beside the planes (attention sinks and massive
            activations would otherwise stretch the scale of all their neighbours).

    Raises:
        ValueError: naming the argument.
    """

    page_size: int = 64
    k_dim: int
    v_dim: int
    k_bits: tuple[int, ...]
    v_bits: tuple[int, ...]
    exceptions: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.page_size <= 256:
            raise ValueError(f"page_size must be 1 to 256 tokens (one index byte), got {self.page_size}")
        for name in ("k", "v"):
            _check_bits(name, getattr(self, f"{name}_dim"), getattr(self, f"{name}_bits"))

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
        tensors = [(self.k_dim, self.k_bits), (self.v_dim, self.v_bits)]
        splits = [(dim, *(sum(b >= w for b in bits) * GROUP for w in (8, 4, 2))) for dim, bits in tensors]
        at = 0

        def take(nbytes: int) -> int:
            nonlocal at
            at += nbytes
            return at - nbytes

        # Planes first, in falling order of importance: a prefix of the bytes is then the coarse segment. Every plane
        # is a multiple of 2 bytes long, so the half-precision parts behind them are aligned.
        planes = [
            [take(self.page_size * n // 2), take(self.page_size * (c - n) // 4)] for _, _, n, c in splits
        ]
        for part, (_, w, _, _) in zip(planes, splits, strict=True):
            part.append(take(self.page_size * w // 2))
        for part, (dim, _, _, c) in zip(planes, splits, strict=True):
            part += [take(2 * c), take(2 * dim)]
        for part, (dim, *_) in zip(planes, splits, strict=True):
            part.append(take(EXCEPTION_BYTES * dim if self.exceptions else 0))
        for part in planes:
            part.append(take(1 if self.exceptions else 0))
        k, v = (TensorPlanes(*split, *part) for split, part in zip(splits, planes, strict=True))
        return k, v, at


def _check_bits(name: str, dim: int, bits: tuple[int, ...]) -> None:
    if dim <= 0 or dim % GROUP:
        raise ValueError(f"{name}_dim must be a positive multiple of {GROUP}, got {dim}")
    if not isinstance(bits, tuple):
        raise ValueError(f"{name}_bits must be a tuple of ints, got {type(bits).__name__}")
    if len(bits) != dim // GROUP:
        raise ValueError(f"{name}_bits must name {dim // GROUP} groups for {name}_dim={dim}, got {len(bits)}: {bits}")
    if any(b not in WIDTHS for b in bits):
        raise ValueError(f"{name}_bits must be from {WIDTHS}, got {bits}")
    if any(a < b for a, b in zip(bits, bits[1:], strict=False)):
        raise ValueError(f"{name}_bits must never increase, got {bits}")
