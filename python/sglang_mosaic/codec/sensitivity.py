"""How much the error of K and of V matters to the attention output of each head, measured on real tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mosaic_kernels.segment import GROUP, SegmentFormat
from mosaic_kernels.segment_decode.reference import decode
from mosaic_kernels.segment_encode.reference import pack

PROBE_BITS = 3


class Sensitivity(NamedTuple):
    """Per KV head, [H] float64: relative squared error of the output per summed squared error of an average segment."""

    k_weight: torch.Tensor
    v_weight: torch.Tensor


def measure(
    queries: torch.Tensor, k_rot: torch.Tensor, v_rot: torch.Tensor, v_weights: torch.Tensor, scale: float, sinks: int
) -> Sensitivity:
    """Quantise K, then V, and look at the attention output.

    Args:
        queries: [H, Q, Dk] float32, rotated.
        k_rot: [H, P, T, Dk] float32; v_rot: [H, P, T, Dv] float32, rotated.
        v_weights: [H, Dv] float32: squared error of a value per squared error of its stored channels.
        scale: factor of the logits.
        sinks: the first pages stay exact, unless there are no others.
    """
    heads, pages, tokens, k_dim = k_rot.shape
    fmt = SegmentFormat(
        page_size=tokens,
        k_dim=k_dim,
        v_dim=v_rot.shape[-1],
        k_bits=(PROBE_BITS,) * (k_dim // GROUP),
        v_bits=(PROBE_BITS,) * (v_rot.shape[-1] // GROUP),
    )
    data = torch.zeros(heads * pages, fmt.segment_bytes, dtype=torch.uint8, device=k_rot.device)
    pack(k_rot.flatten(0, 1), v_rot.flatten(0, 1), fmt, data)
    k_coded, v_coded = (x.unflatten(0, (heads, pages)) for x in decode(data, fmt))
    first = sinks if sinks < pages else 0
    for coded, exact in ((k_coded, k_rot), (v_coded, v_rot)):
        coded[:, :first] = exact[:, :first]
    # Scaled so that lengths are those of values.
    v_rot, v_coded = (x * v_weights[:, None, None].sqrt() for x in (v_rot, v_coded))

    def attend(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax(queries @ k.flatten(1, 2).transpose(1, 2) * scale, -1) @ v.flatten(1, 2)

    exact = attend(k_rot, v_rot)
    weights = []
    for k, v, coded, original in ((k_coded, v_rot, k_coded, k_rot), (k_rot, v_coded, v_coded, v_rot)):
        error = (attend(k, v) - exact).double().square().sum((1, 2)) / exact.double().square().sum((1, 2))
        squared = (coded - original)[:, first:].double().square().sum((2, 3)).mean(1)
        weight = error / squared
        # A head without any error says nothing about its sensitivity.
        weights.append(torch.where(weight.isfinite() & (weight > 0), weight, 1e-12))
    return Sensitivity(*weights)
