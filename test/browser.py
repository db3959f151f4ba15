"""A headless Chromium for tests of pages, driven through its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
INSTALL = "no headless Chromium: on Debian, apt-get install chromium-headless-shell fonts-dejavu-core"


def find_browser() -> str | None:
    """Path of a Chromium on this machine."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab of a browser of its own; a context manager.

    Args:
        executable: as `find_browser` gives it.
        profile: an empty directory.
        size: width and height of the window, pixels.
    """

    def __init__(self, executable: str, profile: Path, size: tuple[int, int] = (1200, 1500)) -> None:
        self._profile = profile
        # Without a sandbox, which root cannot have; it shows nothing but pages of this machine.
        self._process = subprocess.Popen(
            [
                *(executable, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
                *("--remote-debugging-port=0", f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"),
                *("--no-first-run", "--disable-background-networking", "--disable-component-update", "about:blank"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # Its renderers outlive it otherwise: they are killed with it, as one group.
            start_new_session=True,
        )
        self._loop = asyncio.new_event_loop()
        self._numbers = itertools.count(1)
        try:
            self._wait(self._connect())
        except BaseException:
            self._kill()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kill()
        self._wait(self._http.close())
        self._loop.close()

    def _kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def go(self, url: str) -> None:
        """Load a page."""
        self._call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, javascript: str) -> Any:
        """Value of an expression in the page."""
        reply = self._call("Runtime.evaluate", expression=javascript, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def wait_for(self, javascript: str, patience_s: float = 30) -> None:
        """Wait until an expression in the page is true."""
        deadline = time.monotonic() + patience_s
        while not self.run(javascript):
            assert time.monotonic() < deadline, f"not in {patience_s} s: {javascript}; {self.text()[:2000]}"
            time.sleep(0.1)

    def text(self) -> str:
        """What the page shows."""
        return self.run("document.body.innerText")

    def screenshot(self, path: Path) -> None:
        """Write the window as a PNG."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._wait(self._ask(method, parameters))

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(asyncio.wait_for(work, 60))

    async def _connect(self) -> None:
        port_file = self._profile / "DevToolsActivePort"
        while not port_file.exists() or "\n" not in port_file.read_text():
            assert self._process.poll() is None, f"the browser ended with exit status {self._process.returncode}"
            await asyncio.sleep(0.05)
        address = f"http://127.0.0.1:{port_file.read_text().splitlines()[0]}"
        self._http = aiohttp.ClientSession()
        async with self._http.get(f"{address}/json/list") as reply:
            tab = next(target for target in await reply.json() if target["type"] == "page")
        self._socket = await self._http.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)

    async def _ask(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
