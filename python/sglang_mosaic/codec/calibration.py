"""From statistics to the plan of an epoch. Pure functions: another process may run them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from mosaic_kernels.segment import ALIGNMENT, SegmentFormat
from mosaic_kernels.segment_choice.reference import costs, energies
from mosaic_kernels.segment_decode.reference import decode_keys
from mosaic_kernels.segment_encode.reference import pack
from mosaic_kernels.topk.segment import TopKFormat
from sglang_mosaic.codec.allocation import Allocator, Step, best_formats
from sglang_mosaic.codec.base import LayerSample
from sglang_mosaic.codec.basis import LayerBasis, calibrate, value_weights
from sglang_mosaic.codec.plan import Format, HeadPlan, LayerPlan
from sglang_mosaic.codec.selection import SelectionProfile, profile
from sglang_mosaic.codec.sensitivity import Sensitivity, measure
from sglang_mosaic.codec.statistics import by_kv_head

EXCEPTIONS = (0, 1, 4)
"""Numbers of uncompressed tokens that a segment may have."""
FORMATS = 5
"""Most formats of a head for ordinary pages."""
SINK_FORMATS = 2
"""Most further formats for the first pages of sequences."""
CANDIDATES = 8
"""Pages whose own best formats are tried for all, and which tell whether top-k is: formats of more hardly differ
(docs/codec.md)."""
QUICK_PAGES = 16
"""Pages that a quick calibration looks at."""
SMALLEST, LARGEST = 0.9, 1.15
"""Bounds of a head's bytes, as shares of the mean: expected errors are extrapolated from small ones."""


class LayerQueries(NamedTuple):
    """The queries' part of `LayerStatistics`."""

    energy: torch.Tensor | None
    sample: torch.Tensor | None

    def cpu(self) -> LayerQueries:
        """Copied to the host."""
        return LayerQueries(*(None if x is None else x.cpu() for x in self))


class LayerStatistics(NamedTuple):
    """What is known about one layer."""

    query_energy: torch.Tensor | None
    """[H, Dk] float: mean square of the channels of queries, over the GQA group too."""
    queries: torch.Tensor | None
    """[T, Hq, Dk] float: some real queries."""
    sample: LayerSample
    """Real keys and values."""


class CalibrationInput(NamedTuple):
    """All that a calibration depends on."""

    layers: list[LayerStatistics]
    frame_bytes: int
    """Of one page, all layers and heads, a multiple of 16."""
    scale: float
    """Factor of the logits."""
    page_size: int
    """Tokens of a page."""


class _Pages(NamedTuple):
    """Rotated pages of one layer, [H, P, T, D] float32."""

    k: torch.Tensor
    v: torch.Tensor


class _Measured(NamedTuple):
    basis: LayerBasis
    sensitivity: Sensitivity
    queries: torch.Tensor
    """[H, Q, Dk] float32, rotated."""
    rows: _Pages
    """Ordinary pages."""
    sinks: _Pages
    """Starts of sequences."""
    v_weights: list[tuple[float, ...]]
    """Of every head, what a squared error of each stored channel of V counts."""


def make_plan(
    statistics: Sequence[LayerStatistics], frame_bytes: int, scale: float, quick: bool = False, workers: int = 1
) -> list[LayerPlan]:
    """Bases, sizes and formats of every layer and head.

    Bytes go where they save most expected error: first over all heads of all layers, then within a head over K's and
    V's groups, and again for every segment by choosing among the formats of its head.

    Args:
        statistics: of every layer.
        frame_bytes: bytes of one page, all layers and heads, a multiple of 16.
        scale: factor of the logits.
        quick: look at few pages, give every head one format, and let scans read all channels.
        workers: threads that take a layer each; torch should have one for each of them. Within an operation threads
            spin until the last one is done: two beside busy processes took ten times as long as two workers.

    Raises:
        ValueError: a shape does not fit or a value is not finite.
    """
    page_size, heads, k_dim = statistics[0].sample.keys.shape[1:]
    allocator = Allocator(page_size, k_dim, statistics[0].sample.values.shape[-1])
    mean = frame_bytes / (len(statistics) * heads)

    def measured_layer(layer: LayerStatistics) -> tuple[_Measured, list[list[Step]]]:
        found = _measure(_few_pages(layer) if quick else layer, scale)
        paths = []
        for h in range(heads):
            path = allocator.path(_energies(found.rows, found, h).mean(0).tolist(), int(LARGEST * mean))
            paths.append([step for step in path if step.nbytes >= SMALLEST * mean] or path[-1:])
        return found, paths

    def layer_plan(layer: _Measured, paths: list[list[Step]], own: list[int]) -> LayerPlan:
        if quick:
            plan = tuple(_quick_head(layer, h, paths[h], allocator, own[h]) for h in range(heads))
        else:
            plan = tuple(_head(layer, h, allocator, own[h], scale) for h in range(heads))
        return LayerPlan(layer.basis, plan)

    with ThreadPoolExecutor(workers) as pool:
        each = pool.map if workers > 1 else map
        measured, paths = zip(*each(measured_layer, statistics), strict=True)
        sizes = iter(share_out([path for layer in paths for path in layer], frame_bytes))
        own = [[next(sizes) for _ in range(heads)] for _ in measured]
        return list(each(layer_plan, measured, paths, own))


def share_out(paths: Sequence[Sequence[Step]], total: int) -> list[int]:
    """Bytes of each head, in sum at most `total`, so that the next byte would save about as much error anywhere."""
    at = [0] * len(paths)
    left = total - sum(path[0].nbytes for path in paths)
    while True:
        best, gain_of_best = None, 0.0
        for i, path in enumerate(paths):
            if at[i] + 1 < len(path):
                here, after = path[at[i]], path[at[i] + 1]
                gain = (here.cost - after.cost) / (after.nbytes - here.nbytes)
                if after.nbytes - here.nbytes <= left and gain > gain_of_best:
                    best, gain_of_best = i, gain
        if best is None:
            break
        left -= paths[best][at[best] + 1].nbytes - paths[best][at[best]].nbytes
        at[best] += 1
    sizes = [path[i].nbytes for path, i in zip(paths, at, strict=True)]
    # What is left is too little for a step of any head on average; single segments may still use it.
    share = left // len(paths) // ALIGNMENT * ALIGNMENT
    return [size + share for size in sizes]


def _few_pages(layer: LayerStatistics) -> LayerStatistics:
    """With pages that lie evenly among all that start no sequence, if there are enough."""
    keys, values, sinks = layer.sample
    if len(keys) - sinks < QUICK_PAGES:
        return layer
    chosen = torch.arange(QUICK_PAGES, device=keys.device) * (len(keys) - sinks) // QUICK_PAGES + sinks
    return layer._replace(sample=LayerSample(keys[chosen], values[chosen], 0))


def _measure(layer: LayerStatistics, scale: float) -> _Measured:
    keys, values, sinks = layer.sample
    basis = calibrate(layer.query_energy, keys.flatten(0, 1), values.flatten(0, 1))
    k_rot, v_rot = (
        torch.einsum("pthd,hde->hpte", x.float(), b) for x, b in ((keys, basis.k_basis), (values, basis.v_basis))
    )
    if layer.queries is None:
        # Nothing was asked yet: the strongest keys are as good a guess as any.
        queries = keys.flatten(0, 1)[-64:]
    else:
        queries = layer.queries
    q_rot = by_kv_head(queries, keys.shape[2]) @ basis.q_basis
    sensitivity = measure(q_rot, k_rot, v_rot, basis.v_weights, scale, sinks)
    first = sinks if sinks < len(keys) else 0
    return _Measured(
        basis,
        sensitivity,
        q_rot,
        _Pages(k_rot[:, first:], v_rot[:, first:]),
        _Pages(k_rot[:, :first], v_rot[:, :first]),
        value_weights(basis, sensitivity.v_weight.tolist()),
    )


def _energies(pages: _Pages, layer: _Measured, head: int, exceptions: int = 0) -> torch.Tensor:
    """[P, K's groups + V's groups] float64, weighted."""
    k, v = energies(pages.k[head], pages.v[head], exceptions, layer.v_weights[head])
    return torch.cat((k * layer.sensitivity.k_weight[head], v), 1)


def _head(layer: _Measured, head: int, allocator: Allocator, segment_bytes: int, scale: float) -> HeadPlan:
    weights = float(layer.sensitivity.k_weight[head]), float(layer.sensitivity.v_weight[head])
    formats: dict[Format, None] = {}
    _, _, page_size, k_dim = layer.rows.k.shape
    sparse = TopKFormat.fitting(segment_bytes, k_dim, layer.rows.v.shape[-1], page_size)
    sparse_wins = False
    for pages, most in ((layer.rows, FORMATS), (layer.sinks, SINK_FORMATS)):
        if not pages.k.shape[1]:
            continue
        k, v, weighed = pages.k[head], pages.v[head], (weights[0], layer.v_weights[head])
        candidates = _candidates(pages, layer, head, allocator, segment_bytes)
        ordinary_costs = costs(k, v, candidates, *weighed)
        chosen = best_formats(ordinary_costs, most)
        formats.update({candidates[i]: None for i in chosen})
        # Weighing it takes an encoder most of its choice: only where a page is known that would have it.
        if sparse is not None:
            some = _some(len(k))
            sparse_costs = costs(k[some], v[some], [sparse], *weighed)[:, 0]
            sparse_wins |= bool((sparse_costs < ordinary_costs[some][:, chosen].amin(1)).any())
    if sparse is not None and sparse_wins:
        formats[sparse] = None
    # The scan is measured in the format that serves the sample best.
    ordinary = next(fmt for fmt in formats if isinstance(fmt, SegmentFormat))
    selection = _selection(layer, head, ordinary, scale)
    return HeadPlan(segment_bytes, tuple(formats), *weights, selection)


def _quick_head(layer: _Measured, head: int, path: list[Step], allocator: Allocator, segment_bytes: int) -> HeadPlan:
    fitting = [step for step in path if step.nbytes <= segment_bytes]
    weights = float(layer.sensitivity.k_weight[head]), float(layer.sensitivity.v_weight[head])
    channels = layer.rows.k.shape[-1]
    formats = (allocator.format(fitting[-1].widths),)
    return HeadPlan(segment_bytes, formats, *weights, SelectionProfile(channels, None))


def _selection(layer: _Measured, head: int, fmt: SegmentFormat, scale: float) -> SelectionProfile:
    k, v = layer.rows.k[head], layer.rows.v[head]
    data = torch.zeros(len(k), fmt.segment_bytes, dtype=torch.uint8, device=k.device)
    pack(k, v, fmt, data)
    scanned = decode_keys(data, fmt, refined=False)
    # A few dozen queries are enough for a share.
    queries = layer.queries[head][:: max(len(layer.queries[head]) // 64, 1)]
    # Scaled so that lengths are those of values.
    values = v.flatten(0, 1) * layer.basis.v_weights[head].sqrt()
    return profile(queries, k.flatten(0, 1), scanned.flatten(0, 1), values, scale, k.shape[1])


def _some(pages: int) -> slice:
    """At most CANDIDATES of some pages, evenly."""
    return slice(None, None, -(-pages // CANDIDATES))


def _candidates(
    pages: _Pages, layer: _Measured, head: int, allocator: Allocator, segment_bytes: int
) -> list[SegmentFormat]:
    """The best format of some pages and of all together, for every number of exceptions that fits."""
    allocations: dict[tuple[tuple[int, ...], int], None] = {}
    for exceptions in EXCEPTIONS:
        rows = _energies(pages, layer, head, exceptions)
        some = rows[_some(len(rows))]
        for row in torch.cat((rows.mean(0, keepdim=True), some)).tolist():
            allocations[allocator.path(row, segment_bytes, exceptions)[-1].widths, exceptions] = None
    formats = (allocator.format(*allocation) for allocation in allocations)
    return [fmt for fmt in formats if fmt.segment_bytes <= segment_bytes]
