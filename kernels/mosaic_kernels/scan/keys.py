"""Sort keys of tokens: how much attention they get, compared with the dense tokens that are read anyway."""

from __future__ import annotations

import torch

KEYS = 512
"""Number of keys; a larger one is more attention."""
STEPS = 8
"""Keys per factor of e."""
LOWEST = -48.0
"""Logarithm of the ratio that key 0 stands for: what is less attended than that has no part in any output."""


def keys_of(logits: torch.Tensor, known_lse: torch.Tensor, queries: int) -> torch.Tensor:
    """The key of every token, for each query and KV head.

    It is the largest over the group's query heads of the token's logit less the log-sum-exp of what is known: no sum
    over the context has to be finished first. Measured on answers, it chooses as well as the mean probability
    (docs/codec.md).

    Args:
        logits: [Hkv, R, N] float, R = group * queries, group-major.
        known_lse: [Hkv, R] float, of the tokens that are read anyway; -inf, none: the logits alone.

    Returns:
        int16 [Hkv, queries, N].
    """
    known = torch.where(known_lse == -torch.inf, 0.0, known_lse)
    share = (logits - known[..., None]).unflatten(1, (-1, queries)).amax(1)
    return ((share - LOWEST) * STEPS + 0.5).nan_to_num(KEYS - 1.0).floor().clamp(0, KEYS - 1).short()
