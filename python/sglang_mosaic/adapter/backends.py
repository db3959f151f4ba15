"""Factories that SGLang calls for ``--attention-backend mosaic`` and ``--radix-cache-backend mosaic``."""

from __future__ import annotations

import functools
from typing import Any

from sglang_mosaic.adapter.prefill_time import PrefillTime
from sglang_mosaic.page import PAGE_SIZE


def create_attention_backend(runner: Any) -> Any:
    """Attention backend of one model runner; also puts the pool's bracket around the runner's forward.

    Raises:
        SystemExit: a hook did not take, or a layer of the model cannot be served.
    """
    from sglang.srt.layers.radix_attention import RadixAttention

    from sglang_mosaic.adapter import hooks, refusals
    from sglang_mosaic.adapter.attention import MosaicAttentionBackend
    from sglang_mosaic.adapter.kv_pool import MosaicKVPool

    hooks.verify()
    if not isinstance(runner.token_to_kv_pool, MosaicKVPool):
        raise SystemExit(
            f"sglang_mosaic: SGLang built a {type(runner.token_to_kv_pool).__name__} instead of the mosaic pool; "
            "another plugin replaces it; remove that plugin."
        )
    for module in runner.model.modules():
        why = refusals.unsupported_layer(module) if isinstance(module, RadixAttention) else None
        if why is not None:
            refusals.refuse(f"this model ({why})", "choose another model, or another --attention-backend")
    _bracket_forward(runner)
    backend = MosaicAttentionBackend(runner)
    if backend.has_graphs:
        from sglang_mosaic.adapter.decode_graphs import MosaicDecodeGraphs

        runner._decode_cuda_graph_runner_cls = lambda: MosaicDecodeGraphs
    return backend


def create_radix_cache(context: Any) -> Any:
    """Radix cache over logical pages."""
    from sglang_mosaic.adapter import compat
    from sglang_mosaic.adapter.radix_cache import MosaicRadixCache

    compat.log_tree()
    return MosaicRadixCache(context.params)


def _bracket_forward(runner: Any) -> None:
    # On the instance: a class-level hook on ModelRunner cannot be installed that early (circular import). It runs
    # inside SGLang's forward stream, after that stream has waited for the scheduler's.
    memory = runner.token_to_kv_pool.memory
    forward = runner.forward
    prefill_s = runner.prefill_s = PrefillTime()
    device = memory.table.frames.device

    @functools.wraps(forward)
    def bracketed(forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        memory.begin_forward()
        if forward_batch.out_cache_loc is not None and _fills_a_page(forward_batch):
            memory.will_write(forward_batch.out_cache_loc)
        # Nobody asks how long it takes but who may bring pages back instead.
        timed = memory.host is not None and forward_batch.forward_mode.is_extend()
        started = prefill_s.start(device) if timed else None
        output = forward(forward_batch, *args, **kwargs)
        if timed:
            prefill_s.stop(started, forward_batch.extend_num_tokens, runner.attn_backend.compressed_pages)
        return output

    runner.forward = bracketed


def _fills_a_page(batch: Any) -> bool:
    """Whether a forward writes the last token of a page: the others need not be looked at."""
    if batch.seq_lens_cpu is None:
        return True
    lengths = batch.seq_lens_cpu.tolist()
    news = [1] * len(lengths) if batch.forward_mode.is_decode() else batch.extend_seq_lens_cpu
    if news is None:
        return True
    return any(length // PAGE_SIZE > (length - new) // PAGE_SIZE for length, new in zip(lengths, news, strict=True))
