"""Frames <-> the K and V that they stand for, without torch: all segments at a time, kind by kind.

Reading agrees with the codec's own decoder. Writing makes a valid frame of given formats by the codec's rules
(mosaic_kernels.segment_encode.quantise), but for two shortcuts: V's scale is the middle one of the three that the codec
tries, which costs 1 to 3% of the error (docs/codec.md), and formats with exception tokens get those that come first.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from mosaic_kernels.segment import GROUP, V_STEPS, SegmentFormat
from sglang_mosaic.manager.recompress.coarsen import codes_of, planes
from sglang_mosaic.manager.recompress.groups import FORMAT, FrameError, FrameLayout, Groups, Kind

K_COVERS = {1: 0.5, 2: 0.85}
"""As mosaic_kernels.segment_encode.quantise has it: share of a channel's range that the levels of few bits cover."""
V_ANCHOR, V_MORE, V_LAST = 3.0, 1, 0x7C00 // 128 - 1
"""A token's scale is a third of its largest value, and one byte more; the last byte that is finite."""


class Tables(NamedTuple):
    """Where the tables of all S segments lie in a frame of given formats; single bytes."""

    offsets: np.ndarray
    """[S, 2 Dk], float16."""
    means: np.ndarray
    """[S, Dv], int8."""
    mean_scales: np.ndarray
    """[S]."""
    v_coded: np.ndarray
    """bool [S, 1, Dv]: channels that have codes."""
    exceptions: list[int]
    """Segments with exception tokens."""


class FrameValues:
    """
    Args:
        layout: of the epoch.

    Raises:
        FrameError: its heads differ in their dimensions, or have no format of bit planes.
    """

    def __init__(self, layout: FrameLayout) -> None:
        self._layout = layout
        formats = [next((f for f in s.formats if isinstance(f, SegmentFormat)), None) for s in layout.segments]
        shapes = {(f.page_size, f.k_dim, f.v_dim) for f in formats if f is not None}
        if len(shapes) != 1 or None in formats:
            raise FrameError("heads of different dimensions")
        self.tokens, self.k_dim, self.v_dim = shapes.pop()
        self._tables = lru_cache(maxsize=64)(self._tables_of)

    def decode(self, frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Stored K [S, T, Dk] and V [S, T, Dv], float32, of a frame's S segments.

        Raises:
            FrameError: the frame is not of this epoch, or has a segment that is not of bit planes.
        """
        numbers = self._layout.numbers(frame)
        tables = self._tables(numbers.tobytes())
        segments = len(numbers)
        offsets = frame[tables.offsets].view(np.float16).astype(np.float32)
        means = frame[tables.means].view(np.int8) * _scales(frame[tables.mean_scales])[:, None]
        k = np.repeat(offsets[:, None], self.tokens, 1)
        v = np.repeat(means[:, None].astype(np.float32), self.tokens, 1)
        by_group = {"k": k.reshape(segments, self.tokens, -1, GROUP), "v": v.reshape(segments, self.tokens, -1, GROUP)}
        for kind, groups in self._layout.take_apart(numbers)[0].items():
            codes = codes_of(kind, *planes(frame, groups)).astype(np.float32)
            at = groups.segments, slice(None), groups.numbers
            scales = frame[groups.scales]
            if kind.tensor == "k":
                by_group["k"][at] += codes * scales.view(np.float16).astype(np.float32)[:, None]
            else:
                codes -= ((1 << kind.bits) - 1) / 2
                by_group["v"][at] = codes * (V_STEPS[kind.bits] * _scales(scales))[:, :, None]
        for s in tables.exceptions:
            tokens, *rows = self._exceptions(frame, s, int(numbers[s]))
            for x, row in zip((k, v), rows, strict=True):
                x[s, tokens] = row.view(np.float16)
        return k, v

    def encode(self, k: np.ndarray, v: np.ndarray, numbers: np.ndarray, errors: np.ndarray) -> np.ndarray:
        """A frame, uint8 [frame bytes].

        Args:
            k: stored, float32 [S, T, Dk]; v: float32 [S, T, Dv].
            numbers: uint8 [S], formats, all of bit planes.
            errors: float32 [S], for the headers.

        Raises:
            FrameError: a format does not exist, or a value does not fit it.
        """
        layout = self._layout
        layout.check(numbers)
        tables = self._tables(numbers.tobytes())
        frame = np.zeros(layout.frame_bytes, np.uint8)
        frame[layout.headers + FORMAT] = numbers
        layout.put_errors(frame, errors)
        low, high, offsets = k.min(1), k.max(1), k.mean(1)
        if not (np.isfinite(low).all() and np.isfinite(high).all() and np.isfinite(v).all()):
            raise FrameError("a value is not finite")
        means = v.mean(1)
        mean_bytes = _scale_bytes(np.abs(means).max(1) / 127, 127)
        frame[tables.mean_scales] = mean_bytes
        frame[tables.means] = (
            np.rint(means / _divisor(_scales(mean_bytes))[:, None]).clip(-127, 127).astype(np.int8).view(np.uint8)
        )
        largest = np.abs(np.where(tables.v_coded, v, 0)).max(2) if tables.v_coded.any() else np.zeros(v.shape[:2])
        v_bytes = np.minimum(_scale_bytes(largest / V_ANCHOR, 64).astype(int) + V_MORE, V_LAST).astype(np.uint8)
        v_units = 1 / _divisor(_scales(v_bytes))
        words = frame.view(np.uint32)
        for kind, groups in layout.take_apart(numbers)[0].items():
            s, g = groups.segments, groups.numbers
            top = (1 << kind.bits) - 1
            if kind.tensor == "k":
                least, most = (x.reshape(len(x), -1, GROUP)[s, g] for x in (low, high))
                scales = ((most - least) * (K_COVERS.get(kind.bits, 1.0) / top)).astype(np.float16)
                starts = ((most + least) / 2 - scales * np.float32(top / 2)).astype(np.float16).astype(np.float32)
                offsets.reshape(len(offsets), -1, GROUP)[s, g] = starts
                frame[groups.scales] = scales.view(np.uint8)
                codes = k.reshape(*k.shape[:2], -1, GROUP)[s, :, g]
                codes -= starts[:, None]
                codes *= (1 / _divisor(scales.astype(np.float32)))[:, None]
            else:
                frame[groups.scales] = v_bytes[s]
                codes = v.reshape(*v.shape[:2], -1, GROUP)[s, :, g]
                codes *= (v_units[s] / V_STEPS[kind.bits])[:, :, None]
                codes += top / 2
            _put_codes(words, kind, groups, np.rint(codes, out=codes).clip(0, top).astype(np.uint8))
        frame[tables.offsets] = offsets.astype(np.float16).view(np.uint8)
        for i in tables.exceptions:
            self._put_exceptions(frame, i, int(numbers[i]), k[i], v[i])
        return frame

    def _exceptions(self, frame: np.ndarray, s: int, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Views of a segment's exceptions: tokens uint8 [n], and the bytes of K [n, 2 Dk] and V [n, 2 Dv]."""
        segment = self._layout.segments[s]
        fmt = segment.formats[number]
        assert isinstance(fmt, SegmentFormat)  # others have no tables
        n = fmt.exceptions
        starts = (fmt.exception_tokens, n), (fmt.exception_k, 2 * n * fmt.k_dim), (fmt.exception_v, 2 * n * fmt.v_dim)
        views = [frame[segment.start + start : segment.start + start + nbytes] for start, nbytes in starts]
        if views[0].max() >= self.tokens:
            raise FrameError("an exception token beyond the page")
        return views[0], views[1].reshape(n, -1), views[2].reshape(n, -1)

    def _put_exceptions(self, frame: np.ndarray, s: int, number: int, k: np.ndarray, v: np.ndarray) -> None:
        tokens, *rows = self._exceptions(frame, s, number)
        tokens[:] = np.arange(len(tokens))
        for x, row in zip((k, v), rows, strict=True):
            row[:] = x[: len(tokens)].astype(np.float16).view(np.uint8)

    def _tables_of(self, numbers: bytes) -> Tables:
        segments = self._layout.segments
        named = [segment.formats[number] for segment, number in zip(segments, numbers, strict=True)]
        chosen = [fmt for fmt in named if isinstance(fmt, SegmentFormat)]
        if len(chosen) < len(named):
            raise FrameError("a segment that is not of bit planes")
        starts = np.array([segment.start for segment in segments])
        offsets = starts + np.array([fmt.k.offsets for fmt in chosen])
        means = starts + np.array([fmt.mean_v for fmt in chosen])
        return Tables(
            offsets[:, None] + np.arange(2 * self.k_dim),
            means[:, None] + np.arange(self.v_dim),
            starts + np.array([fmt.mean_scale for fmt in chosen]),
            np.array([np.arange(self.v_dim) < fmt.v.coded for fmt in chosen])[:, None],
            [s for s, fmt in enumerate(chosen) if fmt.exceptions],
        )


def _scales(data: np.ndarray) -> np.ndarray:
    """Bytes of scales -> float32."""
    return (data.astype(np.uint16) << 7).view(np.float16).astype(np.float32)


def _scale_bytes(needed: np.ndarray, rounding: int) -> np.ndarray:
    """Non-negative values with 3 bits of mantissa, uint8: 127 rounds up, 64 to the nearest."""
    halves = np.minimum(needed, 65000).astype(np.float16).view(np.uint16)
    return np.minimum((halves + np.uint16(rounding)) >> 7, V_LAST).astype(np.uint8)


def _divisor(scales: np.ndarray) -> np.ndarray:
    return np.where(scales > 0, scales, np.float32(1))


def _put_codes(words: np.ndarray, kind: Kind, groups: Groups, codes: np.ndarray) -> None:
    """Codes uint8 [n, T, 16] into the planes of their groups."""
    words[groups.base] = _packed(codes >> kind.refinement_bits, kind.base_bits)
    if kind.refinement_bits:
        words[groups.refinement] = _packed(codes & ((1 << kind.refinement_bits) - 1), kind.refinement_bits)


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint32 [n, words] of one plane (mosaic_kernels.segment.Plane has the order)."""
    parts = codes.reshape(len(codes), -1, 8 // bits, 4 if bits == 1 else 2 * bits)
    packed = parts[:, :, 0].copy()
    for i in range(1, 8 // bits):
        packed |= parts[:, :, i] << np.uint8(i * bits)
    return packed.reshape(len(codes), -1).view(np.uint32)
