"""Calibrations beside the server, without a manager: each in a process of its own, handed over by a thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from sglang_mosaic.codec.calibration import CalibrationInput
from sglang_mosaic.codec.calibration_job import write_statistics
from sglang_mosaic.manager.calibrator import Calibrator


class CalibrationProcess:
    """One at a time. The process ends with this one.

    Args:
        threads: of a calibration.
    """

    def __init__(self, threads: int) -> None:
        self._calibrator = Calibrator(threads)
        # The same thread for good: a process that one starts ends when that thread does.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="mosaic-calibration")
        self._starting: Future[bool] | None = None
        self._failed = False

    @property
    def calibrates(self) -> bool:
        """Whether epochs can be had: the last one did not fail."""
        return not self._failed

    @property
    def calibrating(self) -> bool:
        """Whether an epoch is being made."""
        return self._starting is not None

    def calibrate(self, given: Callable[[], CalibrationInput]) -> None:
        """Have an epoch made.

        Args:
            given: called by another thread; gives statistics that nobody writes to any more.
        """
        self._starting = self._executor.submit(self._calibrator.start, 0, lambda file: write_statistics(given(), file))

    def take_epoch(self) -> bytes | None:
        """The epoch that was made since this was asked last."""
        if self._starting is None or not self._starting.done():
            return None
        if self._starting.exception() is not None:
            self._starting, self._failed = None, True
            return None
        for done in self._calibrator.poll():
            self._starting, self._failed = None, done.epoch is None
            return done.epoch
        return None

    def close(self) -> None:
        """End what runs."""
        self._executor.shutdown(wait=True)
        self._calibrator.close()
        self._starting = None
