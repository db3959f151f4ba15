"""The codec: embedded bit planes in calibrated bases, precision by importance.

Sources: the axes of the scales from KIVI (arXiv 2402.02750); segments, bases from an SVD, per-vector important elements
and spending bytes by importance from MosaicKV (arXiv 2607.00760).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mosaic_kernels.segment import ALIGNMENT, GROUP
from mosaic_kernels.segment_encode.reference import rotate_pages
from sglang_mosaic.codec import strategies
from sglang_mosaic.codec.base import Codec, Epoch, LayerSample, check_pages
from sglang_mosaic.codec.calibration import LayerStatistics, make_plan
from sglang_mosaic.codec.plan import Format, HeadPlan, LayerPlan, plan_hash
from sglang_mosaic.codec.statistics import QueryStatistics, by_kv_head
from sglang_mosaic.errors import MosaicError

_FORMAT = 0  # byte of the header: number of the format
_ERROR = 4  # four bytes of the header: float32, relative error


class PlanesEpoch(Epoch):
    """Encodes with the plan of one calibration.

    Args:
        layers: the plan.
        page_size: tokens per page.
    """

    def __init__(self, layers: list[LayerPlan], page_size: int) -> None:
        self.layers = layers
        self.page_size = page_size
        self._hash = plan_hash(layers, page_size)
        self._spans = []
        at = 0
        for layer in layers:
            self._spans.append(slice(at, at + layer.nbytes))
            at += layer.nbytes

    @property
    def hash(self) -> str:
        return self._hash

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for layer in self.layers for matrix in layer.basis)

    @property
    def frame_bytes(self) -> int:
        """Bytes of a frame that the layers use."""
        return self._spans[-1].stop

    def span(self, layer: int) -> slice:
        return self._spans[layer]

    def encode(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        plan = self.layers[layer]
        basis, heads = plan.basis, len(plan.heads)
        check_pages(k, v, self.page_size, heads, basis.k_basis.shape[1], basis.v_basis.shape[1])
        k_rot, v_rot = rotate_pages(k, basis.k_basis), rotate_pages(v, basis.v_basis)
        data = torch.zeros(len(k), plan.nbytes, dtype=torch.uint8, device=k.device)
        errors = torch.zeros(heads, len(k), device=k.device)
        at = 0
        for h, head in enumerate(plan.heads):
            _encode_head(k_rot[h], v_rot[h], head, data[:, at : at + head.segment_bytes], errors[h])
            at += head.segment_bytes
        return data, errors.T

    def decode(self, layer: int, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        plan = self.layers[layer]
        if data.dim() != 2 or data.shape[1] != plan.nbytes or data.dtype != torch.uint8:
            raise ValueError(f"data must be uint8 [pages, {plan.nbytes}], got {data.dtype} {tuple(data.shape)}")
        shape = len(plan.heads), len(data), self.page_size
        k_rot = torch.empty(*shape, plan.basis.k_basis.shape[1], device=data.device)
        v_rot = torch.empty(*shape, plan.basis.v_basis.shape[1], device=data.device)
        at = 0
        for h, head in enumerate(plan.heads):
            _decode_head(data[:, at : at + head.segment_bytes], head, k_rot[h], v_rot[h])
            at += head.segment_bytes
        return k_rot.transpose(0, 1), v_rot.transpose(0, 1)

    def scan(self, layer: int, data: torch.Tensor) -> torch.Tensor:
        """What selection reads: K of base planes, float32 [P, H, page_size, C], C the most channels of any head.

        Channels beyond a head's own scan rank are 0. Memory order as of `decode`.
        """
        plan = self.layers[layer]
        most = max(head.selection.scan_channels for head in plan.heads)
        k_rot = torch.zeros(len(plan.heads), len(data), self.page_size, most, device=data.device)
        at = 0
        for h, head in enumerate(plan.heads):
            channels = head.selection.scan_channels
            for fmt, rows, segments in _by_format(data[:, at : at + head.segment_bytes], head):
                k_rot[h, rows, :, :channels] = strategies.scan(fmt, segments, channels)
            at += head.segment_bytes
        return k_rot.transpose(0, 1)

    def mean_values(self, layer: int, data: torch.Tensor) -> torch.Tensor:
        """Mean rotated V of each page: float32 [P, H, Dv]."""
        plan = self.layers[layer]
        means = torch.empty(len(data), len(plan.heads), plan.basis.v_basis.shape[1], device=data.device)
        at = 0
        for h, head in enumerate(plan.heads):
            for fmt, rows, segments in _by_format(data[:, at : at + head.segment_bytes], head):
                means[rows, h] = strategies.mean_values(fmt, segments)
            at += head.segment_bytes
        return means

    def far_bias(self, layer: int) -> torch.Tensor:
        """What to add to the logits of the far field, float32 [H]; -inf: the head has none."""
        biases = [head.selection.far_bias for head in self.layers[layer].heads]
        return torch.tensor([-torch.inf if bias is None else bias for bias in biases])

    def rotate_queries(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        return _per_head(q, self.layers[layer].basis.q_basis)

    def unrotate_output(self, layer: int, out: torch.Tensor) -> torch.Tensor:
        return _per_head(out, self.layers[layer].basis.v_unrotate)


class PlanesCodec(Codec):
    """Plans frames of a fixed size from what running requests show.

    Args:
        layers: layers of the pool.
        heads: KV heads of this rank.
        k_dim, v_dim: channels of K and V, multiples of 16.
        ratio: bfloat16 bytes of a page per byte of its frame.
        page_size: tokens per page.
        scale: factor of the logits; None: k_dim ** -0.5.
        query_budget: tokens per layer and epoch whose queries are observed.
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
        ratio: float = 4.0,
        page_size: int = 64,
        scale: float | None = None,
        query_budget: int = 8192,
        device: torch.device | str = "cpu",
    ):
        for name, count in (("layers", layers), ("heads", heads), ("query_budget", query_budget)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        for name, dim in (("k_dim", k_dim), ("v_dim", v_dim)):
            if dim < GROUP or dim % GROUP:
                raise ValueError(f"{name} must be a multiple of {GROUP}, got {dim}")
        self._shape = layers, heads, k_dim, v_dim
        dense_bytes = layers * heads * page_size * (k_dim + v_dim) * 2
        self._frame_bytes = int(dense_bytes / ratio) // ALIGNMENT * ALIGNMENT
        self._scale = k_dim**-0.5 if scale is None else scale
        self.page_size = page_size
        self._device = torch.device(device)
        self._queries = QueryStatistics(layers, heads, k_dim, query_budget, device)
        # Three float32 matrices a head: K, queries, V.
        self._table_bytes = layers * heads * (2 * k_dim**2 + v_dim**2) * torch.float32.itemsize

    @property
    def frame_bytes(self) -> int:
        return self._frame_bytes

    @property
    def table_bytes(self) -> int:
        return self._table_bytes

    @property
    def state_bytes(self) -> int:
        return self._queries.nbytes

    def observe_queries(self, layer: int, q: torch.Tensor) -> None:
        if not self._queries.full(layer):
            self._queries.observe(layer, q)

    def calibrate(self, samples: list[LayerSample]) -> PlanesEpoch:
        layers, heads, k_dim, v_dim = self._shape
        if len(samples) != layers:
            raise ValueError(f"samples must be of {layers} layers, got {len(samples)}")
        for sample in samples:
            check_pages(sample.keys, sample.values, self.page_size, heads, k_dim, v_dim)
        statistics = [
            LayerStatistics(self._queries.moment(layer), self._queries.recent(layer), sample)
            for layer, sample in enumerate(samples)
        ]
        self._queries.renew()
        return PlanesEpoch(make_plan(statistics, self._frame_bytes, self._scale), self.page_size)


def _encode_head(
    k_rot: torch.Tensor, v_rot: torch.Tensor, head: HeadPlan, data: torch.Tensor, errors: torch.Tensor
) -> None:
    """k_rot and v_rot [P, T, D] float32; data [P, segment_bytes] and errors [P], written."""
    choice = strategies.costs(head.formats, k_rot, v_rot, head.k_weight, head.v_weight).argmin(1)
    for i in choice.unique().tolist():
        fmt, rows = head.formats[i], (choice == i).nonzero().squeeze(1)
        k, v = k_rot[rows], v_rot[rows]
        segments = torch.zeros(len(rows), head.segment_bytes, dtype=torch.uint8, device=data.device)
        strategies.pack(fmt, k, v, segments)
        squared = 0.0
        for exact, coded, weight in zip(
            (k, v), strategies.decode(fmt, segments), (head.k_weight, head.v_weight), strict=True
        ):
            squared = squared + (exact - coded).double().square().sum((1, 2)) * weight
        # Rounded, so that the order of summation does not show in the bytes.
        error = squared.sqrt().bfloat16().float()
        segments[:, _FORMAT] = i
        segments[:, _ERROR : _ERROR + 4] = error[:, None].view(torch.uint8)
        data[rows], errors[rows] = segments, error


def _decode_head(data: torch.Tensor, head: HeadPlan, k_rot: torch.Tensor, v_rot: torch.Tensor) -> None:
    """data [P, segment_bytes]; k_rot and v_rot [P, T, D], written."""
    for fmt, rows, segments in _by_format(data, head):
        k_rot[rows], v_rot[rows] = strategies.decode(fmt, segments)


def _by_format(data: torch.Tensor, head: HeadPlan) -> Iterator[tuple[Format, torch.Tensor, torch.Tensor]]:
    """Format, rows and bytes of the segments of each format. data [P, segment_bytes].

    Raises:
        MosaicError: a segment was never encoded, or not with this plan.
    """
    choice = data[:, _FORMAT]
    for i in choice.unique().tolist():
        if i >= len(head.formats):
            raise MosaicError(f"a segment has format {i} of {len(head.formats)}: its frame was never encoded")
        rows = (choice == i).nonzero().squeeze(1)
        yield head.formats[i], rows, data if len(rows) == len(data) else data[rows]


def _per_head(x: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """x [T, Hq, D] times basis [Hkv, D, D] of the KV head that each query head shares, float32 [T, Hq, D]."""
    tokens, q_heads, dim = x.shape
    heads = basis.shape[0]
    rows = torch.bmm(by_kv_head(x, heads), basis)
    return rows.view(heads, tokens, -1, dim).permute(1, 0, 2, 3).reshape(tokens, q_heads, dim)
