"""Parts of bytes, each with its own zstd frame, one after the other.

The fastest level is as good as any where symbols are all that there is to code (docs/manager.md).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

import numpy as np
import zstandard

from sglang_mosaic.manager.recompress.groups import FrameError

LEVEL = 1
_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(
    LEVEL, format=zstandard.FORMAT_ZSTD1_MAGICLESS, write_content_size=False, write_checksum=False
)
_LENGTH = struct.Struct("<I")


def join(parts: Iterable[np.ndarray]) -> bytes:
    """Arrays of any dtype, compressed one by one."""
    compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
    joined = []
    for part in parts:
        packed = compressor.compress(np.ascontiguousarray(part).data)
        joined += [_LENGTH.pack(len(packed)), packed]
    return b"".join(joined)


class Reader:
    """Takes parts out again, in order."""

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
        """Nothing may be left."""
        if self._at != len(self._data):
            raise FrameError(f"{len(self._data) - self._at} bytes follow a packed frame")
