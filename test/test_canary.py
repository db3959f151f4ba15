"""Every invariant of the pool is violated once, and the audit names it; whatever is allowed, it lets pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from sglang_mosaic.torchvision_compat import declare_missing_operators

declare_missing_operators()

from sglang_mosaic.adapter import observe, tenants  # noqa: E402
from sglang_mosaic.cache.canary import PageCanary  # noqa: E402
from sglang_mosaic.cache.memory import PageMemory  # noqa: E402
from sglang_mosaic.errors import InvariantError  # noqa: E402
from sglang_mosaic.page import PageState  # noqa: E402
from test_host_traffic import PAGES, pool  # noqa: E402

DENSE, COMPRESSED = 7, 3
"""A page of each kind in `memory`."""


@pytest.fixture
def memory() -> Iterator[PageMemory]:
    """Eight full pages, 2 to 6 compressed; audited once while a step could follow."""
    memory = pool()
    memory.config = dataclasses.replace(memory.config, audit=1)
    memory._canary = PageCanary(memory)
    memory.allocate([*range(1, PAGES + 1)], [1])
    memory.will_write(torch.arange(64, (PAGES + 1) * 64))
    memory.begin_forward()
    audit(memory)
    yield memory
    memory.host.tier.close()


def audit(memory: PageMemory) -> None:
    """As SGLang would have it: all eight pages are in the tree, but for those that were freed."""
    pages = memory.lifecycle
    free = [page for page, state in enumerate(pages.state) if page and state is PageState.FREE]
    full = [page for page, state in enumerate(pages.state) if state in (PageState.SEALED, PageState.MOSAIC)]
    memory.audit_step(free, full)


def flip_dense(memory: PageMemory) -> None:
    memory.dense_v[1].view(torch.int16)[memory.lifecycle.frame[DENSE] * 64 + 5, 1, 3] ^= 1


def flip_compressed(memory: PageMemory) -> None:
    memory.slab.frames[memory.lifecycle.frame[COMPRESSED] - memory.table.first_mosaic, 99] ^= 1


def lose_a_frame(memory: PageMemory) -> None:
    memory.lifecycle.mosaic.take()


def share_a_frame(memory: PageMemory) -> None:
    memory.lifecycle.frame[DENSE] = memory.lifecycle.frame[DENSE + 1]


def move_in_the_table(memory: PageMemory) -> None:
    memory.table.frames[COMPRESSED] += 1


def forget_a_calibration(memory: PageMemory) -> None:
    memory.epochs._numbers[memory.lifecycle.frame[COMPRESSED] - memory.table.first_mosaic] = 17


@pytest.mark.parametrize(
    ("violate", "named"),
    [
        (flip_dense, r"page 7 \(SEALED, frame 7\) changed"),
        (flip_compressed, r"page 3 \(MOSAIC, frame \d+\) changed"),
        (lose_a_frame, r"frame \d+ has 0 owners"),
        (share_a_frame, r"frame \d has 0 owners|frame \d has 2 owners"),
        (move_in_the_table, r"the page table has page 3 at frame"),
        (forget_a_calibration, r"page 3 in frame \d+ is of calibration 17, which is gone"),
    ],
    ids=lambda each: each.__name__ if callable(each) else "",
)
def test_a_violation_is_named(memory: PageMemory, violate: Callable[[PageMemory], None], named: str) -> None:
    audit(memory)
    violate(memory)
    with pytest.raises(InvariantError, match=named):
        audit(memory)


def test_what_sglang_holds_is_checked_as_well(memory: PageMemory) -> None:
    with pytest.raises(InvariantError, match=r"page 1 is SEALED, but in the free list"):
        memory.audit_step([1], [])
    memory.free([8])
    with pytest.raises(InvariantError, match=r"the prefix tree holds page 8, which is FREE"):
        memory.audit_step([*range(8, memory.plan.logical_pages + 1)], [8])


def test_pages_may_come_go_and_be_compressed(memory: PageMemory) -> None:
    # Other bytes in the frame of a page that was freed, and other pages in its frame.
    frame = memory.lifecycle.frame[DENSE]
    memory.free([DENSE])
    memory.allocate([DENSE], [])
    assert memory.lifecycle.frame[DENSE] == frame
    flip_dense(memory)
    memory.begin_forward()
    memory.will_write(torch.arange(DENSE * 64, (DENSE + 1) * 64))
    audit(memory)
    # Decided, and not applied before the next forward.
    memory.set_recent_pages(frozenset)
    memory.begin_forward()
    assert memory.lifecycle.state[DENSE] is PageState.MOSAIC
    audit(memory)
    memory.clear()
    audit(memory)
    assert memory.stats()["step_audits"] == 4 and memory.stats()["audits"] == 0


def test_every_page_gets_its_turn(memory: PageMemory) -> None:
    for _ in range(3):
        audit(memory)
    assert set(memory._canary._seen) == set(range(1, PAGES + 1))


def test_a_scheduler_audits_every_so_many_turns(memory: PageMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.config = dataclasses.replace(memory.config, audit=3, host_gb=0.0)
    scheduler = SimpleNamespace(
        server_args=SimpleNamespace(attention_backend="mosaic"),
        token_to_kv_pool_allocator=SimpleNamespace(
            get_kvcache=lambda: SimpleNamespace(memory=memory),
            audited_free_pages=lambda: [*range(PAGES + 1, memory.plan.logical_pages + 1)],
        ),
        tree_cache=SimpleNamespace(pages=lambda: [1, 2, 3]),
        max_req_input_len=512,
        max_total_num_tokens=1024,
        metrics_collector_context=SimpleNamespace(current_scheduler_metrics_enabled=False),
    )
    observe.after_scheduler_init(None, scheduler)
    before, audited = memory.step_audits, []
    for _ in range(7):
        observe.before_next_batch(scheduler)
        audited.append(memory.step_audits - before)
    assert audited == [0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("isolate", [False, True])
def test_requests_without_a_tenant_are_alone_if_wanted(isolate: bool) -> None:
    scheduler = SimpleNamespace(server_args=SimpleNamespace(attention_backend="mosaic"), mosaic_isolate=isolate)
    requests = [SimpleNamespace(extra_key=key) for key in (None, None, "", "tenant", "tenant")]
    for request in requests:
        tenants.before_request(scheduler, request)
    keys = [request.extra_key for request in requests]
    assert keys[3:] == ["tenant", "tenant"]
    assert keys[:3] == [None, None, ""] if not isolate else len(set(keys)) == 4 and all(keys)
