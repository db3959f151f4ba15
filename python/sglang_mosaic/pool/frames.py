"""Free lists of the two kinds of frames, on the host."""

from __future__ import annotations

from sglang_mosaic.errors import CapacityError


class FrameList:
    """The free frames of one kind; ``first`` .. ``first + count - 1``, handed out lowest first at the start.

    Args:
        kind: name for messages.
        first: smallest frame number.
        count: number of frames.
    """

    def __init__(self, kind: str, first: int, count: int) -> None:
        self.kind = kind
        self.first = first
        self.count = count
        self.reset()

    def reset(self) -> None:
        self._free = list(range(self.first + self.count - 1, self.first - 1, -1))

    @property
    def free(self) -> int:
        """Number of free frames."""
        return len(self._free)

    @property
    def used(self) -> int:
        return self.count - len(self._free)

    def take(self) -> int:
        """One free frame.

        Raises:
            CapacityError: none is left.
        """
        if not self._free:
            raise CapacityError(f"no free {self.kind} frame left of {self.count}")
        return self._free.pop()

    def give_back(self, frame: int) -> None:
        self._free.append(frame)

    def snapshot(self) -> list[int]:
        """The free frames, for audits."""
        return list(self._free)
