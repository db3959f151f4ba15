"""Restoring or computing: what a server measures, and what follows from it."""

from __future__ import annotations

import time

import pytest
import torch

from manager_cases import answer, frames, put, until
from sglang_mosaic.adapter.prefill_time import PrefillTime
from sglang_mosaic.adapter.restoring import UNKNOWN_S, RestoringPays
from sglang_mosaic.cache.restore_rate import FRESH_S, WINDOW, RestoreRate
from sglang_mosaic.manager.options import ManagerOptions
from sglang_mosaic.manager.zmq_client import ZmqClient
from sglang_mosaic.page import PAGE_SIZE

PAGE_S = 0.01
"""Computing a page."""
TURN = 8
"""Pages that are put in their place at a time."""


def pays(page_s: float | None, compressed_s: float = 0.0, known: bool = True) -> RestoringPays:
    """Of a server whose prefills take as long as their tokens, or `compressed_s` if they read compressed pages."""

    def prefill_s(tokens: int, compressed: int) -> float | None:
        return max(tokens / PAGE_SIZE * PAGE_S, compressed_s * (compressed > 0)) if known else None

    return RestoringPays(256, prefill_s, lambda pages: None if page_s is None else pages * page_s)


def test_restoring_pays_where_it_is_faster() -> None:
    assert not pays(None).enough(3) and pays(None).enough(4)
    assert pays(None, known=False).budget_s(4, ahead=0, at=0, rest=1) == UNKNOWN_S
    assert pays(None).budget_s(4, ahead=1000, at=0, rest=1) == pytest.approx(0.04)
    assert pays(0.009).budget_s(64, ahead=0, at=0, rest=64) == pytest.approx(0.64)
    assert pays(0.011).budget_s(64, ahead=0, at=0, rest=64) is None
    # Those ahead come first.
    assert pays(0.005).budget_s(64, ahead=63, at=0, rest=1) == pytest.approx(0.64)
    assert pays(0.005).budget_s(64, ahead=65, at=0, rest=1) is None


def test_reading_compressed_pages_takes_time_of_its_own() -> None:
    """8 pages take 80 ms to compute and 40 to bring back."""
    assert pays(0.005, compressed_s=0.03).budget_s(8, ahead=0, at=0, rest=0) == pytest.approx(0.05)
    assert pays(0.005, compressed_s=0.05).budget_s(8, ahead=0, at=0, rest=0) is None
    # Many pages take longer in any case, and so do many tokens behind them.
    assert pays(0.005, compressed_s=0.05).budget_s(64, ahead=0, at=0, rest=0) == pytest.approx(0.59)
    assert pays(0.005, compressed_s=0.05).budget_s(8, ahead=0, at=0, rest=320) == pytest.approx(0.08)
    assert pays(None, compressed_s=0.09).budget_s(8, ahead=0, at=0, rest=0) is None
    # Where some are there, launching takes as long with the others computed.
    assert pays(0.005, compressed_s=0.05).budget_s(8, ahead=0, at=1, rest=0) is None
    assert pays(0.005, compressed_s=0.03).budget_s(8, ahead=0, at=1, rest=0) == pytest.approx(0.05)


def test_one_page_that_was_held_up_does_not_end_restoring() -> None:
    rate = RestoreRate(TURN)
    assert rate(1) is None
    for i in range(8):
        rate.answered(30.0 if i % 3 == 0 else 0.002)
    assert rate(1) == pytest.approx(0.002)
    # Whoever is slower; nobody waits for both.
    rate.received(0.001)
    assert rate(1) == pytest.approx(0.002)
    for _ in range(WINDOW):
        rate.received(0.003)
    assert rate(1) == pytest.approx(0.003)
    rate.placed(2.0, 1)
    assert rate(1) == pytest.approx(0.003), "the first time is a slow one"
    rate.placed(0.0005, 1)
    assert rate(1) == pytest.approx(0.0035), "the scheduler waits for both"


def test_putting_pages_in_their_place_takes_turns() -> None:
    rate = RestoreRate(TURN)
    rate.answered(0.001)
    for pages in (2, 3, 2):
        rate.placed(0.01, pages)
    assert rate(1) == pytest.approx(0.011) and rate(TURN) == pytest.approx(0.018), "as long for many as for a few"
    assert rate(3 * TURN - 1) == pytest.approx(0.053) and rate.page_s == pytest.approx(0.018 / TURN)
    for _ in range(5):
        rate.placed(0.06, 2 * TURN)
    assert rate(2 * TURN) == pytest.approx(0.076)


def test_pages_that_have_become_slow_count() -> None:
    rate = RestoreRate(TURN)
    for seconds in [0.002] * WINDOW + [0.02] * (WINDOW // 2):
        rate.answered(seconds)
    assert 0.002 < rate(1) <= 0.02
    for _ in range(WINDOW):
        rate.answered(0.002)
    assert rate(1) == pytest.approx(0.002)


def test_restoring_is_tried_again_after_a_slow_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who computes instead puts no page in its place, and would think that it takes long for ever."""
    now = 0.0
    monkeypatch.setattr("sglang_mosaic.cache.restore_rate.time.monotonic", lambda: now)
    rate = RestoreRate(TURN)
    rate.answered(0.002)
    for _ in range(2):
        rate.placed(0.001, 1)
    for _ in range(3):
        rate.placed(5.0, 1)
    assert rate(1) == pytest.approx(5.002)
    now = FRESH_S - 1
    rate.answered(0.004)
    assert rate(1) == pytest.approx(5.003)
    now = FRESH_S + 1
    assert rate(1) == pytest.approx(0.005), "of the manager what is newer, of the others the best"
    rate.placed(7.0, 1)
    assert rate(1) == pytest.approx(7.004), "until it is measured"


def test_a_page_takes_as_long_as_the_manager_works_whenever_somebody_looks() -> None:
    """A scheduler that polls once a forward: neither its pauses nor time without a question are the manager's."""
    case = frames()
    client = ZmqClient(ManagerOptions(slot_bytes=len(case.frames[0]), slots=8, nice=0, host_raw_bytes=1 << 30))
    try:
        until(client, lambda: client.connected)
        for key, frame in zip(case.keys[:4], case.frames, strict=False):
            put(client, key, case.meta, frame)
        until(client, lambda: client.room == 8)
        took = []
        for _ in range(2):
            tickets = [client.fetch(key, timeout_s=20.0) for key in case.keys[:4]]
            time.sleep(1.0)
            while len(took) % 4 or not took or tickets:
                for completion in client.poll():
                    tickets.remove(completion.ticket)
                    took.append(completion.seconds)
        assert len(took) == 8 and min(took) > 0 and sum(took) < 1.0, took
    finally:
        client.close()


@pytest.mark.parametrize("said", [float("nan"), -1.0, 1e18])
def test_a_manager_that_lies_about_time_is_not_believed(said: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_mosaic.manager.in_process import InProcessClient

    case = frames()
    client = InProcessClient(ManagerOptions(slot_bytes=len(case.frames[0]), slots=8))
    put(client, case.keys[0], case.meta, case.frames[0])
    monkeypatch.setattr("sglang_mosaic.manager.service.time.monotonic", lambda: said)
    ticket = client.fetch(case.keys[0], timeout_s=1e20)
    monkeypatch.undo()
    assert 0 <= answer(client, ticket).seconds < 20
    client.close()


class Prefills:
    """What a server measured."""

    def __init__(self) -> None:
        self.seconds = PrefillTime()

    def took(self, seconds: float, tokens: int, compressed: int = 0, times: int = 1) -> None:
        for _ in range(times):
            self.seconds.stop(time.perf_counter() - seconds, tokens, compressed)


def test_long_prefills_tell_how_long_a_token_takes() -> None:
    prefills = Prefills()
    assert prefills.seconds(1000, 0) is None
    prefills.took(0.001, 63)
    assert prefills.seconds(1000, 0) is None
    prefills.took(1.0, 8000)
    prefills.took(0.1, 64, times=60)
    # By their mean it would be .58.
    assert prefills.seconds(1000, 0) == pytest.approx(0.125, rel=0.05)
    assert isinstance(prefills.seconds.start(torch.device("cpu")), float)


def test_a_prefill_that_was_held_up_says_little() -> None:
    prefills = Prefills()
    prefills.took(30.0, 1000)  # kernels were compiled
    prefills.took(0.1, 1000, times=3)
    assert prefills.seconds(2000, 0) == pytest.approx(0.2, rel=0.1)


def test_a_short_prefill_takes_as_long_as_those_that_do_less() -> None:
    prefills = Prefills()
    prefills.took(1.0, 10_000)
    for seconds, tokens, compressed in ((0.05, 10, 0), (0.09, 10, 16)):
        prefills.took(seconds, tokens, compressed, times=2)
        assert prefills.seconds(16, compressed) == pytest.approx(0.0016 if not compressed else 0.05, rel=0.1), (
            "two of them say nothing, but that reading compressed pages takes no less"
        )
        prefills.took(seconds, tokens, compressed)
        assert prefills.seconds(16, compressed) == pytest.approx(seconds, rel=0.1)
    assert prefills.seconds(16, 15) == pytest.approx(0.05, rel=0.1), "those that read more do not count"
    assert prefills.seconds(9, 16) == pytest.approx(0.0009, rel=0.1), "those that compute more do not, either"
    assert prefills.seconds(5000, 16) == pytest.approx(0.5, rel=0.1)


def test_restoring_a_page_or_two_does_not_pay_where_launching_takes_longest() -> None:
    """As on a GPU: 55 ms for 1,040 tokens, 16 tokens behind 1,024 compressed ones 60, a page 1 ms."""
    prefills = Prefills()
    restoring = RestoringPays(256, prefills.seconds, lambda pages: 0.001 * pages)
    prefills.took(0.055, 1040, times=8)
    assert restoring.budget_s(16, ahead=0, at=0, rest=16) is not None, "to see how long it takes"
    prefills.took(0.060, 16, 16, times=3)
    assert restoring.budget_s(16, ahead=0, at=0, rest=16) is None
    prefills.took(0.2, 4112, times=8)
    assert restoring.budget_s(64, ahead=0, at=0, rest=16) == pytest.approx(0.14, rel=0.1)
