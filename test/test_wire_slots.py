"""Slots: a state machine over the allocator, and memory that leaves no trace."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sglang_mosaic.wire.messages import Payload, Slot, WireError
from sglang_mosaic.wire.slots import SlotAllocator, SlotMemory, checksum

SLOTS = 3
KEY = bytes(range(16))


class Slots(RuleBasedStateMachine):
    """Against a plain model: who has what."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = SlotAllocator(SLOTS)
        self.held: dict[int, Slot] = {}
        self.over: list[tuple[int, Slot]] = []
        self.ticket = 0
        self.stale = 0

    @rule()
    def take(self) -> None:
        self.ticket += 1
        slot = self.slots.take(self.ticket)
        assert (slot is None) == (len(self.held) == SLOTS)
        if slot is not None:
            assert slot.index not in {other.index for other in self.held.values()}
            assert slot not in {other for _, other in self.over}
            self.held[self.ticket] = slot

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.held)))
        slot = self.held.pop(ticket)
        assert self.slots.holds(ticket, slot)
        assert self.slots.give_back(ticket, slot)
        self.over.append((ticket, slot))

    @precondition(lambda self: self.over)
    @rule(data=st.data())
    def speak_of_a_life_that_is_over(self, data: st.DataObject) -> None:
        ticket, slot = data.draw(st.sampled_from(self.over))
        assert not self.slots.give_back(ticket, slot)
        assert not self.slots.holds(ticket, slot)
        self.stale += 2

    @precondition(lambda self: self.held)
    @rule(data=st.data(), offset=st.integers(1, 3))
    def speak_for_somebody_else(self, data: st.DataObject, offset: int) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.held)))
        assert not self.slots.give_back(ticket + 1000 * offset, self.held[ticket])
        self.stale += 1

    @rule(index=st.sampled_from([-1, SLOTS, 10**9]))
    def name_no_slot(self, index: int) -> None:
        assert not self.slots.give_back(1, Slot(index, 1))
        self.stale += 1

    @invariant()
    def nothing_is_lost(self) -> None:
        assert self.slots.free + len(self.held) == SLOTS
        assert self.slots.stale == self.stale


Slots.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestSlots = Slots.TestCase


@pytest.fixture
def memory():
    memory = SlotMemory.create(SLOTS, 5000)
    yield memory
    memory.close()
    memory.close()


def test_slots_hold_whole_system_pages(memory: SlotMemory) -> None:
    assert memory.slot_bytes >= 5000
    assert memory.slot_bytes % os.sysconf("SC_PAGESIZE") == 0


def test_payloads_come_back(memory: SlotMemory) -> None:
    first = memory.write(Slot(0, 1), KEY, b"a" * memory.slot_bytes)
    second = memory.write(Slot(1, 1), KEY, b"b")
    assert memory.read(first, KEY) == b"a" * memory.slot_bytes
    assert memory.read(second, KEY) == b"b"


def test_what_was_changed_is_refused(memory: SlotMemory) -> None:
    payload = memory.write(Slot(1, 1), KEY, b"hello")
    memory.write(Slot(1, 2), KEY, b"hellp")
    with pytest.raises(WireError, match="checksum"):
        memory.read(payload, KEY)


def test_right_bytes_under_a_wrong_key_are_refused(memory: SlotMemory) -> None:
    payload = memory.write(Slot(1, 1), KEY, b"hello")
    with pytest.raises(WireError, match="checksum"):
        memory.read(payload, KEY[::-1])


@pytest.mark.parametrize("index, length", [(-1, 1), (SLOTS, 1), (2**62, 1), (0, -1), (0, 2**40)])
def test_nothing_outside_a_slot_is_touched(memory: SlotMemory, index: int, length: int) -> None:
    with pytest.raises(WireError):
        memory.read(Payload(Slot(index, 1), length, checksum(KEY, b"")), KEY)
    if length == 1:
        with pytest.raises(WireError):
            memory.write(Slot(index, 1), KEY, b"x")


def test_too_much_does_not_fit(memory: SlotMemory) -> None:
    with pytest.raises(WireError):
        memory.write(Slot(0, 1), KEY, bytes(memory.slot_bytes + 1))


def test_neither_side_can_cut_the_memory_off(memory: SlotMemory) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(memory.fd, 0)


def test_a_file_of_another_size_is_refused(memory: SlotMemory) -> None:
    with pytest.raises(WireError, match="expected 4 slots"):
        SlotMemory(memory.fd, SLOTS + 1, memory.slot_bytes)


def test_a_child_sees_the_same_bytes(memory: SlotMemory) -> None:
    payload = memory.write(Slot(2, 1), KEY, b"from the parent")
    code = (
        "import sys; from sglang_mosaic.wire.slots import SlotMemory; from sglang_mosaic.wire.messages import *\n"
        f"m = SlotMemory({memory.fd}, {SLOTS}, {memory.slot_bytes})\n"
        f"assert m.read(Payload(Slot(2, 1), {payload.length}, {payload.checksum}), {KEY!r}) == b'from the parent'\n"
        f"m.write(Slot(1, 1), {KEY!r}, b'from the child')"
    )
    subprocess.run([sys.executable, "-c", code], pass_fds=(memory.fd,), check=True)
    assert memory.read(Payload(Slot(1, 1), 14, checksum(KEY, b"from the child")), KEY) == b"from the child"


def test_memory_is_there_before_it_is_written_to() -> None:
    memory = SlotMemory.create(SLOTS, 100_000)
    try:
        payload = memory.write(Slot(1, 1), KEY, b"kept")
        before = os.fstat(memory.fd).st_blocks * 512
        memory.touch(8192)
        given = os.fstat(memory.fd).st_blocks * 512 - before
        assert 2 * 8192 <= given < 3 * memory.slot_bytes, "the first pages of the two other slots, not whole slots"
        assert bytes(memory.read(payload, KEY)) == b"kept"
        memory.touch(10**9)
        assert os.fstat(memory.fd).st_blocks * 512 >= SLOTS * memory.slot_bytes
    finally:
        memory.close()
