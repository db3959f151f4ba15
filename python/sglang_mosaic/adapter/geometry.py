"""Shape of one rank's KV cache, read from SGLang once."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from sglang_mosaic.adapter import compat
from sglang_mosaic.codec.base import Codec
from sglang_mosaic.codec.factory import make_codec
from sglang_mosaic.config import MosaicConfig
from sglang_mosaic.page import PAGE_SIZE


@dataclasses.dataclass(frozen=True)
class Geometry:
    """KV cache of one rank. Dimensions are elements, ``layers`` and ``kv_heads`` are this rank's."""

    layers: int
    kv_heads: int
    k_dim: int
    v_dim: int
    dtype: torch.dtype
    device: str
    context_length: int
    start_layer: int
    end_layer: int

    @classmethod
    def of(cls, configurator: Any) -> Geometry:
        """Geometry of an SGLang KVCacheConfigurator."""
        from sglang.srt.runtime_context import get_parallel

        model = configurator.model_config
        tensor_parallel = get_parallel().attn_tp_size
        return cls(
            layers=configurator.layer_info.num_effective_layers,
            kv_heads=model.get_num_kv_heads(tensor_parallel),
            k_dim=model.head_dim,
            v_dim=model.v_head_dim,
            dtype=configurator.kv_cache_dtype,
            device=configurator.device,
            context_length=model.context_len,
            start_layer=configurator.layer_info.start_layer,
            end_layer=configurator.layer_info.end_layer,
        )

    @classmethod
    def expected(cls, server_args: Any) -> Geometry:
        """Geometry that resolved ServerArgs lead to, before there is a model."""
        model = compat.model_config(server_args)
        tensor_parallel = server_args.tp_size // compat.attention_replicas(server_args)
        return cls(
            layers=model.num_attention_layers,
            kv_heads=model.get_num_kv_heads(tensor_parallel),
            k_dim=model.head_dim,
            v_dim=model.v_head_dim,
            dtype=model.dtype if server_args.kv_cache_dtype == "auto" else torch.bfloat16,
            device="cpu",
            context_length=model.context_len,
            start_layer=0,
            end_layer=model.num_attention_layers,
        )

    @property
    def dense_frame_bytes(self) -> int:
        """Bytes of one dense frame over all layers."""
        return self.layers * PAGE_SIZE * self.kv_heads * (self.k_dim + self.v_dim) * self.dtype.itemsize

    def codec(self, config: MosaicConfig) -> Codec:
        """A codec for this geometry, not yet calibrated."""
        shape = self.layers, self.kv_heads, self.k_dim, self.v_dim
        return make_codec(config.codec, *shape, ratio=config.ratio, page_size=PAGE_SIZE, device=self.device)
