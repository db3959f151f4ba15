"""Pages that requests wait for, from a manager in process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from manager_cases import frames, put, until
from sglang_mosaic.cache.host_page import HostPage
from sglang_mosaic.cache.restores import MOST_WAITING, Restores
from sglang_mosaic.manager.in_process import InProcessClient
from sglang_mosaic.manager.options import ManagerOptions

LONG_S = 60.0


class Bench:
    """A manager with the pages of `frames`, and the restores that ask it."""

    def __init__(self) -> None:
        self.cases = frames()
        self.client = InProcessClient(ManagerOptions(slot_bytes=len(self.cases.frames[0]), slots=8))
        self.client.put_epoch(self.cases.epoch.hash, self.cases.epoch_bytes)
        for key, data in zip(self.cases.keys, self.cases.frames, strict=True):
            put(self.client, key, self.cases.meta, data)
        until(self.client, lambda: self.client.room == 8)
        self.readable = {self.cases.epoch.hash}
        self.adopts = True
        self.restores = Restores(self.client, 4, lambda key: None, self.readable.__contains__, self._adopt)

    def _adopt(self, data: bytes) -> bool:
        assert data == self.cases.epoch_bytes
        if self.adopts:
            self.readable.add(self.cases.epoch.hash)
        return self.adopts

    def turn(self) -> None:
        for completion in self.client.poll():
            self.restores.completed(completion)
        self.restores.ask()

    def finish(self, name: str) -> list[HostPage]:
        """All that comes for a request."""
        pages = []
        for _ in range(10_000):
            pages += self.restores.take(name)
            if self.restores.done(name):
                return pages
            self.turn()
        raise AssertionError(f"{name} waits for ever")


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.client.close()


def data_of(pages: list[HostPage]) -> list[bytes]:
    return [bytes(page.data) for page in pages]


def test_pages_come_back_in_order(bench: Bench) -> None:
    bench.restores.begin("a", bench.cases.keys, LONG_S)
    assert data_of(bench.finish("a")) == bench.cases.frames
    assert bench.restores.waiting == 0


def test_a_page_that_is_lost_ends_it_there(bench: Bench) -> None:
    keys = [*bench.cases.keys[:5], b"?" * 16, *bench.cases.keys[5:]]
    bench.restores.begin("a", keys, LONG_S)
    assert data_of(bench.finish("a")) == bench.cases.frames[:5]


def test_two_requests_share_their_fetches(bench: Bench) -> None:
    bench.restores.begin("a", bench.cases.keys[:8], LONG_S)
    bench.restores.begin("b", bench.cases.keys[:8], LONG_S)
    assert data_of(bench.finish("a")) == bench.cases.frames[:8]
    assert data_of(bench.finish("b")) == bench.cases.frames[:8]
    assert bench.client.counters.fetches == 8


def test_a_cancelled_request_stops_nobody_else(bench: Bench) -> None:
    bench.restores.begin("a", bench.cases.keys[:8], LONG_S)
    bench.restores.begin("b", bench.cases.keys[4:12], LONG_S)
    bench.restores.cancel("a")
    bench.restores.cancel("a")
    assert data_of(bench.finish("b")) == bench.cases.frames[4:12]


def test_a_request_whose_time_is_up_stops_nobody_else(bench: Bench) -> None:
    bench.restores.begin("late", bench.cases.keys[:8], 0.0)
    bench.restores.begin("b", bench.cases.keys[8:16], LONG_S)
    assert data_of(bench.finish("b")) == bench.cases.frames[8:16]
    assert bench.finish("late") == []


def test_pages_that_arrived_are_taken_however_late(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0.0, 0.001)
    skip = [0.0]
    monkeypatch.setattr("sglang_mosaic.cache.restores.time.monotonic", lambda: next(clock) + skip[0])
    bench.restores.begin("a", bench.cases.keys[:12], LONG_S)
    for _ in range(100):
        bench.turn()
    skip[0] = 1000.0  # the queue did not move
    pages = bench.restores.take("a")
    assert len(pages) == 12 and bench.restores.done("a")


def test_a_stalled_queue_costs_nobody_the_rest(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_mosaic.cache.restores.MOST_WAITING", 4)
    clock = itertools.count(0.0, 0.0001)
    skip = [0.0]
    monkeypatch.setattr("sglang_mosaic.cache.restores.time.monotonic", lambda: next(clock) + skip[0])
    bench.restores.begin("a", bench.cases.keys[:12], LONG_S)
    for _ in range(100):
        bench.turn()
    skip[0] = 1000.0
    assert data_of(bench.finish("a")) == bench.cases.frames[:12]
    assert MOST_WAITING > 4


def test_an_unknown_epoch_is_fetched_first(bench: Bench) -> None:
    bench.readable.clear()
    bench.restores.begin("a", bench.cases.keys[:3], LONG_S)
    assert data_of(bench.finish("a")) == bench.cases.frames[:3]


def test_pages_of_an_epoch_that_cannot_be_read_are_not_had(bench: Bench) -> None:
    bench.readable.clear()
    bench.adopts = False
    bench.restores.begin("a", bench.cases.keys[:3], LONG_S)
    assert bench.finish("a") == []


def test_without_a_manager_everything_is_a_miss(bench: Bench) -> None:
    bench.client.close()
    bench.restores.begin("a", bench.cases.keys[:3], LONG_S)
    assert bench.finish("a") == []
