"""The directory tier: one file per record, shared by all managers of a machine that are given the same directory.

A file appears whole or not at all (temporary file, fsync, rename), its name says which record it is, and its header and
checksums say whether it is. Two managers may write, read and delete the same files at any time: the last rename wins,
and both contents are valid, since a record names the epoch that it was written with. Files are used in the order of
their modification times, which reading renews.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from pathlib import Path
from typing import NamedTuple

from sglang_mosaic.errors import ConfigError
from sglang_mosaic.manager.child import started
from sglang_mosaic.manager.store.record import HEADER_BYTES, CorruptRecord, Record, RecordId
from sglang_mosaic.wire.messages import KEY_BYTES, RecordKind

LAYOUT = "v1"
"""Folder of this layout of files; others are left alone."""
KINDS = {RecordKind.PAGE: "pages", RecordKind.EPOCH: "epochs", RecordKind.TRANSFORM: "transforms"}
LOW_WATER = 0.9
"""Share of the limit that deleting goes down to, so that it does not have to look at all files for every write."""
LOOK_AGAIN = 0.05
"""Share of the limit after which a writer looks at the directory again: others have written, too."""
ABANDONED_S = 600.0
"""Age after which a temporary file is nobody's any more, whoever has its process id now."""


class _File(NamedTuple):
    nbytes: int
    used: float


class DirectoryTier:
    """Records as files, together about as many bytes as allowed.

    Managers that share the directory see each other's files when they look at it, so that each may add ``LOOK_AGAIN``
    of the limit to it.

    Safe to use from two threads.

    Args:
        root: the directory; made if it is missing.
        limit_bytes: most bytes of all files.

    Raises:
        ConfigError: others could write to the directory, or it cannot be made.
    """

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.refused = 0
        """Files that were damaged, foreign or of another version; they are removed."""
        self.failed_writes = 0
        """Records that the system did not let us write: the disk is full, say."""
        self._base = root / LAYOUT
        self._lock = threading.Lock()
        self._files: dict[RecordId, _File] = {}
        self._total = 0
        self._written = 0  # bytes since the last look
        self._temporaries = 0
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_owner(root)
            for kind in KINDS.values():
                (self._base / kind).mkdir(mode=0o700, parents=True, exist_ok=True)
                _check_owner(self._base)
                _check_owner(self._base / kind)
        except OSError as error:
            raise ConfigError(f"--mosaic-disk: {root} cannot be used ({error}); give another directory.") from error
        self.scan()

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, record: RecordId) -> bool:
        return record in self._files

    @property
    def nbytes(self) -> int:
        """Bytes of all files, as of the last look and what was written since."""
        return self._total

    def ids(self) -> list[RecordId]:
        """All records, as of the last look."""
        with self._lock:
            return list(self._files)

    def scan(self) -> None:
        """Look at the directory anew: other managers write and delete, too."""
        files: dict[RecordId, _File] = {}
        for kind, name in KINDS.items():
            for entry in _entries(self._base / name):
                try:
                    found = entry.stat(follow_symlinks=False)
                except OSError:
                    continue
                key = _key_of(entry.name)
                if key is not None and stat.S_ISREG(found.st_mode):
                    files[kind, key] = _File(found.st_size, found.st_mtime)
                elif _abandoned(entry.name, found.st_mtime):
                    _remove(Path(entry.path))
        with self._lock:
            self._files = files
            self._total = sum(file.nbytes for file in files.values())
            self._written = 0

    def write(self, record: Record, keep_age: bool = False) -> bool:
        """Write a record; False: it is too large or the system refuses, and nothing changed.

        Args:
            keep_age: a file that it replaces lends it the time of its last use.
        """
        if record.nbytes > self.limit_bytes * LOW_WATER or record.meta.kind not in KINDS:
            return False
        target = self._path(record.id)
        before = self._files.get(record.id)
        used = before.used if keep_age and before is not None else time.time()
        self._temporaries += 1
        temporary = target.with_name(f"{target.name}.{os.getpid()}.{self._temporaries}")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            try:
                with open(descriptor, "wb") as file:
                    file.write(record.to_bytes())
                    file.flush()
                    os.fsync(file.fileno())
                os.utime(temporary, (used, used))
                os.rename(temporary, target)
            except OSError:
                _remove(temporary)
                raise
        except OSError:
            self.failed_writes += 1
            return False
        self._forget(record.id, delete=False)
        with self._lock:
            self._files[record.id] = _File(record.nbytes, used)
            self._total += record.nbytes
            self._written += record.nbytes
        self._make_room()
        return True

    def read(self, record: RecordId) -> Record | None:
        """A record, which counts as used; None: it is not there any more, or was no record and is removed."""
        path = self._path(record)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            with open(descriptor, "rb") as file:
                if os.fstat(descriptor).st_size > self.limit_bytes + HEADER_BYTES:
                    raise CorruptRecord("larger than the tier")
                data = file.read()
            found = Record.from_bytes(data, record)
            os.utime(path)
        except CorruptRecord:
            self.refused += 1
            self._forget(record, delete=True)
            return None
        except OSError:
            self._forget(record, delete=False)
            return None
        return found

    def use(self, record: RecordId) -> None:
        """The record is needed for others that were used; nothing happens if it is not there."""
        try:
            os.utime(self._path(record), follow_symlinks=False)
        except OSError:
            self._forget(record, delete=False)

    def remove(self, record: RecordId) -> None:
        """Delete a record; nothing happens if it is not there."""
        self._forget(record, delete=True)

    def _make_room(self) -> None:
        if self._total <= self.limit_bytes and self._written <= self.limit_bytes * LOOK_AGAIN:
            return
        self.scan()
        if self._total <= self.limit_bytes:
            return
        with self._lock:
            oldest = sorted(self._files.items(), key=lambda item: item[1].used)
        for record, _ in oldest:
            if self._total <= self.limit_bytes * LOW_WATER:
                break
            self._forget(record, delete=True)

    def _forget(self, record: RecordId, delete: bool) -> None:
        if delete:
            _remove(self._path(record))
        with self._lock:
            found = self._files.pop(record, None)
            self._total -= 0 if found is None else found.nbytes

    def _path(self, record: RecordId) -> Path:
        kind, key = record
        return self._base / KINDS[kind] / key.hex()


def _key_of(name: str) -> bytes | None:
    """The key that a file is named after; None: it is a temporary or foreign file."""
    try:
        key = bytes.fromhex(name)
    except ValueError:
        return None
    return key if len(key) == KEY_BYTES and key.hex() == name else None


def _abandoned(name: str, modified: float) -> bool:
    """Whether a file that is no record's is a temporary one whose writer has died, or something foreign."""
    writer = name.split(".")[1:2]
    alive = writer and writer[0].isdigit() and started(int(writer[0])) >= 0
    return not alive or time.time() - modified > ABANDONED_S


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError:
        pass  # another manager was faster, or it is a foreign directory


def _check_owner(path: Path) -> None:
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise ConfigError(
            f"--mosaic-disk: {path} must be a directory of this user that nobody else can write to, found "
            f"{stat.filemode(found.st_mode)} of user {found.st_uid}; change its mode or give another directory."
        )
