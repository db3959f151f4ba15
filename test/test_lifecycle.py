"""Single steps of a page's life; the state machine in test_pool_machine.py walks through all of them together."""

from __future__ import annotations

import pytest

from sglang_mosaic.cache.audit import audit_frames
from sglang_mosaic.cache.lifecycle import Copy, PageLifecycle, Restore
from sglang_mosaic.errors import CapacityError, InvariantError
from sglang_mosaic.layout import FrameBytes, MemoryPlan
from sglang_mosaic.page import PageState


def pool(dense: int, mosaic: int, recent=frozenset) -> PageLifecycle:
    return PageLifecycle(MemoryPlan(dense, mosaic, 1, FrameBytes(100, 30)), recent)


def sealed(pages: PageLifecycle, numbers, sinks=()) -> None:
    pages.allocate(list(numbers), sinks)
    pages.take_updates()
    pages.seal(numbers)


def test_full_dense_frames_make_room_by_encoding_the_oldest():
    pages = pool(4, 10)
    sealed(pages, [1, 2, 3, 4])
    pages.allocate([5])
    updates = pages.take_updates()
    assert [e.page for e in updates.encodings] == [1, 2, 3, 4]  # cold pages go as a batch
    assert pages.state[1] is PageState.MOSAIC
    assert updates.table[5] == updates.encodings[-1].dense_frame or updates.table[5] <= 4
    audit_frames(pages)


def test_sinks_and_recent_pages_are_encoded_last():
    pages = pool(4, 10, lambda: {2})
    sealed(pages, [1, 2, 3, 4], sinks=[1])
    pages.allocate([5, 6])
    assert {e.page for e in pages.take_updates().encodings} == {3, 4}
    pages.seal([5, 6])
    pages.recent_pages = lambda: {2, 5, 6}
    pages.allocate([7])
    assert [e.page for e in pages.take_updates().encodings] == [2]
    assert (pages.counters.encoded_recent, pages.counters.encoded_sinks) == (1, 0)
    pages.allocate([8, 9, 10])
    assert {e.page for e in pages.take_updates().encodings} == {5, 6, 1}
    assert (pages.counters.encoded_recent, pages.counters.encoded_sinks) == (3, 1)
    audit_frames(pages)


def test_a_page_freed_before_publication_is_not_encoded():
    pages = pool(2, 4)
    sealed(pages, [1, 2])
    pages.allocate([3])
    pages.free([1])
    updates = pages.take_updates()
    assert 1 not in [e.page for e in updates.encodings]
    assert updates.table[1] == -1
    audit_frames(pages)


def test_a_mosaic_frame_is_written_once_per_publication():
    pages = pool(1, 1)
    sealed(pages, [1])
    pages.allocate([2])  # 1 is to be encoded
    pages.free([1])
    pages.free([2])
    pages.allocate([1])
    updates = pages.take_updates()
    assert updates.encodings == []
    assert updates.table[1] == 1
    audit_frames(pages)


def test_open_pages_are_never_encoded():
    pages = pool(2, 4)
    pages.allocate([1, 2])
    pages.take_updates()
    with pytest.raises(CapacityError, match="only 0 pages can be encoded"):
        pages.allocate([3])


def test_double_free_and_double_allocation_are_named():
    pages = pool(2, 2)
    pages.allocate([1])
    with pytest.raises(InvariantError, match="page 1 was allocated twice"):
        pages.allocate([1])
    pages.free([1])
    with pytest.raises(InvariantError, match="page 1 was freed twice"):
        pages.free([1])


def test_a_late_write_to_a_freed_page_does_not_seal_it():
    pages = pool(2, 2)
    pages.allocate([1])
    pages.free([1])
    pages.seal([1, 0])
    assert pages.state[1] is PageState.FREE


def test_audit_names_a_frame_with_two_owners():
    pages = pool(2, 2)
    pages.allocate([1, 2])
    pages.frame[2] = pages.frame[1]
    with pytest.raises(InvariantError, match=r"frame [12] has [02] owners"):
        audit_frames(pages)


def test_cold_pages_are_looked_for_only_after_another_page_was_sealed():
    looks = []
    pages = pool(8, 8, lambda: looks.append(1) or {2})
    sealed(pages, [1, 2, 3], sinks=[1])
    for _ in range(5):
        pages.encode_cold()
    assert [e.page for e in pages.take_updates().encodings] == [3]
    assert len(looks) == 1
    pages.recent_pages = frozenset
    sealed(pages, [4])
    pages.encode_cold()
    assert [e.page for e in pages.take_updates().encodings] == [2, 4]
    audit_frames(pages)


def test_copies_read_frames_before_anybody_writes_to_them():
    pages = pool(2, 1)
    sealed(pages, [1, 2])
    pages.allocate([3])  # one of the two is about to be encoded
    (page,) = (page for page in (1, 2) if pages.state[page] is PageState.ENCODING)
    (encoding,) = pages._operations.values()
    pages.free([3])
    pages.restore_dense(3, b"", sink=True)  # into the dense frame that the encoding reads
    assert pages.frame[3] == encoding.dense_frame
    pages.free([page])
    pages.copy_out(page, b"key", 128, lambda frame: None)
    operations = pages.take_updates().operations
    assert [type(operation) for operation in operations] == [Copy, Restore]
    assert operations[0].frame == encoding.dense_frame and operations[0].position == 128
    audit_frames(pages)


def test_a_page_that_came_back_and_goes_again_is_not_copied():
    pages = pool(2, 2)
    pages.take_updates()
    pages.restore_mosaic(1, b"bytes")
    pages.free([1])
    pages.copy_out(1, b"key", 0, lambda frame: None)
    assert pages.take_updates().operations == [] and pages.counters.copied == 0
    audit_frames(pages)


def test_a_sink_is_copied_as_it_is_and_other_dense_pages_encoded():
    pages = pool(3, 2)
    sealed(pages, [1, 2], sinks=[1])
    pages.free([1, 2])
    for page in (1, 2):
        pages.copy_out(page, b"key", 0, lambda frame: None)
    assert [operation.exact for operation in pages.take_updates().operations] == [True, False]


def test_a_page_that_is_in_use_again_is_not_copied():
    pages = pool(3, 2)
    sealed(pages, [1])
    pages.free([1])
    pages.allocate([1])
    pages.copy_out(1, b"key", 0, lambda frame: None)
    assert pages.take_updates().operations == []
