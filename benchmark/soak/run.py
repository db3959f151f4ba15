"""A server under rude clients for a while, with one fault after the other; what it holds is plotted.

    python benchmark/soak/run.py --minutes 20 --json soak.json --png soak.png

The pool is so small that requests retract and evict each other; evicted pages go to a host store and a directory, both
of them too small as well. Clients abort, hang up and retry at random moments. All invariants, and the contents of all
full pages, are checked every few steps (--mosaic-audit) and the server stops at the first violation; SGLang's own
accounting is checked at every step. Before and after, the same prompts are asked with an empty cache: they must have
the same answers, but for near-ties. Exit status: 0, 1 when anything was wrong, 2 when there is no result.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `import benchmark` when run by path


from benchmark.common.cpu import CPU_FLAGS
from benchmark.common.errors import BenchmarkError
from benchmark.common.options import integer, number
from benchmark.common.report import write_png
from benchmark.manager.own_server import write_report
from benchmark.soak.soak import Soak
from benchmark.soak.verdict import describe, draw, failures

SERVER_ARGS = (
    f"{CPU_FLAGS} --max-running-requests 8 --chunked-prefill-size 512 "
    "--skip-server-warmup --sleep-on-idle --enable-metrics --mosaic-kv-mib 57 --mosaic-refresh-pages 0 "
    "--mosaic-audit 20 --mosaic-host-gb 0.02 --mosaic-disk-gb 0.05 --mosaic-restart-s 0.5 "
    "--mosaic-host-max-error 0.1 --mosaic-cold-max-error 0.2"
)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; exits with argparse's message on a bad one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", metavar="MODEL", help="checkpoint folder (default: the embedded SmolLM2)")
    parser.add_argument("--minutes", type=number(0.5), default=20.0, help="of load (default %(default)g)")
    parser.add_argument("--clients", type=integer(1), default=10, help="requests at a time (default %(default)s)")
    parser.add_argument("--calm-s", type=number(0), default=5.0, help="pause between two faults (default %(default)g)")
    parser.add_argument("--seed", type=int, default=0, help="of clients and faults (default %(default)s)")
    parser.add_argument(
        "--server-args", default=SERVER_ARGS, metavar="STRING", help="flags of the server (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures, samples and the environment")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write memory and descriptors over time")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit status."""
    args = parse_arguments(argv)
    load = os.getloadavg()
    try:
        with tempfile.TemporaryDirectory(prefix="mosaic-soak-") as folder:
            result = Soak(args.minutes, args.clients, args.calm_s, args.seed).run(
                args.model_path, args.server_args, Path(folder)
            )
    except BenchmarkError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2
    failed = failures(result)
    print(describe(result))
    for failure in failed:
        print(f"FAILED: {failure}", file=sys.stderr)
    write_report("soak", args, load, gate={"passed": not failed, "failures": failed}, **result)
    if args.png:
        write_png(args.png, draw(result))
        print(f"wrote {args.png}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
