"""The codec of the first release: fixed bit patterns in calibrated bases."""

from __future__ import annotations

import hashlib

import torch

from mosaic_kernels.segment import GROUP, SegmentFormat
from mosaic_kernels.segment_decode.reference import decode
from mosaic_kernels.segment_encode.reference import encode
from sglang_mosaic.codec.base import SegmentCodec
from sglang_mosaic.codec.basis import LayerBasis, calibrate
from sglang_mosaic.codec.statistics import SecondMoments
from sglang_mosaic.errors import MosaicError


def default_format(k_dim: int, v_dim: int) -> SegmentFormat:
    """The default pattern: 4 bits in every channel of K and V, 3.56x smaller than bfloat16 with everything counted.

    Error of the attention output, SmolLM2-135M / Qwen2.5-Coder-0.5B, 2,816 tokens of a novel, end pages exact:
    .038 / .057; KIVI at the same bytes .043 / .059; 8422 for K .069 / .078. With nothing exact .075 / .092, KIVI .091 /
    .110; an exact exception token per segment .058 / .072, but only 3.37x; per-channel scales for V .206 / .166.
    """
    return SegmentFormat(k_dim=k_dim, v_dim=v_dim, k_bits=(4,) * (k_dim // GROUP), v_bits=(4,) * (v_dim // GROUP))


class PlanesCodec(SegmentCodec):
    """Fixed bits per group of 16 channels; scales per channel and segment for K, per token and 32 channels for V.

    Sources: the axes of the scales from KIVI (arXiv 2402.02750); segments, bases from an SVD and spending bytes by
    importance from MosaicKV (arXiv 2607.00760).

    Args:
        layers: layers of the pool.
        heads: KV heads of this rank.
        k_dim, v_dim: channels of K and V, multiples of 16.
        fmt: format of a segment; None takes `default_format`.
        query_budget: tokens per layer whose queries are observed.
        device: where K, V and queries are.

    Raises:
        ValueError: naming the argument that does not fit.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        k_dim: int,
        v_dim: int,
        *,
        fmt: SegmentFormat | None = None,
        query_budget: int = 8192,
        device: torch.device | str = "cpu",
    ):
        self.format = fmt or default_format(k_dim, v_dim)
        if (self.format.k_dim, self.format.v_dim) != (k_dim, v_dim):
            raise ValueError(f"fmt is for k_dim={self.format.k_dim}, v_dim={self.format.v_dim}, got {k_dim}, {v_dim}")
        for name, count in (("layers", layers), ("heads", heads), ("query_budget", query_budget)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        self._heads = heads
        self._device = torch.device(device)
        self._bases: list[LayerBasis | None] = [None] * layers
        self._moments = SecondMoments(layers, heads, k_dim, query_budget, device)
        self._revision: str | None = None

    @property
    def frame_bytes(self) -> int:
        return self._heads * self.format.segment_bytes

    @property
    def ratio(self) -> float:
        return self.format.ratio

    @property
    def calibrated(self) -> bool:
        return all(basis is not None for basis in self._bases)

    @property
    def revision(self) -> str:
        if self._revision is None:
            digest = hashlib.sha256(repr(self.format).encode())
            for layer, basis in enumerate(self._bases):
                for matrix in (basis.k_basis, basis.v_basis) if basis else ():
                    digest.update(layer.to_bytes(4, "little") + matrix.cpu().numpy().tobytes())
            self._revision = digest.hexdigest()[:16]
        return self._revision

    @property
    def table_bytes(self) -> int:
        # Four float32 matrices a head: two for K and queries, two for V and outputs (basis.py).
        matrices = 2 * (self.format.k_dim**2 + self.format.v_dim**2)
        return len(self._bases) * self._heads * matrices * torch.float32.itemsize

    @property
    def state_bytes(self) -> int:
        return self._moments.nbytes + sum(matrix.nbytes for basis in self._bases if basis for matrix in basis)

    def observe_queries(self, layer: int, q: torch.Tensor) -> None:
        if not self._moments.full(layer):
            self._moments.observe(layer, q)

    def calibrate(self, layer: int, k_sample: torch.Tensor, v_sample: torch.Tensor) -> None:
        if self._bases[layer] is not None:
            raise MosaicError(f"layer {layer} is calibrated already: pages encoded with its bases would be misread")
        for name, sample, dim in (("k_sample", k_sample, self.format.k_dim), ("v_sample", v_sample, self.format.v_dim)):
            if sample.shape[1:] != (self._heads, dim):
                raise ValueError(f"{name} must be [N, {self._heads}, {dim}], got {tuple(sample.shape)}")
        basis = calibrate(self._moments.moment(layer), k_sample, v_sample)
        self._bases[layer] = LayerBasis(*(matrix.to(self._device) for matrix in basis))
        self._moments.forget(layer)
        self._revision = None

    def encode(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        basis = self._basis(layer)
        # Unchecked: one broken page must not stop a server, and it decodes to non-finite values as its dense frame did.
        return encode(k, v, basis.k_basis, basis.v_basis, self.format, check_finite=False)

    def decode(
        self, layer: int, data: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return decode(data, self.format, out=out)

    def rotate_queries(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        return _per_head(q, self._basis(layer).q_basis)

    def unrotate_output(self, layer: int, out: torch.Tensor) -> torch.Tensor:
        return _per_head(out, self._basis(layer).v_unrotate)

    def _basis(self, layer: int) -> LayerBasis:
        basis = self._bases[layer]
        if basis is None:
            raise MosaicError(
                f"layer {layer} is not calibrated: call calibrate() with some of its keys and values first"
            )
        return basis


def _per_head(x: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """x [T, Hq, D] times basis [Hkv, D, D] of the KV head that each query head shares, float32 [T, Hq, D]."""
    tokens, q_heads, dim = x.shape
    heads = basis.shape[0]
    rows = x.float().view(tokens, heads, -1, dim).permute(1, 0, 2, 3).reshape(heads, -1, dim)
    return torch.bmm(rows, basis).view(heads, tokens, -1, dim).permute(1, 0, 2, 3).reshape(tokens, q_heads, dim)
