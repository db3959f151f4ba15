"""Entropy coding of quantised coefficients whose spreads are known.

Coefficients of about the same spread make one stream. Where most are zero, a stream is a mask, eight to a byte, and the
others; so zstd's Huffman codes, which spend at least a bit on a symbol, never meet one that is worth much less.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from sglang_mosaic.manager.recompress.groups import FrameError
from sglang_mosaic.manager.recompress.parts import Reader

MASKED, PLAIN = 0, 1
DENSE = 0.7
"""Share of coefficients other than zero from which a mask does not pay."""


def parts(values: np.ndarray, ends: Sequence[int]) -> Iterator[np.ndarray]:
    """What `read` reads.

    Args:
        values: int32 [n], streams one after the other, within +-2^15.
        ends: of the streams; the last is n.
    """
    folded = np.where(values < 0, -2 * values - 1, 2 * values).astype(np.uint16)
    high = []
    for stream in np.split(folded, ends[:-1]):
        mask = stream != 0
        form = MASKED if np.count_nonzero(mask) < DENSE * len(stream) else PLAIN
        if form == MASKED:
            stream = stream[mask] - 1
        yield np.array([form, *len(stream).to_bytes(4, "little")], np.uint8)
        if form == MASKED:
            yield np.packbits(mask)
        yield stream.astype(np.uint8)
        high.append((stream >> 8).astype(np.uint8))
    yield np.concatenate(high)


def read(reader: Reader, ends: Sequence[int]) -> np.ndarray:
    """int32 [n] that `parts` was given.

    Raises:
        FrameError: they are not there.
    """
    masks: list[np.ndarray | None] = []
    streams = []
    for length in np.diff(ends, prepend=0).tolist():
        form, *count = reader.take(5).tolist()
        count = int.from_bytes(bytes(count), "little")
        if form == MASKED:
            nonzero = np.unpackbits(reader.take(-(-length // 8)), count=length).view(bool)
            masks.append(nonzero)
            expected = np.count_nonzero(nonzero)
        else:
            masks.append(None)
            expected = length
        if count != expected:
            raise FrameError(f"a stream of {expected} values says that it has {count}")
        streams.append(reader.take(count).astype(np.int32))
    high = reader.take(sum(map(len, streams))).astype(np.int32) << 8
    values = np.zeros(ends[-1], np.int32)
    at = start = 0
    for mask, stream, end in zip(masks, streams, ends, strict=True):
        stream += high[at : at + len(stream)]
        at += len(stream)
        if mask is None:
            values[start:end] = stream
        else:
            values[start:end][mask] = stream + 1
        start = end
    return values >> 1 ^ -(values & 1)
