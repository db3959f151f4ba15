"""Attention with log-sum-exp of many queries: torch's flash attention where it can, the reference elsewhere."""

from __future__ import annotations

import torch

from mosaic_kernels.attend import reference
from mosaic_kernels.merge_lse.reference import merge

_FLASH_DTYPES = torch.bfloat16, torch.float16
_FLASH_DIM = 256


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal_offset: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.attend`, in the dtype of K and V where that is bfloat16 or float16 on a GPU.

    Then queries and weights are rounded to it, and queries beyond float16 saturate. Sums are float32.

    Args:
        q: [Tq, Hq, D] float.
        k, v: [Hkv, Tk, D], channels next to each other.
        scale, causal_offset: as of the reference.

    Returns:
        out [Tq, Hq, D] and lse [Tq, Hq], float32.

    Raises:
        ValueError: shapes do not fit together.
    """
    if not _flash_can(q, k, v):
        return reference.attend(q, k, v, scale, causal_offset)
    if causal_offset is None:
        return _flash(q, k, v, scale, causal=False)
    if causal_offset < 0 or k.shape[1] != len(q) + causal_offset:
        return reference.attend(q, k, v, scale, causal_offset)
    # Apart, so that it does not matter to which corner a mask that is no square belongs.
    new = _flash(q, k[:, causal_offset:], v[:, causal_offset:], scale, causal=True)
    if not causal_offset:
        return new
    return merge(*new, *_flash(q, k[:, :causal_offset], v[:, :causal_offset], scale, causal=False))


def _flash_can(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    dim = q.shape[-1]
    return (
        q.is_cuda
        and k.dtype == v.dtype
        and k.dtype in _FLASH_DTYPES
        and k.shape == v.shape
        and k.shape[-1] == dim
        and dim <= _FLASH_DIM
        and not dim % 8
        and not q.shape[1] % len(k)
        and bool(len(q))
        and bool(k.shape[1])
        and k.stride(-1) == v.stride(-1) == 1
    )


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    most = torch.finfo(k.dtype).max
    query = q if q.dtype == k.dtype else q.clamp(-most, most).to(k.dtype)
    # The operator behind scaled_dot_product_attention, as only it gives the log-sum-exp and takes heads in groups.
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], None, None, len(q), k.shape[1], 0.0, causal,
        False, scale=scale,
    )  # fmt: skip
    return out[0].float(), lse[0].transpose(0, 1)
