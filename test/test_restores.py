"""Pages that requests wait for, from a manager in process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from manager_cases import frames, put, until
from sglang_mosaic.cache.host_page import HostPage
from sglang_mosaic.cache.restores import PROBE_EVERY_S, PROBES, Restores
from sglang_mosaic.manager.in_process import InProcessClient
from sglang_mosaic.manager.options import ManagerOptions

LONG_S = 60.0


class Bench:
    """A manager with the pages of `frames`, and the restores that ask it."""

    def __init__(self, slots: int = 8, at_once: int = 4, most_pages: float = 1000) -> None:
        self.cases = frames()
        self.page_bytes = len(self.cases.frames[0])
        self.client = InProcessClient(ManagerOptions(slot_bytes=self.page_bytes, slots=slots))
        self.client.put_epoch(self.cases.epoch.hash, self.cases.epoch_bytes)
        for key, data in zip(self.cases.keys, self.cases.frames, strict=True):
            put(self.client, key, self.cases.meta, data)
        until(self.client, lambda: self.client.room == slots)
        self.readable = {self.cases.epoch.hash}
        self.adopts = True
        self.restores = Restores(
            self.client,
            at_once,
            int(most_pages * self.page_bytes),
            lambda key: None,
            self.readable.__contains__,
            self._adopt,
        )

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
    # What it was asked for before its time was up came in the same turn.
    assert data_of(bench.finish("late")) == bench.cases.frames[:4]


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


def test_a_stalled_queue_takes_bounded_memory_and_costs_nobody_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(most_pages=4)
    clock = itertools.count(0.0, 0.0001)
    skip = [0.0]
    monkeypatch.setattr("sglang_mosaic.cache.restores.time.monotonic", lambda: next(clock) + skip[0])
    bench.restores.begin("a", bench.cases.keys[:12], LONG_S)
    bench.restores.begin("b", bench.cases.keys[12:], LONG_S)
    for _ in range(100):
        bench.turn()
    # What was under way when memory ran out came, too.
    assert bench.client.counters.fetches <= 4 + 4
    skip[0] = 1000.0
    bench.turn()
    assert data_of(bench.finish("a")) == bench.cases.frames[:12]
    # It was asked for nothing yet, so that nothing of it is late.
    assert data_of(bench.finish("b")) == bench.cases.frames[12:]
    bench.client.close()


def test_a_turn_brings_as_many_pages_as_there_is_room_for() -> None:
    bench = Bench(slots=32, at_once=16)
    bench.restores.begin("a", bench.cases.keys, LONG_S)
    bench.turn()
    # The others are on their way before the next forward, not after it.
    assert bench.client.counters.fetches == len(bench.cases.keys) == bench.restores.ahead + 16
    assert bench.restores.take("a") == [] and not bench.restores.done("a")
    bench.turn()
    assert len(bench.restores.take("a")) == 24 and bench.restores.done("a")
    bench.client.close()


def test_pages_are_taken_many_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_mosaic.cache.restores.TOGETHER", 8)
    bench = Bench(slots=10, at_once=5)
    bench.restores.begin("a", bench.cases.keys[:21], LONG_S)
    taken = []
    while not bench.restores.done("a"):
        bench.turn()
        taken.append(bench.restores.take("a"))
    assert [len(pages) for pages in taken if pages] == [10, 10, 1]
    assert data_of([page for pages in taken for page in pages]) == bench.cases.frames[:21]
    bench.client.close()


def test_pages_for_which_there_is_no_place_are_held_until_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("sglang_mosaic.cache.restores.time.monotonic", lambda: now[0])
    bench = Bench(slots=32, at_once=32)
    bench.restores.begin("a", bench.cases.keys, 1.0)
    bench.turn()
    assert bench.restores.take("a", hold=True) == [] and not bench.restores.done("a")
    now[0] = 1.1
    assert data_of(bench.restores.take("a", hold=True)) == bench.cases.frames and bench.restores.done("a")
    bench.client.close()


def test_turns_longer_than_the_budget_cost_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards of others last longer than computing the pages would take: nobody looks, but the manager works."""
    bench = Bench()
    now = [0.0]
    monkeypatch.setattr("sglang_mosaic.cache.restores.time.monotonic", lambda: now[0])
    bench.restores.begin("a", bench.cases.keys, 0.1)
    pages = []
    for turn in range(len(bench.cases.keys) // 4):
        assert not bench.restores.done("a"), turn
        now[0] += 1.0
        bench.turn()
        pages += bench.restores.take("a")
    assert bench.restores.done("a") and data_of(pages) == bench.cases.frames
    bench.client.close()


def test_a_probe_measures_and_brings_nothing(bench: Bench) -> None:
    assert bench.restores.rate(1) is bench.restores.rate.page_s is None
    bench.restores.probe(bench.cases.keys)
    bench.restores.probe(bench.cases.keys)
    assert bench.client.counters.fetches == min(PROBES, 8)
    bench.turn()
    assert 0 <= bench.restores.rate(1) < 1
    assert bench.restores.waiting == bench.restores.ahead == 0 and bench.client.room == 8
    bench.restores.begin("a", bench.cases.keys[:2], LONG_S)
    assert data_of(bench.finish("a")) == bench.cases.frames[:2]


def test_probes_keep_no_server_from_its_work(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    fetches = []
    for seconds in (0.0, 0.1, PROBE_EVERY_S - 0.1, PROBE_EVERY_S + 0.1):
        monkeypatch.setattr("sglang_mosaic.cache.restores.time.monotonic", lambda now=1000 + seconds: now)
        bench.restores.probe(bench.cases.keys)
        monkeypatch.undo()
        bench.turn()
        fetches.append(bench.client.counters.fetches)
    assert fetches == [fetches[0]] * 3 + [2 * fetches[0]]


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
