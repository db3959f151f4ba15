"""Asymmetric uniform quantisation: keys per channel, values per token, as in KIVI (arXiv 2402.02750).

Levels run from end to end of the range, both ends included: the tokens at the ends are those that attention looks at.
Levels in the middle of equal bins have the smaller worst case, and twice the measured error in the attention output.
With 2 bits alone the ends are given up: four levels over the whole range leave most values far from any of them.
"""

from __future__ import annotations

import torch

from mosaic_kernels.segment import OFFSET_STEPS, V_BLOCK

INFINITE_SCALE = 0x7C00 >> 7  # scale byte of float16's infinity
# Share of the range that four levels cover; measured on the attention output of two models (docs/codec.md).
K_COVER_2_BITS = 0.85
V_COVER_2_BITS = 0.8


def quantise_channels(
    y: torch.Tensor, levels: torch.Tensor, low: torch.Tensor, high: torch.Tensor, mean: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One scale and offset per channel of the segment: |offset + code * scale - y| <= scale / 2 + float16 rounding.

    Keys: a channel is similar over neighbouring tokens and differs between channels. The codes belong to the scale
    and the offset as rounded to float16, which is what the decoder sees.

    Args:
        y: [..., T, D] float32. Values outside [low, high] get the code of the nearest end.
        levels: [D] float32, 2^bits of each channel; 1 stores the mean alone. With 4 the outer 15% of the range are
            outside.
        low, high: [..., D] float32, range of each channel, tokens that do not count left out.
        mean: [..., D] float32. The middle of the range instead would move all logits of the segment against others.

    Returns:
        codes [..., T, D] uint8, scales and offsets [..., D] float16. A channel whose range is below float16's
        smallest step has scale 0 and its middle as offset. Ranges beyond float16 give infinite scales or offsets.
    """
    cover = torch.where(levels == 4, K_COVER_2_BITS, 1.0)
    # A difference of two finite floats may overflow, the difference of their halves does not.
    scales = ((high * 0.5 - low * 0.5) * cover / (levels - 1).clamp_min(1) * 2).half()
    scales = torch.where(levels > 1, scales, 0)
    # Centred, so that both ends share what the scale lost by rounding.
    offsets = (low * 0.5 + high * 0.5 - scales.float() * ((levels - 1) * 0.5)).half()
    offsets = torch.where(levels > 1, offsets, mean.half())
    codes = _codes(y - offsets.float()[..., None, :], scales.float()[..., None, :], levels)
    return codes, scales, offsets


def quantise_tokens(y: torch.Tensor, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One scale and offset per token and block of 32 channels, |(code + offset * unit) * scale - y| <= scale / 2.

    Values: attention sinks have values far smaller than their neighbours' and most of the attention mass, so a scale
    shared between tokens multiplies into the output. Scales are rounded up to 3 bits of mantissa.

    Args:
        y: [..., T, D] float32, the coded channels alone.
        levels: [D] float32, 2^bits >= 4 of each channel, equal within a block. With 4 the outer 20% of the range get
            the code of the nearest end.

    Returns:
        codes [..., T, D] uint8, scales [..., T, blocks] uint8 (`byte << 7` are the bits of a float16) and offsets
        [..., T, blocks] int8 in units of levels / 64 scales. Values below 2^-15 may get scale 0; ranges beyond float16
        and values that are not finite get an infinite scale, byte 248.
    """
    codes, scales, offsets = [], [], []
    for block, n in zip(y.split(V_BLOCK, -1), levels.split(V_BLOCK), strict=True):
        low, high = block.amin(-1, keepdim=True), block.amax(-1, keepdim=True)
        n = n[:1]
        outside = torch.where(n == 4, (1 - V_COVER_2_BITS) / 2, 0.0)
        # Halved first: a difference of two finite floats may overflow.
        low, high = (low + (high * 0.5 - low * 0.5) * (2 * outside), high - (high * 0.5 - low * 0.5) * (2 * outside))
        unit = n / OFFSET_STEPS
        # Large enough for the range, one unit of rounding included, and for the offset to fit into its byte.
        needed = torch.maximum((high * 0.5 - low * 0.5) / (n - 1 - unit) * 2, low.abs() / (127 * unit))
        scale_byte, scale = scale_bytes(needed)
        offset = (low / divisor(scale) / unit).floor_().clamp_(-128, 127)
        codes.append(_codes(block - offset * unit * scale, scale, n))
        scales.append(scale_byte)
        offsets.append(offset.char())
    return torch.cat(codes, -1), torch.cat(scales, -1), torch.cat(offsets, -1)


def scale_bytes(needed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positive float32 rounded up to 3 bits of mantissa: bytes, uint8, and what they decode to, float32."""
    byte = needed.half().view(torch.int16) + 127 >> 7
    # The bits of a NaN are arbitrary; an infinite scale decodes to infinity or NaN for every code.
    byte = torch.where(needed.isfinite(), byte, INFINITE_SCALE)
    return byte.byte(), (byte << 7).view(torch.float16).float()


def divisor(scales: torch.Tensor) -> torch.Tensor:
    """`scales` with 1 instead of 0."""
    return torch.where(scales > 0, scales, 1.0)


def _codes(above: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Nearest code of values `above` their offset. `above` is overwritten."""
    codes = above.div_(divisor(scales)).round_()
    # As tensors: clamp() takes a tensor for both ends or for none.
    return codes.clamp_(torch.zeros_like(levels), levels - 1).byte()
