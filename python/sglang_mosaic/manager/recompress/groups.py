"""Where the codes of a frame lie, so that all groups of one kind can be worked on at once.

A *group* is 16 channels of one tensor of one segment: 64 codes a channel, in a base plane and perhaps a refinement
plane. The bytes of a frame are taken apart into the planes of its groups and the rest: headers, scales, mean values,
exceptions, padding, and whole segments of other strategies. Indices count words of four bytes, of which every row of a
group has one or two: a quarter of the work that bytes would be.
"""

from __future__ import annotations

import json
import math
import struct
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from mosaic_kernels.segment import ALIGNMENT, BASE_BITS, GROUP, V_STEPS, Plane, SegmentFormat, TensorPlanes
from mosaic_kernels.topk.segment import TopKFormat
from sglang_mosaic.errors import MosaicError

FORMAT, ERROR = 0, 4
"""First bytes of the parts of a segment's header, as codec/encoding.py has them: number of its format, its error."""
ERROR_BYTES = 4
WORD = 4
"""Bytes: planes begin and groups of a row end at a multiple of it (mosaic_kernels.segment.Plane)."""


class FrameError(MosaicError):
    """Bytes that are no frame of an epoch, or no epoch."""


class Kind(NamedTuple):
    """What groups have in common."""

    tensor: str
    """"k" or "v"."""
    bits: int
    """Of a code, base and refinement together."""

    @property
    def base_bits(self) -> int:
        return BASE_BITS[self.bits]

    @property
    def refinement_bits(self) -> int:
        return self.bits - self.base_bits


class _Members(NamedTuple):
    """Groups of one kind in one segment: the parts of `Groups`."""

    base: np.ndarray
    refinement: np.ndarray
    scales: np.ndarray
    weights: np.ndarray
    segments: np.ndarray
    numbers: np.ndarray


class Groups:
    """All n groups of one kind in a frame. Arrays are joined when they are asked for: restoring needs two of them."""

    def __init__(self, members: list[_Members]) -> None:
        self._members = members
        self._size = sum(len(member.segments) for member in members)

    def __len__(self) -> int:
        return self._size

    @cached_property
    def base(self) -> np.ndarray:
        """int32 [n, words of a base plane's group], row by row of the plane."""
        return np.concatenate([member.base for member in self._members])

    @cached_property
    def refinement(self) -> np.ndarray:
        """int32 [n, words], zero wide without refinement."""
        return np.concatenate([member.refinement for member in self._members])

    @property
    def scales(self) -> np.ndarray:
        """int32 [n, bytes], single bytes: 16 float16 scales of K's channels, or one for each of V's tokens."""
        return np.concatenate([member.scales for member in self._members])

    @property
    def weights(self) -> np.ndarray:
        """float64 [n, 16]: what a squared error of a channel's value counts in the attention output."""
        return np.concatenate([member.weights for member in self._members])

    @property
    def segments(self) -> np.ndarray:
        """int32 [n]: the segment that each group belongs to."""
        return np.concatenate([member.segments for member in self._members])

    @property
    def numbers(self) -> np.ndarray:
        """int32 [n]: which 16 channels of its segment each group has."""
        return np.concatenate([member.numbers for member in self._members])


class Segment(NamedTuple):
    """One KV head of one layer."""

    start: int
    nbytes: int
    formats: tuple[SegmentFormat | TopKFormat, ...]
    k_weight: float
    v_weights: np.ndarray
    """float64 [Dv]."""


class FrameLayout:
    """The frames of one epoch.

    Args:
        epoch: its bytes, as codec/storage.py writes them; read without torch.

    Raises:
        FrameError: they are none.
    """

    def __init__(self, epoch: bytes) -> None:
        try:
            self.segments = _segments(epoch)
        except (KeyError, IndexError, TypeError, ValueError, struct.error) as error:
            raise FrameError(f"not an epoch: {error}") from error
        self.frame_bytes = sum(segment.nbytes for segment in self.segments)
        self.headers = np.array([segment.start for segment in self.segments], np.int32)
        """int32 [segments]: first byte of every segment."""
        self._parts = lru_cache(maxsize=None)(self._part_of_segment)

    def numbers(self, frame: np.ndarray) -> np.ndarray:
        """Number of the format of every segment, uint8 [segments].

        Raises:
            FrameError: the frame has another length, or a segment a format that does not exist.
        """
        if frame.dtype != np.uint8 or frame.shape != (self.frame_bytes,):
            raise FrameError(f"a frame of this epoch has {self.frame_bytes} bytes, got {frame.dtype} {frame.shape}")
        numbers = frame[self.headers + FORMAT]
        self.check(numbers)
        return numbers

    def check(self, numbers: np.ndarray) -> None:
        """
        Raises:
            FrameError: there is a number that no segment's format has.
        """
        if len(numbers) != len(self.segments):
            raise FrameError(f"a frame of this epoch has {len(self.segments)} segments, got {len(numbers)}")
        for number, segment in zip(numbers.tolist(), self.segments, strict=True):
            if number >= len(segment.formats):
                raise FrameError(f"a segment has format {number} of {len(segment.formats)}")

    def errors(self, frame: np.ndarray) -> np.ndarray:
        """A view of the errors in the headers would not be aligned: a copy, float32 [segments]."""
        at = self.headers[:, None] + ERROR + np.arange(ERROR_BYTES, dtype=np.int32)
        return frame[at].view(np.float32)[:, 0]

    def put_errors(self, frame: np.ndarray, errors: np.ndarray) -> None:
        """Write the errors of all segments, float32 [segments], into their headers."""
        at = self.headers[:, None] + ERROR + np.arange(ERROR_BYTES, dtype=np.int32)
        frame[at] = errors.astype(np.float32)[:, None].view(np.uint8)

    def take_apart(self, numbers: np.ndarray) -> tuple[dict[Kind, Groups], np.ndarray]:
        """Groups of a frame with these formats, in a fixed order of kinds, and the words of the rest, int32."""
        parts = [self._parts(i, number) for i, number in enumerate(numbers.tolist())]
        members: dict[Kind, list[_Members]] = {}
        for of_segment, _ in parts:
            for kind, member in of_segment.items():
                members.setdefault(kind, []).append(member)
        groups = {kind: Groups(members[kind]) for kind in sorted(members)}
        return groups, np.concatenate([rest for _, rest in parts])

    def _part_of_segment(self, i: int, number: int) -> tuple[dict[Kind, _Members], np.ndarray]:
        segment = self.segments[i]
        fmt = segment.formats[number]
        rest = np.ones(segment.nbytes // WORD, bool)
        found: dict[Kind, list[tuple[Any, ...]]] = {}
        if isinstance(fmt, SegmentFormat):
            for tensor, planes in (("k", fmt.k), ("v", fmt.v)):
                for g, bits in enumerate(planes.bits):
                    if bits:
                        group = _group(fmt, segment, tensor, planes, g)
                        rest[group[0]] = rest[group[1]] = False
                        found.setdefault(Kind(tensor, bits), []).append((*group, i, g))
        groups = {}
        for kind, members in found.items():
            base, refinement, scales, weights, segments, numbers = (np.stack(x) for x in zip(*members, strict=True))
            groups[kind] = _Members(
                (base + segment.start // WORD).astype(np.int32),
                (refinement + segment.start // WORD).astype(np.int32),
                (scales + segment.start).astype(np.int32),
                weights,
                segments.astype(np.int32),
                numbers.astype(np.int32),
            )
        return groups, (np.flatnonzero(rest) + segment.start // WORD).astype(np.int32)


def epoch_hash(epoch: bytes) -> str:
    """The hash that the bytes of an epoch name.

    Raises:
        FrameError: they are none.
    """
    try:
        return str(read_header(epoch)["__metadata__"]["hash"])
    except (KeyError, TypeError, ValueError, struct.error) as error:
        raise FrameError(f"not an epoch: {error}") from error


def read_header(epoch: bytes) -> dict[str, Any]:
    """Header of a safetensors file: entries of its tensors, and the metadata."""
    (length,) = struct.unpack_from("<Q", epoch)
    return json.loads(epoch[8 : 8 + length])


def _group(
    fmt: SegmentFormat, segment: Segment, tensor: str, planes: TensorPlanes, g: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Words of base and refinement and bytes of scales within the segment, and the channels' weights, of one group."""
    base, refinement = (_words_of(fmt, runs, g) for runs in (planes.base, planes.refinement))
    if tensor == "k":
        scales = planes.scales + 2 * GROUP * g + np.arange(2 * GROUP)
        weights = np.full(GROUP, segment.k_weight)
    else:
        scales = planes.scales + np.arange(fmt.page_size)
        weights = segment.v_weights[g * GROUP : (g + 1) * GROUP] * V_STEPS[planes.bits[g]] ** 2
    return base, refinement, scales, weights


def _words_of(fmt: SegmentFormat, runs: tuple[Plane, ...], g: int) -> np.ndarray:
    for plane in runs:
        if plane.first <= g < plane.first + plane.groups:
            words = plane.group_bytes // WORD
            rows = np.arange(-(-fmt.page_size // plane.row_tokens))[:, None] * plane.groups * words
            return (plane.start // WORD + rows + (g - plane.first) * words + np.arange(words)).ravel()
    return np.empty(0, np.int64)


def _segments(epoch: bytes) -> list[Segment]:
    header = read_header(epoch)
    data = memoryview(epoch)[8 + struct.unpack_from("<Q", epoch)[0] :]
    segments, start = [], 0
    for layer, heads in enumerate(json.loads(header["__metadata__"]["heads"])):
        v_basis = read_tensor(header[f"{layer}.v_basis"], data)
        # As LayerBasis.v_weights has it: squared error of a value per squared error of a stored channel.
        of_channel = 1 / np.square(v_basis.astype(np.float64)).sum(1)
        for h, head in enumerate(heads):
            nbytes, k_weight, v_weight = head["segment_bytes"], float(head["k_weight"]), float(head["v_weight"])
            formats = tuple(_format(**fmt) for fmt in head["formats"])
            if nbytes % ALIGNMENT or any(fmt.segment_bytes > nbytes for fmt in formats):
                raise ValueError(f"a segment of {nbytes} bytes, which a format does not fit")
            segments.append(Segment(start, nbytes, formats, k_weight, of_channel[h] * v_weight))
            start += nbytes
    if not segments:
        raise ValueError("no layers")
    return segments


def read_tensor(entry: dict[str, Any], data: memoryview) -> np.ndarray:
    """A float32 tensor of a safetensors file, of which `data` is what follows the header."""
    start, stop = entry["data_offsets"]
    if entry["dtype"] != "F32" or stop - start != 4 * math.prod(entry["shape"]):
        raise ValueError(f"a tensor of {entry['dtype']}, expected float32")
    return np.frombuffer(data[start:stop], np.float32).reshape(entry["shape"])


def _format(strategy: str, **fields: Any) -> SegmentFormat | TopKFormat:
    fields = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
    return {"planes": SegmentFormat, "topk": TopKFormat}[strategy](**fields)
