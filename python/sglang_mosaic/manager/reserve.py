"""Memory that is there before it is needed.

The first write to memory takes several times as long as later ones, since the system has to find and clear it: for
the 2.3 MB of a page of an 8B model 1.7 ms instead of .25, on two CPU cores, in the thread that answers. So another one
writes to it first, while it has nothing else to do.
"""

from __future__ import annotations

import ctypes

RESERVE_BYTES, RESERVE_SHARE, MOST_RESERVE_BYTES = 1 << 29, 8, 1 << 32
"""Written to ahead of what is stored, or a share of all if that is more, up to a limit: a long prompt that comes back
makes as much leave within a second as it has itself."""
STEP_BYTES = 1 << 25
"""At a time: other work must not wait for long."""
_PIECE = 1 << 23
"""Below the size from which glibc takes memory from the system, and gives it back, piece by piece."""


class Reserve:
    """Goes through memory that the process has not used yet, for `child.allocator_options` keep what was freed.

    Args:
        most_bytes: of all that will be stored.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._ahead = max(RESERVE_BYTES, min(most_bytes // RESERVE_SHARE, MOST_RESERVE_BYTES))
        self._written = 0
        self._libc = ctypes.CDLL(None)
        self._libc.malloc.restype = ctypes.c_void_p
        self._libc.free.argtypes = (ctypes.c_void_p,)
        self._libc.memset.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t

    def keep_ahead(self, stored_bytes: int) -> bool:
        """Write to a step more of memory; False: there is enough. Other threads run meanwhile.

        Args:
            stored_bytes: in use at the moment.
        """
        if min(stored_bytes + self._ahead, self._most_bytes) - self._written < STEP_BYTES:
            return False
        # What was written to before is taken first, or it would be given again.
        free = [self._libc.malloc(_PIECE) for _ in range(max(self._written - stored_bytes, 0) // _PIECE)]
        fresh = [self._libc.malloc(_PIECE) for _ in range(STEP_BYTES // _PIECE)]
        for piece in filter(None, fresh):
            self._libc.memset(piece, 0, _PIECE)
        for piece in (*free, *fresh):
            self._libc.free(piece)
        self._written += STEP_BYTES
        return True
