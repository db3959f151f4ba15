"""The one exception that benchmark scripts print without a traceback."""

from __future__ import annotations


class BenchmarkError(RuntimeError):
    """The run cannot go on; the message names the setting, what was found and what to change."""
