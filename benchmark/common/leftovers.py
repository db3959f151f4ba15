"""What servers may leave behind on a machine."""

from __future__ import annotations

import os

_SGLANG = ("sem.mp-", "sem.loky-", "sglang_", "sgl_shm_", "psm_")
"""SGLang's own, and those of multiprocessing and loky, which it loads: they outlive a kill."""


def shared_memory_files() -> set[str]:
    """Names in /dev/shm that are not SGLang's own."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith(_SGLANG)}
