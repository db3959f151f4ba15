"""``python -m sglang_mosaic.launch_server``: SGLang's server with the mosaic cache selected.

Takes every flag of ``python -m sglang.launch_server`` plus the ``mosaic`` group.
"""

from __future__ import annotations

import os
import sys

from sglang_mosaic.torchvision_compat import declare_missing_operators


def with_mosaic_backends(argv: list[str]) -> list[str]:
    """``argv`` with ``--attention-backend mosaic`` added where no attention backend is named."""
    named = any(flag.split("=", 1)[0] == "--attention-backend" for flag in argv)
    return argv if named else [*argv, "--attention-backend", "mosaic"]


def main(argv: list[str] | None = None) -> None:
    """Serve until the process is stopped."""
    declare_missing_operators()

    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    server_args = prepare_server_args(with_mosaic_backends(sys.argv[1:] if argv is None else argv))
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
