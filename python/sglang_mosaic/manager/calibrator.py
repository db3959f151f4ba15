"""Calibrations, one at a time, each in a process of its own: seconds of linear algebra that no restore waits for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

from sglang_mosaic.manager.child import thread_limits
from sglang_mosaic.manager.recompress.groups import FrameError, epoch_hash


class Calibration(NamedTuple):
    """A calibration that ended."""

    ticket: int
    hash: str
    """Of the epoch; empty: it failed."""
    epoch: bytes | None


class _Job(NamedTuple):
    ticket: int
    process: subprocess.Popen[bytes]
    output: int
    """File descriptor of what it writes."""


class Calibrator:
    """
    Args:
        threads: of a calibration.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._environment = {**os.environ, **thread_limits(1)}
        self._job: _Job | None = None

    @property
    def running(self) -> bool:
        return self._job is not None

    def start(self, ticket: int, write: Callable[[BinaryIO], object]) -> bool:
        """Begin one of the statistics that `write` writes; False: another one is running."""
        if self._job is not None:
            return False
        # Files without names: nothing of them outlives the processes.
        source, output = (os.memfd_create(f"sglang-mosaic-{name}", os.MFD_CLOEXEC) for name in ("statistics", "epoch"))
        with open(source, "wb") as file:
            write(file)
            file.flush()
            os.lseek(source, 0, os.SEEK_SET)
            command = [sys.executable, "-m", "sglang_mosaic.manager.calibrate_job", str(os.getpid())]
            process = subprocess.Popen(
                [*command, str(source), str(output), str(self._threads)],
                pass_fds=(source, output),
                stdin=subprocess.DEVNULL,
                env=self._environment,
            )
        self._job = _Job(ticket, process, output)
        return True

    def poll(self) -> list[Calibration]:
        """What ended since the last call."""
        if self._job is None or self._job.process.poll() is None:
            return []
        job, self._job = self._job, None
        os.lseek(job.output, 0, os.SEEK_SET)
        with open(job.output, "rb") as file:
            epoch = file.read()
        try:
            if job.process.returncode == 0:
                return [Calibration(job.ticket, epoch_hash(epoch), epoch)]
        except FrameError:
            pass
        return [Calibration(job.ticket, "", None)]

    def cancel(self, ticket: int) -> None:
        """End a calibration; nothing happens if it is not running."""
        if self._job is not None and self._job.ticket == ticket:
            self.close()

    def close(self) -> None:
        """End what runs."""
        if self._job is not None:
            job, self._job = self._job, None
            job.process.kill()
            job.process.wait()
            os.close(job.output)
