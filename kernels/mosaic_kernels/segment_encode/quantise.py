"""Uniform quantisation: keys per channel, values per token, as in KIVI (arXiv 2402.02750).

Keys: levels run from end to end of the range, both ends included: the tokens at the ends are those that attention
looks at. Levels in the middle of equal bins have the smaller worst case, and twice the measured error in the attention
output. With one or two bits the ends are given up: so few levels over the whole range leave most values far from any.

Values: levels symmetric about zero, one scale per token. Their steps are best for a normal distribution; how far the
scale follows the largest value is tried out for every token.
"""

from __future__ import annotations

import torch

from mosaic_kernels.constants import constant
from mosaic_kernels.segment import GROUP, V_STEPS

INFINITE_SCALE = 0x7C00 >> 7  # scale byte of float16's infinity
K_COVERS = {1: 0.5, 2: 0.85}
"""Bits -> share of the range that K's levels cover, 1 for others; measured on the attention output (docs/codec.md)."""
# Bytes of V's scale to try, relative to that of a third of the token's largest value: about 1/3.4, 1/2.7, 1/2.1 of it.
V_TRIED = (-1, 1, 3)
ERROR_UNITS = 256  # per step; squared errors are summed as integers of them


def quantise_channels(
    y: torch.Tensor, levels: torch.Tensor, low: torch.Tensor, high: torch.Tensor, mean: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One scale and offset per channel of the segment: |offset + code * scale - y| <= scale / 2 + float16 rounding.

    Keys: a channel is similar over neighbouring tokens and differs between channels. The codes belong to the scale
    and the offset as rounded to float16, which is what the decoder sees.

    Args:
        y: [..., T, D] float32. Values outside [low, high] get the code of the nearest end.
        levels: [D] float32, 2^bits of each channel; 1 stores the mean alone.
        low, high: [..., D] float32, range of each channel, tokens that do not count left out.
        mean: [..., D] float32. The middle of the range instead would move all logits of the segment against others.

    Returns:
        codes [..., T, D] uint8, scales and offsets [..., D] float16. A channel whose range is below float16's
        smallest step has scale 0 and its middle as offset. Ranges beyond float16 give infinite scales or offsets.
    """
    cover = torch.ones_like(levels)
    for bits, share in K_COVERS.items():
        cover = torch.where(levels == 2**bits, share, cover)
    # A difference of two finite floats may overflow, the difference of their halves does not.
    scales = ((high * 0.5 - low * 0.5) * cover / (levels - 1).clamp_min(1) * 2).half()
    scales = torch.where(levels > 1, scales, 0)
    # Centred, so that both ends share what the scale lost by rounding.
    offsets = low * 0.5 + high * 0.5 - scales.float() * ((levels - 1) * 0.5)
    # Which zero a minimum returns differs between devices: + 0.0 makes both positive.
    offsets = (torch.where(levels > 1, offsets, mean) + 0.0).half()
    codes = _codes(y - offsets.float()[..., None, :], scales.float()[..., None, :], levels)
    return codes, scales, offsets


def quantise_tokens(y: torch.Tensor, bits: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale per token, |(code - (2^bits - 1) / 2) * V_STEPS[bits] * scale - y| small on average.

    Values: attention sinks have values far smaller than their neighbours' and most of the attention mass, so a scale
    shared between tokens multiplies into the output. Of three scales the one with the least squared error, in steps of
    each channel, is taken; with 4 bits and more the largest of them reaches every value.

    Args:
        y: [..., T, D] float32, the coded channels alone.
        bits: of each group of 16 channels, at least 1.

    Returns:
        codes [..., T, D] uint8 and scales [..., T] uint8 (`byte << 7` are the bits of a float16). Values below 2^-14
        may get scale 0; those whose third is beyond float16, or not finite, give an infinite scale, byte 248.
    """
    per_channel = [b for b in bits for _ in range(GROUP)]
    steps = constant(tuple(V_STEPS[b] for b in per_channel), torch.float32, y.device)
    last = constant(tuple(2.0**b - 1 for b in per_channel), torch.float32, y.device)
    largest = y.abs().amax(-1, keepdim=True)
    anchor = nearest_scale_byte(largest / 3)
    best = codes = scales = None
    for more in V_TRIED:
        byte = torch.where(anchor < INFINITE_SCALE, (anchor + more).clamp(0, INFINITE_SCALE - 1), anchor)
        scale = scale_of(byte)
        above = y / (steps * divisor(scale)) + last * 0.5
        code = torch.minimum(above.round().clamp_min_(0), last)
        # Integers, so that the order of summation does not matter: at most 4 steps per value.
        error = above.sub_(code).mul_(ERROR_UNITS).round_().nan_to_num_(0, 0, 0).int().square_().sum(-1, keepdim=True)
        error = error * scale.double().square()
        if best is None:
            best, codes, scales = error, code, byte
        else:
            better = error < best
            best, codes, scales = (
                torch.where(better, new, old) for new, old in ((error, best), (code, codes), (byte, scales))
            )
    return codes.byte(), scales.squeeze(-1).byte()


def scale_bytes(needed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positive float32 rounded up to 3 bits of mantissa: bytes, uint8, and what they decode to, float32."""
    byte = needed.half().view(torch.int16) + 127 >> 7
    # The bits of a NaN are arbitrary; an infinite scale decodes to infinity or NaN for every code.
    byte = torch.where(needed.isfinite(), byte, INFINITE_SCALE)
    return byte.byte(), scale_of(byte)


def nearest_scale_byte(scale: torch.Tensor) -> torch.Tensor:
    """Positive float32 rounded to the nearest with 3 bits of mantissa, int16."""
    byte = scale.half().view(torch.int16) + 64 >> 7
    return torch.where(scale.isfinite(), byte, INFINITE_SCALE)


def scale_of(byte: torch.Tensor) -> torch.Tensor:
    """Integer scale bytes -> float32."""
    return (byte.short() << 7).view(torch.float16).float()


def divisor(scales: torch.Tensor) -> torch.Tensor:
    """`scales` with 1 instead of 0."""
    return torch.where(scales > 0, scales, 1.0)


def _codes(above: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Nearest code of values `above` their offset. `above` is overwritten."""
    codes = above.div_(divisor(scales)).round_()
    # As tensors: clamp() takes a tensor for both ends or for none.
    return codes.clamp_(torch.zeros_like(levels), levels - 1).byte()
