"""The codec: embedded bit planes in calibrated bases, precision by importance.

Sources: the axes of the scales from KIVI (arXiv 2402.02750); segments, bases from an SVD, per-vector important elements
and spending bytes by importance from MosaicKV (arXiv 2607.00760).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from mosaic_kernels.constants import constant
from mosaic_kernels.segment import ALIGNMENT, GROUP
from mosaic_kernels.segment_encode.reference import rotate_pages
from mosaic_kernels.segment_error.reference import FORMAT
from mosaic_kernels.segment_table import HeadFormats, kernels_can
from mosaic_kernels.topk.segment import TopKFormat
from sglang_mosaic.codec import strategies
from sglang_mosaic.codec.base import Codec, Epoch, LayerSample, Put, Rows, check_pages
from sglang_mosaic.codec.basis import value_weights
from sglang_mosaic.codec.calibration import CalibrationInput, LayerQueries, LayerStatistics, make_plan
from sglang_mosaic.codec.encoding import Segments, by_format, encode_segments, rare_kind, rare_kinds
from sglang_mosaic.codec.plan import Format, LayerPlan, plan_hash
from sglang_mosaic.codec.statistics import QueryStatistics, by_kv_head

if TYPE_CHECKING:
    from sglang_mosaic.codec.kernel_encoding import KernelEncoder


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
        self._spans = _spans([layer.nbytes for layer in layers])
        self._segments = [_spans([head.segment_bytes for head in layer.heads]) for layer in layers]
        """Of every layer, where each head's segment lies among its bytes."""
        self._v_weights = [value_weights(layer.basis, [head.v_weight for head in layer.heads]) for layer in layers]
        """Of every layer and head, what a squared error of each stored channel of V counts."""
        segments = [
            (self._spans[i].start + span.start, head.formats)
            for i, layer in enumerate(layers)
            for head, span in zip(layer.heads, self._segments[i], strict=True)
        ]
        self._headers = [start + FORMAT for start, _ in segments]
        """In a frame, of every layer and head."""
        self._format_counts = np.array([len(formats) for _, formats in segments])
        self._has_rare = any(rare_kind(fmt) for _, formats in segments for fmt in formats)
        self.rare: frozenset[str] = frozenset()
        """`rare_kind` of what segments encoded so far have. Kernels are compiled without what no segment has."""
        self._encoders: dict[int, KernelEncoder] = {}
        """Of layers whose pages kernels encode."""

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

    @functools.cached_property
    def most_formats(self) -> int:
        """Formats of any head."""
        return int(self._format_counts.max())

    @functools.cached_property
    def most_scanned(self) -> int:
        """Channels of K that a scan of any head reads."""
        return max(head.selection.scan_channels for layer in self.layers for head in layer.heads)

    def span(self, layer: int) -> slice:
        return self._spans[layer]

    def headers(self, layer: int) -> list[int]:
        """Of every head's segment in a frame, the byte that tells its format's number."""
        heads = len(self.layers[layer].heads)
        return self._headers[layer * heads : (layer + 1) * heads]

    def encode(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        encoder = self._kernels(layer, k, v)
        if encoder is None:
            plan = self.layers[layer]
            rotated = rotate_pages(k, plan.basis.k_basis), rotate_pages(v, plan.basis.v_basis)
            encoded = encode_segments(self._segments_of(layer), *rotated)
        else:
            encoded = encoder.encode(k, v)
        self.rare |= encoded.rare
        return encoded.data, encoded.errors

    def encode_layers(self, layers: int, rows: Rows, put: Put) -> torch.Tensor:
        """By kernels, the device is asked once whether any segment got a format of a rare kind, instead of once a
        layer; layers in which one did, as yet none of a real model, are encoded again."""
        if self._kernels(0, *rows(0)) is None:
            return super().encode_layers(layers, rows, put)
        errors, rare = self.encode_ordinary(layers, rows, put)
        return self.encode_rare(rare, errors, rows, put)

    def with_topk(self) -> PlanesEpoch:
        """The same with a format of top-k more in every head that has the bytes for one: calibrations give it only to
        heads that have a page for it."""
        _, k_dim, v_dim = self._heads_and_dims
        layers = []
        for plan in self.layers:
            formats = [TopKFormat.fitting(head.segment_bytes, k_dim, v_dim, self.page_size) for head in plan.heads]
            pairs = zip(plan.heads, formats, strict=True)
            heads = (head if fmt is None else head._replace(formats=(*head.formats, fmt)) for head, fmt in pairs)
            layers.append(plan._replace(heads=tuple(heads)))
        return PlanesEpoch(layers, self.page_size)

    def kernels_encode(self, device: torch.device) -> bool:
        """Whether kernels encode pages on a device."""
        _, k_dim, v_dim = self._heads_and_dims
        return device.type == "cuda" and kernels_can(k_dim, v_dim)

    def encode_ordinary(self, layers: int, rows: Rows, put: Put) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The launches of `encode_layers`, where kernels encode: nothing waits, and a CUDA graph can replay them.

        Returns:
            Errors, and bool [layers]: where a segment got a format of a rare kind, so that the layer's bytes and
            errors are of no use. None: nowhere, as no head has any.
        """
        errors, rare = [], []
        for layer in range(layers):
            k, v = rows(layer)
            encoder = self._kernels(layer, k, v)
            assert encoder is not None
            (data, of_layer, _), found = encoder.encode_ordinary(k, v)
            put(layer, data)
            errors.append(of_layer)
            rare.append(found)
        there = [found for found in rare if found is not None]
        none = torch.zeros((), dtype=torch.bool, device=errors[0].device)
        flags = torch.stack([none if found is None else found for found in rare]) if there else None
        return torch.stack(errors), flags

    def encode_rare(self, rare: torch.Tensor | None, errors: torch.Tensor, rows: Rows, put: Put) -> torch.Tensor:
        """What `encode_ordinary` could not do. Waits for the device if it has to be asked.

        Args:
            rare, errors: as it gave them; the errors are written to, and returned.
        """
        for layer, found in enumerate([] if rare is None else rare.tolist()):
            if found:
                data, errors[layer] = self.encode(layer, *rows(layer))
                put(layer, data)
        return errors

    def _kernels(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> KernelEncoder | None:
        """What encodes such pages of a layer; None: the reference.

        Raises:
            ValueError: a shape does not fit.
        """
        check_pages(k, v, self.page_size, *self._heads_and_dims)
        if not self.kernels_encode(k.device):
            return None
        if layer not in self._encoders:
            # Imported here: Triton needs a GPU's driver.
            from sglang_mosaic.codec.kernel_encoding import KernelEncoder

            self._encoders[layer] = KernelEncoder(self._segments_of(layer), k.device)
        return self._encoders[layer]

    @property
    def _heads_and_dims(self) -> tuple[int, int, int]:
        """KV heads and channels of K and V, of every layer."""
        basis = self.layers[0].basis
        return len(self.layers[0].heads), basis.k_basis.shape[1], basis.v_basis.shape[1]

    def _segments_of(self, layer: int) -> Segments:
        return Segments(self.layers[layer], self._segments[layer], self._v_weights[layer])

    def decode(self, layer: int, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        plan = self.layers[layer]
        if data.dim() != 2 or data.shape[1] != plan.nbytes or data.dtype != torch.uint8:
            raise ValueError(f"data must be uint8 [pages, {plan.nbytes}], got {data.dtype} {tuple(data.shape)}")
        shape = len(plan.heads), len(data), self.page_size
        k_rot = torch.empty(*shape, plan.basis.k_basis.shape[1], device=data.device)
        v_rot = torch.empty(*shape, plan.basis.v_basis.shape[1], device=data.device)
        for h, fmt, rows, segments in self._stored(layer, data):
            k_rot[h, rows], v_rot[h, rows] = strategies.decode(fmt, segments)
        return k_rot.transpose(0, 1), v_rot.transpose(0, 1)

    def scan(self, layer: int, data: torch.Tensor) -> torch.Tensor:
        """What selection reads: K of base planes, float32 [P, H, page_size, C], C the most channels of any head.

        Channels beyond a head's own scan rank are 0. Memory order as of `decode`.
        """
        plan = self.layers[layer]
        channels = [head.selection.scan_channels for head in plan.heads]
        k_rot = torch.zeros(len(plan.heads), len(data), self.page_size, max(channels), device=data.device)
        for h, fmt, rows, segments in self._stored(layer, data):
            k_rot[h, rows, :, : channels[h]] = strategies.scan(fmt, segments, channels[h])
        return k_rot.transpose(0, 1)

    def mean_values(self, layer: int, data: torch.Tensor) -> torch.Tensor:
        """Mean rotated V of each page: float32 [P, H, Dv]."""
        plan = self.layers[layer]
        means = torch.empty(len(data), len(plan.heads), plan.basis.v_basis.shape[1], device=data.device)
        for h, fmt, rows, segments in self._stored(layer, data):
            means[rows, h] = strategies.mean_values(fmt, segments)
        return means

    def admit(self, frames: Sequence[bytes | memoryview]) -> int:
        """How many whole frames from elsewhere, from the first on, are of this epoch, by the formats that their headers
        name.

        Args:
            frames: of frame_bytes each.
        """
        # Not the frames side by side, which would be megabytes each.
        headers = np.array(self._headers)
        numbers = np.stack([np.frombuffer(frame, np.uint8)[headers] for frame in frames])
        foreign = (numbers >= self._format_counts).any(1)
        count = int(foreign.argmax()) if foreign.any() else len(frames)
        if self._has_rare and count:
            for segment, found in enumerate(numbers[:count].T.tolist()):
                layer, h = divmod(segment, len(self.layers[0].heads))
                formats = self.layers[layer].heads[h].formats
                self.rare |= rare_kinds(formats[number] for number in set(found))
        return count

    def _stored(self, layer: int, data: torch.Tensor) -> Iterator[tuple[int, Format, torch.Tensor, torch.Tensor]]:
        """Head, format, pages and bytes of the segments of each head and format.

        Raises:
            MosaicError: a segment was never encoded, or not with this plan.
        """
        plan, segments = self.layers[layer], self._segments[layer]
        choices = torch.stack([data[:, segment.start + FORMAT] for segment in segments], 1)
        for h, i, rows in by_format(choices, plan):
            found = data[:, segments[h]]
            yield h, plan.heads[h].formats[i], rows, found if len(rows) == len(data) else found[rows]

    def head_formats(self, layer: int) -> list[HeadFormats]:
        """What kernels need to know to read the KV heads of a layer from whole frames."""
        first = self._spans[layer].start
        return [
            HeadFormats(
                first + segment.start,
                head.formats,
                head.selection.scan_channels,
                -math.inf if head.selection.far_bias is None else head.selection.far_bias,
            )
            for head, segment in zip(self.layers[layer].heads, self._segments[layer], strict=True)
        ]

    def far_bias(self, layer: int) -> torch.Tensor:
        """What to add to the logits of the far field, float32 [H]; -inf: the head has none."""
        plan = self.layers[layer]
        found = (head.selection.far_bias for head in plan.heads)
        biases = tuple(-torch.inf if bias is None else bias for bias in found)
        return constant(biases, torch.float32, plan.basis.q_basis.device)

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

    def fits(self, epoch: PlanesEpoch) -> bool:
        """Whether frames of an epoch made elsewhere could be this codec's."""
        layers, heads, k_dim, v_dim = self._shape
        shapes = {(*layer.basis.k_basis.shape, layer.basis.v_basis.shape[-1]) for layer in epoch.layers}
        return (
            len(epoch.layers) == layers
            and shapes == {(heads, k_dim, k_dim, v_dim)}
            and epoch.page_size == self.page_size
            and epoch.frame_bytes <= self._frame_bytes
        )

    def observe_queries(self, layer: int, q: torch.Tensor) -> None:
        if not self._queries.full(layer):
            self._queries.observe(layer, q)

    def calibrate(self, samples: list[LayerSample], quick: bool = False) -> PlanesEpoch:
        return calibrate(self.statistics(samples), quick)

    def statistics(self, samples: list[LayerSample], queries: list[LayerQueries] | None = None) -> CalibrationInput:
        """All that a calibration depends on; another process may run it (`calibrate`).

        Args:
            samples: of every layer.
            queries: as of `take_queries`; None: those of now.

        Raises:
            ValueError: a shape does not fit.
        """
        layers, heads, k_dim, v_dim = self._shape
        if len(samples) != layers:
            raise ValueError(f"samples must be of {layers} layers, got {len(samples)}")
        for sample in samples:
            check_pages(sample.keys, sample.values, self.page_size, heads, k_dim, v_dim)
        known = self.take_queries() if queries is None else queries
        statistics = [LayerStatistics(*one, sample) for one, sample in zip(known, samples, strict=True)]
        return CalibrationInput(statistics, self._frame_bytes, self._scale, self.page_size)

    def take_queries(self) -> list[LayerQueries]:
        """What queries have shown in every layer; later ones count for the next epoch."""
        known = [
            LayerQueries(self._queries.energy(layer), self._queries.sample(layer)) for layer in range(self._shape[0])
        ]
        self._queries.renew()
        return known


def calibrate(given: CalibrationInput, quick: bool = False, workers: int = 1) -> PlanesEpoch:
    """The epoch of some statistics; `quick` and `workers` as of `make_plan`. Pure.

    Raises:
        ValueError: a value is not finite.
    """
    return PlanesEpoch(make_plan(given.layers, given.frame_bytes, given.scale, quick, workers), given.page_size)


def planes_of(epoch: Epoch | None) -> PlanesEpoch:
    """An epoch of which the caller knows that it is there, and of this codec.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(epoch, PlanesEpoch):
        raise TypeError(f"expected an epoch of planes, got {type(epoch).__name__}")
    return epoch


def planes_codec_of(codec: Codec) -> PlanesCodec:
    """The same of a codec.

    Raises:
        TypeError: it is another one.
    """
    if not isinstance(codec, PlanesCodec):
        raise TypeError(f"expected the codec of planes, got {type(codec).__name__}")
    return codec


def _spans(sizes: Iterable[int]) -> list[slice]:
    """Things of these sizes one after the other."""
    ends = list(itertools.accumulate(sizes, initial=0))
    return [slice(start, stop) for start, stop in itertools.pairwise(ends)]


def _per_head(x: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """x [T, Hq, D] times basis [Hkv, D, D] of the KV head that each query head shares, float32 [T, Hq, D]."""
    tokens, q_heads, dim = x.shape
    heads = basis.shape[0]
    rows = torch.bmm(by_kv_head(x, heads), basis)
    return rows.view(heads, tokens, -1, dim).permute(1, 0, 2, 3).reshape(tokens, q_heads, dim)
