"""`python -m sglang_mosaic.embedded_model`: prints the checkpoint's path on stdout, everything else on stderr."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from sglang_mosaic.embedded_model import ModelConversionError, ModelDownloadError, ensure_model


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 after one line on stderr that says what went wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_mosaic.embedded_model",
        description="Fetch and convert the default model (SmolLM2-135M-Instruct, 93 MB) unless it is cached, and print "
        "the path of its checkpoint.",
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        help="where to keep it (default: $SGLANG_MOSAIC_CACHE, else sglang-mosaic in the user's cache directory)",
    )
    parser.add_argument("--check", action="store_true", help="compare the sha256 of every cached file, not only sizes")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    args = parser.parse_args(argv)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            path = ensure_model(args.cache_dir, quiet=args.quiet, full_check=args.check)
    except (ModelConversionError, ModelDownloadError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
