"""Entropy coding of frames: planes of one kind and rung side by side, each with its own zstd frame.

What makes a frame smaller is that codes of one kind are distributed alike, and on coarser rungs take few values; there
is nothing to find twice, so the fastest level is as good as any (docs/manager.md has the figures). Packing loses
nothing: unpacking gives back the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sglang_mosaic.manager.recompress import coarsen
from sglang_mosaic.manager.recompress.groups import WORD, FrameError, FrameLayout, Groups, Kind
from sglang_mosaic.manager.recompress.parts import Reader, join


def pack(layout: FrameLayout, frame: np.ndarray, rungs: dict[Kind, np.ndarray]) -> bytes:
    """
    Args:
        frame: uint8 [frame bytes].
        rungs: of all groups, as `coarsen` gives them: what they leave constant is not stored.

    Raises:
        FrameError: the frame is not of this epoch.
    """
    numbers = layout.numbers(frame)
    kinds, rest = layout.take_apart(numbers)
    steps = np.concatenate([rungs[kind] for kind in kinds]) if kinds else np.empty(0, np.uint8)
    words = frame.view(np.uint32)
    return join((numbers, steps, *(words[at] for at in _streams(kinds, rungs)), words[rest]))


def unpack(layout: FrameLayout, data: bytes) -> np.ndarray:
    """The frame, uint8 [frame bytes].

    Raises:
        FrameError: they are not the bytes of a frame of this epoch.
    """
    reader = Reader(data)
    numbers = reader.take(len(layout.segments))
    layout.check(numbers)
    kinds, rest = layout.take_apart(numbers)
    steps = reader.take(sum(len(groups) for groups in kinds.values()))
    rungs, first = {}, 0
    for kind, groups in kinds.items():
        rungs[kind] = steps[first : first + len(groups)]
        first += len(groups)
        if rungs[kind].max() >= coarsen.rungs(kind):
            raise FrameError(f"a group is on rung {rungs[kind].max()} of {coarsen.rungs(kind)}")
    words = np.empty(layout.frame_bytes // WORD, np.uint32)
    for at in _streams(kinds, rungs):
        words[at] = reader.take(at.size * WORD).view(np.uint32).reshape(at.shape)
    for kind, groups in kinds.items():
        if kind.refinement_bits and rungs[kind].any():
            dropped = groups.refinement[rungs[kind] > 0]
            words[dropped] = coarsen.filling(kind.refinement_bits, dropped.shape[1] * WORD).view(np.uint32)
    words[rest] = reader.take(rest.size * WORD).view(np.uint32)
    reader.end()
    frame = words.view(np.uint8)
    if not np.array_equal(layout.numbers(frame), numbers):
        raise FrameError("a packed frame has other formats than it says")
    return frame


def _streams(kinds: dict[Kind, Groups], rungs: dict[Kind, np.ndarray]) -> Iterator[np.ndarray]:
    """Words of what is coded together, in order."""
    for kind, groups in kinds.items():
        for rung in range(coarsen.rungs(kind)):
            rows = np.flatnonzero(rungs[kind] == rung)
            if not len(rows):
                continue
            # Of all, no copy.
            chosen = slice(None) if len(rows) == len(groups) else rows
            yield groups.base[chosen]
            if rung == 0 and kind.refinement_bits:
                yield groups.refinement[chosen]
