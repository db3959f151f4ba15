"""Compression of KV pages: calibrated epochs and the bytes of a page.

`Codec` and `Epoch` (base.py) are what the pool and the attention backend use; `PlanesCodec` (planes.py) is the codec,
`baselines/` has others to compare with. This floor imports torch, `mosaic_kernels` and the errors, nothing of the pool
or the cache.
"""

from sglang_mosaic.codec.base import Codec, Epoch, LayerSample
from sglang_mosaic.codec.planes import PlanesCodec, PlanesEpoch

__all__ = ["Codec", "Epoch", "LayerSample", "PlanesCodec", "PlanesEpoch"]
