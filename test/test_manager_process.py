"""The manager as a process that is killed, stopped and orphaned: hits are lost, nothing else."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from manager_cases import answer, frames, manager_metric, put, until, waves
from sglang_mosaic.errors import ConfigError
from sglang_mosaic.manager import child, ipc_directory
from sglang_mosaic.manager.client import Lookup, Status
from sglang_mosaic.manager.options import ManagerOptions
from sglang_mosaic.manager.store.directory import DirectoryTier
from sglang_mosaic.manager.supervisor import Supervisor
from sglang_mosaic.manager.zmq_client import Link, ZmqClient
from sglang_mosaic.wire.messages import RecordKind
from sglang_mosaic.wire.slots import SlotMemory

OPTIONS = ManagerOptions(
    slot_bytes=len(frames().frames[0]),
    slots=6,
    nice=0,
    heartbeat_s=0.05,
    silence_s=0.5,
    ready_s=60.0,
    backoff_s=0.01,
    most_backoff_s=0.02,
)
KILLS = 100


@pytest.fixture
def client() -> Iterator[ZmqClient]:
    client = ZmqClient(OPTIONS)
    yield client
    client.close()


def test_kill_9_at_a_hundred_moments_under_load(client: ZmqClient, caplog: pytest.LogCaptureFixture) -> None:
    case = frames()
    rng = random.Random(0)
    under_way: dict[int, int] = {}
    answered = {Status.OK: 0, Status.MISS: 0}
    client.put_epoch(case.epoch.hash, case.epoch_bytes)
    for life in range(KILLS):
        client.poll()
        for _ in waves():
            if client.manager_pid is not None:
                break
            client.poll()
        # Half of the moments are after its start-up, however long that takes, the others in it or soon after.
        if life % 2:
            until(client, lambda: client.connected)
        moment = time.monotonic() + rng.uniform(0.0, 0.2 if life % 2 else 0.5)
        while time.monotonic() < moment:
            page = rng.randrange(len(case.keys))
            if rng.random() < 0.5:
                client.put(case.keys[page], case.meta, case.frames[page])
            else:
                under_way[client.fetch(case.keys[page], timeout_s=5.0)] = page
            for completion in client.poll():
                page = under_way.pop(completion.ticket)
                answered[completion.status] += 1
                if completion.status is Status.OK:
                    assert completion.key == case.keys[page]
                    assert completion.data == case.frames[page]
            time.sleep(0.0005)
        pid = client.manager_pid
        os.kill(pid, signal.SIGKILL)
        for _ in waves():
            for completion in client.poll():
                page = under_way.pop(completion.ticket)
                answered[completion.status] += 1
                assert completion.status is Status.MISS or completion.data == case.frames[page]
            if client.manager_pid != pid:
                break
        assert under_way == {}
        assert client.stats()["slots_free"] == OPTIONS.slots
    assert client.counters.deaths == KILLS
    assert sum(record.levelname == "WARNING" for record in caplog.records) == KILLS
    assert answered[Status.OK] > KILLS
    # The next manager is as good as the first one.
    until(client, lambda: client.connected)
    put(client, case.keys[0], case.meta, case.frames[0])
    until(client, lambda: client.lookup(case.keys[0]) is Lookup.HIT)
    assert answer(client, client.fetch(case.keys[0])).data == case.frames[0]


def test_a_stopped_manager_is_dead_until_it_speaks_again(client: ZmqClient) -> None:
    case = frames()
    until(client, lambda: client.connected)
    put(client, case.keys[0], case.meta, case.frames[0])
    until(client, lambda: client.lookup(case.keys[0]) is Lookup.HIT)
    pid = client.manager_pid
    os.kill(pid, signal.SIGSTOP)
    deadline = client.fetch(case.keys[0], timeout_s=0.2)
    assert answer(client, deadline).status is Status.MISS
    assert client.put(case.keys[1], case.meta, case.frames[1])
    long = client.fetch(case.keys[0], timeout_s=60.0)
    assert answer(client, long).status is Status.MISS
    assert client.link is Link.SILENT
    assert client.lookup(case.keys[0]) is Lookup.MISS
    assert not client.put(case.keys[2], case.meta, case.frames[2])
    assert client.stats()["slots_free"] == OPTIONS.slots
    refused = client.counters.refused
    os.kill(pid, signal.SIGCONT)
    until(client, lambda: client.link is Link.UP)
    # What it was asked before nobody waits for any more: two fetches and a put.
    until(client, lambda: client.counters.refused == refused + 3)
    assert client.manager_pid == pid
    assert client.lookup(case.keys[0]) is Lookup.HIT
    assert answer(client, client.fetch(case.keys[0])).data == case.frames[0]


def test_a_manager_that_stays_stopped_is_replaced() -> None:
    client = ZmqClient(dataclasses.replace(OPTIONS, silence_s=0.2, kill_s=0.4))
    try:
        until(client, lambda: client.connected)
        pid = client.manager_pid
        os.kill(pid, signal.SIGSTOP)
        until(client, lambda: client.connected and client.manager_pid != pid)
        assert child.started(pid) < 0
        assert client.counters.deaths == 1
    finally:
        client.close()


def test_a_manager_that_does_not_get_ready_is_replaced(client: ZmqClient) -> None:
    client.options = dataclasses.replace(OPTIONS, ready_s=0.3)
    client.poll()
    pid = client.manager_pid
    os.kill(pid, signal.SIGSTOP)
    until(client, lambda: client.counters.deaths == 1)
    assert child.started(pid) < 0


def test_epochs_are_given_to_the_next_manager_too(client: ZmqClient) -> None:
    case = frames()
    client.put_epoch(case.epoch.hash, case.epoch_bytes)
    until(client, lambda: client.connected and manager_metric(client, "stored") == 1)
    os.kill(client.manager_pid, signal.SIGKILL)
    until(client, lambda: not client.connected)
    until(client, lambda: client.connected)
    until(client, lambda: manager_metric(client, "stored") == 1)
    assert answer(client, client.fetch_epoch(case.epoch.hash)).data == case.epoch_bytes


def test_figures_of_a_dead_manager_are_not_taken_for_its_successors(client: ZmqClient) -> None:
    until(client, lambda: client.connected and "fetches" in client.stats()["manager"])
    os.kill(client.manager_pid, signal.SIGKILL)
    until(client, lambda: client.stats()["pid"] is None)
    assert client.stats()["manager"] == {}


def test_pauses_between_restarts_grow(caplog: pytest.LogCaptureFixture) -> None:
    options = dataclasses.replace(OPTIONS, backoff_s=0.05, most_backoff_s=0.2)
    supervisor = Supervisor(options)
    memory = SlotMemory.create(options.slots, options.slot_bytes)
    try:
        pauses = []
        for _ in range(4):
            for _ in waves():
                if supervisor.due:
                    break
            supervisor.start(Path("/nowhere/manager.sock"), memory)
            os.kill(supervisor.pid, signal.SIGKILL)
            for _ in waves():
                if supervisor.ended():
                    break
            assert not supervisor.due
            assert not supervisor.ended()
            pauses.append(caplog.records[-1].args[-1])
        assert pauses == [0.05, 0.1, 0.2, 0.2]
    finally:
        supervisor.end(0)
        memory.close()


def test_a_system_without_processes_is_a_pause(client: ZmqClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise BlockingIOError("Resource temporarily unavailable")

    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "Popen", refuse)
        until(client, lambda: client.counters.deaths == 2)
        assert client.lookup(frames().keys[0]) is Lookup.MISS
        assert not client.put(frames().keys[0], frames().meta, frames().frames[0])
        assert answer(client, client.fetch(frames().keys[0])).status is Status.MISS
    until(client, lambda: client.connected)


def test_nothing_waits_for_a_manager_that_is_stopped(client: ZmqClient) -> None:
    case = frames()
    client.options = dataclasses.replace(OPTIONS, silence_s=60.0)
    until(client, lambda: client.connected)
    os.kill(client.manager_pid, signal.SIGSTOP)
    worst = 0.0
    for i in range(300):
        start = time.perf_counter()
        client.put(case.keys[i % 20], case.meta, case.frames[i % 20])
        client.fetch(case.keys[i % 20], timeout_s=60.0)
        client.lookup(case.keys[i % 20])
        client.poll()
        worst = max(worst, time.perf_counter() - start)
    # Not a matter of speed: whatever could be waited for would take a minute.
    assert worst < 30
    os.kill(client.manager_pid, signal.SIGCONT)


OWNER = """
import itertools, os, sys, time
from pathlib import Path
from sglang_mosaic.manager.options import ManagerOptions
from sglang_mosaic.manager.zmq_client import ZmqClient
from sglang_mosaic.manager.keys import namespace, page_keys
from sglang_mosaic.wire.messages import Meta, RecordKind
pages, epoch, hash_, slot_bytes, disk = sys.argv[1:]
pages, slot_bytes = Path(pages).read_bytes(), int(slot_bytes)
pages = [pages[at : at + slot_bytes] for at in range(0, len(pages), slot_bytes)]
client = ZmqClient(ManagerOptions(slot_bytes=slot_bytes, nice=0, disk=disk, disk_bytes=1 << 20))
client.put_epoch(hash_, Path(epoch).read_bytes())
while not client.connected:
    client.poll()
    time.sleep(0.001)
print(client.manager_pid, client._directory, flush=True)
for i in itertools.count():
    (key,) = page_keys(namespace(os.getpid(), i), range(64))
    client.put(key, Meta(RecordKind.PAGE, 3, hash_), pages[i % len(pages)])
    client.poll()
    time.sleep(0.0005)
"""


def test_kill_9_of_the_server_while_the_store_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = frames()
    # Sockets need a short path.
    temporary, store = Path(tempfile.mkdtemp()), tmp_path / "store"
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    # Without torch the owner starts quickly.
    pages, epoch = tmp_path / "pages", tmp_path / "epoch"
    pages.write_bytes(b"".join(case.frames))
    epoch.write_bytes(case.epoch_bytes)
    shared = set(os.listdir("/dev/shm"))
    rng = random.Random(1)
    for _ in range(4):
        owner = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(pages), str(epoch), case.epoch.hash, str(OPTIONS.slot_bytes), str(store)],
            stdout=subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(temporary)},
        )
        manager, directory = owner.stdout.readline().split()
        time.sleep(rng.uniform(0.05, 0.4))
        owner.kill()
        owner.wait()
        owner.stdout.close()
        for _ in waves():
            if child.started(int(manager)) < 0:
                break
        # The directory of the dead stays until somebody starts.
        assert Path(directory.decode()).exists()
        ipc_directory.sweep(temporary)
        assert list(temporary.iterdir()) == []
        tier = DirectoryTier(store, 1 << 30)
        assert all(tier.read(record_id) is not None for record_id in tier.ids())
        assert tier.refused == 0
        assert all("." not in path.name for path in (store / "v1" / "pages").iterdir())
    assert len(tier.ids()) > 1
    assert set(os.listdir("/dev/shm")) == shared
    # And the next server has them.
    client = ZmqClient(dataclasses.replace(OPTIONS, disk=str(store)))
    try:
        until(client, lambda: client.connected)
        key = next(key for kind, key in tier.ids() if kind is RecordKind.PAGE)
        found = answer(client, client.fetch(key, timeout_s=10.0))
        assert found.status is Status.OK
        assert found.data in case.frames
    finally:
        client.close()
    temporary.rmdir()


def test_directories_of_the_living_and_of_others_are_not_swept(tmp_path: Path) -> None:
    me = os.getpid()
    started = child.started(me)
    user = os.geteuid()
    living = tmp_path / f"sglang-mosaic-{user}-{me}-{started}-a"
    reborn = tmp_path / f"sglang-mosaic-{user}-{me}-{started - 1}-a"
    dead = tmp_path / f"sglang-mosaic-{user}-{2**22 + 5}-17-a"
    open_to_all = tmp_path / f"sglang-mosaic-{user}-{2**22 + 5}-18-a"
    other = tmp_path / "sglang-mosaic-notes"
    for path in (living, reborn, dead, open_to_all, other):
        path.mkdir(mode=0o700)
    open_to_all.chmod(0o755)
    ipc_directory.sweep(tmp_path)
    assert {path for path in tmp_path.iterdir()} == {living, open_to_all, other}


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o777])
def test_a_manager_refuses_a_directory_that_others_can_enter(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(ConfigError, match="0700"):
        ipc_directory.check(tmp_path)
    memory = SlotMemory.create(OPTIONS.slots, OPTIONS.slot_bytes)
    command = [sys.executable, "-m", "sglang_mosaic.manager", str(os.getpid()), str(tmp_path / "s"), str(memory.fd)]
    done = subprocess.run([*command, OPTIONS.to_json()], pass_fds=(memory.fd,), capture_output=True, text=True)
    memory.close()
    assert done.returncode == 1
    assert "0700" in done.stderr


def test_a_manager_without_its_parent_does_not_start() -> None:
    command = [sys.executable, "-m", "sglang_mosaic.manager", "1", "/nowhere", "0", "{}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "parent process is dead" in done.stderr


def test_the_manager_does_not_load_torch(client: ZmqClient) -> None:
    case = frames()
    until(client, lambda: client.connected)
    client.put_epoch(case.epoch.hash, case.epoch_bytes)
    put(client, case.keys[0], case.meta, case.frames[0])
    until(client, lambda: manager_metric(client, "recompressed") == 1)
    assert "libtorch" not in Path(f"/proc/{client.manager_pid}/maps").read_text()


def test_the_manager_is_polite() -> None:
    client = ZmqClient(dataclasses.replace(OPTIONS, nice=7))
    try:
        until(client, lambda: client.connected)
        assert os.getpriority(os.PRIO_PROCESS, client.manager_pid) == os.getpriority(os.PRIO_PROCESS, 0) + 7
    finally:
        client.close()
