"""A Hypothesis state machine over SGLang's own allocator and radix cache, our page memory, and a plain model.

Requests come with overlapping prefixes, are prefilled in chunks, decode, finish into the tree or are aborted; the tree
is split, shared and evicted; a small pool keeps pages being encoded all the time. Device work lags behind host
decisions by one step, as under overlap scheduling. The model knows which value every token must have; whatever a
running request can see is read back after each forward: dense pages exactly, mosaic pages byte for byte as the epoch
that wrote them encodes the right values, and within the codec's step of these. With a host tier, evicted pages go to a
manager (in process), and requests wait for those that they need.
"""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sglang_mosaic.torchvision_compat import declare_missing_operators

declare_missing_operators()

from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams  # noqa: E402
from sglang.srt.mem_cache.cache_init_params import CacheInitParams  # noqa: E402
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool  # noqa: E402
from sglang.srt.mem_cache.radix_cache import RadixKey  # noqa: E402

from sglang_mosaic.adapter.allocator import with_page_events  # noqa: E402
from sglang_mosaic.adapter.cpu_platform_class import cpu_allocator_class  # noqa: E402
from sglang_mosaic.adapter.node_pages import NodePages  # noqa: E402
from sglang_mosaic.adapter.radix_cache import MosaicRadixCache  # noqa: E402
from sglang_mosaic.adapter.request_pages import RequestPages, note_decode, note_extend  # noqa: E402
from sglang_mosaic.cache.dense_bytes import dense_bytes  # noqa: E402
from sglang_mosaic.cache.host_page import HostPage  # noqa: E402
from sglang_mosaic.cache.host_tier import HostTier  # noqa: E402
from sglang_mosaic.cache.memory import PageMemory  # noqa: E402
from sglang_mosaic.codec.planes import PlanesCodec  # noqa: E402
from sglang_mosaic.config import MosaicConfig  # noqa: E402
from sglang_mosaic.errors import InvariantError  # noqa: E402
from sglang_mosaic.layout import FrameBytes, MemoryPlan, minimum_dense_frames, reserve_dense_frames  # noqa: E402
from sglang_mosaic.manager.in_process import InProcessClient  # noqa: E402
from sglang_mosaic.manager.options import ManagerOptions  # noqa: E402
from sglang_mosaic.page import PAGE_SIZE  # noqa: E402
from sglang_mosaic.wire.buffers import Buffers  # noqa: E402

RUNNING, CHUNK, DIM = 3, 2 * PAGE_SIZE, 16
RATIO = 3.0
TOLERANCE = 0.6
"""Relative error of a page. Pages look different from those that an epoch was calibrated on, and a tensor that hardly
matters may get 2 bits; what another page holds is off by 1.4."""
MEANWHILE = st.sampled_from(["nothing", "evict", "leave"])
LENGTHS = [1, 63, 64, 65, 127, 128, 129, 200]


def token_values(tokens: list[int]) -> torch.Tensor:
    """K (= V) that a forward writes for these tokens, float [tokens, 16]: depends on the token and its position.

    Channels are independent, all the harder to compress."""
    ids = torch.tensor(tokens, dtype=torch.float32)[:, None]
    place = torch.arange(len(tokens), dtype=torch.float32)[:, None]
    return torch.sin((ids * 0.7 + place * 0.31 + 1) * (torch.arange(DIM) * 1.3 + 1))


DENSE_BYTES = PAGE_SIZE * 2 * DIM * torch.float32.itemsize


class Tier(HostTier):
    """Calibrates where it is called: processes that load torch would take a second each."""

    calibrates = False


class Always:
    """Every page is worth waiting for."""

    def enough(self, pages: int) -> bool:
        return pages > 0

    def budget_s(self, pages: int, ahead: int, at: int, rest: int) -> float | None:
        return 60.0


class Pool(RuleBasedStateMachine):
    @initialize(
        mosaic=st.sampled_from([12, 6, 2, 0]),
        roomy=st.booleans(),
        windows=st.booleans(),
        policy=st.sampled_from(["pressure", "seal"]),
        refresh=st.sampled_from([0, 3]),
        limit=st.sampled_from([None, 0.05]),
        host=st.booleans(),
    )
    def build(
        self, mosaic: int, roomy: bool, windows: bool, policy: str, refresh: int, limit: float | None, host: bool
    ) -> None:
        dense = reserve_dense_frames(RUNNING, CHUNK, 2) if roomy else minimum_dense_frames(RUNNING, CHUNK)
        codec = PlanesCodec(1, 1, DIM, DIM, ratio=RATIO)
        plan = MemoryPlan(dense, mosaic, RUNNING, FrameBytes(DENSE_BYTES, codec.frame_bytes))
        # Poison: reading a dense frame that no forward has written gives NaN.
        k = [torch.full(((dense + 1) * PAGE_SIZE, 1, DIM), torch.nan)]
        v = [torch.full(((dense + 1) * PAGE_SIZE, 1, DIM), torch.nan)]
        config = MosaicConfig(encode=policy, calibration_pages=2, refresh_pages=refresh, max_error=limit, audit=1)
        self.memory = PageMemory(plan, config, codec, k, v)
        kv_cache = SimpleNamespace(memory=self.memory)
        allocator = with_page_events(cpu_allocator_class())
        self.allocator = allocator(plan.logical_tokens, PAGE_SIZE, torch.float32, "cpu", kv_cache, need_sort=False)
        self.slots = ReqToTokenPool(RUNNING, 1024, "cpu", enable_memory_saver=False)
        self.tree = MosaicRadixCache(CacheInitParams(False, self.slots, self.allocator, PAGE_SIZE))
        self.requests: list[SimpleNamespace] = []
        self.seen: list[tuple[int, ...]] = []
        self.lagging: tuple[torch.Tensor, torch.Tensor] | None = None
        if windows:
            self.memory.set_recent_pages(self._recent_pages)
        self.tier: Tier | None = None
        if host:
            self._connect()

    def _connect(self) -> None:
        memory = self.memory
        options = ManagerOptions(slot_bytes=DENSE_BYTES, slots=6, host_bytes=1 << 20, host_raw_bytes=1 << 16)
        self.tier = Tier(
            InProcessClient(options),
            40 * DENSE_BYTES,
            40 * DENSE_BYTES,
            options.slots,
            Buffers(40 * DENSE_BYTES),
            readable=lambda hash_: memory.epochs.number(hash_) is not None,
            adopt=memory.adopt,
        )
        memory.connect(self.tier)
        self.tree.connect(b"test", Always())
        restore = memory.restore

        def restore_in_order(*args) -> None:
            # In the stream of the last forward, which may still write to these frames for somebody who left.
            self._device_catches_up()
            restore(*args)

        memory.restore = restore_in_order

    @property
    def used(self) -> bool:
        """Whether there is anything yet to evict, flush or audit."""
        return self.memory.lifecycle.counters.allocated > 0

    # One forward: host decisions are over, device work of the previous forward has happened.

    def forward(self, slots: torch.Tensor, values: torch.Tensor) -> None:
        self._device_catches_up()
        self.memory.begin_forward()
        self._check_reads()
        self.lagging = (self.memory.table.dense_slots(slots), values)
        self.memory.will_write(slots)
        for request in self.requests:
            request.written = request.length
        if self.tier is not None:
            self.tier.poll()

    def _check_reads(self) -> None:
        """Every running request reads back what earlier forwards wrote for its tokens."""
        for request in self.requests:
            row = self.slots.req_to_token[request.req_pool_idx, : request.written].to(torch.int64)
            wanted = token_values(request.tokens)[: request.written]
            frames = self.memory.table.frames[row // PAGE_SIZE]
            dense = frames < self.memory.table.first_mosaic
            got = self.memory.dense_k[0][(frames * PAGE_SIZE + row % PAGE_SIZE)[dense], 0]
            assert torch.equal(got, wanted[dense])
            if not dense.all():
                self._check_mosaic(frames[~dense][::PAGE_SIZE], wanted[~dense].view(-1, PAGE_SIZE, 1, DIM))

    def _check_mosaic(self, frames: torch.Tensor, wanted: torch.Tensor) -> None:
        """Mosaic frames hold these values [pages, 64, 1, 16], each in the epoch that it was written with."""
        numbers = self.memory.epochs.numbers_of(frames)
        for number in numbers.unique().tolist():
            epoch, own = self.memory.epochs[number], numbers == number
            data = self.memory.mosaic_data(0, frames[own], number)
            assert torch.equal(data, epoch.encode(0, wanted[own], wanted[own])[0])
            k, v = (x[:, 0] for x in epoch.decode(0, data))
            k = k @ epoch.layers[0].basis.q_basis[0].T
            v = epoch.unrotate_output(0, v.reshape(-1, 1, DIM)).view_as(v)
            for found in (k, v):
                exact = wanted[own][:, :, 0]
                error = (found - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))
                assert (error < TOLERANCE).all(), error

    def _device_catches_up(self) -> None:
        if self.lagging is not None:
            rows, values = self.lagging
            assert (rows >= PAGE_SIZE).all() and (rows < len(self.memory.dense_k[0])).all()
            self.memory.dense_k[0][rows, 0] = values
            self.memory.dense_v[0][rows, 0] = values
            self.lagging = None

    def _recent_pages(self) -> set[int]:
        pages: set[int] = set()
        for request in self.requests:
            last = max(request.length - 1, 0) // PAGE_SIZE
            row = self.slots.req_to_token[request.req_pool_idx]
            pages.update((row[max(last - 1, 0) * PAGE_SIZE : request.length : PAGE_SIZE] // PAGE_SIZE).tolist())
        return pages

    # Rules.

    @precondition(lambda self: len(self.requests) < RUNNING)
    @rule(
        prefix=st.integers(0, 2), shared=st.sampled_from(LENGTHS), own=st.sampled_from(LENGTHS), seed=st.integers(0, 3)
    )
    def arrive(self, prefix: int, shared: int, own: int, seed: int) -> None:
        """A request whose first tokens are one of three common texts."""
        self._arrive([prefix * 1000 + i % 50 for i in range(shared)] + [5000 + seed * 100 + i % 90 for i in range(own)])

    @precondition(lambda self: self.tier is not None and self.seen and len(self.requests) < RUNNING)
    @rule(index=st.integers(0, 9), gone=st.sampled_from([64, 200, 10_000]), stale=st.booleans())
    def come_back(self, index: int, gone: int, stale: bool) -> None:
        """An earlier prompt, after pages were evicted; with `stale` before a forward has copied them out."""
        self.tree.evict(EvictParams(num_tokens=gone))
        if not stale:
            self.forward(torch.empty(0, dtype=torch.int64), torch.empty(0, DIM))
        self._arrive(list(self.seen[index % len(self.seen)]))

    def _arrive(self, tokens: list[int]) -> None:
        self._restore(array("q", tokens))
        match = self.tree.match_prefix(MatchPrefixParams(key=RadixKey(array("q", tokens[:-1]))))
        hit = len(match.device_indices)
        self.tree.inc_lock_ref(match.last_device_node)
        if not self._room_for(len(tokens) - hit):
            self.tree.dec_lock_ref(match.last_device_node)
            return
        request = SimpleNamespace(
            tokens=tokens,
            length=hit,
            written=hit,
            req_pool_idx=None,
            inflight_middle_chunks=0,
            kv_committed_len=0,
            extra_key=None,
            last_node=match.last_device_node,
            cache_protected_len=hit,
            prefix_indices=match.device_indices,
            priority=0,
        )
        request.get_fill_ids = lambda: array("q", request.tokens[: request.length])
        self.slots.alloc([request])
        self.slots.write((request.req_pool_idx, slice(0, hit)), match.device_indices.to(torch.int32))
        self.requests.append(request)
        self.seen.append(tuple(tokens))

    def _restore(self, tokens: array) -> None:
        """What SGLang's scheduler does with a request in its queue, until nothing more comes back for it."""
        if self.tier is None:
            return
        waiting = SimpleNamespace(
            rid="waiting", extra_key=None, priority=0, positional_embed_overrides=None, full_untruncated_fill_ids=tokens
        )
        waiting._compute_max_prefix_len = lambda length: length - 1

        def look_up(tree: MosaicRadixCache, cow_mamba: bool) -> None:
            found = tree.match_prefix(MatchPrefixParams(key=RadixKey(tokens[:-1])))
            waiting.last_node, waiting.prefix_indices = found.last_device_node, found.device_indices

        waiting.init_next_round_input = look_up
        self.tree.begin_restore(waiting)
        while not self.tree.check_prefetch_progress("waiting"):
            self.tier.poll()
        self.tree.pop_prefetch_loaded_tokens("waiting")

    @precondition(lambda self: any(r.length < len(r.tokens) for r in self.requests))
    @rule(chunks=st.integers(1, 4), meanwhile=MEANWHILE)
    def prefill(self, chunks: int, meanwhile: str) -> None:
        request = next(r for r in self.requests if r.length < len(r.tokens))
        for _ in range(chunks):
            end = min(request.length + CHUNK, len(request.tokens))
            if not self._extend([request], [end], meanwhile) or end == len(request.tokens):
                return
            self.tree.cache_unfinished_req(request, chunked=True)

    @precondition(lambda self: any(r.length == len(r.tokens) for r in self.requests))
    @rule(token=st.integers(7000, 7005), steps=st.integers(1, 70), meanwhile=MEANWHILE)
    def decode(self, token: int, steps: int, meanwhile: str) -> None:
        batch = [r for r in self.requests if r.length == len(r.tokens)]
        for step in range(steps):
            if not self._room_for(0, len(batch)):
                return
            lengths = torch.tensor([r.length for r in batch])
            rows = self.slots.req_to_token[[r.req_pool_idx for r in batch]]
            last = rows[torch.arange(len(batch)), lengths - 1].to(torch.int64)
            slots = self.allocator.alloc_decode(lengths + 1, lengths + 1, last)
            note_decode(batch, self.allocator.take_handed_out())
            for request, slot in zip(batch, slots, strict=True):
                request.tokens.append(token)
                self.slots.write((request.req_pool_idx, request.length), slot.to(torch.int32))
                request.length += 1
            self._meanwhile(meanwhile if step == 0 else "nothing", batch)
            self.forward(slots, torch.stack([token_values(r.tokens)[-1] for r in batch]))

    @precondition(lambda self: self.requests)
    @rule(index=st.integers(0, RUNNING - 1), insert=st.booleans())
    def leave(self, index: int, insert: bool) -> None:
        """Finish (the tree keeps the full pages) or abort, at any stage of the request."""
        request = self.requests.pop(index % len(self.requests))
        request.origin_input_ids, request.output_ids = array("q", request.tokens), array("q")
        self.tree.cache_finished_req(request, is_insert=insert, kv_len_to_handle=request.length)
        self.slots.free(request)

    @precondition(lambda self: self.requests)
    @rule(index=st.integers(0, RUNNING - 1))
    def lose_count(self, index: int) -> None:
        """As when SGLang allocates in a way that is not told: pages are read from the device then."""
        RequestPages.forget(self.requests[index % len(self.requests)])

    @precondition(lambda self: self.used)
    @rule(tokens=st.sampled_from([1, 64, 300, 10_000]))
    def evict(self, tokens: int) -> None:
        self.tree.evict(EvictParams(num_tokens=tokens))

    @precondition(lambda self: self.used and not self.requests)
    @rule()
    def flush(self) -> None:
        self._device_catches_up()
        self.tree.reset()
        self.allocator.clear()

    def _extend(self, batch: list[SimpleNamespace], ends: list[int], meanwhile: str) -> bool:
        starts = [r.length for r in batch]
        if not self._room_for(sum(ends) - sum(starts)):
            return False
        prefix, total = torch.tensor(starts), torch.tensor(ends)
        rows = self.slots.req_to_token[[r.req_pool_idx for r in batch]]
        last = torch.where(prefix > 0, rows[torch.arange(len(batch)), (prefix - 1).clamp_min(0)].to(torch.int64), -1)
        slots = self.allocator.alloc_extend(prefix, prefix, total, total, last, sum(ends) - sum(starts))
        note_extend(batch, self.allocator.take_handed_out())
        values, first = [], 0
        for request, start, end in zip(batch, starts, ends, strict=True):
            self.slots.write(
                (request.req_pool_idx, slice(start, end)), slots[first : first + end - start].to(torch.int32)
            )
            request.length = end
            values.append(token_values(request.tokens)[start:end])
            first += end - start
        self._meanwhile(meanwhile, batch)
        self.forward(slots, torch.cat(values))
        return True

    def _meanwhile(self, what: str, batch: list[SimpleNamespace]) -> None:
        """What the scheduler may do between an allocation and the forward that it is for."""
        if what == "evict":
            self.tree.evict(EvictParams(num_tokens=10_000))
        others = [i for i, request in enumerate(self.requests) if request not in batch]
        if what == "leave" and others:
            self.leave(others[0], insert=False)

    def _room_for(self, tokens: int, requests: int = 1) -> bool:
        """What SGLang's scheduler does before it allocates: evict, and admit only what fits."""
        needed = tokens + requests * PAGE_SIZE
        if self.allocator.available_size() < needed:
            self.tree.evict(EvictParams(num_tokens=needed - self.allocator.available_size()))
        return self.allocator.available_size() >= needed

    # Invariants.

    @invariant()
    def accounts_balance(self) -> None:
        if not hasattr(self, "tree"):
            return
        in_requests = sum(-(-r.length // PAGE_SIZE) * PAGE_SIZE - r.cache_protected_len for r in self.requests)
        assert len(self.memory.epochs.live) <= self.memory.config.live_epochs
        total = self.allocator.available_size() + self.tree.evictable_size() + self.tree.protected_size() + in_requests
        assert total == self.memory.plan.logical_tokens
        assert self.allocator.host_free_pages() == self.allocator.audited_free_pages()
        for request in self.requests:
            known = RequestPages.of(request)
            if known is not None:
                row = self.slots.req_to_token[request.req_pool_idx, : request.length : PAGE_SIZE] // PAGE_SIZE
                for count in (0, 1, 2, len(row)):
                    assert known.last(count, request.last_node) == row.tolist()[len(row) - count :]
        nodes = list(self.tree.root_node.children.values())
        for node in nodes:
            assert NodePages.of(node.value) == (node.value[::PAGE_SIZE] // PAGE_SIZE).tolist()
            nodes += node.children.values()

    @precondition(lambda self: self.used)
    @rule()
    def audit(self) -> None:
        self._device_catches_up()  # audits wait for it
        self.memory.audit(self.allocator.host_free_pages(), self.tree.pages())

    def teardown(self) -> None:
        if hasattr(self, "tree"):
            self.audit()
            if self.tier is not None:
                self.tier.close()


TestPool = Pool.TestCase
TestPool.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("known", [True, False])
def test_pages_that_are_known_are_not_read_from_the_device(known: bool) -> None:
    """Of requests that end, with a tail and with duplicates of what the tree has, and of nodes that are evicted."""
    pool = Pool()
    pool.build(mosaic=12, roomy=True, windows=False, policy="pressure", refresh=0, limit=None, host=False)
    for _ in range(2):
        pool.arrive(prefix=0, shared=200, own=129, seed=0)
    for request in list(pool.requests):
        while request.length < len(request.tokens):
            pool.prefill(chunks=1, meanwhile="nothing")
            pool.accounts_balance()
    pool.decode(token=7000, steps=70, meanwhile="nothing")
    assert all(RequestPages.of(request) is not None for request in pool.requests)
    if not known:
        pool.lose_count(0)
    before = pool.allocator.device_reads
    for _ in range(2):
        pool.leave(index=0, insert=True)
        pool.accounts_balance()
    pool.evict(tokens=10_000)
    pool.accounts_balance()
    assert (pool.allocator.device_reads == before) == known
    pool.teardown()


def test_an_audit_finds_a_mirror_that_is_not_the_free_list() -> None:
    pool = Pool()
    pool.build(mosaic=12, roomy=True, windows=False, policy="pressure", refresh=0, limit=None, host=False)
    pool.allocator._mirror.reverse()
    with pytest.raises(InvariantError, match="pages on the device"):
        pool.allocator.audited_free_pages()
    pool.allocator._mirror.reverse()


def test_allocator_mirror_names_sequence_starts() -> None:
    from sglang_mosaic.adapter.allocator import first_new_pages

    assert first_new_pages([0, 64, 0, 10], [65, 200, 64, 20]) == [0, 5]


@pytest.mark.parametrize("policy", ["seal", "pressure"])
def test_what_was_evicted_comes_back(policy: str) -> None:
    """Prompts that never fit together come back page by page; without a manager they are computed again."""
    pool = Pool()
    pool.build(mosaic=12, roomy=True, windows=False, policy=policy, refresh=0, limit=None, host=True)

    def serve() -> None:
        while any(request.length < len(request.tokens) for request in pool.requests):
            pool.prefill(chunks=1, meanwhile="nothing")
        pool.leave(0, insert=True)

    for seed in range(4):
        pool.arrive(prefix=seed % 3, shared=200, own=200, seed=seed)
        serve()
    for turn in range(12):
        pool.come_back(index=turn % 4, gone=[64, 300, 10_000][turn % 3], stale=turn == 5)
        serve()
    counters = pool.tier.counters
    assert counters.restored >= 30 and counters.missed == 0, counters
    pool.tier.close()
    for index in range(4):
        pool.come_back(index=index, gone=10_000, stale=False)
        serve()
    pool.teardown()


def test_a_sink_comes_back_into_a_pool_without_dense_frames() -> None:
    """Making room for it encodes other pages, into frames that must not be those of the pages behind it."""
    pool = Pool()
    pool.build(mosaic=3, roomy=False, windows=False, policy="pressure", refresh=0, limit=None, host=True)
    memory, dense = pool.memory, pool.memory.plan.dense_frames
    slots = pool.allocator.alloc(dense * PAGE_SIZE)
    pool.forward(slots, token_values(list(range(len(slots)))))
    pool.forward(torch.empty(0, dtype=torch.int64), torch.empty(0, DIM))
    frames = torch.arange(1, dense + 1)
    memory._calibrate(frames.tolist())
    epoch = memory.epochs.current
    mosaic = HostPage(epoch.hash, bytes(epoch.encode(0, *memory.dense_rows(0, frames[:1]))[0][0].numpy()))
    sink = HostPage("", bytes(dense_bytes(memory.dense_k, memory.dense_v, frames[:1])[0].numpy()))
    assert memory.lifecycle.dense.free == 0 and memory.lifecycle.mosaic.free == 3
    pool.allocator.alloc_restored([sink, mosaic, mosaic], sequence_start=True)
    memory.begin_forward()
    assert memory.lifecycle.mosaic.free == memory.lifecycle.dense.free == 0
