"""Checks of a server's flags: the model and the memory plan, without loading weights."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sglang_mosaic.config import MosaicConfig
from sglang_mosaic.doctor.finding import FAIL, OK, WARN, Finding
from sglang_mosaic.errors import ConfigError
from sglang_mosaic.layout import MIB, MemoryPlan, minimum_dense_frames, reserve_dense_frames


def model_and_plan(server_flags: list[str]) -> Iterator[Finding]:
    """Whether a server with these flags would start, and with how many frames."""
    from sglang_mosaic.adapter import compat
    from sglang_mosaic.adapter.sizing import expected_plan, largest_prefill

    server_args = compat.resolved(_resolve(server_flags))
    if server_args.attention_backend != "mosaic":
        yield Finding(WARN, "model", f"--attention-backend {server_args.attention_backend} does not compress anything")
        return
    model = compat.model_config(server_args)
    yield Finding(OK, "model", f"{', '.join(model.hf_config.architectures)}, {model.num_attention_layers} layers")
    config = MosaicConfig.load()
    memory, kv_bytes = _memory(server_args, config.kv_mib)
    yield memory
    plan = expected_plan(server_args, kv_bytes)
    yield Finding(OK, "plan", plan.describe())
    if plan.mosaic_frames:
        yield _reserve(plan, largest_prefill(server_args, model.context_len), config.window_pages)


def _resolve(server_flags: list[str]) -> Any:
    """ServerArgs as the launcher resolves them.

    Raises:
        SystemExit: our own refusal.
        ConfigError: what argparse or the reader of the model's config said.
    """
    from sglang_mosaic.adapter import compat
    from sglang_mosaic.launch_server import with_mosaic_backends

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return compat.parse(with_mosaic_backends(server_flags))
    except SystemExit as refusal:
        if isinstance(refusal.code, str):
            raise
        why = said.getvalue().rpartition("error: ")[2].strip() or f"exit status {refusal.code}"
        raise ConfigError(f"{why}; see python -m sglang_mosaic.launch_server --help") from refusal
    except OSError as error:
        raise ConfigError(f"--model-path: {error} Pass a checkpoint directory or a hub name.") from error


def _memory(server_args: Any, kv_mib: float | None) -> tuple[Finding, int]:
    """How far the memory goes, and the bytes to plan with. SGLang gives its pool pre-load free memory x
    --mem-fraction-static less the weights; they are counted here from the files of a local checkpoint."""
    from sglang.srt.utils import get_available_gpu_memory

    free_gib = get_available_gpu_memory(server_args.device, server_args.base_gpu_id, empty_cache=False)
    static = int(free_gib * server_args.mem_fraction_static * 2**30)
    files = Path(server_args.model_path).glob("*.safetensors")
    budget = static - sum(file.stat().st_size for file in files) // server_args.tp_size
    room = f"about {budget / MIB:.0f} MiB for the cache at --mem-fraction-static {server_args.mem_fraction_static:g}"
    if kv_mib is None:
        return Finding(WARN, "memory", f"{room}, an estimate; --mosaic-kv-mib fixes the size"), budget
    kv_bytes = int(kv_mib * MIB)
    if kv_bytes <= budget:
        return Finding(OK, "memory", f"--mosaic-kv-mib {kv_mib:g} of {room}"), kv_bytes
    text = f"--mosaic-kv-mib {kv_mib:g}, but there are only {room}; lower the one or raise the other"
    return Finding(FAIL if kv_bytes > static else WARN, "memory", text), kv_bytes


def _reserve(plan: MemoryPlan, chunk_tokens: int, window_pages: int) -> Finding:
    running = plan.max_running_requests
    least = minimum_dense_frames(running, chunk_tokens)
    wanted = reserve_dense_frames(running, chunk_tokens, window_pages)
    # Rounded up, as in the refusal of a smaller pool.
    least_mib = ((least + 1) * plan.frame_bytes.dense + plan.table_bytes) / MIB + 0.05
    text = (
        f"{running} running requests need at least {least} dense frames ({least_mib:.1f} MiB); with {wanted} every "
        "recent window stays uncompressed"
    )
    if plan.dense_frames >= wanted:
        return Finding(OK, "reserve", text)
    return Finding(WARN, "reserve", f"{text}: raise --mosaic-kv-mib, or lower --max-running-requests")
