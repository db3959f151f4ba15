"""SGLang's radix cache over logical pages, and the pages that it has on the host. Sharing, splitting and eviction are
SGLang's own."""

from __future__ import annotations

import time
import uuid
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey, TreeNode

from sglang_mosaic.adapter import compat
from sglang_mosaic.adapter.node_pages import NodePages
from sglang_mosaic.adapter.request_pages import RequestPages
from sglang_mosaic.adapter.restoring import Restoring, RestoringPays
from sglang_mosaic.cache.host_page import HostPage
from sglang_mosaic.manager.keys import namespace, page_keys
from sglang_mosaic.page import PAGE_SIZE


class MosaicRadixCache(RadixCache):
    """A node's value holds logical slots, so that it stays valid when the pages behind it are compressed.

    With a host tier (`connect`), nodes that are evicted live on there, under keys that follow from their tokens.
    """

    def __init__(self, params: CacheInitParams) -> None:
        self._root_key = self._identity = b""
        self._pays: RestoringPays | None = None
        self._restoring: dict[str, Restoring] = {}
        self._restored: dict[str, int] = {}
        super().__init__(params)
        self._memory = self.token_to_kv_pool_allocator.get_kvcache().memory

    def connect(self, identity: bytes, pays: RestoringPays) -> None:
        """Keep evicted pages on the host of the page memory.

        Args:
            identity: of all that gives a token's pages their bytes, besides the tokens before it.
            pays: tells which pages to bring back and how long to wait for them.
        """
        self._root_key = self._identity = identity
        self._pays = pays

    def pages(self) -> list[int]:
        """Every page that the tree holds, for audits."""
        held, stack = [], list(self.root_node.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            held.extend((node.value[::PAGE_SIZE] // PAGE_SIZE).tolist())
        return held

    def reset(self) -> None:
        super().reset()
        if self._identity:
            # The cache is emptied when weights change, too: what is on the host must not be found any more.
            self._root_key = namespace(self._identity.hex(), uuid.uuid4().hex)
            for name in list(self._restoring):
                self._forget(name)

    # Out.

    def _delete_leaf(self, node: TreeNode) -> None:
        # Its pages were freed just now, and their frames are intact until the next forward.
        if self._identity:
            pages = NodePages.of(node.value) or NodePages(node.value)()
            self._memory.host.evicted(pages, self._keys(node), self._position(node))
        super()._delete_leaf(node)

    def cache_finished_req(self, req: Any, *args: Any, **kwargs: Any) -> None:
        allocator = self.token_to_kv_pool_allocator
        allocator.owner = RequestPages.of(req)
        super().cache_finished_req(req, *args, **kwargs)
        allocator.owner = None
        RequestPages.forget(req)

    def cache_unfinished_req(self, req: Any, *args: Any, **kwargs: Any) -> None:
        allocator = self.token_to_kv_pool_allocator
        allocator.owner = known = RequestPages.of(req)
        super().cache_unfinished_req(req, *args, **kwargs)
        allocator.owner = None
        if known is not None:
            known.advance(req.cache_protected_len // PAGE_SIZE)

    def _record_store_event(self, node: TreeNode) -> None:
        # Called for every new node with slots, but for those of a split.
        super()._record_store_event(node)
        owner = self.token_to_kv_pool_allocator.owner
        NodePages.note(node.value, None if owner is None else owner.at(self._position(node), len(node.key)))

    def _split_node(self, key: RadixKey, child: TreeNode, split_len: int) -> TreeNode:
        pages, known = split_len // PAGE_SIZE, NodePages.there(child.value)
        new_node = super()._split_node(key, child, split_len)
        NodePages.note(new_node.value, None if known is None else known[:pages])
        NodePages.note(child.value, None if known is None else known[pages:])
        keys = getattr(child, "page_keys", None)
        if keys is not None:
            new_node.page_keys, child.page_keys = keys[:pages], keys[pages:]
        return new_node

    def _keys(self, node: TreeNode) -> list[bytes]:
        """Keys of a node's pages on the host; remembered at the node."""
        unknown = []
        while node is not self.root_node and not hasattr(node, "page_keys"):
            unknown.append(node)
            node = node.parent
        for node in reversed(unknown):
            node.page_keys = self._keys_below(node.parent, node.key.raw_token_ids(), compat.Tenant.of(node.key))
        return node.page_keys

    def _position(self, node: TreeNode) -> int:
        """Tokens before a node's."""
        position = 0
        while (node := node.parent) is not None:
            position += len(node.key)
        return position

    def _keys_below(self, node: TreeNode, tokens: Any, tenant: compat.Tenant) -> list[bytes]:
        """Keys of the pages of tokens that follow those of a node."""
        if node is self.root_node:
            root, salt = self._root_key, tenant.cache_salt
            return page_keys(root if salt is None else namespace(root.hex(), salt), tokens, tenant.extra_key)
        return page_keys(self._keys(node)[-1], tokens)

    # Back. The scheduler asks here about requests in its queue, as it asks SGLang's own storage tier.

    def begin_restore(self, request: Any) -> None:
        """A request enters the queue: ask the host for the pages that it needs and the tree lacks."""
        if not self._identity or request.positional_embed_overrides is not None:
            return
        request.init_next_round_input(self, cow_mamba=False)
        tokens, matched = request.full_untruncated_fill_ids, compat.matched_tokens(request)
        whole = request._compute_max_prefix_len(len(tokens)) // PAGE_SIZE * PAGE_SIZE
        tenant = compat.Tenant.of(request)
        keys = self._keys_below(request.last_node, tokens[matched:whole], tenant)
        tier = self._memory.host.tier
        held = tier.held(keys)
        if not self._pays.enough(held):
            tier.counters.recomputed += held
            return
        rest = len(tokens) - matched - held * PAGE_SIZE
        budget_s = self._pays.budget_s(held, tier.restores.ahead, matched // PAGE_SIZE, rest)
        if budget_s is None:
            tier.counters.recomputed += held
            # Or nothing would be measured again, and none come back for good.
            tier.restores.probe(keys[:held])
        else:
            tokens = tokens[: matched + held * PAGE_SIZE]
            self._restoring[request.rid] = Restoring(tokens, tenant, request.priority or 0, matched // PAGE_SIZE)
            tier.restores.begin(request.rid, keys[:held], budget_s)

    def check_prefetch_progress(self, handle: Any) -> bool:
        """Whether a request in the queue waits for no page any more. Puts into the tree what has arrived."""
        name = compat.request_name(handle)
        restoring = self._restoring.get(name)
        if restoring is None:
            return True
        tier = self._memory.host.tier
        restores = tier.restores
        pages = restores.take(name, hold=tier.crowded)
        if pages:
            self._memory.seal_written()  # waits for the device, which is no part of the work that is measured
        started = time.perf_counter()
        inserted = not pages or self._insert_restored(restoring, pages)
        if pages:
            restores.rate.placed(time.perf_counter() - started, len(pages))
        if not inserted:
            restores.cancel(name)
        elif not restores.done(name):
            return False
        self._finish(name)
        return True

    def pop_prefetch_loaded_tokens(self, handle: Any) -> int:
        """Tokens that came back for a request; asked once."""
        return self._restored.pop(compat.request_name(handle), 0)

    def release_aborted_request(self, handle: Any) -> None:
        """A request leaves the queue without having run."""
        self._forget(compat.request_name(handle))

    def _forget(self, name: str) -> None:
        if name in self._restoring:
            self._memory.host.tier.restores.cancel(name)
            self._finish(name)
        self._restored.pop(name, None)

    def _finish(self, name: str) -> None:
        restoring = self._restoring.pop(name)
        asked = len(restoring.tokens) // PAGE_SIZE - restoring.first
        self._memory.host.tier.counters.restored += restoring.restored
        self._memory.host.tier.counters.missed += asked - restoring.restored - restoring.found
        self._restored[name] = restoring.restored * PAGE_SIZE

    def _insert_restored(self, restoring: Restoring, pages: list[HostPage]) -> bool:
        """Put the next pages of a sequence into the tree; False: not all of them could be."""
        match = self.match_prefix(MatchPrefixParams(key=restoring.key(restoring.at + len(pages))))
        slots_there = compat.matched_slots(self, match)
        there = len(slots_there) // PAGE_SIZE
        if there < restoring.at:
            return False  # what they follow was evicted meanwhile
        restoring.found += there - restoring.at
        wanted = pages[there - restoring.at :]
        self.inc_lock_ref(match.last_device_node)
        count = self._make_room(wanted)
        if count:
            slots = self.token_to_kv_pool_allocator.alloc_restored(wanted[:count], sequence_start=there == 0)
        self.dec_lock_ref(match.last_device_node)
        if count:
            value = torch.cat((slots_there, slots))
            self.insert(InsertParams(restoring.key(there + count), value, priority=restoring.priority))
        restoring.at = there + count
        restoring.restored += count
        return count == len(wanted)

    def _make_room(self, pages: list[HostPage]) -> int:
        """Evict for pages that come back; how many of them, from the first on, can be taken."""
        host, allocator = self._memory.host, self.token_to_kv_pool_allocator
        pages = pages[: host.valid(pages)]
        while missing := max(len(pages) - allocator.available_size() // PAGE_SIZE, host.missing_frames(pages)):
            # What is evicted may have the other kind of frame.
            if not self.evict(EvictParams(num_tokens=missing * PAGE_SIZE)).num_tokens_evicted:
                break
        count = min(len(pages), allocator.available_size() // PAGE_SIZE)
        while host.missing_frames(pages[:count]):
            count -= 1
        return count
