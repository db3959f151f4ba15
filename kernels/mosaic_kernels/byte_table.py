"""How the codes of a format become signed bytes, which tensor cores multiply as they are (load_bytes.py).

Bits of a code go to the top of a byte, base first, and its highest bit is turned over: a code of b bits becomes
2^(8 - b) * code - 128, whatever its width. All channels then have the range of a byte, and what one step of it is worth
goes into the query (K) or the result (V).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mosaic_kernels.segment import BASE_BITS, GROUP, V_STEPS, TensorPlanes

# Words of each group of 16 channels; a kernel loads four at a time. Quads are the channels 0..3, 4..7, 8..11, 12..15.
BASE, REFINEMENT, FACTORS, TURNS, MASKS, FLAGS, LEVELS, SCAN = range(8)
"""BASE, REFINEMENT: first byte of the group in that plane | bytes from row to row << 16.
FACTORS: of each quad, a byte, by which the word of the base is multiplied to bring its bits to the top of bytes; of
planes of one bit for even tokens, 16 times that for odd ones.
TURNS: of each quad, a byte: places by which the word of the refinement is rotated to the left, plus 32; of planes of
one bit for even tokens, 4 more than that for odd ones.
MASKS: bits that a byte has of the base | bits that it has of the refinement << 8.
FLAGS: ONE_BIT and FOUR_BITS of the base | those of the refinement << 8.
LEVELS: float16 pair (f, z): K is offset + scale * (f * byte + z), V is (f * byte + z) in scales of the token.
SCAN: the same of K without its refinement, and of z only, << 16."""
BYTE_WORDS = 8
ONE_BIT, FOUR_BITS = 1, 2
"""A row has two tokens; a group has a second word in it, with quads 1 and 3."""


def key_words(part: TensorPlanes) -> torch.Tensor:
    """int32 [groups, BYTE_WORDS] of the planes of K."""
    words = _plane_words(part)
    for group, bits in enumerate(part.bits):
        if bits:
            middle = ((1 << bits - BASE_BITS[bits]) - 1) / 2
            words[group, LEVELS] = _pair(2.0 ** (bits - 8), 2.0 ** (bits - 1))
            words[group, SCAN] = _pair(0.0, 2.0 ** (bits - 1) + middle)
    return words


def value_words(part: TensorPlanes) -> torch.Tensor:
    """int32 [groups, BYTE_WORDS] of the planes of V."""
    words = _plane_words(part)
    for group, bits in enumerate(part.bits):
        if bits:
            words[group, LEVELS] = _pair(V_STEPS[bits] * 2.0 ** (bits - 8), V_STEPS[bits] / 2)
    return words


def _plane_words(part: TensorPlanes) -> torch.Tensor:
    words = torch.zeros(part.dim // GROUP, BYTE_WORDS, dtype=torch.int32)
    for planes, first, flags in ((part.base, BASE, 0), (part.refinement, REFINEMENT, 8)):
        for plane in planes:
            for group in range(plane.first, plane.first + plane.groups):
                row = words[group]
                at = plane.start + (group - plane.first) * plane.group_bytes
                row[first] = at | plane.groups * plane.group_bytes << 16
                row[FLAGS] |= (ONE_BIT * (plane.bits == 1) | FOUR_BITS * (plane.bits == 4)) << flags
    for group, bits in enumerate(part.bits):
        base = BASE_BITS[bits]
        more = bits - base
        if base:
            words[group, FACTORS] = _bytes(1 << 8 - base - _place(base, quad) for quad in range(4))
            words[group, MASKS] |= 0xFF00 >> base & 0xFF
        if more:
            words[group, TURNS] = _bytes((8 - bits - _place(more, quad)) % 32 + 32 for quad in range(4))
            words[group, MASKS] |= (1 << more) - 1 << 8 - bits << 8
    return words


def _place(bits: int, quad: int) -> int:
    """Of the first of so many bits of a quad, in the bytes of its word, of an even token (segment.Plane)."""
    return quad // 2 * 4 if bits == 4 else quad * bits


def _bytes(values: Iterable[int]) -> int:
    return int.from_bytes(bytes(values), "little")


def _pair(first: float, second: float) -> torch.Tensor:
    return torch.tensor([first, second], dtype=torch.float16).view(torch.int32)[0]
