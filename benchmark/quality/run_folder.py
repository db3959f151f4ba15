"""The folder of one run: its settings, one line per finished sample, one line per session. Nothing is overwritten."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmark.common.errors import BenchmarkError

Record = dict[str, Any]

RUN, PARTIAL, SAMPLES, SESSIONS = "run.json", "run.partial", "samples.jsonl", "sessions.jsonl"


class RunFolder:
    """A run that is being measured. A context manager; only one process at a time may hold it."""

    def __init__(self, folder: Path, settings: dict[str, Any], about: dict[str, Any]) -> None:
        """Create the run, or go on with it.

        Args:
            folder: the run's folder; new, empty, or of a run with the same settings.
            settings: everything that decides what is measured, as JSON.
            about: what else is known about the run; kept from its first session.
        """
        self._folder = folder
        # As it will be read back: tuples become lists, numbers as keys become strings.
        settings = json.loads(json.dumps(settings))
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        _refuse_foreign(folder)
        self._file = (folder / SAMPLES).open("a+b")
        try:
            self._claim()
            self._check_or_write(settings, about)
            self.done = _records(folder / SAMPLES)
            self._end_half_line()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, record: Record) -> None:
        """Keep a finished sample; from any thread."""
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()
            self.done[record["key"]] = record

    def end_session(self, session: dict[str, Any]) -> None:
        """Keep a line about the session that ends."""
        with (self._folder / SESSIONS).open("a") as file:
            file.write(json.dumps(session) + "\n")

    def _claim(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BenchmarkError(f"--run {self._folder}: another process is measuring this run") from error

    def _check_or_write(self, settings: dict[str, Any], about: dict[str, Any]) -> None:
        path = self._folder / RUN
        if not path.exists():
            partial = self._folder / PARTIAL
            partial.write_text(json.dumps({"settings": settings, **about}, indent=2) + "\n")
            partial.rename(path)
            return
        found = json.loads(path.read_text())["settings"]
        different = sorted(key for key in {*found, *settings} if found.get(key) != settings.get(key))
        if different:
            listed = "; ".join(f"{key}: {found.get(key)!r} there, {settings.get(key)!r} now" for key in different)
            raise BenchmarkError(
                f"--run {self._folder} has a run with other settings ({listed}); name another folder, or repeat the "
                "run's own command to go on with it"
            )

    def _end_half_line(self) -> None:
        size = self._file.seek(0, os.SEEK_END)
        if size:
            self._file.seek(size - 1)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")


def read_run(folder: Path) -> tuple[dict[str, Any], dict[str, Record], list[dict[str, Any]]]:
    """A run's run.json, its samples by key and its sessions."""
    try:
        about = json.loads((folder / RUN).read_text())
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"--compare: {folder} is not the folder of a run ({error})") from error
    return about, _records(folder / SAMPLES), list(_lines(folder / SESSIONS))


def _refuse_foreign(folder: Path) -> None:
    """BenchmarkError for a folder with files that are not of a run."""
    if (folder / RUN).exists():
        return
    # A session that ended before run.json was complete leaves these two.
    foreign = [path.name for path in folder.iterdir() if path.name not in (SAMPLES, PARTIAL)]
    if not foreign and (folder / SAMPLES).exists() and (folder / SAMPLES).stat().st_size:
        foreign = [SAMPLES]
    if foreign:
        raise BenchmarkError(f"--run {folder} has files but no {RUN} ({min(foreign)}, ...); name a new or empty folder")


def _records(path: Path) -> dict[str, Record]:
    return {record["key"]: record for record in _lines(path)}


def _lines(path: Path) -> list[dict[str, Any]]:
    """Every complete line; one that an interrupt cut short is passed over, and its sample measured again."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
