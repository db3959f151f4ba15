"""SGLang's CUDA graphs of decode steps, one for each of what a step may read.

What a step reads of compressed pages decides which kernels run, so that every batch size has a graph for each. SGLang
tells graphs of one size apart by a label, which it uses for LoRA; here the label also says what is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner

from sglang_mosaic.cache.reading import Reading


class MosaicDecodeGraphs(DecodeCudaGraphRunner):
    """One per model runner; its attention backend is a `MosaicAttentionBackend`."""

    def can_run_graph(self, forward_batch: Any) -> bool:
        return self.attn_backend.can_replay(forward_batch) and super().can_run_graph(forward_batch)

    def capture_one_shape(
        self, size: int, forward: Callable, stream_idx: int | None = None, variant_label: str | None = None
    ) -> None:
        for reading in self.attn_backend.readings:
            self.attn_backend.reading = reading
            super().capture_one_shape(size, forward, stream_idx, _label(variant_label, reading))

    def load_batch(self, forward_batch: Any, pp_proxy_tensors: Any = None) -> None:
        # Where other ranks' batches decide about the size, no step goes on with another's selection.
        size = None if self.require_mlp_tp_gather else self._pad_to_bucket(forward_batch.batch_size, self.capture_bs)
        self.attn_backend.choose_reading(forward_batch, size)
        super().load_batch(forward_batch, pp_proxy_tensors)

    def _resolve_lora_variant(self, forward_batch: Any) -> str:
        return _label(super()._resolve_lora_variant(forward_batch), self.attn_backend.reading)


def _label(variant: str | None, reading: Reading) -> str:
    return reading.value if variant is None else f"{variant}-{reading.value}"
