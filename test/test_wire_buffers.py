"""Buffers that come back by themselves."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_mosaic.wire.buffers import Buffers


def address(view: memoryview) -> int:
    return np.frombuffer(view, np.uint8).ctypes.data


def test_a_buffer_is_used_again_once_nobody_refers_to_it() -> None:
    buffers = Buffers(100)
    first, second = buffers.take(40), buffers.take(40)
    assert address(first) != address(second)
    first[:] = bytes(range(40))
    part, where = first[10:20], address(first)
    del first
    assert buffers.free_bytes == 0 and bytes(part) == bytes(range(10, 20))
    del part
    assert buffers.free_bytes == 40
    assert address(buffers.take(30)) != where
    again = buffers.take(40)
    assert address(again) == where and not again.readonly and len(again) == 40


def test_few_bytes_are_kept() -> None:
    buffers = Buffers(100)
    several = [buffers.take(40) for _ in range(4)]
    del several
    assert buffers.free_bytes == 80
    large = buffers.take(101)
    del large
    assert buffers.free_bytes == 80


def test_what_outlives_the_buffers_stays_as_it_is() -> None:
    buffers = Buffers(100)
    view = buffers.take(3)
    view[:] = b"abc"
    del buffers
    assert bytes(view) == b"abc"


def test_memory_is_taken_from_where_the_caller_says() -> None:
    sizes: list[int] = []

    def allocate(size: int) -> np.ndarray:
        sizes.append(size)
        return np.zeros(size, np.uint8)

    buffers = Buffers(100, allocate)
    for size in (40, 40, 30):
        assert bytes(buffers.take(size)) == bytes(size)
    assert sizes == [40, 30]


def test_buffers_that_were_prepared_are_cut_from_large_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def allocate(size: int) -> np.ndarray:
        sizes.append(size)
        return np.zeros(size, np.uint8)

    buffers = Buffers(100, allocate)
    buffers.prepare(30)
    assert buffers.free_bytes == 90
    taken = [buffers.take(30) for _ in range(3)]
    assert sizes == [90] and len({address(view) for view in taken}) == 3
    taken.append(buffers.take(30))
    assert sizes == [90, 30]
    del taken
    assert buffers.free_bytes == 90
    monkeypatch.setattr("sglang_mosaic.wire.buffers.ARENA_BYTES", 70)
    sizes.clear()
    Buffers(100, allocate).prepare(30)
    assert sizes == [60, 30]
