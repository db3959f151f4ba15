"""Real frames: K and V of a text, encoded by the codec, with what their attention output should be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from benchmark.codec.capture import Captured
from benchmark.codec.methods import PAGE, Problem, pages, problems, samples
from mosaic_kernels.attend.reference import attend
from mosaic_kernels.merge_lse.reference import merge
from sglang_mosaic.codec import PlanesCodec, PlanesEpoch


class RealFrames(NamedTuple):
    """Pages of one text, but for its first and last, which stay exact."""

    epoch: PlanesEpoch
    frames: np.ndarray
    """uint8 [pages, frame bytes]."""
    problems: list[Problem]
    """Of every layer."""

    @staticmethod
    def position(page: int) -> int:
        """Of the first token of one of the frames."""
        return (page + 1) * PAGE

    @property
    def dense_bytes(self) -> int:
        """bfloat16 bytes of one page."""
        return sum(PAGE * x.shape[2] * x.shape[3] * 2 for p in self.problems for x in (p.keys, p.values))

    def output_error(self, frames: np.ndarray) -> float:
        """||o - o_ref|| / ||o_ref|| over all queries, mean over query heads and layers, of other bytes of the pages."""
        data = torch.from_numpy(frames)
        errors = [
            _layer_error(self.epoch, layer, data[:, self.epoch.span(layer)].contiguous(), problem)
            for layer, problem in enumerate(self.problems)
        ]
        return torch.stack(errors).mean().item()


def encode(captured: Captured, ratio: float, queries: int, calibration_tokens: int) -> RealFrames:
    """Calibrate on the start of the text itself, and encode it."""
    layers = list(captured.layers.values())
    asked = problems(layers, queries)
    _, _, heads, k_dim = asked[0].keys.shape
    codec = PlanesCodec(len(layers), heads, k_dim, asked[0].values.shape[-1], ratio=ratio, page_size=PAGE)
    for index, layer in enumerate(layers):
        codec.observe_queries(index, layer.q[:calibration_tokens])
    epoch = codec.calibrate(samples(layers, calibration_tokens))
    data = [epoch.encode(index, p.keys[1:-1], p.values[1:-1])[0] for index, p in enumerate(asked)]
    return RealFrames(epoch, torch.cat(data, 1).numpy(), asked)


def encode_others(real: RealFrames, captured: Captured, most: int) -> list[tuple[np.ndarray, int]]:
    """The first pages of another text in the same epoch, and the positions of their first tokens."""
    layers = captured.layers.values()
    data = [
        real.epoch.encode(index, pages(layer.k)[:most], pages(layer.v)[:most])[0] for index, layer in enumerate(layers)
    ]
    return [(frame, page * PAGE) for page, frame in enumerate(torch.cat(data, 1).numpy())]


def _layer_error(epoch: PlanesEpoch, index: int, data: torch.Tensor, problem: Problem) -> torch.Tensor:
    queries = epoch.rotate_queries(index, problem.queries)
    rotated = (x.transpose(0, 1).flatten(1, 2) for x in epoch.decode(index, data))
    out, lse = attend(queries, *rotated, problem.scale)
    ends: Sequence[torch.Tensor] = [head_major(torch.cat((x[:1], x[-1:]))) for x in (problem.keys, problem.values)]
    out, _ = merge(epoch.unrotate_output(index, out), lse, *attend(problem.queries, *ends, problem.scale))
    return ((out - problem.exact).norm(dim=(0, 2)) / problem.exact.norm(dim=(0, 2))).mean()


def head_major(x: torch.Tensor) -> torch.Tensor:
    """[pages, PAGE, H, D] -> [H, tokens, D]."""
    return x.flatten(0, 1).transpose(0, 1)
