"""Is an answer right? For generated replies by their text, for forced answers by the tokens' ranks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from benchmark.quality.scoring import Listed

NEAR_TIE = 0.01
"""Gap in nats to the best token under which full KV may flip its own choice, too."""

LIKELIHOOD = "likelihood"
"""Metric of running text: the score is the share of tokens that are the model's first choice."""

KEPT = 20
"""Listed tokens kept per position."""
DIGITS = 4
"""Kept decimal digits of a log-probability."""


def match_all(reply: str, references: Sequence[str]) -> float:
    """Share of the references that the reply contains; RULER's metric for all tasks but the two of questions."""
    reply = reply.lower()
    return sum(reference.lower() in reply for reference in references) / len(references)


def match_part(reply: str, references: Sequence[str]) -> float:
    """1 when the reply contains any of the references; RULER's metric for questions with several right answers."""
    reply = reply.lower()
    return float(any(reference.lower() in reply for reference in references))


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {check.__name__: check for check in (match_all, match_part)}
"""Score of a reply, 0 to 1, from its text and the references."""


@dataclasses.dataclass(frozen=True)
class Forced:
    """Verdict on a forced answer."""

    correct: int
    """Scored tokens that are the first choice."""
    total: int
    near_tie: bool
    """Wrong, but only by tokens within NEAR_TIE of the first choice."""

    @property
    def exact(self) -> bool:
        return self.correct == self.total


def judge(answer: Sequence[int], own: Sequence[float], listed: Sequence[Listed]) -> Forced:
    """Compare every answer token with the most probable one.

    Args:
        answer: the tokens that count.
        own: their log-probabilities.
        listed: the most probable tokens at their positions.
    """
    correct, widest = 0, 0.0
    for token, value, row in zip(answer, own, listed, strict=True):
        best = max(row, key=row.__getitem__)
        if best == token:
            correct += 1
        else:
            widest = max(widest, row[best] - value)
    return Forced(correct, len(answer), correct < len(answer) and widest < NEAR_TIE)


def perplexity(own: Sequence[float]) -> float:
    """Of tokens with these log-probabilities."""
    return math.exp(-sum(own) / len(own))
