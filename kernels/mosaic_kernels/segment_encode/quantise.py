"""Asymmetric uniform quantisation per channel of a segment (KIVI, arXiv 2402.02750, for keys; here for values too)."""

from __future__ import annotations

import torch


def quantise(
    y: torch.Tensor, levels: torch.Tensor, exception: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and offsets with |offset + code * scale - y| <= scale / 2 + float16 rounding.

    Codes are bin centres: `levels` bins share the range evenly. That is a smaller worst case than levels from end to
    end, (max - min) / (2 levels) against (max - min) / (2 levels - 2), and makes the leading bits of a code the code
    of a coarser quantiser. The quantiser uses the scale and the offset as rounded to float16, the decoder's values.

    Args:
        y: [P, H, T, D] float32.
        levels: [D] float32, 2^bits of each channel; 1 stores the middle of the range alone.
        exception: [P, H] int64, a token left out of the ranges, or None. Its codes mean nothing.

    Returns:
        codes [P, H, T, D] uint8, scales and offsets [P, H, D] float16. A channel whose range is below float16's
        smallest step gets scale 0 and its middle as offset. Ranges beyond float16 give infinite scales or offsets.
    """
    low, high = y.amin(-2), y.amax(-2)
    if exception is not None and y.shape[-2] > 1:
        rest = torch.arange(y.shape[-2], device=y.device) != exception[..., None]
        rest = rest[..., None]
        low = torch.where(rest, y, torch.inf).amin(-2)
        high = torch.where(rest, y, -torch.inf).amax(-2)
    scales = ((high - low) / levels).half()
    scales = torch.where(levels > 1, scales, 0)
    # Centred, so that the rounding of the scale is shared by both ends.
    offsets = ((low + high) * 0.5 - scales.float() * ((levels - 1) * 0.5)).half()
    divisor = torch.where(scales > 0, scales, 1).float()
    codes = (y - offsets.float()[..., None, :]).div_(divisor[..., None, :]).round_()
    # As tensors: clamp() takes a tensor for both ends or for none.
    return codes.clamp_(torch.zeros_like(levels), levels - 1).byte(), scales, offsets
