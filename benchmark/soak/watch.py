"""What the processes of a server hold, sampled for as long as it runs."""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

EVERY_S = 2.0
ROLES = {"sglang_mosaic.manager": "manager", "sglang::scheduler": "scheduler", "sglang::detokenizer": "detokenizer"}
"""By a part of the command line; a process that names none of them and speaks HTTP is the first one, "server"."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One look; the first index of each series is the role."""

    second: float
    memory_mib: dict[str, float]
    """Resident, without what processes share through files: weights count once they were written to."""
    descriptors: dict[str, int]
    threads: dict[str, int]
    shared_memory_mib: float
    """Of all files in /dev/shm."""
    disk_mib: float
    """Of the managers' directory."""
    gpu_mib: dict[str, float] = dataclasses.field(default_factory=dict)
    """That a process has on GPUs; of those that have none, and without nvidia-smi, nothing."""


class Watch:
    """Looks every two seconds, in a thread of its own, between `with` and its end.

    Args:
        pid: of the server's first process.
        disk: the managers' directory.
    """

    def __init__(self, pid: int, disk: Path) -> None:
        self.samples: list[Sample] = []
        self._pid = pid
        self._disk = disk
        self._start = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def second(self) -> float:
        """Since it was made."""
        return time.monotonic() - self._start

    def _run(self) -> None:
        while not self._ended.wait(EVERY_S):
            memory: dict[str, float] = {}
            descriptors: dict[str, int] = {}
            threads: dict[str, int] = {}
            gpu: dict[str, float] = {}
            on_gpus = gpu_memory()
            for role, process in processes(self._pid):
                try:
                    with process.oneshot():
                        info = process.memory_info()
                        memory[role] = (info.rss - info.shared) / 2**20
                        descriptors[role] = process.num_fds()
                        threads[role] = process.num_threads()
                    if process.pid in on_gpus:
                        gpu[role] = on_gpus[process.pid]
                except psutil.Error:
                    continue  # killed a moment ago
            self.samples.append(
                Sample(
                    self.second,
                    memory,
                    descriptors,
                    threads,
                    folder_mib(Path("/dev/shm")),
                    folder_mib(self._disk),
                    gpu,
                )
            )


def processes(pid: int) -> list[tuple[str, psutil.Process]]:
    """The server's processes that last, by role; helpers that come and go have none and are left out."""
    try:
        root = psutil.Process(pid)
        found = [("server", root)]
        for process in root.children(recursive=True):
            try:
                line = " ".join(process.cmdline())
            except psutil.Error:
                continue
            found += [(role, process) for part, role in ROLES.items() if part in line][:1]
    except psutil.Error:
        return []
    return found


def gpu_memory() -> dict[int, float]:
    """MiB on all GPUs of each process that has some there, by its number; {} without nvidia-smi or a GPU."""
    argv = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}
    found: dict[int, float] = {}
    for line in lines:
        pid, _, mib = line.partition(",")
        if mib.strip().isdigit():  # drivers that do not tell say [N/A]
            found[int(pid)] = found.get(int(pid), 0.0) + float(mib)
    return found


def folder_mib(folder: Path) -> float:
    """MiB of a folder's files."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:
                continue
    return total / 2**20


def growth(samples: Sequence[Sample], series: str, role: str) -> tuple[float, float]:
    """Medians of a role's second and of its last quarter; of what a server allocates once, the first has the rest."""
    values = [getattr(sample, series)[role] for sample in samples if role in getattr(sample, series)]
    quarter = max(len(values) // 4, 1)
    return statistics.median(values[quarter : 2 * quarter] or values), statistics.median(values[-quarter:])
