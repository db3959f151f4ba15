"""What the mosaic cache cannot serve, each refused at start-up in one sentence that says what to change."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NoReturn

from sglang_mosaic.adapter import compat
from sglang_mosaic.config import MosaicConfig
from sglang_mosaic.errors import ConfigError
from sglang_mosaic.manager.store.directory import DirectoryTier
from sglang_mosaic.page import PAGE_SIZE

_FLAGS = (
    # (attribute of ServerArgs, value that is fine, flag, why)
    ("speculative_algorithm", None, "--speculative-algorithm", "draft tokens are written and moved by physical row"),
    ("disaggregation_mode", "null", "--disaggregation-mode", "KV is transferred by physical row"),
    ("enable_hierarchical_cache", False, "--enable-hierarchical-cache", "its host copies are made by physical row"),
    ("enable_lmcache", False, "--enable-lmcache", "it copies KV by physical row"),
    ("enable_flexkv", False, "--enable-flexkv", "it copies KV by physical row"),
    ("enable_hisparse", False, "--enable-hisparse", "it has a pool of its own"),
    ("enable_memory_saver", False, "--enable-memory-saver", "it releases KV memory behind the page table's back"),
    ("enable_unified_memory", False, "--enable-unified-memory", "it has a pool of its own"),
    ("enable_page_major_kv_layout", False, "--enable-page-major-kv-layout", "it has a pool of its own"),
    ("enable_two_batch_overlap", False, "--enable-two-batch-overlap", "two forwards would share one page table"),
    ("enable_pdmux", False, "--enable-pdmux", "two streams would share one page table"),
    ("kv_canary", "none", "--kv-canary", "it checks KV by physical row"),
    ("prefill_only_disable_kv_cache", False, "--prefill-only-disable-kv-cache", "there would be no pages"),
    ("dllm_algorithm", None, "--dllm-algorithm", "diffusion models rewrite pages that count as full"),
    ("enable_streaming_session", False, "--enable-streaming-session", "sessions trim and move slots"),
    ("enable_session_radix_cache", False, "--enable-session-radix-cache", "sessions trim and move slots"),
    ("enable_deterministic_inference", False, "--enable-deterministic-inference", "compression depends on the load"),
    ("encoder_only", False, "--encoder-only", "there is no KV cache"),
    ("pp_size", 1, "--pipeline-parallel-size", "pipeline stages are not supported"),
    ("dcp_size", 1, "--dcp-size", "context parallelism is not supported"),
    ("attn_cp_size", 1, "--attention-context-parallel-size", "context parallelism is not supported"),
    ("prefill_attention_backend", None, "--prefill-attention-backend", "only the mosaic backend reads mosaic pages"),
    ("decode_attention_backend", None, "--decode-attention-backend", "only the mosaic backend reads mosaic pages"),
    *compat.REFUSED_FLAGS,
)

_ENVIRONMENT = {
    "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING": "it resizes the pool after start-up",
    "SGLANG_USE_HND_KVCACHE": "it changes the layout of a page",
}


def refuse(what: str, change: str) -> NoReturn:
    """End the process with one sentence. SystemExit, since SGLang catches and logs ordinary exceptions of plugins."""
    raise SystemExit(f"sglang_mosaic: --attention-backend mosaic cannot serve {what}; {change}.")


def refuse_flags(server_args: Any) -> None:
    """Refuse flag combinations, before SGLang resolves them."""
    for name, fine, flag, why in _FLAGS:
        value = getattr(server_args, name, fine)
        if value != fine:
            refuse(f"{flag} {value} ({why})", f"drop {flag}, or choose another --attention-backend")
    for name, why in _ENVIRONMENT.items():
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "on"):
            refuse(f"{name}={os.environ[name]} ({why})", f"unset {name}")
    if server_args.page_size not in (None, PAGE_SIZE):
        refuse(f"--page-size {server_args.page_size}", f"use --page-size {PAGE_SIZE} or leave it out")
    if server_args.radix_cache_backend not in (None, "mosaic"):
        refuse(f"--radix-cache-backend {server_args.radix_cache_backend}", "use --radix-cache-backend mosaic")


def refuse_host_tier(server_args: Any, config: MosaicConfig) -> None:
    """Refuse a host tier where there is nothing for it to do, or where ranks could disagree about what came back."""
    if not config.host_gb:
        return
    if server_args.disable_radix_cache:
        refuse("--mosaic-host-gb with --disable-radix-cache (nothing is ever evicted)", "drop one of them")
    if server_args.tp_size > 1:
        refuse("--mosaic-host-gb with --tensor-parallel-size above 1", "drop one of them")
    if config.disk:
        try:
            DirectoryTier(Path(config.disk), 1 << 62)
        except ConfigError as error:
            raise SystemExit(f"sglang_mosaic: {error}") from error


def refuse_half_selection(server_args: Any) -> None:
    """The radix cache alone, without the attention backend that reads its pages, is a mistake."""
    halves = [server_args.prefill_attention_backend, server_args.decode_attention_backend]
    if server_args.radix_cache_backend == "mosaic" or "mosaic" in halves:
        raise SystemExit(
            "sglang_mosaic: the mosaic radix cache and the mosaic attention backend work only together; pass "
            "--attention-backend mosaic (for prefill and decode alike)."
        )


def refuse_resolved(server_args: Any) -> None:
    """Refuse models and types that only the resolved arguments show."""
    if server_args.model_path.lower() in ("none", "dummy"):
        return
    if server_args.attention_backend != "mosaic":
        refuse(
            f"{server_args.model_path} (SGLang chose --attention-backend {server_args.attention_backend} for it)",
            "choose another model",
        )
    if server_args.page_size != PAGE_SIZE:
        refuse(f"a page size of {server_args.page_size} (set for this model by SGLang)", "choose another model")
    if server_args.kv_cache_dtype not in ("auto", "bf16", "bfloat16"):
        refuse(f"--kv-cache-dtype {server_args.kv_cache_dtype}", "use --kv-cache-dtype auto or bfloat16")
    why = unsupported_model(compat.model_config(server_args))
    if why is not None:
        refuse(f"{server_args.model_path} ({why})", "choose another model, or another --attention-backend")


def unsupported_model(model_config: Any) -> str | None:
    """Why SGLang's ModelConfig cannot be served, None if it can."""
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.configs.model_config import AttentionArch

    if model_config.attention_arch == AttentionArch.MLA:
        return "multi-head latent attention"
    if mambaish_config(model_config) is not None:
        return "Mamba or linear-attention layers"
    if getattr(model_config, "is_hybrid_swa", False):
        return "sliding-window layers"
    if not model_config.is_generation:
        return "not a generation model"
    if model_config.is_encoder_decoder:
        return "encoder-decoder attention"
    for name, dim in (("head_dim", model_config.head_dim), ("v_head_dim", model_config.v_head_dim)):
        if dim % 16 or dim > 256:
            return f"{name} {dim}, which is not a multiple of 16 up to 256"
    return None


def unsupported_layer(layer: Any) -> str | None:
    """Why one RadixAttention layer cannot be served, None if it can."""
    if layer.sliding_window_size is not None and layer.sliding_window_size > -1:
        return f"layer {layer.layer_id} has a sliding window of {layer.sliding_window_size} tokens"
    if layer.logit_cap:
        return f"layer {layer.layer_id} caps its logits at {layer.logit_cap}"
    if layer.is_cross_attention or layer.attn_type.value != "decoder":
        return f"layer {layer.layer_id} is not causal self-attention"
    return None
