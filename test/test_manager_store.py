"""The store: a state machine over both tiers, damaged and foreign files, and two managers in one directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from manager_cases import waves
from sglang_mosaic.errors import ConfigError
from sglang_mosaic.manager.keys import epoch_key, namespace, page_keys
from sglang_mosaic.manager.store.directory import LOOK_AGAIN, DirectoryTier
from sglang_mosaic.manager.store.eviction import LeastRecentlyUsed
from sglang_mosaic.manager.store.memory import MemoryTier
from sglang_mosaic.manager.store.record import HEADER_BYTES, CorruptRecord, Form, Record
from sglang_mosaic.manager.store.tiers import Store
from sglang_mosaic.wire.messages import Meta, RecordKind
from sglang_mosaic.wire.slots import checksum

KEYS = page_keys(namespace("store"), range(64 * 12))
LIMIT = 4000


def record(key: bytes, body: bytes, epoch: str = "", kind: RecordKind = RecordKind.PAGE) -> Record:
    return Record(key, Meta(kind, 3, epoch), Form.RAW, len(body), checksum(key, body), body)


class Tiers(RuleBasedStateMachine):
    """Whatever is got is what was last put under the key, and limits and announcements hold."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.store = self.open()
        self.put_last: dict[bytes, bytes] = {}
        self.announced: set = set()

    def open(self) -> Store:
        directory = DirectoryTier(self.root / "store", LIMIT * 2)
        return Store(MemoryTier(LIMIT, LeastRecentlyUsed()), directory, 500)

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    def hear(self) -> None:
        for change in self.store.take_changes():
            (self.announced.add if change.known else self.announced.discard)(change.record)

    @rule(key=st.sampled_from(KEYS), size=st.integers(1, 900), byte=st.integers(0, 255))
    def put(self, key: bytes, size: int, byte: int) -> None:
        if key in self.put_last:
            return  # content-addressed: a key means one page
        body = bytes([byte]) * size
        assert self.store.put(record(key, body))
        self.put_last[key] = body

    @rule()
    def put_too_much(self) -> None:
        assert not self.store.put(record(b"x" * 16, bytes(LIMIT)))

    @rule(flush=st.booleans())
    def settle(self, flush: bool) -> None:
        found = self.store.next(flush)
        if found is not None:
            self.store.settle(found, found)

    @rule(key=st.sampled_from(KEYS))
    def get(self, key: bytes) -> None:
        self.hear()
        known = (RecordKind.PAGE, key) in self.announced
        found = self.store.get((RecordKind.PAGE, key))
        if found is not None:
            assert found.body == self.put_last[key]
        # Announced and not taken back meanwhile: it is there.
        assert (found is not None) == known

    @rule(key=st.sampled_from(KEYS))
    def remove(self, key: bytes) -> None:
        self.store.remove((RecordKind.PAGE, key))
        assert self.store.get((RecordKind.PAGE, key)) is None

    @rule(key=st.sampled_from(KEYS), at=st.integers(0, 10_000), bit=st.integers(0, 7))
    def damage_a_file(self, key: bytes, at: int, bit: int) -> None:
        path = self.root / "store" / "v1" / "pages" / key.hex()
        if path.exists() and (RecordKind.PAGE, key) not in self.store.memory:
            data = bytearray(path.read_bytes())
            data[at % len(data)] ^= 1 << bit
            path.write_bytes(data)
            assert self.store.get((RecordKind.PAGE, key)) is None
            assert not path.exists()

    @rule(key=st.sampled_from(KEYS))
    def lose_a_file(self, key: bytes) -> None:
        (self.root / "store" / "v1" / "pages" / key.hex()).unlink(missing_ok=True)
        self.store.rescan()

    @rule()
    def restart(self) -> None:
        on_disk = set(self.store.directory.ids())
        self.store = self.open()
        assert set(self.store.ids()) == on_disk
        self.announced = set(on_disk)

    @precondition(lambda self: self.put_last)
    @invariant()
    def limits_hold(self) -> None:
        memory = self.store.memory
        assert memory.nbytes <= LIMIT
        assert memory.nbytes == sum(memory.peek(record_id).nbytes for record_id in memory.ids())
        files = list((self.root / "store" / "v1" / "pages").iterdir())
        assert sum(path.stat().st_size for path in files) <= LIMIT * 2
        assert all("." not in path.name for path in files)
        known = self.store.directory
        assert known.nbytes == sum(known._files[record_id].nbytes for record_id in known.ids())
        self.hear()
        assert self.announced >= set(memory.ids())
        assert self.announced == set(self.store.ids())


Tiers.TestCase.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestTiers = Tiers.TestCase


def test_least_recently_used_goes_first() -> None:
    policy = LeastRecentlyUsed()
    ids = [(RecordKind.PAGE, key) for key in KEYS[:3]]
    for record_id in ids:
        policy.use(record_id)
    policy.use(ids[0])
    assert policy.victim() == ids[1]
    policy.forget(ids[1])
    assert policy.victim() == ids[2]
    policy.forget(ids[2])
    policy.forget(ids[0])
    with pytest.raises(LookupError):
        policy.victim()


def test_an_epoch_goes_after_the_last_of_its_pages() -> None:
    store = Store(MemoryTier(4 * (HEADER_BYTES + 100), LeastRecentlyUsed()))
    epoch = record(epoch_key("e"), bytes(100), kind=RecordKind.EPOCH)
    store.put(epoch)
    for key in KEYS[:8]:
        store.put(record(key, bytes(100), "e"))
        assert store.get(epoch.id) is epoch
    for key in KEYS[8:12]:
        store.put(record(key, bytes(100)))
    assert store.get(epoch.id) is None


def test_pages_that_came_before_their_epoch_wait_for_it() -> None:
    store = Store(MemoryTier(LIMIT, LeastRecentlyUsed()))
    page = record(KEYS[0], b"page", "e")
    store.put(page)
    assert store.next() is page
    store.park(page)
    assert store.next() is None
    store.put(record(epoch_key("other"), b"epoch", kind=RecordKind.EPOCH))
    store.put(record(epoch_key("e"), b"epoch", kind=RecordKind.EPOCH))
    assert [store.next().key for _ in range(3)] == [epoch_key("other"), epoch_key("e"), KEYS[0]]


@given(st.data())
def test_no_damaged_file_is_read(data: st.DataObject) -> None:
    good = record(KEYS[0], b"some bytes of a page", "0123456789abcdef")
    file = bytearray(good.to_bytes())
    assert Record.from_bytes(bytes(file), good.id) == good
    how = data.draw(st.sampled_from(["flip", "cut", "extend"]))
    at = data.draw(st.integers(0, len(file) - 1))
    if how == "flip":
        file[at] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "cut":
        del file[at:]
    else:
        file += data.draw(st.binary(min_size=1, max_size=5))
    with pytest.raises(CorruptRecord):
        Record.from_bytes(bytes(file), good.id)


def test_the_right_file_under_a_wrong_name_is_removed(tmp_path: Path) -> None:
    tier = DirectoryTier(tmp_path, 10_000)
    tier.write(record(KEYS[0], b"one"))
    pages = tmp_path / "v1" / "pages"
    (pages / KEYS[0].hex()).rename(pages / KEYS[1].hex())
    tier.scan()
    assert tier.read((RecordKind.PAGE, KEYS[1])) is None
    assert tier.refused == 1
    assert list(pages.iterdir()) == []


def test_links_and_foreign_files_are_not_followed(tmp_path: Path) -> None:
    tier = DirectoryTier(tmp_path / "store", 10_000)
    outside = tmp_path / "outside"
    outside.write_bytes(record(KEYS[0], b"one").to_bytes())
    pages = tmp_path / "store" / "v1" / "pages"
    (pages / KEYS[0].hex()).symlink_to(outside)
    (pages / "notes.txt").write_text("mine")
    tier.scan()
    assert tier.ids() == []
    assert tier.read((RecordKind.PAGE, KEYS[0])) is None
    assert outside.exists()


def test_what_a_dead_writer_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    DirectoryTier(tmp_path, 10_000)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    pages = tmp_path / "v1" / "pages"
    left, living = pages / f"{KEYS[0].hex()}.{dead.pid}.1", pages / f"{KEYS[1].hex()}.{os.getppid()}.1"
    left.write_bytes(b"half")
    living.write_bytes(b"half")
    tier = DirectoryTier(tmp_path, 10_000)
    assert not left.exists()
    assert living.exists()
    assert tier.ids() == []


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
def test_a_directory_that_others_can_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    root = tmp_path / "store"
    root.mkdir()
    root.chmod(mode)
    with pytest.raises(ConfigError, match="nobody else can write"):
        DirectoryTier(root, 10_000)


def test_a_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(tmp_path).st_uid + 1)
    with pytest.raises(ConfigError, match="of this user"):
        DirectoryTier(tmp_path, 10_000)


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    with pytest.raises(ConfigError):
        DirectoryTier(tmp_path / "store", 10_000)


def test_a_full_disk_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DirectoryTier(tmp_path, 10_000)

    def fail(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    assert not tier.write(record(KEYS[0], b"one"))
    assert tier.failed_writes == 1
    assert list((tmp_path / "v1" / "pages").iterdir()) == []


WRITER = """
import os, random, sys
from pathlib import Path
from sglang_mosaic.manager.keys import namespace, page_keys
from sglang_mosaic.manager.store.directory import DirectoryTier
from sglang_mosaic.manager.store.record import Form, Record
from sglang_mosaic.wire.messages import Meta, RecordKind
from sglang_mosaic.wire.slots import checksum
seed = int(sys.argv[2])
random.seed(seed)
os.fsync = lambda descriptor: None  # a disk's speed is not what is tested
tier = DirectoryTier(Path(sys.argv[1]), 20_000)
keys = page_keys(namespace("two"), range(64 * 30))
print("ready", flush=True)
sys.stdin.readline()
others = 0
for step in range(3000):
    key = random.choice(keys)
    if random.random() < 0.5:
        body = key * random.randint(1, 100)
        meta = Meta(RecordKind.PAGE, 3, f"epoch {seed}")
        tier.write(Record(key, meta, Form.RAW, len(body), checksum(key, body), body))
    else:
        found = tier.read((RecordKind.PAGE, key))
        if found is not None:
            assert found.body == key * (len(found.body) // 16)
            others += found.meta.epoch != f"epoch {seed}"
    if step % 100 == 0:
        tier.scan()
assert tier.refused == 0
print(others)
"""


def start_writer(root: Path, seed: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WRITER, str(root), str(seed)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_two_managers_share_a_directory(tmp_path: Path) -> None:
    writers = [start_writer(tmp_path, seed) for seed in range(2)]
    for writer in writers:
        assert writer.stdout.readline() == b"ready\n"
    for writer in writers:
        writer.stdin.write(b"go\n")
        writer.stdin.flush()
    for writer in writers:
        out, _ = writer.communicate(timeout=60)
        assert writer.returncode == 0
        assert int(out) > 0, "it never read what the other one wrote"
    tier = DirectoryTier(tmp_path, 20_000)
    assert 0 < tier.nbytes <= 20_000 * (1 + 2 * LOOK_AGAIN)
    assert all(tier.read(record_id) is not None for record_id in tier.ids())


def test_a_writer_killed_at_any_moment_leaves_whole_files(tmp_path: Path) -> None:
    for seed in range(8):
        with start_writer(tmp_path, seed) as writer:
            writer.stdout.readline()
            writer.stdin.write(b"go\n")
            writer.stdin.flush()
            for _ in waves():
                if len(list((tmp_path / "v1" / "pages").iterdir())) > seed:
                    break
            writer.kill()
    tier = DirectoryTier(tmp_path, 20_000)
    assert tier.ids()
    assert all(tier.read(record_id) is not None for record_id in tier.ids())
    assert tier.refused == 0
    assert all("." not in path.name for path in (tmp_path / "v1" / "pages").iterdir())
