"""What a server's log says of trouble."""

from __future__ import annotations

import re
from pathlib import Path

_TROUBLE = re.compile(r"Traceback|[A-Z]\w*(?:Error|Exception)\b|\bERROR\b|\bleak|invariant|violat", re.IGNORECASE)
# SGLang's settings, optional parts of it that are not installed, clients that hung up, and ranks that share a node.
_HARMLESS = re.compile(
    r"server_args=|No module named|Ignore import error when loading|disconnected from the client side"
    r"|is larger than numa node number"
)
# Without a warm-up SGLang 0.5.23 asks itself over HTTP to tidy up before it listens, and logs that nobody answered.
_GC_RACE = re.compile(r"post-warmup freeze_gc failed\n(?:(?!\[\d{4}-).*\n)*")
LINE = 300
"""Characters of a line that are told."""


def trouble(log: Path, provoked: str = r"(?!)") -> list[str]:
    """Lines of a server's log that tell of an exception, a leak or a violated invariant.

    Args:
        provoked: a regular expression of lines that were asked for; by default none.
    """
    lines = _GC_RACE.sub("", log.read_text(errors="replace")).splitlines()
    return [
        line[:LINE]
        for line in lines
        if _TROUBLE.search(line) and not (_HARMLESS.search(line) or re.search(provoked, line))
    ]
