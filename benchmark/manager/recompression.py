"""What recompressing costs and gains: bytes, error and time of one core, for limits and for general compressors."""

from __future__ import annotations

import lzma
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import zstandard

from benchmark.codec.methods import PAGE
from benchmark.common.stats import percentile
from benchmark.manager.frames import RealFrames
from sglang_mosaic.codec.storage import epoch_to_bytes
from sglang_mosaic.manager.recompress.base import Packed
from sglang_mosaic.manager.recompress.cold import FrameRows, TransformCoding
from sglang_mosaic.manager.recompress.groups import FrameLayout
from sglang_mosaic.manager.recompress.planes import PlanesPacking
from sglang_mosaic.manager.recompress.rope import Rope
from sglang_mosaic.manager.recompress.transform import calibrate


def measure_limits(real: RealFrames, limits: Sequence[float], layout: FrameLayout) -> list[dict[str, Any]]:
    """A row for every error limit; the first is for frames as they come from the device."""
    frames = real.frames
    codec = PlanesPacking(layout)

    def unpack(data: bytes, page: int) -> np.ndarray:
        return codec.unpack(data)

    return [
        _row(real, "frames", None, [frame.tobytes() for frame in frames], frames),
        *(
            _measure(real, "coarser", limit, lambda page, limit=limit: codec.pack(frames[page], limit), unpack)
            for limit in limits
        ),
    ]


def measure_cold(
    real: RealFrames, limits: Sequence[float], rope: Rope, sample: Sequence[tuple[np.ndarray, int]]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row for every error limit of transform coding, and what its transform takes; it is learnt from `sample`, frames
    of other texts with their positions."""
    planes = FrameRows.of(epoch_to_bytes(real.epoch), rope)
    start = time.perf_counter()
    transform = calibrate(lambda: (planes.rows(*page) for page in sample))
    learning_s = time.perf_counter() - start
    codec = TransformCoding(planes, transform)
    rows = [
        _measure(
            real,
            "transform",
            limit,
            lambda page, limit=limit: _smaller(real, page, codec.pack(real.frames[page], real.position(page), limit)),
            lambda data, page: (
                codec.unpack(data, real.position(page)) if len(data) < real.frames.shape[1] else real.frames[page]
            ),
        )
        for limit in limits
    ]
    return rows, {"pages": len(sample), "seconds": learning_s, "bytes": len(transform.to_bytes())}


def _smaller(real: RealFrames, page: int, packed: Packed | None) -> Packed:
    """A page that is not smaller within the limit stays as it is."""
    frame = real.frames[page]
    return packed if packed is not None and len(packed.data) < len(frame) else Packed(frame.tobytes(), frame)


def _measure(
    real: RealFrames,
    codec: str,
    limit: float,
    pack: Callable[[int], Packed],
    unpack: Callable[[bytes, int], np.ndarray],
) -> dict[str, Any]:
    pack_s, unpack_s, packed, restored = [], [], [], []
    for page in range(len(real.frames)):
        start = time.perf_counter()
        result = pack(page)
        between = time.perf_counter()
        again = unpack(result.data, page)
        unpack_s.append(time.perf_counter() - between)
        pack_s.append(between - start)
        if not np.array_equal(again, result.frame):
            raise ValueError(f"a frame packed at the limit {limit} does not come back")
        packed.append(result.data)
        restored.append(again)
    row = _row(real, codec, limit, packed, np.stack(restored))
    for name, seconds in (("pack", pack_s), ("restore", unpack_s)):
        row[f"{name}_ms"] = percentile(seconds, 50) * 1e3
        row[f"{name}_mb_s"] = real.dense_bytes / percentile(seconds, 50) / 1e6
    return row


def _row(real: RealFrames, codec: str, limit: float | None, packed: list[bytes], frames: np.ndarray) -> dict[str, Any]:
    nbytes = sum(map(len, packed)) / len(packed)
    return {
        "codec": codec,
        "limit": limit,
        "bytes_per_token": nbytes / PAGE,
        "ratio": real.dense_bytes / nbytes,
        "error": real.output_error(frames),
        "pack_ms": None,
        "pack_mb_s": None,
        "restore_ms": None,
        "restore_mb_s": None,
    }


class _Compressor(NamedTuple):
    name: str
    compress: Callable[[bytes], bytes]
    decompress: Callable[[bytes], bytes]


def measure_compressors(real: RealFrames, layout: FrameLayout, pages: int) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for every compressor and layout of the bytes, and what is not installed."""
    compressors, missing = _compressors()
    layouts = {
        "as they are": [[frame.tobytes()] for frame in real.frames[:pages]],
        "by planes": [list(_planes(layout, frame)) for frame in real.frames[:pages]],
    }
    rows = []
    for name, parts in layouts.items():
        raw = sum(len(part) for page in parts for part in page)
        for compressor in compressors:
            start = time.perf_counter()
            packed = [[compressor.compress(part) for part in page] for page in parts]
            between = time.perf_counter()
            back = [[compressor.decompress(part) for part in page] for page in packed]
            end = time.perf_counter()
            if back != parts:
                raise ValueError(f"{compressor.name} does not give back what it was given")
            rows.append(
                {
                    "compressor": compressor.name,
                    "bytes": name,
                    "of_raw": sum(len(part) for page in packed for part in page) / raw,
                    "compress_mb_s": raw / (between - start) / 1e6,
                    "decompress_mb_s": raw / (end - between) / 1e6,
                }
            )
    return rows, missing


def _planes(layout: FrameLayout, frame: np.ndarray) -> Iterator[bytes]:
    """The bytes of a frame, planes of one kind side by side."""
    kinds, rest = layout.take_apart(layout.numbers(frame))
    words = frame.view(np.uint32)
    for groups in kinds.values():
        yield words[groups.base].tobytes()
        if groups.refinement.size:
            yield words[groups.refinement].tobytes()
    yield words[rest].tobytes()


def _compressors() -> tuple[list[_Compressor], list[str]]:
    found = [
        _Compressor(f"zstd {level}", zstandard.ZstdCompressor(level).compress, zstandard.ZstdDecompressor().decompress)
        for level in (-1, 1, 3, 6, 12, 19)
    ]
    found.append(_Compressor("zlib, Huffman only", _huffman_only, zlib.decompress))
    found.append(_Compressor("lzma 1", lambda data: lzma.compress(data, preset=1), lzma.decompress))
    missing = []
    try:
        lz4 = import_module("lz4.frame")
        found.append(_Compressor("lz4", lz4.compress, lz4.decompress))
    except ImportError:
        missing.append("lz4")
    try:
        brotli = import_module("brotli")
        for quality in (1, 5):
            found.append(_Compressor(f"brotli {quality}", partial(brotli.compress, quality=quality), brotli.decompress))
    except ImportError:
        missing.append("brotli")
    return found, missing


def _huffman_only(data: bytes) -> bytes:
    compressor = zlib.compressobj(6, strategy=zlib.Z_HUFFMAN_ONLY)
    return compressor.compress(data) + compressor.flush()


def layout_of(real: RealFrames) -> FrameLayout:
    """What a manager knows of the frames."""
    return FrameLayout(epoch_to_bytes(real.epoch))
