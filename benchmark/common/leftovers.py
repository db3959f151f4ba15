"""What servers may leave behind on a machine."""

from __future__ import annotations

import os

_SGLANG = ("sem.mp-", "sglang_", "sgl_shm_", "psm_")
"""SGLang's own, and those of Python's multiprocessing: they outlive a kill."""


def shared_memory_files() -> set[str]:
    """Names in /dev/shm that are not SGLang's own."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith(_SGLANG)}
