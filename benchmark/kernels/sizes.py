"""Sizes of what is measured: a layer, a batch, its pieces."""

from __future__ import annotations

from typing import NamedTuple

from mosaic_kernels.page_batch import LEAST_SCANNED

PAGE = 64
"""Tokens."""
SHARED_STEPS = 4
"""Decode steps that share a selection."""


class Dims(NamedTuple):
    """One layer of a model, and what its codec and a step of it read."""

    heads: int
    """KV heads H."""
    group: int
    """Query heads of a KV head."""
    dim: int
    """Channels D of K and of V."""
    scan_channels: int
    select: float
    """Share of the tokens that a step selects."""


class Shape(NamedTuple):
    """A batch of requests of one length."""

    batch: int
    context: int
    """Tokens, a multiple of PAGE."""

    def __str__(self) -> str:
        return f"{self.batch}x{self.context}"


class Split(NamedTuple):
    """How a batch is cut into pieces (`page_batch.plan`, `plan_selection`, `plan_step`)."""

    programs: int
    token_programs: int
    least_pages: int = LEAST_SCANNED
    least_tokens: int = 64
