"""Attention with log-sum-exp: torch's flash attention where it can, the reference elsewhere."""

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


def attend_causally(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    most_queries: int,
    most_keys: int,
    scale: float,
) -> torch.Tensor:
    """The last tokens of R contexts attend to what lies before each of them and to itself.

    Args:
        q: [new tokens of all contexts, Hq, D] float.
        k, v: [tokens of all contexts, Hkv, D], one context after the other.
        queries, keys: int32 [R + 1], where each context's new tokens and tokens begin, and the ends.
        most_queries, most_keys: of any context.
        scale: factor of the logits.

    Returns:
        [new tokens, Hq, D] in the type of q.
    """
    if _flash_can(q, k.transpose(0, 1), v.transpose(0, 1)):
        # Its mask ends in the corner of the last query and the last key.
        out, *_ = torch.ops.aten._flash_attention_forward(
            _as(q, k.dtype), k, v, queries, keys, most_queries, most_keys, 0.0, True, False, scale=scale
        )
        return out.to(q.dtype)
    found = []
    for first, last, start, stop in zip(
        *(x.tolist() for x in (queries[:-1], queries[1:], keys[:-1], keys[1:])), strict=True
    ):
        own = k[start:stop].transpose(0, 1), v[start:stop].transpose(0, 1)
        found.append(reference.attend(q[first:last], *own, scale, stop - start - (last - first))[0])
    return torch.cat(found).to(q.dtype)


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
    keys, values = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    # The operator behind scaled_dot_product_attention, as only it gives the log-sum-exp and takes heads in groups.
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        _as(q, k.dtype)[None], keys, values, None, None, len(q), k.shape[1], 0.0, causal, False, scale=scale
    )
    return out[0].float(), lse[0].transpose(0, 1).contiguous()


def _as(q: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    most = torch.finfo(dtype).max
    return q if q.dtype == dtype else q.clamp(-most, most).to(dtype)
