"""Mosaic frames into dense K and V, for prefills over a compressed prefix (Triton)."""

from __future__ import annotations

import torch

from mosaic_kernels.segment_decode.launch import decode_frames
from sglang_mosaic.cache.memory import PageMemory
from sglang_mosaic.cache.mixed_attention import Decode
from sglang_mosaic.cache.segment_tables import SegmentTables


def frame_decoder(memory: PageMemory, tables: SegmentTables) -> Decode:
    """`Epoch.decode` of mosaic frames, for `MixedAttention`, in float16: scales and offsets are, too."""

    def decode(layer: int, frames: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = frames - memory.table.first_mosaic
        slot = memory.epochs.slots[number]
        k, v = decode_frames(memory.slab.frames, rows, tables.layer(layer).formats, slot, torch.float16)
        return k.transpose(0, 1), v.transpose(0, 1)

    return decode
