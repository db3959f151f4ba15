"""A stand-in for the server processes that a comparison starts: a server in a thread of the test for each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def process_class(make: Callable[[list[str]], Any], started: list[tuple[list[str], Any]]) -> type:
    """To put in the place of `benchmark.common.compare.ServerProcess`.

    Args:
        make: of a command line, a server with a `port`, which runs as long as one is in its context.
        started: gets every command line and its server, in order.
    """

    class StandIn:
        def __init__(self, argv: list[str], url: str, log_path: Path, health_timeout_s: float) -> None:
            self._server = make(argv)
            self.url = f"http://127.0.0.1:{self._server.port}"
            started.append((argv, self._server))

        def __enter__(self) -> StandIn:
            self._server.__enter__()
            return self

        def __exit__(self, *details: object) -> None:
            self._server.__exit__(*details)

        def check_alive(self) -> None:
            """It is a thread of the test."""

    return StandIn
