"""Entropy coding of frames: planes of one kind and rung side by side, each with its own zstd frame.

What makes a frame smaller is that codes of one kind are distributed alike, and on coarser rungs take few values; there
is nothing to find twice, so the fastest level is as good as any (docs/manager.md has the figures). Packing loses
nothing: unpacking gives back the same bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
import zstandard

from sglang_mosaic.manager.recompress import coarsen
from sglang_mosaic.manager.recompress.groups import WORD, FrameError, FrameLayout, Groups, Kind

LEVEL = 1
_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(
    LEVEL, format=zstandard.FORMAT_ZSTD1_MAGICLESS, write_content_size=False, write_checksum=False
)
_LENGTH = struct.Struct("<I")


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
    compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
    words = frame.view(np.uint32)
    parts = []
    for data in (numbers, steps, *(words[at] for at in _streams(kinds, rungs)), words[rest]):
        packed = compressor.compress(np.ascontiguousarray(data))
        parts += [_LENGTH.pack(len(packed)), packed]
    return b"".join(parts)


def unpack(layout: FrameLayout, data: bytes) -> np.ndarray:
    """The frame, uint8 [frame bytes].

    Raises:
        FrameError: they are not the bytes of a frame of this epoch.
    """
    reader = _Reader(data)
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
            if len(rows) == len(groups):
                rows = slice(None)  # no copy
            yield groups.base[rows]
            if rung == 0 and kind.refinement_bits:
                yield groups.refinement[rows]


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self._at = 0
        self._decompressor = zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS)

    def take(self, nbytes: int) -> np.ndarray:
        """The next part, which must have so many bytes."""
        try:
            (length,) = _LENGTH.unpack_from(self._data, self._at)
            start = self._at + _LENGTH.size
            packed = self._data[start : start + length]
            if len(packed) != length:
                raise FrameError("a packed frame ends within a part")
            # One byte more than wanted, so that a longer part shows.
            data = self._decompressor.decompress(packed, max_output_size=nbytes + 1)
        except (struct.error, zstandard.ZstdError) as error:
            raise FrameError(f"a packed frame is damaged: {error}") from error
        if len(data) != nbytes:
            raise FrameError(f"a part of a packed frame has {len(data)} bytes, expected {nbytes}")
        self._at = start + length
        return np.frombuffer(data, np.uint8)

    def end(self) -> None:
        if self._at != len(self._data):
            raise FrameError(f"{len(self._data) - self._at} bytes follow a packed frame")
