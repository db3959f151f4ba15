"""Agreement of two models' next-token distributions, from their listed log-probabilities."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

Listed = dict[int, float]
"""Token id -> natural log-probability, the most probable tokens of one position."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Figures of one or more prompts; KL in nats."""

    positions: int
    same: int
    near_ties: int
    """Differing positions at which the reference's two best are nearly equal; they count as differing."""
    kl_sum: float
    kl_max: float

    @classmethod
    def total(cls, parts: Sequence[Agreement]) -> Agreement:
        return cls(
            sum(p.positions for p in parts),
            sum(p.same for p in parts),
            sum(p.near_ties for p in parts),
            sum(p.kl_sum for p in parts),
            max(p.kl_max for p in parts),
        )

    def as_dict(self) -> dict[str, float]:
        return {
            "positions": self.positions,
            "agreement": self.same / self.positions,
            "differing_near_ties": self.near_ties,
            "mean_kl": self.kl_sum / self.positions,
            "max_kl": self.kl_max,
        }


def agreement(reference: Sequence[Listed], ours: Sequence[Listed], near_tie: float) -> Agreement:
    """Compare position by position.

    Args:
        reference, ours: listed log-probabilities, same positions.
        near_tie: gap of the reference's two best log-probabilities that counts as a tie.
    """
    same = near_ties = 0
    divergences = []
    for a, b in zip(reference, ours, strict=True):
        divergences.append(divergence(a, b))
        best, second = sorted(a.values(), reverse=True)[:2]
        if max(a, key=a.__getitem__) == max(b, key=b.__getitem__):
            same += 1
        elif best - second < near_tie:
            near_ties += 1
    return Agreement(len(divergences), same, near_ties, sum(divergences), max(divergences))


def divergence(p: Listed, q: Listed) -> float:
    """KL(p || q) in nats over p's listed tokens and one bucket for all others.

    A token that q does not list gets q's smallest listed probability, an upper bound of its true one.
    """
    floor = min(q.values())
    total, p_mass, q_mass = 0.0, 0.0, 0.0
    for token, log_p in p.items():
        log_q = q.get(token, floor)
        total += math.exp(log_p) * (log_p - log_q)
        p_mass += math.exp(log_p)
        q_mass += math.exp(log_q)
    p_rest, q_rest = max(1.0 - p_mass, 0.0), max(1.0 - q_mass, 1e-9)
    if p_rest > 0.0:
        total += p_rest * math.log(p_rest / q_rest)
    return max(total, 0.0)
