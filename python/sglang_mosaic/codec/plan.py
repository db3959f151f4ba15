"""How an epoch spends a frame's bytes: bases, formats and sizes of every layer and head."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from mosaic_kernels.segment import REVISION, SegmentFormat
from mosaic_kernels.topk.segment import TopKFormat
from sglang_mosaic.codec.basis import LayerBasis
from sglang_mosaic.codec.selection import SelectionProfile

Format = SegmentFormat | TopKFormat


class HeadPlan(NamedTuple):
    """One KV head of one layer."""

    segment_bytes: int
    """Fixed size of its segments; every format fits."""
    formats: tuple[Format, ...]
    """What a segment may look like; byte 0 of its header says which."""
    k_weight: float
    """Relative squared error of the attention output per unit of summed squared error of a segment's rotated K."""
    v_weight: float
    """The same of V, before its channels are scaled (basis.py)."""
    selection: SelectionProfile
    """How its tokens are selected."""


class LayerPlan(NamedTuple):
    """One layer."""

    basis: LayerBasis
    heads: tuple[HeadPlan, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the layer's part of a frame."""
        return sum(head.segment_bytes for head in self.heads)


def plan_hash(layers: list[LayerPlan], page_size: int) -> str:
    """16 hexadecimal digits of everything that gives bytes their meaning."""
    digest = hashlib.sha256(f"{REVISION} {page_size}".encode())
    for layer in layers:
        digest.update(repr(layer.heads).encode())
        for matrix in layer.basis:
            digest.update(matrix.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
