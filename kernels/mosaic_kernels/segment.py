"""Byte layout of one compressed segment: one page of tokens, one layer, one KV head."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

REVISION = 3
"""Changes whenever bytes of one format come to mean something else."""
GROUP = 16  # channels that share a bit width
BASE_BITS = {0: 0, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 8: 4}
"""Bits per value that a group may get -> how many of them are in its base plane; the others refine it."""
WIDTHS = tuple(BASE_BITS)
V_STEPS = {1: 102 / 64, 2: 1.0, 3: 38 / 64, 4: 43 / 128, 5: 3 / 16, 6: 27 / 256, 8: 1 / 32}
"""Bits -> distance of two neighbouring codes of V, in scales of their token.

Close to the steps of the uniform quantisers with the least squared error for a normal distribution of variance 1
(Max, "Quantizing for minimum distortion", 1960), of few significant bits, so that products with a scale are exact.
"""
ALIGNMENT = 16  # bytes; a segment's length is a multiple of it (one vector load of a GPU)
HEADER = 16  # bytes; what they mean is the codec's business


@dataclass(frozen=True)
class Plane:
    """Some bits of the codes of consecutive groups, uint8 [rows, groups, group_bytes] from byte `start`.

    A row is one token, so that its codes are consecutive, or, with one bit, two tokens: then a group, too, has a whole
    32-bit word, from which one shift and one mask make the codes of four channels. Lowest bits first, byte j of a group
    holds

    - four bits: the channels j and j + 8 of the group;
    - two bits: the channels j, j + 4, j + 8 and j + 12;
    - one bit: the channels j, j + 4, j + 8 and j + 12 of the even token, then of the odd one.
    """

    bits: int
    first: int
    """First group."""
    groups: int
    start: int

    @property
    def channels(self) -> slice:
        """The channels that the plane covers."""
        return slice(self.first * GROUP, (self.first + self.groups) * GROUP)

    @property
    def row_tokens(self) -> int:
        """Tokens of a row."""
        return 2 if self.bits == 1 else 1

    @property
    def group_bytes(self) -> int:
        """Bytes of a group in a row."""
        return 2 * self.bits * self.row_tokens

    def nbytes(self, page_size: int) -> int:
        """Bytes of the plane."""
        return -(-page_size // self.row_tokens) * self.groups * self.group_bytes


@dataclass(frozen=True)
class TensorPlanes:
    """Where the parts of K or of V lie in a segment. Offsets are bytes from the start of the segment.

    Channels are ordered by bit width; the first `coded` have codes, the others none. A code is its base bits followed
    by its refinement bits. Without refinement a code stands for the middle of those that share its base.

    A decoded value is affine in its code:

    - K: `offset + code * scale`, per channel `scales` [coded] float16 and `offsets` [dim] float16 (the value itself
      without a code);
    - V: `(code - (2^bits - 1) / 2) * V_STEPS[bits] * scale`, per token `scales` [page_size] uint8, none if nothing is
      coded. A scale byte holds the upper bits of a positive float16, `byte << 7`; channels without a code are the mean
      V. The groups of a token share its scale: a basis that gives all channels the same variance uses all codes.
    """

    dim: int
    bits: tuple[int, ...]
    coded: int
    scales: int
    offsets: int | None
    base: tuple[Plane, ...]
    refinement: tuple[Plane, ...]


@dataclass(frozen=True, kw_only=True)
class SegmentFormat:
    """One way to lay out a segment; equal formats lay out equally.

    A header of 16 bytes; scales, offsets, mean V and exceptions; padding to 16 bytes; base planes of K and V;
    refinement planes of K and V. Cutting a segment off after its base planes leaves a valid, coarser one.

    - `mean_v` [v_dim] int8 times `mean_scale` (a byte as V's scales): mean of the rotated values, what far tokens and
      channels without codes are taken for;
    - `exceptions`: tokens kept as float16, `exception_tokens` [exceptions] uint8, `exception_k` [exceptions, k_dim],
      `exception_v` [exceptions, v_dim]. Their codes are arbitrary.

    Args:
        page_size: tokens per segment, at most 256.
        k_dim, v_dim: channels of K and V, multiples of 16.
        k_bits, v_bits: bits per value of each 16-channel group, from WIDTHS, never increasing (the bases sort channels
            by energy).
        exceptions: tokens kept uncompressed.

    Raises:
        ValueError: naming the argument.
    """

    page_size: int = 64
    k_dim: int
    v_dim: int
    k_bits: tuple[int, ...]
    v_bits: tuple[int, ...]
    exceptions: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.page_size <= 256:
            raise ValueError(f"page_size must be 1 to 256 tokens, got {self.page_size}")
        if not 0 <= self.exceptions < self.page_size:
            raise ValueError(f"exceptions must be 0 to page_size - 1, got {self.exceptions}")
        for name in ("k", "v"):
            _check_bits(name, getattr(self, f"{name}_dim"), getattr(self, f"{name}_bits"))

    @property
    def k(self) -> TensorPlanes:
        """Layout of the keys."""
        return self._layout[0]

    @property
    def v(self) -> TensorPlanes:
        """Layout of the values."""
        return self._layout[1]

    @property
    def mean_v(self) -> int:
        return self._layout[2]

    @property
    def mean_scale(self) -> int:
        return self._layout[3]

    @property
    def exception_k(self) -> int:
        return self._layout[4]

    @property
    def exception_v(self) -> int:
        return self._layout[5]

    @property
    def exception_tokens(self) -> int:
        return self._layout[6]

    @property
    def base_bytes(self) -> int:
        """Bytes up to the end of the base planes."""
        return self._layout[7]

    @property
    def segment_bytes(self) -> int:
        """Bytes of one segment, a multiple of 16."""
        return self._layout[8]

    @property
    def dense_bytes(self) -> int:
        """Bytes of the same tokens, layer and head as bfloat16 K and V."""
        return self.page_size * (self.k_dim + self.v_dim) * 2

    @property
    def ratio(self) -> float:
        """bfloat16 bytes per compressed byte, everything counted."""
        return self.dense_bytes / self.segment_bytes

    @cached_property
    def _layout(self) -> tuple[TensorPlanes, TensorPlanes, int, int, int, int, int, int, int]:
        at = HEADER

        def take(nbytes: int) -> int:
            nonlocal at
            at += nbytes
            return at - nbytes

        def align() -> int:
            return take(-at % ALIGNMENT)

        def planes(runs: list[tuple[int, int, int]]) -> tuple[Plane, ...]:
            return tuple(Plane(*run, start=take(Plane(*run, start=0).nbytes(self.page_size))) for run in runs)

        k_coded, v_coded = (sum(b > 0 for b in bits) * GROUP for bits in (self.k_bits, self.v_bits))
        # Parts of two bytes a value first, so that they are aligned.
        k_tables = take(2 * k_coded), take(2 * self.k_dim)
        exception_k, exception_v = take(2 * self.exceptions * self.k_dim), take(2 * self.exceptions * self.v_dim)
        v_scales = take(self.page_size if v_coded else 0)
        mean_v, mean_scale = take(self.v_dim), take(1)
        exception_tokens = take(self.exceptions)
        align()
        base = [planes(_runs(bits, lambda width: BASE_BITS[width])) for bits in (self.k_bits, self.v_bits)]
        base_bytes = at
        align()
        refinement = [
            planes(_runs(bits, lambda width: width - BASE_BITS[width])) for bits in (self.k_bits, self.v_bits)
        ]
        align()
        k = TensorPlanes(self.k_dim, self.k_bits, k_coded, *k_tables, base[0], refinement[0])
        v = TensorPlanes(self.v_dim, self.v_bits, v_coded, v_scales, None, base[1], refinement[1])
        return k, v, mean_v, mean_scale, exception_k, exception_v, exception_tokens, base_bytes, at


def _runs(widths: tuple[int, ...], part) -> list[tuple[int, int, int]]:
    """(bits, first group, groups) of maximal runs of groups with the same width whose part is not empty."""
    runs, first = [], 0
    for bits, members in itertools.groupby(widths, key=part):
        groups = len(list(members))
        if bits:
            runs.append((bits, first, groups))
        first += groups
    return runs


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
