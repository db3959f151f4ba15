"""Compiles the kernels that encode pages and read them in prefills, before there is a page (Triton).

Without it the first requests that compress something wait for the compiler, for seconds each.
"""

from __future__ import annotations

import torch

from mosaic_kernels.segment_decode.launch import decode_frames
from mosaic_kernels.segment_table import FORMATS, make_table
from sglang_mosaic.cache.memory import PageMemory
from sglang_mosaic.codec.base import LayerSample
from sglang_mosaic.codec.planes import PlanesCodec
from sglang_mosaic.page import PAGE_SIZE

PAGES = 40
"""Of noise: more than a rotation does with few warps."""


def warm_up(memory: PageMemory, query_heads: int) -> None:
    """Encode and decode noise with a layer of the pool's shape.

    Args:
        query_heads: of this rank.
    """
    (_, heads, k_dim), v_dim = memory.dense_k[0].shape, memory.dense_v[0].shape[2]
    device, dtype = memory.dense_k[0].device, memory.dense_k[0].dtype

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    codec = PlanesCodec(1, heads, k_dim, v_dim, page_size=PAGE_SIZE, ratio=memory.config.ratio, device=device)
    codec.observe_queries(0, noise(PAGE_SIZE, query_heads, k_dim))
    k, v = noise(PAGES, PAGE_SIZE, heads, k_dim), noise(PAGES, PAGE_SIZE, heads, v_dim)
    epoch = codec.calibrate([LayerSample(k, v, 0)], quick=True)
    epoch.encode(0, k[:1], v[:1])
    data, _ = epoch.encode(0, k, v)
    table = make_table([epoch.head_formats(0)], device, topk=False, exceptions=False, room=FORMATS)
    decode_frames(data, torch.arange(PAGES, device=device), table, 0, torch.float16)
