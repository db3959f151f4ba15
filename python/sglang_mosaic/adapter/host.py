"""The host tier of a server: the manager's options, whose pages are whose, and when the scheduler turns to it."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
import uuid
from pathlib import Path
from typing import Any

from mosaic_kernels.segment import REVISION
from sglang_mosaic.adapter import compat
from sglang_mosaic.adapter.arguments import selects_mosaic
from sglang_mosaic.adapter.restoring import RestoringPays
from sglang_mosaic.adapter.rope import RopeOfModel, rope_of
from sglang_mosaic.cache.host_copies import pinned_memory
from sglang_mosaic.cache.host_tier import HostTier
from sglang_mosaic.cache.memory import PageMemory
from sglang_mosaic.config import MosaicConfig
from sglang_mosaic.errors import ConfigError
from sglang_mosaic.layout import FrameBytes
from sglang_mosaic.manager.keys import namespace
from sglang_mosaic.manager.options import ManagerOptions
from sglang_mosaic.manager.slotted_client import KEPT_BYTES
from sglang_mosaic.manager.zmq_client import ZmqClient
from sglang_mosaic.wire.buffers import Buffers, usual_memory

logger = logging.getLogger(__name__)

GIB = 1 << 30
LEAST_SLOTS, MOST_SLOTS, SLOTS_BYTES = 16, 512, GIB
"""Payloads under way: as many as compressed pages have so many bytes. Half of them come back in one turn of the
scheduler, which may last as long as a prefill: they must be more than that computes. A slot has room for an
uncompressed page, of which few travel; memory that nobody wrote to takes none."""
OUTBOX_BYTES, OUTBOX_SHARE = GIB, 0.1
"""Most bytes of pages that wait for the manager, and a share of the host tier if that is more: bringing a long prompt
back evicts as much within a second. LEAST_PAGES of them in any case."""
LEAST_PAGES = 32
RAW_SHARE, RAW_SHARE_LOSSY = 0.75, 0.25
"""Shares of the host's memory that hold its newest pages as they came: they come back much faster. Coding them again
without loss saves little. None with --mosaic-disk: what is not coded is not written yet, and SGLang ends its processes
without a warning."""
BUSY_SLEEP_S = 0.001
"""Sleep of an idle scheduler while pages are on their way."""


def manager_options(config: MosaicConfig, frame_bytes: FrameBytes, rope: RopeOfModel) -> ManagerOptions:
    """Options of the manager of one rank."""
    host_bytes = int(config.host_gb * GIB)
    slot_bytes = max(frame_bytes.dense, frame_bytes.mosaic)
    usual_bytes = frame_bytes.mosaic if config.compresses and frame_bytes.mosaic else slot_bytes
    lossy = config.host_max_error or config.cold_max_error
    raw_share = 0.0 if config.disk else RAW_SHARE_LOSSY if lossy else RAW_SHARE
    return ManagerOptions(
        slot_bytes=slot_bytes,
        usual_bytes=usual_bytes,
        slots=min(max(SLOTS_BYTES // usual_bytes, LEAST_SLOTS), MOST_SLOTS),
        host_bytes=host_bytes,
        host_raw_bytes=int(raw_share * host_bytes),
        host_max_error=config.host_max_error,
        cold_max_error=config.cold_max_error,
        rope_frequencies=rope.frequencies,
        rope_interleaved=rope.interleaved,
        disk=config.disk,
        disk_bytes=int(config.disk_gb * GIB),
        backoff_s=min(ManagerOptions.backoff_s, config.restart_s),
        most_backoff_s=config.restart_s,
    )


def connect(scheduler: Any, memory: PageMemory) -> None:
    """Give a scheduler its host tier, if one is asked for. In the thread that polls it: the manager dies with it.

    Raises:
        SystemExit: there is no place for the manager's sockets.
    """
    config = memory.config
    if not config.host_gb:
        return
    # Only cold pages need to know; computing it takes a table of all positions.
    rope = rope_of(scheduler.tp_worker.model_runner.model) if config.cold_max_error else RopeOfModel()
    options = manager_options(config, memory.plan.frame_bytes, rope)
    outbox_bytes = min(max(OUTBOX_BYTES, int(OUTBOX_SHARE * options.host_bytes)), options.host_bytes)
    most_bytes = max(outbox_bytes, LEAST_PAGES * options.slot_bytes)
    on_gpu = memory.table.frames.is_cuda
    allocate = pinned_memory if on_gpu else usual_memory
    buffers = Buffers(most_bytes, allocate)
    try:
        client = ZmqClient(options, allocate)
    except ConfigError as error:
        raise SystemExit(f"sglang_mosaic: --mosaic-host-gb: {error}") from error
    tier = HostTier(
        client,
        most_bytes,
        # The other half of the buffers for pages that come back is for those under way.
        KEPT_BYTES // 2,
        options.slots,
        buffers,
        readable=lambda hash_: memory.epochs.number(hash_) is not None,
        adopt=memory.adopt,
    )
    tier.poll()  # starts the manager
    if on_gpu:
        # The system takes longer to give and pin memory than to fill it: steps would wait for it, and pages seem slow
        # to come back.
        for prepare in (client.prepare, buffers.prepare):
            prepare(options.usual_bytes)
    memory.connect(tier)
    pays = RestoringPays(config.restore_from, scheduler.tp_worker.model_runner.prefill_s, tier.restores.rate)
    scheduler.tree_cache.connect(identity(scheduler, memory), pays)
    # From here on the scheduler asks the tree about the requests in its queue.
    scheduler.enable_hicache_storage = True
    logger.info("sglang_mosaic: evicted pages go to the host, %.3g GB%s", config.host_gb, _disk(config))


def identity(scheduler: Any, memory: PageMemory) -> bytes:
    """Of all that gives the pages of some tokens their bytes: weights, how they are computed, the codec.

    Servers with the same identity read each other's pages. What cannot be told apart gets one of its own.
    """
    from sglang.srt.runtime_context import get_parallel

    args, model = compat.resolved(scheduler.server_args), scheduler.model_config
    fields = (
        "dtype",
        "quantization",
        "json_model_override_args",
        "kv_cache_dtype",
        "tp_size",
        "ep_size",
        "moe_dp_size",
    )
    told = {name: repr(getattr(args, name, None)) for name in fields}
    told |= compat.IDENTITY
    told["weights"] = _weights(args, model)
    told["rank"] = repr(get_parallel().tp_rank)
    # Where nothing is compressed, nothing that was may come back.
    told["exact"] = repr(not memory.config.compresses)
    told["codec"] = repr((REVISION, dataclasses.astuple(memory.plan.frame_bytes)))
    return namespace(json.dumps(told, sort_keys=True))


def _weights(args: Any, model: Any) -> str:
    """Of the checkpoint: its files, or the commit that a hub gave."""
    path = Path(args.model_path)
    if args.load_format == "dummy":
        return uuid.uuid4().hex
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        return repr([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])
    commit = getattr(model.hf_config, "_commit_hash", None)
    return repr((args.model_path, commit)) if commit else uuid.uuid4().hex


def _disk(config: MosaicConfig) -> str:
    return f", and to {os.path.abspath(config.disk)}, {config.disk_gb:.3g} GB" if config.disk else ""


def tier_of(scheduler: Any) -> HostTier | None:
    """The host tier of a scheduler, if it has one."""
    if not selects_mosaic(scheduler.server_args):
        return None
    host = scheduler.token_to_kv_pool_allocator.get_kvcache().memory.host
    return None if host is None else host.tier


def before_next_batch(self: Any, *args: Any, **kwargs: Any) -> None:
    """Once a turn of the scheduler."""
    tier = tier_of(self)
    if tier is not None:
        tier.poll()


def around_prefetch(original, self, req, *args):
    """A request enters the queue."""
    if tier_of(self) is None:
        original(self, req, *args)
    else:
        self.tree_cache.begin_restore(req)


def around_idle_sleep(original, self):
    """Sleep less while pages are on their way."""
    tier = tier_of(self)
    if tier is not None and tier.busy:
        time.sleep(BUSY_SLEEP_S)
    else:
        original(self)
