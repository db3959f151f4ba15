"""Hooks that size and build the pool: bytes -> memory plan -> our pool and our allocator."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch

from sglang_mosaic.adapter import compat
from sglang_mosaic.adapter.arguments import selects_mosaic
from sglang_mosaic.adapter.geometry import Geometry
from sglang_mosaic.config import MosaicConfig
from sglang_mosaic.errors import ConfigError
from sglang_mosaic.layout import MIB, FrameBytes, MemoryPlan, plan_memory
from sglang_mosaic.page import PAGE_SIZE

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class _Planned:
    """The plan of this process's rank: SGLang computes sizes and builds the pool in separate calls."""

    plan: MemoryPlan | None = None


_planned = _Planned()


def plan_for(configurator: Any, budget_bytes: int) -> MemoryPlan:
    """The memory plan of one rank.

    Args:
        configurator: SGLang's KVCacheConfigurator, model loaded.
        budget_bytes: bytes that SGLang would give its own pool.

    Raises:
        ConfigError: the plan does not fit.
    """
    config = MosaicConfig.load()
    kv_bytes = budget_bytes if config.kv_mib is None else int(config.kv_mib * MIB)
    if kv_bytes > budget_bytes:
        raise ConfigError(
            f"--mosaic-kv-mib {config.kv_mib}: only {budget_bytes / MIB:.1f} MiB are free for the cache; lower it or "
            "raise --mem-fraction-static."
        )
    return _plan(config, compat.resolved(configurator.server_args), Geometry.of(configurator), kv_bytes)


def refuse_small_pool(server_args: Any) -> None:
    """Refuse a --mosaic-kv-mib that is too small in the launcher: a scheduler that ends leaves a traceback there.

    Raises:
        SystemExit: names the smallest size that works.
    """
    config = MosaicConfig.load()
    if config.kv_mib is None or server_args.model_path.lower() in ("none", "dummy"):
        return
    try:
        expected_plan(server_args, int(config.kv_mib * MIB))
    except ConfigError as error:
        raise SystemExit(f"sglang_mosaic: {error}") from error


def expected_plan(server_args: Any, kv_bytes: int) -> MemoryPlan:
    """The plan that resolved ServerArgs lead to with ``kv_bytes`` for all frames of a rank, without a model.

    Raises:
        ConfigError: the plan does not fit.
    """
    return _plan(MosaicConfig.load(), server_args, Geometry.expected(server_args), kv_bytes)


def _plan(config: MosaicConfig, server_args: Any, geometry: Geometry, kv_bytes: int) -> MemoryPlan:
    if geometry.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ConfigError(f"the checkpoint asks for a {geometry.dtype} KV cache: use --kv-cache-dtype bfloat16.")
    try:
        codec = geometry.codec(config)
    except ValueError as error:
        raise ConfigError(f"--mosaic-codec {config.codec} cannot hold this model's cache: {error}") from error
    return plan_memory(
        kv_bytes=kv_bytes,
        frame_bytes=FrameBytes(geometry.dense_frame_bytes, codec.frame_bytes),
        table_bytes=codec.table_bytes * config.live_epochs,
        chunk_tokens=largest_prefill(server_args, geometry.context_length),
        window_pages=config.window_pages,
        dense_fraction=config.dense_fraction,
        max_running_requests=server_args.max_running_requests,
        max_total_tokens=server_args.max_total_tokens,
        compress=config.compresses,
        prefer_dense=config.encode != "seal",
    )


def largest_prefill(server_args: Any, context_length: int) -> int:
    """Most new prefill tokens in one forward."""
    chunk = server_args.chunked_prefill_size
    if chunk is None or chunk <= 0:  # chunked prefill is off
        return max(server_args.max_prefill_tokens, context_length)
    return chunk


def around_config_from_budget(original, self, budget_bytes, **kwargs):
    """Size the pool in logical tokens."""
    if not selects_mosaic(self.server_args):
        return original(self, budget_bytes, **kwargs)
    from sglang.srt.model_executor.pool_configurator import MemoryPoolConfig

    try:
        plan = plan_for(self, budget_bytes)
    except ConfigError as error:
        raise SystemExit(f"sglang_mosaic: {error}") from error
    logger.info("sglang_mosaic: %s", plan.describe())
    _planned.plan = plan
    return MemoryPoolConfig(max_total_num_tokens=plan.logical_tokens)


def around_resolve_max_num_reqs(original, self, token_capacity):
    """Never run more requests than the plan's reserve was computed for."""
    requests = original(self, token_capacity)
    if not selects_mosaic(self.server_args) or _planned.plan is None:
        return requests
    return min(requests, _planned.plan.max_running_requests)


def around_build_pool(original, self, *, sizes, **kwargs):
    """Build the pool of frames instead of one row per token."""
    if not selects_mosaic(self.server_args):
        return original(self, sizes=sizes, **kwargs)
    from sglang_mosaic.adapter.kv_pool import MosaicKVPool

    plan = _planned.plan
    if plan is None or plan.logical_tokens != sizes.max_total_num_tokens:
        raise SystemExit(
            f"sglang_mosaic planned {plan and plan.logical_tokens} tokens, but SGLang sized its pool for "
            f"{sizes.max_total_num_tokens}: another plugin or flag resizes the KV cache; remove it."
        )
    return MosaicKVPool(plan, MosaicConfig.load(), Geometry.of(self))


def around_build_allocator(original, self, **kwargs):
    """Rebuild SGLang's allocator as a subclass that reports which pages it hands out and takes back."""
    allocator = original(self, **kwargs)
    if not selects_mosaic(self.server_args):
        return allocator
    from sglang_mosaic.adapter.allocator import with_page_events

    return with_page_events(type(allocator))(
        allocator.size,
        page_size=PAGE_SIZE,
        dtype=allocator.dtype,
        device=allocator.device,
        kvcache=allocator.get_kvcache(),
        need_sort=allocator.need_sort,
    )


def around_fused_set_kv_buffer(original, forward_batch):
    """RoPE kernels that write K and V themselves would write to logical slots."""
    from sglang.srt.runtime_context import get_server_args

    return False if selects_mosaic(get_server_args()) else original(forward_batch)
