"""Attention of new tokens with log-sum-exp: torch's flash attention where it can, the reference elsewhere."""

from __future__ import annotations

import torch

from mosaic_kernels.attend import reference

_FLASH_DTYPES = torch.bfloat16, torch.float16
_FLASH_DIM = 256


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Every token attends to every key.

    Where K and V are bfloat16 or float16 on a GPU, queries and weights are rounded to it, and queries beyond float16
    saturate. Sums are float32.

    Args:
        q: [Tq, Hq, D] float.
        k, v: [Hkv, Tk, D], channels next to each other.
        scale: factor of the logits.

    Returns:
        out [Tq, Hq, D], in the type of K where that is rounded, else float32; lse float32 [Tq, Hq], of any strides.

    Raises:
        ValueError: shapes do not fit together.
    """
    if not _flash_can(q, k, v):
        return reference.attend(q, k, v, scale)
    keys, values = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    # The operator behind scaled_dot_product_attention, as only it gives the log-sum-exp and takes heads in groups.
    # Few queries of many keys fill the chip, too: it cuts the keys into pieces by itself.
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        _as(q, k.dtype)[None], keys, values, None, None, len(q), k.shape[1], 0.0, False, False, scale=scale
    )
    return out[0], lse[0].transpose(0, 1)


def attend_causally(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    most_queries: int,
    most_keys: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last tokens of R contexts attend to what lies before each of them and to itself.

    Args:
        q: [new tokens of all contexts, Hq, D] float.
        k, v: [tokens of all contexts, Hkv, D], one context after the other.
        queries, keys: int32 [R + 1], where each context's new tokens and tokens begin, and the ends.
        most_queries, most_keys: of any context.
        scale: factor of the logits.

    Returns:
        out [new tokens, Hq, D] in the type of q; lse float32 [new tokens, Hq], of any strides.
    """
    if _flash_can(q, k.transpose(0, 1), v.transpose(0, 1)):
        # Its mask ends in the corner of the last query and the last key.
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            _as(q, k.dtype), k, v, queries, keys, most_queries, most_keys, 0.0, True, False, scale=scale
        )
        return out.to(q.dtype), lse.transpose(0, 1)
    found = []
    for first, last, start, stop in zip(
        *(x.tolist() for x in (queries[:-1], queries[1:], keys[:-1], keys[1:])), strict=True
    ):
        own = k[start:stop].transpose(0, 1), v[start:stop].transpose(0, 1)
        found.append(reference.attend(q[first:last], *own, scale, stop - start - (last - first)))
    outs, lses = zip(*found, strict=True)
    return torch.cat(outs).to(q.dtype), torch.cat(lses)


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


def _as(q: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    most = torch.finfo(dtype).max
    return q if q.dtype == dtype else q.clamp(-most, most).to(dtype)
