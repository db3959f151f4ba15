"""Process of one calibration: `python -m sglang_mosaic.manager.calibrate_job PARENT INPUT OUTPUT WORKERS`.

INPUT and OUTPUT are inherited file descriptors, of statistics and of an empty file for the epoch. Exit status 0: it is
complete.
"""

from __future__ import annotations

import sys

from sglang_mosaic.manager.child import follow_parent


def main(argv: list[str]) -> int:
    """Run it; returns the exit status."""
    parent, source, target, workers = (int(argument) for argument in argv)
    follow_parent(parent)
    # torch takes seconds and hundreds of MiB, which go with this process.
    from sglang_mosaic.codec.calibration_job import StatisticsError, run

    with open(source, "rb") as file:
        statistics = file.read()
    try:
        epoch = run(statistics, workers)
    except StatisticsError as error:
        print(f"sglang_mosaic manager: calibration: {error}", file=sys.stderr)
        return 1
    with open(target, "wb") as file:
        file.write(epoch)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
