"""One codec at one budget on captured K and V: the error it makes, through the interface that serving uses.

A text's last tokens ask, all tokens before them are the keys; the first and the last page of these stay exact, as the
start and the recent window of a running request do, and every page between goes through the bytes of a frame.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from benchmark.codec.capture import Layer
from benchmark.common.kv_bytes import BF16_BYTES
from benchmark.common.stats import percentile
from mosaic_kernels.attend.reference import attend
from mosaic_kernels.merge_lse.reference import merge
from sglang_mosaic.codec.base import Epoch, LayerSample
from sglang_mosaic.codec.factory import make_codec

PAGE = 64
ONLINE, OFFLINE = "online", "offline"
"""What planes is calibrated on: the start of the text itself, or another text."""

RATIOS = (3.1, 3.37, 4.0, 4.27, 4.5, 5.3, 5.82, 6.4, 8.0)
TOPK_RATIOS = (2.0, 3.1, 4.0, 6.0)


class Method(NamedTuple):
    """A codec, the budget that it is asked for (None: it has one of its own), and its calibration text."""

    codec: str
    ratio: float | None
    basis: str

    @property
    def label(self) -> str:
        return f"{self.codec} {self.basis}" if self.codec == "planes" else self.codec


class Problem(NamedTuple):
    """One layer: what is asked of which keys, and the exact answer."""

    queries: torch.Tensor
    """[Q, Hq, Dk]"""
    keys: torch.Tensor
    """[pages, PAGE, H, Dk]"""
    values: torch.Tensor
    """[pages, PAGE, H, Dv]"""
    scale: float
    exact: torch.Tensor
    """[Q, Hq, Dv] float32"""


class Measured(NamedTuple):
    """One layer in one method."""

    errors: torch.Tensor
    """[Hq] ||o - o_ref|| / ||o_ref|| over all queries."""
    predicted: torch.Tensor
    """[H] what `encode` expected, root mean square over the pages."""
    encode_us: float
    """Per page and KV head."""
    decode_us: float


def methods(ratios: Sequence[float] = RATIOS) -> list[Method]:
    """Every strategy at every budget."""
    planes = [Method("planes", ratio, basis) for basis in (ONLINE, OFFLINE) for ratio in ratios]
    topk = [Method("topk", ratio, OFFLINE) for ratio in TOPK_RATIOS]
    own = [Method(codec, None, OFFLINE) for codec in ("kivi4", "kivi3", "kivi2", "int8", "channel-drop")]
    return [*planes, *topk, *own]


def pages(x: torch.Tensor) -> torch.Tensor:
    """[tokens, H, D] -> [whole pages, PAGE, H, D]."""
    whole = len(x) // PAGE
    return x[: whole * PAGE].unflatten(0, (whole, PAGE))


def problems(layers: Sequence[Layer], queries: int) -> list[Problem]:
    """What the last `queries` tokens of a text ask of the whole pages before them."""
    result = []
    for layer in layers:
        q, k, v = layer.q[-queries:], pages(layer.k[:-queries]), pages(layer.v[:-queries])
        exact, _ = attend(q, _head_major(k), _head_major(v), layer.scale)
        result.append(Problem(q, k, v, layer.scale, exact))
    return result


def samples(layers: Sequence[Layer], tokens: int) -> list[LayerSample]:
    """The first tokens of a text, to calibrate on; the first page is the start of a sequence."""
    return [LayerSample(pages(layer.k[:tokens]), pages(layer.v[:tokens]), sinks=1) for layer in layers]


def measure_layer(epoch: Epoch, index: int, problem: Problem) -> Measured:
    """Encode, decode and attend one layer; `index` is the layer's number in the codec."""
    k, v = problem.keys[1:-1], problem.values[1:-1]
    segments = k.shape[0] * k.shape[2]
    start = time.perf_counter()
    data, predicted = epoch.encode(index, k, v)
    encoded = time.perf_counter()
    k_rot, v_rot = epoch.decode(index, data)
    decoded = time.perf_counter()

    span = epoch.span(index)
    if data.shape != (len(k), span.stop - span.start):
        raise ValueError(f"layer {index} has {data.shape[1]} bytes a page where a frame has {span}")
    queries = epoch.rotate_queries(index, problem.queries)
    out, lse = attend(queries, *(x.transpose(0, 1).flatten(1, 2) for x in (k_rot, v_rot)), problem.scale)
    ends = (_head_major(torch.cat((x[:1], x[-1:]))) for x in (problem.keys, problem.values))
    out, _ = merge(epoch.unrotate_output(index, out), lse, *attend(problem.queries, *ends, problem.scale))
    errors = (out - problem.exact).norm(dim=(0, 2)) / problem.exact.norm(dim=(0, 2))
    return Measured(
        errors,
        predicted.square().mean(0).sqrt(),
        (encoded - start) / segments * 1e6,
        (decoded - encoded) / segments * 1e6,
    )


def measure(
    method: Method, layers: Sequence[Problem], calibration: Sequence[Layer], calibration_tokens: int
) -> dict[str, Any]:
    """One row of the results.

    Args:
        layers: what to measure on.
        calibration: the same layers of the calibration text, of which the first `calibration_tokens` are seen.

    Raises:
        ValueError: the codec cannot have these dimensions or this ratio.
    """
    _, _, heads, k_dim = layers[0].keys.shape
    v_dim = layers[0].values.shape[-1]
    # The others ignore the ratio.
    codec = make_codec(method.codec, len(layers), heads, k_dim, v_dim, ratio=method.ratio or 1.0, page_size=PAGE)
    for index, layer in enumerate(calibration):
        codec.observe_queries(index, layer.q[:calibration_tokens])
    start = time.perf_counter()
    epoch = codec.calibrate(samples(calibration, calibration_tokens))
    calibrate_s = time.perf_counter() - start

    measured = [measure_layer(epoch, index, problem) for index, problem in enumerate(layers)]
    errors = torch.stack([layer.errors for layer in measured])
    return {
        "method": method.label,
        "codec": method.codec,
        "basis": method.basis if method.codec in ("planes", "channel-drop") else None,
        "asked_ratio": method.ratio,
        "ratio": len(layers) * heads * PAGE * (k_dim + v_dim) * BF16_BYTES / codec.frame_bytes,
        "frame_bytes": codec.frame_bytes,
        "table_bytes": codec.table_bytes,
        "error_mean": errors.mean().item(),
        "error_median": percentile(errors.flatten().tolist(), 50),
        "error_max": errors.max().item(),
        "predicted": torch.stack([layer.predicted for layer in measured]).mean().item(),
        "encode_us": percentile([layer.encode_us for layer in measured], 50),
        "decode_us": percentile([layer.decode_us for layer in measured], 50),
        "calibrate_s": calibrate_s,
        "layer_means": errors.mean(1).tolist(),
        "layer_maxima": errors.amax(1).tolist(),
    }


def _head_major(x: torch.Tensor) -> torch.Tensor:
    """[pages, PAGE, H, D] -> [H, tokens, D]."""
    return x.flatten(0, 1).transpose(0, 1)
