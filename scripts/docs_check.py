"""Runs the commands of the documents as a reader would, on a machine without a GPU.

Every block of ```sh has one of these lines right above it, which the rendered page does not show:

    <!-- runs on a CPU -->
    <!-- runs on a CPU, with a server -->
    <!-- serves on a CPU -->
    <!-- needs a GPU -->

Blocks run in the repository's root by bash, which stops at the first command that fails. "With a server" is that of
`make serve`, on a free port that takes the place of 127.0.0.1:30000. A block that serves is ended once it answers
there. MODEL stands for the default model. What would take hours is shortened, by replacing text before it runs:

    <!-- runs on a CPU; --samples 50 => --samples 1; --length 4096 => --length 1024 -->

A block without such a line, and text to be replaced that is not there, are failures. Arguments choose blocks by how
their places begin: `docs/manager.md`, `README.md:138`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/*.md")
TIMEOUT_S = 1800
SCRATCH = "build/docs-check"
"""Where shortened commands write what would lie about; empty when a check begins."""
_KINDS = RUNS, ASKS, SERVES, GPU = (
    "runs on a CPU",
    "runs on a CPU, with a server",
    "serves on a CPU",
    "needs a GPU",
)
_BLOCK = re.compile(
    rf"(?:^<!-- ({'|'.join(_KINDS)})((?:; .+? => .+?)*) -->\n)?^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
_ADDRESS = "127.0.0.1:30000"


@dataclasses.dataclass(frozen=True)
class Block:
    """Commands of a document."""

    place: str
    """File and line."""
    text: str
    kind: str | None
    """None: it is not marked."""
    shortened: tuple[tuple[str, str], ...] = ()
    """What is replaced, and by what."""


def blocks(path: Path, name: str) -> list[Block]:
    """Every block of shell commands in a document."""
    text = path.read_text()
    return [
        Block(
            f"{name}:{text.count(chr(10), 0, match.start(3)) + 1}",
            match[3],
            match[1],
            tuple(tuple(pair.split(" => ", 1)) for pair in (match[2] or "").split("; ") if pair),
        )
        for match in _BLOCK.finditer(text)
    ]


def commands(block: Block, replace: dict[str, str]) -> str:
    """What is run.

    Raises:
        ValueError: the block lacks what is to be shortened.
    """
    text = block.text
    for written, meant in block.shortened:
        if written not in text:
            raise ValueError(f"{block.place}: {written!r} is to be replaced and is not there")
        text = text.replace(written, meant)
    for written, meant in replace.items():
        text = re.sub(rf"(?<![$\w]){re.escape(written)}(?![\w=])", meant, text)
    return text


def run(text: str, environment: dict[str, str]) -> bool:
    """Run commands; False: one failed, whose output was shown."""
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


def serve_until_it_answers(text: str, environment: dict[str, str]) -> bool:
    """Start a server that listens where the documents say, and end it; False: it did not come."""
    from benchmark.common.errors import BenchmarkError
    from benchmark.common.server import ServerProcess

    host, _, port = _ADDRESS.partition(":")
    with socket.socket() as probe:
        if probe.connect_ex((host, int(port))) == 0:
            print(f"FAILED: something listens at {_ADDRESS} already; end it first")
            return False
    settings = [f"{name}={value}" for name, value in environment.items()]
    argv = ["env", "-i", *settings, "bash", "-euo", "pipefail", "-c", text]
    started = time.monotonic()
    try:
        with ServerProcess(argv, f"http://{_ADDRESS}", ROOT / SCRATCH / "serve.log", TIMEOUT_S):
            print(f"ok, it answered after {time.monotonic() - started:.0f} s")
    except BenchmarkError as error:
        print(f"FAILED: {error}")
        return False
    return True


def check(
    found: Iterable[Block], environment: dict[str, str], model: str, serve: Callable[[], tuple[str, object]]
) -> int:
    """Run all that a CPU can; 1 if anything failed or is not marked, or there is nothing.

    Args:
        serve: starts a server; its address, and what ends it when it is dropped.
    """
    found = [*found]
    failed = [block.place for block in found if block.kind is None]
    replace, server, done = {"MODEL": model}, None, 0
    # Those that listen at the port of the documents come before the server, which takes another.
    for block in sorted(
        (b for b in found if b.kind not in (None, GPU)), key=lambda b: (b.kind == ASKS, b.kind != SERVES)
    ):
        if block.kind == ASKS and server is None:
            address, server = serve()
            replace[_ADDRESS] = address
        try:
            text = commands(block, replace)
        except ValueError as error:
            print(f"FAILED: {error}")
            failed.append(block.place)
            continue
        print(f"--- {block.place}\n{text}", end="", flush=True)
        done += 1
        if not (serve_until_it_answers if block.kind == SERVES else run)(text, environment):
            failed.append(block.place)
    on_gpu = [block.place for block in found if block.kind == GPU]
    print(f"{done} blocks run; need a GPU: {', '.join(on_gpu) or 'none'}; failed or not marked: {failed or 'none'}")
    return bool(failed) or not done


class _Served:
    """The server of `make serve`, until this object is closed."""

    def __init__(self) -> None:
        from benchmark.common.server import ServerProcess, free_port

        port = free_port()
        self.address = f"127.0.0.1:{port}"
        log = ROOT / SCRATCH / "with-a-server.log"
        settings = {"VENV": sys.prefix, "PORT": str(port)}
        command = ["env", *(f"{name}={value}" for name, value in settings.items()), str(ROOT / "scripts" / "serve.sh")]
        # What asks it how much compression costs would say that there was none.
        command += ["--skip-server-warmup", "--sleep-on-idle", "--mosaic-encode", "seal"]
        self._process = ServerProcess(command, f"http://{self.address}", log)
        self._process.__enter__()

    def close(self) -> None:
        """End the server."""
        self._process.stop()


def main() -> int:
    """Check every document."""
    sys.path.insert(0, str(ROOT))
    shutil.rmtree(ROOT / SCRATCH, ignore_errors=True)
    (ROOT / SCRATCH).mkdir(parents=True)
    binaries = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    model = subprocess.run(
        [sys.executable, "-m", "sglang_mosaic.embedded_model"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()
    paths = [path for pattern in DOCUMENTS for path in sorted(ROOT.glob(pattern))]
    found = [block for path in paths for block in blocks(path, str(path.relative_to(ROOT)))]
    wanted = tuple(sys.argv[1:]) or ("",)
    found = [block for block in found if block.place.startswith(wanted)]
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
