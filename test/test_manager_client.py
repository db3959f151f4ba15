"""The client's contract: the same tests over a manager in this process and over one of its own."""

from __future__ import annotations

import dataclasses
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from manager_cases import answer, frames, manager_metric, put, until
from sglang_mosaic.codec.calibration_job import statistics_to_bytes
from sglang_mosaic.codec.storage import epoch_from_bytes
from sglang_mosaic.manager.client import Lookup, ManagerClient, Status
from sglang_mosaic.manager.in_process import InProcessClient
from sglang_mosaic.manager.options import ManagerOptions
from sglang_mosaic.manager.store.record import Form
from sglang_mosaic.manager.zmq_client import ZmqClient
from sglang_mosaic.wire.messages import Meta, RecordKind

OPTIONS = ManagerOptions(
    slot_bytes=len(frames().frames[0]), slots=4, nice=0, heartbeat_s=0.05, rescan_s=0.1, ready_s=60.0
)
CLIENTS = {"in process": InProcessClient, "zmq": ZmqClient}


@pytest.fixture(params=CLIENTS)
def kind(request: pytest.FixtureRequest) -> type[ManagerClient]:
    return CLIENTS[request.param]


def connected(kind: type[ManagerClient], options: ManagerOptions) -> ManagerClient:
    client = kind(options)
    until(client, lambda: client.connected)
    return client


@pytest.fixture
def client(kind: type[ManagerClient]) -> Iterator[ManagerClient]:
    client = connected(kind, OPTIONS)
    yield client
    client.close()


def test_a_page_comes_back(client: ManagerClient) -> None:
    case = frames()
    key, frame = case.keys[0], case.frames[0]
    assert client.lookup(key) is Lookup.MISS
    assert client.put(key, case.meta, frame)
    assert client.lookup(key) is Lookup.PENDING
    until(client, lambda: client.lookup(key) is Lookup.HIT)
    found = answer(client, client.fetch(key))
    assert (found.status, found.key, found.meta, found.data) == (Status.OK, key, case.meta, frame)


def test_a_page_that_is_asked_for_right_after_it_went_comes_back(client: ManagerClient) -> None:
    case = frames()
    for key, frame in zip(case.keys[:3], case.frames, strict=False):
        assert client.put(key, case.meta, frame)
    found = answer(client, client.fetch(case.keys[2]))
    assert (found.status, found.data) == (Status.OK, case.frames[2])


def test_a_page_that_was_damaged_in_memory_is_a_miss_and_may_come_anew() -> None:
    case = frames()
    key, frame = case.keys[0], case.frames[0]
    client = connected(InProcessClient, dataclasses.replace(OPTIONS, host_raw_bytes=1 << 20))
    try:
        put(client, key, case.meta, frame)
        until(client, lambda: client.lookup(key) is Lookup.HIT)
        record = client._service.store.memory.peek((RecordKind.PAGE, key))
        assert record.form is Form.RAW
        damaged = bytearray(record.body)
        damaged[100] ^= 1
        client._service.store.memory.put(dataclasses.replace(record, body=bytes(damaged)))
        assert answer(client, client.fetch(key)).status is Status.MISS
        assert client.stats()["client"]["refused"] == 1
        put(client, key, case.meta, frame)
        until(client, lambda: client.lookup(key) is Lookup.HIT)
        assert answer(client, client.fetch(key)).data == frame
    finally:
        client.close()


def test_a_page_comes_back_after_recompression(client: ManagerClient) -> None:
    case = frames()
    client.put_epoch(case.epoch.hash, case.epoch_bytes)
    for key, frame in zip(case.keys, case.frames, strict=True):
        put(client, key, case.meta, frame)
    until(client, lambda: manager_metric(client, "recompressed") == len(case.keys))
    assert manager_metric(client, "recompressed_to") < manager_metric(client, "recompressed_from")
    for key, frame in zip(case.keys, case.frames, strict=True):
        assert answer(client, client.fetch(key)).data == frame
    until(client, lambda: sum(client.stats()["manager"]["restore_counts"]) == len(case.keys))


def test_within_an_error_limit_pages_change_and_stay_valid(kind: type[ManagerClient]) -> None:
    case = frames()
    client = connected(kind, dataclasses.replace(OPTIONS, host_max_error=0.3))
    try:
        client.put_epoch(case.epoch.hash, case.epoch_bytes)
        put(client, case.keys[0], case.meta, case.frames[0])
        until(client, lambda: manager_metric(client, "recompressed") == 1)
        found = answer(client, client.fetch(case.keys[0]))
        assert found.data != case.frames[0]
        assert len(found.data) == len(case.frames[0])
    finally:
        client.close()


def test_an_unknown_page_is_a_miss(client: ManagerClient) -> None:
    found = answer(client, client.fetch(b"?" * 16))
    assert (found.status, found.data) == (Status.MISS, b"")
    assert client.stats()["client"]["misses"] == 1


def test_an_epoch_larger_than_a_slot_comes_back(client: ManagerClient) -> None:
    case = frames()
    assert len(case.epoch_bytes) > 4 * OPTIONS.slot_bytes
    client.put_epoch(case.epoch.hash, case.epoch_bytes)
    until(client, lambda: manager_metric(client, "stored") == 1)
    assert answer(client, client.fetch_epoch(case.epoch.hash)).data == case.epoch_bytes
    assert answer(client, client.fetch_epoch("unknown")).status is Status.MISS


def test_the_same_page_is_not_copied_twice(client: ManagerClient) -> None:
    case = frames()
    assert client.put(case.keys[0], case.meta, case.frames[0])
    assert client.put(case.keys[0], case.meta, case.frames[0])
    until(client, lambda: client.lookup(case.keys[0]) is Lookup.HIT)
    assert client.put(case.keys[0], case.meta, case.frames[0])
    counters = client.stats()["client"]
    assert (counters["puts"], counters["puts_known"]) == (1, 2)


def test_a_put_without_a_slot_is_dropped_at_once(client: ManagerClient) -> None:
    case = frames()
    taken = [client.put(key, case.meta, frame) for key, frame in zip(case.keys, case.frames, strict=True)]
    # Nothing was polled: no slot can have come back.
    assert taken == [True] * OPTIONS.slots + [False] * (len(taken) - OPTIONS.slots)
    assert client.stats()["client"]["puts_dropped"] == len(taken) - OPTIONS.slots
    until(client, lambda: client.stats()["slots_free"] == OPTIONS.slots)
    assert client.put(case.keys[-1], case.meta, case.frames[-1])


def test_a_fetch_without_a_slot_is_a_miss(client: ManagerClient) -> None:
    tickets = [client.fetch(b"?" * 16) for _ in range(OPTIONS.slots + 2)]
    assert len(set(tickets)) == len(tickets)
    found: dict[int, Status] = {}
    deadline = time.monotonic() + 20
    while len(found) < len(tickets) and time.monotonic() < deadline:
        for completion in client.poll():
            assert completion.ticket not in found
            found[completion.ticket] = completion.status
    assert found == dict.fromkeys(tickets, Status.MISS)


@pytest.mark.parametrize("size", [0, 1 << 20])
def test_what_fits_no_slot_is_an_error(client: ManagerClient, size: int) -> None:
    with pytest.raises(ValueError, match="data must have"):
        client.put(b"k" * 16, Meta(RecordKind.PAGE), bytes(size))


def test_a_cancelled_ticket_is_not_told(client: ManagerClient) -> None:
    case = frames()
    put(client, case.keys[0], case.meta, case.frames[0])
    until(client, lambda: client.lookup(case.keys[0]) is Lookup.HIT)
    client.cancel(client.fetch(case.keys[0]))
    until(client, lambda: manager_metric(client, "fetches") == 1)
    # Its answer is late: refused, and the slot is free for others.
    until(client, lambda: client.stats()["client"]["refused"] == 1)
    assert client.stats()["slots_free"] == OPTIONS.slots
    assert answer(client, client.fetch(case.keys[0])).data == case.frames[0]
    client.cancel(12345)


def test_a_full_store_evicts_and_says_so(kind: type[ManagerClient]) -> None:
    case = frames()
    client = connected(kind, dataclasses.replace(OPTIONS, host_bytes=6 * (len(case.frames[0]) + 200)))
    try:
        for key, frame in zip(case.keys, case.frames, strict=True):
            put(client, key, case.meta, frame)
        until(client, lambda: manager_metric(client, "stored") == len(case.keys))
        until(client, lambda: sum(client.lookup(key) is Lookup.HIT for key in case.keys) == 6)
        assert manager_metric(client, "evicted") == len(case.keys) - 6
        assert [client.lookup(key) for key in case.keys[-6:]] == [Lookup.HIT] * 6
        assert answer(client, client.fetch(case.keys[0])).status is Status.MISS
        assert answer(client, client.fetch(case.keys[-1])).data == case.frames[-1]
    finally:
        client.close()


def test_a_page_larger_than_the_store_is_refused(kind: type[ManagerClient]) -> None:
    client = connected(kind, dataclasses.replace(OPTIONS, host_bytes=100))
    try:
        put(client, frames().keys[0], frames().meta, frames().frames[0])
        until(client, lambda: client.stats()["client"]["puts_refused"] == 1)
        assert client.lookup(frames().keys[0]) is Lookup.MISS
    finally:
        client.close()


def test_a_directory_survives_a_restart(kind: type[ManagerClient], tmp_path: Path) -> None:
    case = frames()
    options = dataclasses.replace(OPTIONS, disk=str(tmp_path / "store"), close_s=30.0)
    client = connected(kind, options)
    client.put_epoch(case.epoch.hash, case.epoch_bytes)
    for key, frame in zip(case.keys, case.frames, strict=True):
        put(client, key, case.meta, frame)
    until(client, lambda: manager_metric(client, "stored") == len(case.keys) + 1)
    client.close()
    client = connected(kind, options)
    try:
        assert {client.lookup(key) for key in case.keys} == {Lookup.HIT}
        for key, frame in zip(case.keys, case.frames, strict=True):
            assert answer(client, client.fetch(key, timeout_s=10.0)).data == frame
        assert answer(client, client.fetch_epoch(case.epoch.hash)).data == case.epoch_bytes
        until(client, lambda: manager_metric(client, "hits_disk") > 0)
    finally:
        client.close()


def test_another_server_of_the_machine_finds_the_pages(kind: type[ManagerClient], tmp_path: Path) -> None:
    case = frames()
    options = dataclasses.replace(OPTIONS, disk=str(tmp_path / "store"))
    first, second = connected(kind, options), connected(kind, options)
    try:
        first.put_epoch(case.epoch.hash, case.epoch_bytes)
        put(first, case.keys[0], case.meta, case.frames[0])
        until(first, lambda: manager_metric(first, "disk_records") == 2)
        until(second, lambda: second.lookup(case.keys[0]) is Lookup.HIT)
        assert answer(second, second.fetch(case.keys[0])).data == case.frames[0]
    finally:
        first.close()
        second.close()


def test_a_calibration_gives_the_epoch_that_this_process_would_make(client: ManagerClient) -> None:
    case = frames()
    put(client, case.keys[0], case.meta, case.frames[0])
    until(client, lambda: client.lookup(case.keys[0]) is Lookup.HIT)
    statistics = statistics_to_bytes(case.codec.statistics(case.samples))
    first = client.calibrate(statistics)
    until(client, lambda: client.stats()["uploads"] == 0)
    # Its process only begins to load torch when this is answered: a restore does not wait for it.
    assert answer(client, client.fetch(case.keys[0], timeout_s=1.0)).data == case.frames[0]
    # One at a time: the second one can only succeed if the first one was ended.
    client.cancel(first)
    found = answer(client, client.calibrate(statistics))
    assert found.status is Status.OK
    assert epoch_from_bytes(found.data).hash == case.epoch.hash
    until(client, lambda: manager_metric(client, "calibrations") == 1)


def test_a_calibration_of_nonsense_fails() -> None:
    client = InProcessClient(OPTIONS)
    try:
        assert answer(client, client.calibrate(b"nonsense" * 10_000)).status is Status.MISS
        until(client, lambda: manager_metric(client, "calibrations_failed") == 1)
    finally:
        client.close()


def test_a_closed_client_answers_with_misses(kind: type[ManagerClient]) -> None:
    case = frames()
    client = connected(kind, OPTIONS)
    put(client, case.keys[0], case.meta, case.frames[0])
    until(client, lambda: client.lookup(case.keys[0]) is Lookup.HIT)
    ticket = client.fetch(case.keys[0])
    client.close()
    client.close()
    later = [client.fetch(case.keys[0]), client.calibrate(b"x")]
    assert {c.ticket: c.status for c in client.poll()} == dict.fromkeys([ticket, *later], Status.MISS)
    assert client.lookup(case.keys[0]) is Lookup.MISS
    assert not client.put(case.keys[1], case.meta, case.frames[1])


def test_nothing_is_left_behind(kind: type[ManagerClient]) -> None:
    def traces() -> set[str]:
        names = {*os.listdir("/dev/shm"), *os.listdir(tempfile.gettempdir())}
        return {name for name in names if "mosaic" in name}

    before, descriptors = traces(), len(os.listdir("/proc/self/fd"))
    client = connected(kind, OPTIONS)
    put(client, frames().keys[0], frames().meta, frames().frames[0])
    if kind is ZmqClient:
        (path,) = [Path(tempfile.gettempdir(), name) for name in traces() - before]
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    client.close()
    assert traces() == before
    assert len(os.listdir("/proc/self/fd")) == descriptors
