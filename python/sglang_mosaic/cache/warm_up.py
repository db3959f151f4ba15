"""Compiles the kernels that encode pages and read them in prefills, before there is a page (Triton).

Without it the first requests that compress something wait for the compiler, for seconds each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mosaic_kernels.attend.launch import attend, attend_causally
from mosaic_kernels.attend.ragged import RaggedAttention
from mosaic_kernels.merge_lse.launch import merge_rows
from mosaic_kernels.rotate_rows.launch import rotate_rows
from mosaic_kernels.segment_decode.launch import decode_frames
from mosaic_kernels.segment_table import FORMATS, make_table
from sglang_mosaic.cache.memory import PageMemory
from sglang_mosaic.cache.prefill_attention import DECODED
from sglang_mosaic.codec.base import LayerSample
from sglang_mosaic.codec.planes import PlanesCodec, PlanesEpoch
from sglang_mosaic.page import PAGE_SIZE

PAGES = 40
"""Of noise: more than a rotation does with few warps."""


def warm_up(memory: PageMemory, query_heads: int, ragged: RaggedAttention | None) -> None:
    """Encode noise with a layer of the pool's shape, and read it.

    Args:
        query_heads: of this rank.
        ragged: as of `PrefillAttention`.
    """
    (_, heads, k_dim), v_dim = memory.dense_k[0].shape, memory.dense_v[0].shape[2]
    device, dtype = memory.dense_k[0].device, memory.dense_k[0].dtype

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    codec = PlanesCodec(1, heads, k_dim, v_dim, page_size=PAGE_SIZE, ratio=memory.config.ratio, device=device)
    codec.observe_queries(0, noise(PAGE_SIZE, query_heads, k_dim))
    k, v = noise(PAGES, PAGE_SIZE, heads, k_dim), noise(PAGES, PAGE_SIZE, heads, v_dim)
    epoch = codec.calibrate([LayerSample(k, v, 0)], quick=True)
    # Where a head has formats of a rare kind, encoders choose by another kernel.
    for either in (epoch.with_topk(), epoch):
        either.encode(0, k[:1], v[:1])
    data, _ = epoch.encode(0, k, v)
    table = make_table([epoch.head_formats(0)], device, topk=False, exceptions=False, room=FORMATS)
    decoded = decode_frames(data, torch.arange(PAGES, device=device), table, 0, DECODED)
    # Numbers of rows that 16 divides have kernels of their own.
    for tokens in (PAGE_SIZE, PAGE_SIZE + 1):
        _read(noise(tokens, query_heads, k_dim), noise, *decoded, epoch, ragged)


def _read(
    q: torch.Tensor,
    noise: Callable[..., torch.Tensor],
    k: torch.Tensor,
    v: torch.Tensor,
    epoch: PlanesEpoch,
    ragged: RaggedAttention | None,
) -> None:
    """What `PrefillAttention.run` does for a layer of one request.

    Args:
        q: [tokens, Hq, Dk].
        noise: makes K and V of new tokens.
        k, v: decoded pages [H, pages, page, D].
    """
    tokens, basis = len(q), epoch.layers[0].basis
    new_k, new_v = noise(tokens, len(k), k.shape[-1]), noise(tokens, len(v), v.shape[-1])
    starts = torch.tensor([0, tokens], dtype=torch.int32)
    if ragged is None:
        there = starts.to(q.device)
        out, lse = attend_causally(q, new_k, new_v, there, there, tokens, tokens, 1.0)
    else:
        out, lse = ragged.attend_causally(q, new_k, new_v, (starts, starts), 1.0)
    rotated = rotate_rows(q, basis.q_basis, DECODED)
    found = (ragged.attend if ragged else attend)(rotated, k.flatten(1, 2), v.flatten(1, 2), 1.0)
    # Of requests that lie side by side, and of others.
    for places in (None, torch.arange(tokens, device=q.device)):
        merge_rows(out, lse, *found, basis.v_basis, places)
