"""The codec of pages that stay cold: transform coding (transform.py), restored to a frame of the page's own epoch.

A restored frame is made anew: the bytes depend on float32 products, so on the machine's linear algebra. A record that
was packed on another kind of machine may then not match its checksum, which makes it a miss.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

from sglang_mosaic.manager.recompress import symbols
from sglang_mosaic.manager.recompress.base import Packed
from sglang_mosaic.manager.recompress.bases import WeightedBases
from sglang_mosaic.manager.recompress.groups import FrameError, FrameLayout
from sglang_mosaic.manager.recompress.parts import Reader, join
from sglang_mosaic.manager.recompress.rope import Rope
from sglang_mosaic.manager.recompress.transform import Rows, Transform, quantise, step_size
from sglang_mosaic.manager.recompress.values import FrameValues

FINEST, COARSEST = -64, 0
"""Steps that are tried: 2^-16 to 1."""
RETRIES = 3
"""Finer steps that are tried when the frame made of the coefficients is over the limit."""
_HEAD = struct.Struct("<8sh")


class FrameRows(NamedTuple):
    """Frames of one epoch as weighted rows, and back. Pure."""

    layout: FrameLayout
    values: FrameValues
    bases: WeightedBases

    @classmethod
    def of(cls, epoch: bytes, rope: Rope) -> FrameRows:
        """
        Raises:
            FrameError: it is no epoch, or not one of equal heads.
        """
        layout = FrameLayout(epoch)
        return cls(layout, FrameValues(layout), WeightedBases(epoch, rope))

    def rows(self, frame: np.ndarray, position: int) -> Rows:
        """
        Raises:
            FrameError: of FrameValues.decode.
        """
        return self.bases.to_rows(*self.values.decode(frame), position)

    def frame(self, rows: Rows, position: int, numbers: np.ndarray, errors: np.ndarray) -> np.ndarray:
        """
        Raises:
            FrameError: of FrameValues.encode.
        """
        return self.values.encode(*self.bases.from_rows(*rows, position), numbers, errors)


class TransformCoding:
    """Packs frames of one epoch, each with the position of its first token.

    Raises:
        FrameError: the transform is for other pages.
    """

    def __init__(self, frames: FrameRows, transform: Transform) -> None:
        values = frames.values
        if transform.shape != (len(frames.layout.segments), values.tokens, values.k_dim, values.v_dim):
            raise FrameError("a transform of other pages")
        self._frames = frames
        self._transform = transform

    def pack(self, frame: np.ndarray, position: int, max_error: float) -> Packed | None:
        """
        Args:
            frame: uint8 [frame bytes].
            position: of its first token.
            max_error: of FrameCodec.pack, for the frame that `unpack` makes.

        Returns:
            None: the limit is used up, or nothing fits it.

        Raises:
            FrameError: the frame is not of this epoch, or not of bit planes.
        """
        numbers = self._frames.layout.numbers(frame)
        made = self._frames.layout.errors(frame).astype(np.float64) ** 2
        rows = self._frames.rows(frame, position)
        # What writing a frame loses by itself.
        again = self._frames.frame(rows, position, numbers, np.zeros(len(numbers), np.float32))
        room = max_error**2 - made.mean() - self._distances(rows, again, position).mean()
        if not room > 0:
            return None
        coarsest = self._coarsest(rows, room)
        for step in range(coarsest, max(coarsest - RETRIES, FINEST) - 1, -1):
            packed = self._pack(rows, position, step, numbers, made)
            errors = self._frames.layout.errors(packed.frame)
            if np.sqrt(np.square(errors.astype(np.float64)).mean()) <= max_error:
                return packed
        return None

    def unpack(self, data: bytes, position: int) -> np.ndarray:
        """A valid frame, uint8 [frame bytes].

        Raises:
            FrameError: they are not the bytes of a page of this epoch and transform.
        """
        reader = Reader(data)
        digest, step = _HEAD.unpack(reader.take(_HEAD.size).tobytes())
        if digest != self._transform.digest:
            raise FrameError("a page of another transform")
        if not FINEST <= step <= COARSEST:
            raise FrameError(f"a step of {step}")
        segments = len(self._frames.layout.segments)
        numbers = reader.take(segments)
        self._frames.layout.check(numbers)
        errors = reader.take(2 * segments).view(np.float16).astype(np.float32)
        codes = symbols.read(reader, self._transform.streams(step).tolist())
        reader.end()
        return self._frames.frame(self._rows(codes, step), position, numbers, errors)

    def _pack(self, rows: Rows, position: int, step: int, numbers: np.ndarray, made: np.ndarray) -> Packed:
        transform = self._transform
        ends = transform.streams(step)
        codes = quantise(transform.forward(rows)[transform.order[: ends[-1]]], step)
        codes = codes.clip(-(1 << 14), 1 << 14)
        restored = self._rows(codes, step)
        frame = self._frames.frame(restored, position, numbers, np.zeros(len(numbers), np.float32))
        errors = np.sqrt(made + self._distances(rows, frame, position)).astype(np.float16)
        self._frames.layout.put_errors(frame, errors.astype(np.float32))
        head = np.frombuffer(_HEAD.pack(transform.digest, step), np.uint8)
        return Packed(join((head, numbers, errors, *symbols.parts(codes, ends.tolist()))), frame)

    def _rows(self, codes: np.ndarray, step: int) -> Rows:
        coefficients = np.zeros(len(self._transform.order), np.float32)
        coefficients[self._transform.order[: len(codes)]] = codes * np.float32(step_size(step))
        return self._transform.inverse(coefficients)

    def _coarsest(self, rows: Rows, room: float) -> int:
        """The step that leaves the most error within `room`, a mean over segments; below FINEST: none does."""
        transform = self._transform
        coefficients = transform.forward(rows)
        left_out = self._distance(rows, transform.inverse(coefficients)).mean()
        coefficients = coefficients[transform.order]
        low, high = FINEST - 1, COARSEST
        while low < high:
            middle = (low + high + 1) // 2
            end = transform.streams(middle)[-1]
            lost = coefficients[:end] - quantise(coefficients[:end], middle) * np.float32(step_size(middle))
            squares = np.square(lost, dtype=np.float64).sum() + np.square(coefficients[end:], dtype=np.float64).sum()
            if squares / len(rows[0]) + left_out <= room:
                low = middle
            else:
                high = middle - 1
        return low

    def _distances(self, rows: Rows, frame: np.ndarray, position: int) -> np.ndarray:
        """Weighted squared distance of every segment of a page to that of a frame, float64 [S]."""
        return self._distance(rows, self._frames.rows(frame, position))

    @staticmethod
    def _distance(rows: Rows, others: Rows) -> np.ndarray:
        return sum(np.square(a - b, dtype=np.float64).sum((1, 2)) for a, b in zip(rows, others, strict=True))
