"""The private directory of a server's sockets: nobody else may enter it, and nobody's outlives its owner for long."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path

from sglang_mosaic.errors import ConfigError
from sglang_mosaic.manager.child import started

PREFIX = "sglang-mosaic"
LONGEST_SOCKET = 107
"""Bytes of a Unix socket's path, which the kernel limits."""


def make() -> Path:
    """A new directory of this process, mode 0700; those of dead processes of this user are swept first.

    Raises:
        ConfigError: the temporary directory's path is too long for sockets.
    """
    parent = Path(tempfile.gettempdir())
    sweep(parent)
    owner = os.getpid()
    path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}-{os.geteuid()}-{owner}-{started(owner)}-", dir=parent))
    if len(os.fsencode(socket(path, 999_999))) > LONGEST_SOCKET:
        path.rmdir()
        raise ConfigError(f"TMPDIR: {parent} is too long a path for sockets; give a shorter one.")
    return path


def socket(path: Path, number: int) -> Path:
    """Where the manager of that number listens."""
    return path / str(number)


def sweep(parent: Path) -> None:
    """Remove what dead owners of this user have left."""
    for path in parent.glob(f"{PREFIX}-{os.geteuid()}-*"):
        parts = path.name.split("-")[3:5]
        if len(parts) == 2 and all(part.isdigit() for part in parts) and _is_private(path):
            pid, since = (int(part) for part in parts)
            # A process id may have been given away again since.
            if started(pid) != since:
                shutil.rmtree(path, ignore_errors=True)


def check(path: Path) -> None:
    """
    Raises:
        ConfigError: it is not a directory that only this user can enter.
    """
    if not _is_private(path):
        raise ConfigError(f"{path} is no directory of this user with mode 0700; the server makes a new one.")


def _is_private(path: Path) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
