"""``sglang-mosaic``: commands around the server."""

from __future__ import annotations

import argparse
import sys

from sglang_mosaic import __version__


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit status is its own."""
    parser = argparse.ArgumentParser(prog="sglang-mosaic", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser(
        "doctor",
        help="check versions, hooks, device, model and memory plan; say what to change",
        description="Checks this installation, and, given the flags of a server (--model-path ...), whether it would "
        "start and with how many frames. Nothing is served and no weights are loaded. Exit status 1 if a check fails.",
    )
    doctor.add_argument("--json", action="store_true", help="print the checks as JSON")
    # No help of its own: every option goes to the module that does the work.
    commands.add_parser("model", help="fetch and convert the embedded default model; print its path", add_help=False)
    commands.add_parser("calibrate", help="calibrate the codec on a text, for --mosaic-calibration", add_help=False)
    args, others = parser.parse_known_args(argv)
    if args.command == "model":
        from sglang_mosaic.embedded_model.__main__ import main as print_model_path

        return print_model_path(others)
    if args.command == "calibrate":
        from sglang_mosaic.calibrate import main as calibrate

        return calibrate(others)
    from sglang_mosaic.doctor import report

    return report(others, as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
