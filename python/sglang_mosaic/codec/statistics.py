"""What the codec learns from the queries of running requests."""

from __future__ import annotations

import functools
import random

import torch

from mosaic_kernels.segment_table import kernels_can
from mosaic_kernels.upload import upload

SAMPLE_TOKENS = 128
"""Queries kept per layer, to measure on."""
TOKENS_A_CALL = 32
"""Most of them from one call."""


class QueryStatistics:
    """Mean squares of the channels of queries, per layer and KV head, and a few real queries.

    Args:
        layers: number of layers.
        heads: KV heads of this rank, Hkv.
        dim: channels of a query, Dk.
        token_budget: tokens per layer and epoch after which nothing more is added; bounds the work, not the memory.
        device: where the statistics live; queries must be there too.
    """

    def __init__(self, layers: int, heads: int, dim: int, token_budget: int, device: torch.device | str = "cpu"):
        self._shape = (heads, dim)
        self._budget = token_budget
        self._device = torch.device(device)
        self._left = [token_budget] * layers
        self._seen = [0] * layers
        """Queries whose squares were summed: of every token those of the GQA group."""
        self._sums: list[torch.Tensor | None] = [None] * layers
        self._sample: list[torch.Tensor | None] = [None] * layers
        self._sampled = [0] * layers
        """Queries that were offered to the sample."""

    def observe(self, layer: int, q: torch.Tensor) -> None:
        """Add queries [T, Hq, Dk] of any float dtype, Hq a multiple of Hkv, as far as the budget goes."""
        q = q[: self._left[layer]]
        tokens, q_heads, dim = q.shape
        if not tokens:
            return
        sums = self._sums[layer]
        if sums is None:
            sums = self._sums[layer] = torch.zeros(self._shape, dtype=torch.float64, device=self._device)
        group = q_heads // self._shape[0]
        if q.is_cuda and kernels_can(dim, dim, group):
            # Imported here: Triton needs a GPU's driver.
            from mosaic_kernels.query_squares.launch import add_squares
        else:
            from mosaic_kernels.query_squares.reference import add_squares
        add_squares(q, sums)
        self._seen[layer] += tokens * group
        self._left[layer] -= tokens
        self._keep(layer, q.detach())

    def _keep(self, layer: int, q: torch.Tensor) -> None:
        rows, places, offered = _choice(self._sampled[layer], len(q), q.device)
        self._sampled[layer] += offered
        sample = self._sample[layer]
        if sample is None:
            sample = self._sample[layer] = q.new_zeros(SAMPLE_TOKENS, *q.shape[1:])
        if len(places):
            sample.index_copy_(0, places, q.index_select(0, rows))

    def full(self, layer: int) -> bool:
        """The budget of a layer is used up until the next epoch."""
        return not self._left[layer]

    def energy(self, layer: int) -> torch.Tensor | None:
        """Mean squares of a layer, over the GQA group too, float64 [Hkv, Dk]; None if it saw no query."""
        total = self._sums[layer]
        return None if total is None else total / self._seen[layer]

    def sample(self, layer: int) -> torch.Tensor | None:
        """At most SAMPLE_TOKENS queries [T, Hq, Dk] of a layer, a copy, or None if it saw none."""
        sample = self._sample[layer]
        return None if sample is None else sample[: self._sampled[layer]].clone()

    def renew(self) -> None:
        """Give every layer its budget again; what was learnt stays."""
        self._left = [self._budget] * len(self._left)

    @property
    def nbytes(self) -> int:
        """Bytes held at the moment, on the device."""
        return sum(x.nbytes for x in (*self._sums, *self._sample) if x is not None)


@functools.lru_cache(maxsize=16)
def _choice(before: int, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Which queries of a call go where in the sample: old prompts and new ones stay with the same probability
    (reservoir sampling, algorithm R, Vitter 1985, doi 10.1145/3147.3165).

    All layers see the same tokens, and tables that are made for each of them cost more than looking does.

    Args:
        before: queries that were offered before.
        tokens: of the call; TOKENS_A_CALL of them at most are offered, evenly, the last one among them.

    Returns:
        int64 [N] rows of the call, int64 [N] places in the sample, and how many were offered.
    """
    stride = -(-tokens // TOKENS_A_CALL)
    offered = range((tokens - 1) % stride, tokens, stride)
    # Seeded: the same requests in the same order give the same calibrations.
    chance = random.Random(before)
    chosen: dict[int, int] = {}
    for number, row in enumerate(offered, before + 1):
        place = number - 1 if number <= SAMPLE_TOKENS else chance.randrange(number)
        if place < SAMPLE_TOKENS:
            chosen[place] = row
    rows, places = (upload(list(x), device) for x in (chosen.values(), chosen))
    return rows, places, len(offered)


def by_kv_head(q: torch.Tensor, heads: int) -> torch.Tensor:
    """[T, Hq, D] -> float32 [Hkv, T * group, D]: query head h shares KV head h // group."""
    tokens, q_heads, dim = q.shape
    return q.float().view(tokens, heads, q_heads // heads, dim).permute(1, 0, 2, 3).reshape(heads, -1, dim)
