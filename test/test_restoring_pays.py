"""Restoring or computing: what a server measures, and what follows from it."""

from __future__ import annotations

import time

import pytest
import torch

from manager_cases import answer, frames, put, until
from sglang_mosaic.adapter.prefill_rate import PrefillRate
from sglang_mosaic.adapter.restoring import UNKNOWN_S, RestoringPays
from sglang_mosaic.cache.restore_rate import WINDOW, RestoreRate
from sglang_mosaic.manager.options import ManagerOptions
from sglang_mosaic.manager.zmq_client import ZmqClient

RATE = 6400.0
"""Tokens per second: 10 ms a page."""


def pays(page_s: float | None, rate: float | None = RATE, compressed_s: float = 0.0) -> RestoringPays:
    return RestoringPays(256, lambda: rate, lambda: page_s, lambda pages: compressed_s)


def test_restoring_pays_where_it_is_faster() -> None:
    assert not pays(None).enough(3) and pays(None).enough(4)
    assert pays(None, rate=None).budget_s(4, ahead=0, at=0) == UNKNOWN_S
    assert pays(None).budget_s(4, ahead=1000, at=0) == pytest.approx(0.04)
    assert pays(0.009).budget_s(64, ahead=0, at=0) == pytest.approx(0.64)
    assert pays(0.011).budget_s(64, ahead=0, at=0) is None
    # Those ahead come first.
    assert pays(0.005).budget_s(64, ahead=64, at=0) == pytest.approx(0.64)
    assert pays(0.005).budget_s(64, ahead=65, at=0) is None


def test_reading_compressed_pages_takes_time_of_its_own() -> None:
    """8 pages take 80 ms to compute and 40 to bring back."""
    assert pays(0.005, compressed_s=0.03).budget_s(8, ahead=0, at=0) == pytest.approx(0.05)
    assert pays(0.005, compressed_s=0.05).budget_s(8, ahead=0, at=0) is None
    # They will be read anyway where some are there, and do not matter to many.
    assert pays(0.005, compressed_s=0.05).budget_s(8, ahead=0, at=1) == pytest.approx(0.08)
    assert pays(0.005, compressed_s=0.05).budget_s(64, ahead=0, at=0) == pytest.approx(0.59)
    assert pays(None, compressed_s=0.09).budget_s(8, ahead=0, at=0) is None


def test_one_page_that_was_held_up_does_not_end_restoring() -> None:
    rate = RestoreRate()
    assert rate() is None
    for i in range(8):
        rate.answered(30.0 if i % 3 == 0 else 0.002)
    assert rate() == pytest.approx(0.002)
    # Whoever is slower; nobody waits for both.
    rate.received(0.001)
    assert rate() == pytest.approx(0.002)
    for _ in range(WINDOW):
        rate.received(0.003)
    assert rate() == pytest.approx(0.003)


def test_pages_that_have_become_slow_count() -> None:
    rate = RestoreRate()
    for seconds in [0.002] * WINDOW + [0.02] * (WINDOW // 2):
        rate.answered(seconds)
    assert 0.002 < rate() <= 0.02
    for _ in range(WINDOW):
        rate.answered(0.002)
    assert rate() == pytest.approx(0.002)


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


def test_long_prefills_decide_the_rate() -> None:
    rate, device = PrefillRate(), torch.device("cpu")
    assert rate() is None
    now = time.perf_counter()
    rate.stop(now - 0.001, 63, 0)
    assert rate() is None
    rate.stop(now - 1.0, 8000, 0)
    for _ in range(3):
        rate.stop(time.perf_counter() - 0.1, 64, 0)
    # By their mean it would be below 4,000.
    assert 4000 < rate() < 8000
    assert isinstance(rate.start(device), float)


def test_what_compressed_pages_add_is_the_least_of_forwards_that_read_no_more() -> None:
    rate = PrefillRate()

    def took(seconds: float, tokens: int, compressed: int) -> None:
        rate.stop(time.perf_counter() - seconds, tokens, compressed)

    took(100.0, 10_000, 0)  # 10 ms a token
    for seconds in (30.0, 5.0):  # the first one was compiled meanwhile
        took(seconds, 10, 16)
    assert rate.compressed_s(16) == 0.0, "two of them say nothing"
    took(2.0, 50, 8)
    assert rate.compressed_s(16) == pytest.approx(1.5, abs=0.2)
    assert rate.compressed_s(15) == 0.0, "those that read more do not count"
    took(1.5, 10, 0)
    assert rate.compressed_s(16) == pytest.approx(1.5, abs=0.2), "the longer forward took nothing beyond its tokens"
    took(0.2, 5, 1)
    assert rate.compressed_s(16) == pytest.approx(0.15, abs=0.1)


def test_nothing_is_added_before_both_were_seen() -> None:
    rate = PrefillRate()
    for _ in range(3):
        rate.stop(time.perf_counter() - 1.0, 64, 1)
    assert rate.compressed_s(1) == 0.0
