"""The manager's process, started by its supervisor: `python -m sglang_mosaic.manager PARENT SOCKET FD OPTIONS`."""

from __future__ import annotations

import sys
from pathlib import Path

from sglang_mosaic.errors import MosaicError
from sglang_mosaic.manager import ipc_directory
from sglang_mosaic.manager.child import be_polite, follow_parent
from sglang_mosaic.manager.options import ManagerOptions
from sglang_mosaic.manager.process import serve
from sglang_mosaic.wire.slots import SlotMemory


def main(argv: list[str]) -> int:
    """Serve until the owner says goodbye or dies; returns the exit status."""
    parent, socket, fd = int(argv[0]), Path(argv[1]), int(argv[2])
    follow_parent(parent)
    try:
        options = ManagerOptions.from_json(argv[3])
        be_polite(options.nice)
        ipc_directory.check(socket.parent)
        slots = SlotMemory(fd, options.slots, options.slot_bytes)
        slots.touch(options.usual_bytes)
        serve(parent, socket, slots, options)
    except MosaicError as error:
        print(f"sglang_mosaic manager: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
