"""SGLang's KV pool over frames: it is addressed by logical slots and stores dense frames and mosaics."""

from __future__ import annotations

import functools
import os

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, unwrap_write_loc

from sglang_mosaic.adapter.calibration import load_calibration, save_calibration
from sglang_mosaic.adapter.geometry import Geometry
from sglang_mosaic.cache.calibration_process import CalibrationProcess
from sglang_mosaic.cache.memory import PageMemory
from sglang_mosaic.config import MosaicConfig
from sglang_mosaic.layout import MemoryPlan
from sglang_mosaic.page import PAGE_SIZE

ENCODED_TOGETHER = 16
"""Pages that must be full before any is compressed without need, on a GPU: launching the kernels of all layers takes as
long for one page as for so many (about 20 ms at 32 layers)."""
_PHYSICAL_ROWS = (
    "get_contiguous_buf_infos",
    "get_cpu_copy",
    "load_cpu_copy",
    "move_kv_cache",
    "set_kv_buffer_prefix_valid",
)


class MosaicKVPool(MHATokenToKVPool):
    """``k_buffer`` / ``v_buffer`` hold the dense frames, ``[(dense_frames + 1) * 64, kv_heads, dim]`` per layer;
    ``memory`` holds everything else. ``size`` is in logical tokens, as SGLang's accounting expects."""

    def __init__(self, plan: MemoryPlan, config: MosaicConfig, geometry: Geometry) -> None:
        self.memory: PageMemory | None = None
        self._dense_rows = (plan.dense_frames + 1) * PAGE_SIZE
        super().__init__(
            plan.logical_tokens,
            page_size=PAGE_SIZE,
            dtype=geometry.dtype,
            head_num=geometry.kv_heads,
            head_dim=geometry.k_dim,
            v_head_dim=geometry.v_dim,
            layer_num=geometry.layers,
            device=geometry.device,
            enable_memory_saver=False,
            start_layer=geometry.start_layer,
            end_layer=geometry.end_layer,
            enable_alt_stream=False,
        )
        codec = geometry.codec(config)
        self.memory = PageMemory(
            plan,
            config,
            codec,
            self.k_buffer,
            self.v_buffer,
            epoch=load_calibration(config, codec, geometry),
            on_epoch=functools.partial(save_calibration, config),
            beside=_calibrates_beside(config, geometry),
            least_cold=ENCODED_TOGETHER if torch.device(geometry.device).type == "cuda" else 1,
        )
        self._finalize_allocation_log(plan.logical_tokens)

    def _kv_buffer_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (
            (self._dense_rows, self.head_num, self.head_dim),
            (self._dense_rows, self.head_num, self.v_head_dim),
        )

    def _build_kv_buffer_descs(self) -> list:
        return []  # of rows by slot, for transfers, which are refused

    def get_kv_size_bytes(self) -> int:
        """Bytes of all frames and of the codec's tables."""
        return sum(buffer.nbytes for buffer in (*self.k_buffer, *self.v_buffer)) + self.memory.mosaic_bytes

    def _finalize_allocation_log(self, num_tokens: int) -> None:
        if self.memory is not None:  # SGLang calls this once before there are mosaic frames
            super()._finalize_allocation_log(num_tokens)

    def set_kv_buffer(self, layer, loc_info, cache_k: torch.Tensor, cache_v: torch.Tensor, *args, **kwargs) -> None:
        """Write K and V ``[tokens, kv_heads, dim]`` to the dense frames of their logical slots.

        ``loc_info.full_loc`` may carry the translated rows, which the attention backend computes once a forward.
        """
        slots, _, rows = unwrap_write_loc(loc_info)
        if rows is None:
            rows = self.memory.table.dense_slots(slots)
        super().set_kv_buffer(layer, rows, cache_k, cache_v, *args, **kwargs)


def _calibrates_beside(config: MosaicConfig, geometry: Geometry) -> CalibrationProcess | None:
    # Without a GPU the server needs all cores itself, and models are small enough to wait for.
    if torch.device(geometry.device).type != "cuda" or config.codec != "planes" or not config.compresses:
        return None
    return CalibrationProcess(max(len(os.sched_getaffinity(0)) // 2, 1))


def _refuse(name: str):
    def refused(self, *args, **kwargs):
        raise NotImplementedError(
            f"MosaicKVPool.{name}: a logical slot of the mosaic cache has no physical row of its own; "
            "serve this feature without --attention-backend mosaic."
        )

    refused.__name__ = name
    return refused


for _name in _PHYSICAL_ROWS:
    setattr(MosaicKVPool, _name, _refuse(_name))
