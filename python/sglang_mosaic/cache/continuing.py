"""Which decode steps may go on with the selection of an earlier one (`--mosaic-select-steps`)."""

from __future__ import annotations

from collections.abc import Sequence


class Continuing:
    """Remembers the step that selected last.

    A later one goes on with it while the same requests are decoded, by one token each, and no page was compressed
    since: then it would select from the same pages.

    Args:
        steps: that share a selection, the one that selects included.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._last: tuple[object, tuple[object, ...], tuple[int, ...], int] | None = None
        self._age = 0

    def goes_on(self, buffers: object, requests: Sequence[object], lengths: Sequence[int], encoded: int) -> bool:
        """Whether this step may read what the last one did. Call once a step, in order.

        Args:
            buffers: where a selection is kept; steps with other buffers do not know it.
            requests: who is decoded; lengths: their tokens.
            encoded: pages compressed so far.
        """
        before = tuple(length - 1 for length in lengths)
        follows = self._last is not None and (
            self._last[0] is buffers and self._last[1:] == (tuple(requests), before, encoded)
        )
        self._age = self._age + 1 if follows else 0
        self._last = buffers, tuple(requests), tuple(lengths), encoded
        if self._age >= self._steps:
            self._age = 0
        return self._age > 0

    def forget(self) -> None:
        """The last step kept nothing."""
        self._last = None
