"""Memory that is there before it is needed.

The first write to memory takes several times as long as later ones, since the system has to find and clear it: for
the 2.3 MB of a page of an 8B model 1.7 ms instead of .25, on two CPU cores, in the thread that answers. So another one
writes to it first.
"""

from __future__ import annotations

import ctypes

RESERVE_BYTES = 1 << 29
"""Written to ahead of what is stored."""
_PIECE = 1 << 23
"""Below the size from which glibc takes memory from the system, and gives it back, piece by piece."""


class Reserve:
    """Goes through memory that the process has not used yet, for `child.allocator_options` keep what was freed.

    Args:
        most_bytes: of all that will be stored.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._written = 0
        self._libc = ctypes.CDLL(None)
        self._libc.malloc.restype = ctypes.c_void_p
        self._libc.free.argtypes = (ctypes.c_void_p,)
        self._libc.memset.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t

    def keep_ahead(self, stored_bytes: int) -> bool:
        """Write to more memory if little is left of what was written to; False: there was enough. Other threads run
        meanwhile.

        Args:
            stored_bytes: in use at the moment.
        """
        wanted = min(stored_bytes + RESERVE_BYTES, self._most_bytes)
        missing = wanted - self._written
        if missing < min(RESERVE_BYTES // 2, self._most_bytes // 4) or missing < _PIECE:
            return False
        # All at a time, or each would be the memory that the one before has just given back.
        free = max(self._written - stored_bytes, 0)
        pieces = [self._libc.malloc(_PIECE) for _ in range((free + missing) // _PIECE)]
        for piece in filter(None, pieces):
            self._libc.memset(piece, 0, _PIECE)
        for piece in pieces:
            self._libc.free(piece)
        self._written = wanted
        return True
