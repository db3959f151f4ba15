"""How well scanned logits find the tokens that matter, measured per head on real tokens.

The scan reads the base planes of K's leading channels. Its rank follows the head: some concentrate on few directions,
others need most of them. The far field stands in for the tokens that were not chosen; its mass is corrected by what the
scan is measured to over- or underestimate, and heads that it does not help go without.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mosaic_kernels.scan.keys import keys_of
from mosaic_kernels.segment import GROUP
from mosaic_kernels.select.reference import attend_selected, choose_tokens, far_logits

BUDGET = 0.1
"""Share of the tokens selected while measuring."""
ENOUGH_RECALL = 0.998
"""Of the attention mass that the best choice of as many tokens would catch."""


class SelectionProfile(NamedTuple):
    """One KV head."""

    scan_channels: int
    """Leading channels of K that the scan reads, a multiple of 16."""
    far_bias: float | None
    """Added to the far field's logits; None: no far field."""


def profile(
    queries: torch.Tensor, keys: torch.Tensor, scanned: torch.Tensor, values: torch.Tensor, scale: float, page_size: int
) -> SelectionProfile:
    """Measure one head.

    Args:
        queries: [R, Dk] float32, rotated; every row is a query of its own.
        keys: [N, Dk] float32, exact; scanned: [N, Dk] float32, as the base planes have them; both rotated.
        values: [N, Dv] float32, rotated; N a multiple of page_size.
        scale: factor of the logits.
        page_size: tokens that share a mean value.
    """
    exact = (queries * scale) @ keys.T
    mass = exact.softmax(-1)
    most = max(int(BUDGET * len(keys)), 1)
    best = mass.topk(most, -1).values.sum(-1).mean()
    for channels in range(GROUP, keys.shape[1] + 1, GROUP):
        logits = (queries[:, :channels] * scale) @ scanned[:, :channels].T
        caught = mass.gather(-1, logits.topk(most, -1).indices).sum(-1).mean()
        if caught >= ENOUGH_RECALL * best:
            break
    return SelectionProfile(channels, _far_bias(queries, keys, values, logits, exact, scale, most, page_size))


def _far_bias(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scanned: torch.Tensor,
    exact: torch.Tensor,
    scale: float,
    most: int,
    page_size: int,
) -> float | None:
    """The correction of the far field's mass, if with it the output is closer to the exact one."""
    # As if what is read anyway had as much of the attention.
    keys_seen = keys_of(scanned[None], scanned.logsumexp(-1)[None], len(queries))
    selected = choose_tokens(keys_seen, 1.0, most)
    true = exact[None].masked_fill(selected, -torch.inf).unflatten(-1, (-1, page_size)).logsumexp(-1)
    seen = far_logits(keys_seen, scanned[None].unflatten(-1, (-1, page_size)).logsumexp(-1), selected)
    bias = true.logsumexp(-1).mean() - seen.logsumexp(-1).mean()
    if not torch.isfinite(bias):
        return None
    means = values.unflatten(0, (-1, page_size)).mean(1)[None]
    wanted = exact.softmax(-1) @ values
    errors = [
        (attend_selected(queries[None], keys[None], values[None], selected, scale, far)[0] - wanted).norm()
        for far in (None, (seen + bias, means))
    ]
    return float(bias) if errors[1] < errors[0] else None
