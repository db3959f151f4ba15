"""Server-sent events of the OpenAI streaming API, from raw bytes to decoded JSON events."""

from __future__ import annotations

import json
from typing import Any


class EventStream:
    """Incremental parser: feed the bytes as they arrive, get the JSON events that became complete.

    Chunks may end anywhere, inside a line or a multi-byte character too. Comment lines and fields other than `data`
    are skipped; `data: [DONE]` sets `done` and is not returned.
    """

    def __init__(self) -> None:
        self.done = False
        self._pending = b""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[dict[str, Any]]:
        """Take the next bytes of the body; return the events that they complete, in order."""
        *lines, self._pending = (self._pending + chunk).split(b"\n")
        events = []
        for line in lines:
            event = self._take_line(line.rstrip(b"\r").decode())
            if event is not None:
                events.append(event)
        return events

    def _take_line(self, line: str) -> dict[str, Any] | None:
        if line.startswith("data:"):
            self._data.append(line[len("data:") :].removeprefix(" "))
            return None
        if line or not self._data:
            return None
        payload, self._data = "\n".join(self._data), []
        if payload == "[DONE]":
            self.done = True
            return None
        return json.loads(payload)
