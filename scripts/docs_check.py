"""Runs the commands of the documents that are marked as runnable on a CPU, as a reader would.

A block of ```sh is marked by one of these lines right above it, which the rendered page does not show:

    <!-- runs on a CPU -->
    <!-- runs on a CPU, with a server -->

Blocks run in the repository's root by bash, which stops at the first command that fails. The server is that of
`make serve`, on a free port that takes the place of 127.0.0.1:30000. MODEL stands for the default model. What is not
marked is counted and said, no more.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/*.md")
TIMEOUT_S = 900
_BLOCK = re.compile(r"(?:^<!-- (runs on a CPU)(, with a server)? -->\n)?^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ADDRESS = "127.0.0.1:30000"


@dataclasses.dataclass(frozen=True)
class Block:
    """Commands of a document."""

    place: str
    """File and line."""
    text: str
    marked: bool
    needs_server: bool


def blocks(path: Path, name: str) -> list[Block]:
    """Every block of shell commands in a document."""
    text = path.read_text()
    return [
        Block(
            f"{name}:{text.count(chr(10), 0, match.start(3)) + 1}",
            match[3],
            match[1] is not None,
            match[2] is not None,
        )
        for match in _BLOCK.finditer(text)
    ]


def run(block: Block, environment: dict[str, str], replace: dict[str, str]) -> bool:
    """Run a block; False: a command failed, whose output was shown."""
    text = block.text
    for written, meant in replace.items():
        text = re.sub(rf"\b{re.escape(written)}\b", meant, text)
    print(f"--- {block.place}\n{text}", end="", flush=True)
    started = time.monotonic()
    try:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_S,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        print(f"FAILED: not done in {TIMEOUT_S} s")
        return False
    if done.returncode:
        print(f"{done.stdout[-4000:]}\nFAILED: exit status {done.returncode}")
    else:
        print(f"ok, {time.monotonic() - started:.0f} s")
    return done.returncode == 0


def check(
    found: Iterable[Block], environment: dict[str, str], model: str, serve: Callable[[], tuple[str, object]]
) -> int:
    """Run what is marked; 1 if anything failed, or nothing was marked.

    Args:
        serve: starts a server; its address, and what ends it when it is dropped.
    """
    found = [*found]
    marked = sorted((block for block in found if block.marked), key=lambda block: block.needs_server)
    replace, server, failed = {"MODEL": model}, None, []
    for block in marked:
        if block.needs_server and server is None:
            address, server = serve()
            replace[_ADDRESS] = address
        if not run(block, environment, replace):
            failed.append(block.place)
    print(f"{len(marked)} blocks run, {len(found) - len(marked)} not marked and not run; failed: {failed or 'none'}")
    return bool(failed) or not marked


class _Served:
    """The server of `make serve`, until this object is closed."""

    def __init__(self) -> None:
        sys.path.insert(0, str(ROOT))
        from benchmark.common.server import ServerProcess, free_port

        port = free_port()
        self.address = f"127.0.0.1:{port}"
        log = ROOT / "build" / "docs-check.log"
        settings = {"VENV": sys.prefix, "PORT": str(port)}
        command = ["env", *(f"{name}={value}" for name, value in settings.items()), str(ROOT / "scripts" / "serve.sh")]
        command += ["--skip-server-warmup", "--sleep-on-idle"]
        self._process = ServerProcess(command, f"http://{self.address}", log)
        self._process.__enter__()

    def close(self) -> None:
        """End the server."""
        self._process.stop()


def main() -> int:
    """Check every document."""
    binaries = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    model = subprocess.run(
        [sys.executable, "-m", "sglang_mosaic.embedded_model"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()
    paths = [path for pattern in DOCUMENTS for path in sorted(ROOT.glob(pattern))]
    found = [block for path in paths for block in blocks(path, str(path.relative_to(ROOT)))]
    started: list[_Served] = []

    def serve() -> tuple[str, object]:
        started.append(_Served())
        return started[0].address, started[0]

    try:
        return check(found, environment, model, serve)
    finally:
        for server in started:
            server.close()


if __name__ == "__main__":
    sys.exit(main())
