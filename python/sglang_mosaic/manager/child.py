"""What every process does that is started for another one: it is polite, and it never outlives its parent."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def follow_parent(parent: int) -> None:
    """Die with the parent, whatever kills it. Linux only.

    Args:
        parent: process id of the parent that is meant.

    Raises:
        SystemExit: it is dead already.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise SystemExit(f"prctl: {os.strerror(ctypes.get_errno())}")
    # It may have died before prctl took effect.
    if not has_parent(parent):
        raise SystemExit("the parent process is dead")


def has_parent(parent: int) -> bool:
    """Whether the parent is still the one that is meant."""
    return os.getppid() == parent


def started(pid: int) -> int:
    """When a process started, in clock ticks since boot; -1: there is none that runs, at most what is left of one."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return -1
    # The name, in parentheses, may hold anything.
    state, *fields = text.rpartition(")")[2].split()
    return -1 if state in "ZX" else int(fields[18])


def be_polite(levels: int) -> None:
    """Raise the nice level; the numeric libraries' threads are limited by `thread_limits` from outside."""
    os.nice(levels)


def thread_limits(threads: int) -> dict[str, str]:
    """Environment that limits the threads of numeric libraries."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    return {name: str(threads) for name in names}


def allocator_options() -> dict[str, str]:
    """Environment in which glibc keeps what was freed. A process that stores pages of megabytes in memory of a fixed
    size would otherwise give each back to the system and get it again: 1.22 ms instead of .83 for 2.3 MB."""
    return {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
