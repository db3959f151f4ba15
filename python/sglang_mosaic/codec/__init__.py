"""Compression of KV pages: calibrated bases and the bytes of a page.

A page of one layer becomes a frame: one segment per KV head, each of a fixed size. `SegmentCodec` (base.py) is what the
pool and the attention backend use; `PlanesCodec` (planes.py) is the codec. This floor imports torch, `mosaic_kernels`
and the errors, nothing of the pool or the cache.
"""

from sglang_mosaic.codec.base import SegmentCodec
from sglang_mosaic.codec.planes import PlanesCodec

__all__ = ["PlanesCodec", "SegmentCodec"]
