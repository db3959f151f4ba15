"""What the scheduler tells us and we tell the world: recent windows, the longest prompt, the idle audit,
statistics, metrics."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Collection
from typing import Any

from sglang_mosaic.adapter import compat, host
from sglang_mosaic.adapter.arguments import selects_mosaic
from sglang_mosaic.adapter.prefix_hits import PrefixHits
from sglang_mosaic.adapter.request_pages import RequestPages, note_decode, note_extend
from sglang_mosaic.adapter.sight.question import layer_of
from sglang_mosaic.cache.memory import PageMemory
from sglang_mosaic.cache.picture import layer_picture
from sglang_mosaic.page import PAGE_SIZE

logger = logging.getLogger(__name__)


def after_scheduler_init(_result: None, self: Any, *args: Any, **kwargs: Any) -> None:
    """Connect the pool with the scheduler that fills it."""
    if not selects_mosaic(self.server_args):
        return
    memory = memory_of(self.token_to_kv_pool_allocator)
    self.mosaic_prefix_hits = PrefixHits()
    self.mosaic_isolate = memory.config.isolate
    memory.set_recent_pages(RecentPages(self, memory.config.window_pages))
    # SGLang admits a prompt only if a page stays free beside it, but refuses it only from the pool's size on: those in
    # between would wait forever, and everyone behind them.
    self.max_req_input_len = min(self.max_req_input_len, self.max_total_num_tokens - PAGE_SIZE)
    host.connect(self, memory)
    if memory.config.audit:
        self.mosaic_audit_turns = itertools.cycle(reversed(range(memory.config.audit)))
    if self.metrics_collector_context.current_scheduler_metrics_enabled:
        # Not before SGLang has told prometheus_client how processes share /metrics.
        from sglang_mosaic.adapter.metrics import Exporter

        self.mosaic_exporter = Exporter(self.metrics_collector.labels, memory.stats)


def before_next_batch(self: Any, *args: Any, **kwargs: Any) -> None:
    """Once a turn of the scheduler, whether it has work or not."""
    exporter = getattr(self, "mosaic_exporter", None)
    if exporter is not None:
        exporter.turn()
    turns = getattr(self, "mosaic_audit_turns", None)
    if turns is not None and next(turns) == 0:
        memory_of(self.token_to_kv_pool_allocator).audit_step(*_holdings(self))


def after_extend(_result: None, batch: Any) -> None:
    """SGLang has allocated pages for the next tokens of prompts."""
    if hasattr(batch.token_to_kv_pool_allocator, "take_handed_out"):
        note_extend(batch.reqs, batch.token_to_kv_pool_allocator.take_handed_out())


def after_decode(_result: None, batch: Any) -> None:
    """SGLang has allocated pages for the next token of running requests."""
    if hasattr(batch.token_to_kv_pool_allocator, "take_handed_out"):
        note_decode(batch.reqs, batch.token_to_kv_pool_allocator.take_handed_out())


def memory_of(allocator: Any) -> PageMemory:
    """The page memory behind one of our allocators."""
    return allocator.get_kvcache().memory


class RecentPages:
    """Pages in the last ``window_pages`` pages of every request that is running or being prefilled.

    Where nobody noted a request's pages they are read from the device, which waits for what it does; the pool asks only
    when it has to encode.
    """

    def __init__(self, scheduler: Any, window_pages: int) -> None:
        self.scheduler = scheduler
        self.window_pages = window_pages

    def __call__(self) -> set[int]:
        table = self.scheduler.req_to_token_pool.req_to_token
        pages: set[int] = set()
        for request in self._requests():
            row, known = compat.pool_index(request), RequestPages.of(request)
            if row is None:
                continue  # it has given its pages back
            if known is not None:
                pages.update(known.last(self.window_pages, request.last_node))
                continue
            last = (request.kv.kv_allocated_len - 1) // PAGE_SIZE
            first = max(last - self.window_pages + 1, 0)
            slots = table[row, first * PAGE_SIZE : (last + 1) * PAGE_SIZE : PAGE_SIZE]
            pages.update((slots // PAGE_SIZE).tolist())
        return pages

    def _requests(self) -> set[Any]:
        scheduler = self.scheduler
        requests = set()
        for batch in (scheduler.running_batch, scheduler.last_batch):
            if batch is not None:
                requests.update(batch.reqs)
        if scheduler.chunked_req is not None:
            requests.add(scheduler.chunked_req)
        return requests


def after_idle_check(_result: None, self: Any) -> None:
    """Audit the pool where SGLang checks its own accounting: nothing runs, everything is either cached or free."""
    memory = getattr(self.token_to_kv_pool_allocator.get_kvcache(), "memory", None)
    if not isinstance(memory, PageMemory):  # SGLang's own pool: the mosaic backend is not selected
        return
    if memory.config.audit is not None and memory.changed_since_audit:
        memory.audit(*_holdings(self))
        logger.info("sglang_mosaic audit %d clean", memory.audits)


def _holdings(holder: Any) -> tuple[list[int], Collection[int]]:
    """Pages that SGLang's free list and its prefix tree hold.

    Args:
        holder: the scheduler or its invariant checker.
    """
    tree = holder.tree_cache
    return holder.token_to_kv_pool_allocator.audited_free_pages(), tree.pages() if hasattr(tree, "pages") else ()


def after_prefill_report(_result: None, self: Any, batch: Any, prefill_stats: Any, *args: Any, **kwargs: Any) -> None:
    """A prefill has run."""
    hits = getattr(self.scheduler, "mosaic_prefix_hits", None)
    if hits is not None:
        hits.add(prefill_stats)


def around_get_internal_state(original, self, recv_req):
    """Add ``mosaic`` to the state that /get_server_info shows, and to what /mosaic/stats asks for its picture."""
    output = original(self, recv_req)
    if selects_mosaic(self.server_args):
        memory = memory_of(self.token_to_kv_pool_allocator)
        output.internal_state["mosaic"] = memory.stats() | {"prefix": dataclasses.asdict(self.mosaic_prefix_hits)}
        layer = layer_of(recv_req.rid)
        if layer is not None:
            output.internal_state["mosaic"]["picture"] = layer_picture(memory, layer)
    return output
