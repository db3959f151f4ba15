"""Recent windows, from what is known on the host and, where nothing is, from the device."""

from types import SimpleNamespace

import torch

from sglang_mosaic.torchvision_compat import declare_missing_operators

declare_missing_operators()

from sglang_mosaic.adapter.node_pages import NodePages  # noqa: E402
from sglang_mosaic.adapter.observe import RecentPages  # noqa: E402
from sglang_mosaic.adapter.request_pages import HandedOut, RequestPages, note_decode, note_extend  # noqa: E402
from sglang_mosaic.page import PAGE_SIZE  # noqa: E402

ROWS = 4


def slots_of(pages: list[int]) -> torch.Tensor:
    return (torch.tensor(pages)[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()


def request(row: int | None, tokens: int, node: SimpleNamespace | None = None, protected: int = 0) -> SimpleNamespace:
    kv = SimpleNamespace(kv_allocated_len=tokens)
    return SimpleNamespace(
        req_pool_idx=row, kv=kv, last_node=node, cache_protected_len=protected * PAGE_SIZE, rid=f"{row}"
    )


class Hashable(SimpleNamespace):
    __hash__ = object.__hash__


def recent(window: int, *requests: SimpleNamespace) -> set[int]:
    table = torch.zeros(ROWS, 8 * PAGE_SIZE, dtype=torch.int64)
    for row in range(ROWS):
        table[row] = slots_of([100 * (row + 1) + i for i in range(8)])  # what only the device says
    batch = SimpleNamespace(reqs=[Hashable(**vars(one)) for one in requests])
    pool = SimpleNamespace(req_to_token=table)
    scheduler = SimpleNamespace(req_to_token_pool=pool, running_batch=batch, last_batch=None, chunked_req=None)
    return RecentPages(scheduler, window)()


def test_known_pages_are_those_of_the_request_and_then_of_its_nodes() -> None:
    root = SimpleNamespace(parent=None, value=[])
    upper = SimpleNamespace(parent=root, value=slots_of([1, 2, 3]))
    lower = SimpleNamespace(parent=upper, value=slots_of([4]))
    NodePages.note(upper.value)
    one = request(0, 5 * PAGE_SIZE + 1, lower, protected=4)
    note_extend([one], [HandedOut([5, 6], 6)])
    assert [recent(n, one) for n in (0, 1, 2, 3, 4, 9)] == [
        set(), {6}, {5, 6}, {4, 5, 6}, {3, 4, 5, 6}, {1, 2, 3, 4, 5, 6},
    ]  # fmt: skip


def test_without_a_tree_a_request_may_be_shorter_than_the_window() -> None:
    one = request(0, 10)
    note_extend([one], [HandedOut([7], 1)])
    assert recent(4, one) == {7}


def test_what_is_not_known_is_read_from_the_device() -> None:
    known, missed, unknown = request(0, 70), request(1, 70), request(2, 70)
    note_extend([known, missed], [HandedOut([1, 2], 2), HandedOut([3], 2)])
    assert RequestPages.of(missed) is None
    assert recent(1, known, missed, unknown) == {2, 201, 301}
    note_decode([known], None)  # an allocation that was not told
    assert recent(1, known) == {101}


def test_a_request_that_has_given_its_pages_back_has_no_window() -> None:
    gone = request(None, 70)
    note_extend([gone], [HandedOut([1, 2], 2)])
    assert recent(2, gone) == set()
