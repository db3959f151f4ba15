"""Greedy answers with their log-probabilities, and what tells a wrong token from a tie."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NEAR_TIE = 0.01
"""Gap between the two best log-probabilities below which either token is a right answer: bf16 decides it."""


class NearTieWarning(UserWarning):
    """A differing token that is no error; shown in the summary of the test run."""


@dataclass(frozen=True)
class Answer:
    """One answer; per token its log-probability and the gap between the two best ones."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    gaps: tuple[float, ...]
    prompt_tokens: int
    cached_tokens: int

    @classmethod
    def of(cls, reply: dict[str, Any]) -> Answer:
        """From a reply of /generate with return_logprob and top_logprobs_num=2."""
        meta = reply["meta_info"]
        chosen = meta["output_token_logprobs"]
        return cls(
            tokens=tuple(token for _, token, _ in chosen),
            logprobs=tuple(logprob for logprob, _, _ in chosen),
            gaps=tuple(best[0] - second[0] for best, second in meta["output_top_logprobs"]),
            prompt_tokens=meta["prompt_tokens"],
            cached_tokens=meta["cached_tokens"],
        )


def wrong_answers(expected: Mapping[str, Answer], found: Mapping[str, Answer]) -> list[str]:
    """One line for each answer whose tokens differ; a first difference at a near-tie is a warning instead."""
    wrong = []
    for name, want in expected.items():
        got = found[name]
        if got.tokens == want.tokens:
            continue
        at = next((i for i, (a, b) in enumerate(zip(want.tokens, got.tokens, strict=False)) if a != b), None)
        if at is None:
            wrong.append(f"{name}: {len(got.tokens)} tokens instead of {len(want.tokens)}")
            continue
        line = (
            f"{name}: token {at} is {got.tokens[at]} instead of {want.tokens[at]}, "
            f"expected log-probability {want.logprobs[at]:.5f}, gap to the second {want.gaps[at]:.5f}"
        )
        if want.gaps[at] < NEAR_TIE:
            warnings.warn(line, NearTieWarning, stacklevel=2)
        else:
            wrong.append(line)
    return wrong


def largest_drift(expected: Mapping[str, Answer], found: Mapping[str, Answer]) -> float:
    """Largest difference of a log-probability, over the tokens before the first difference of each answer."""
    drift = 0.0
    for name, want in expected.items():
        got = found[name]
        for i, token in enumerate(want.tokens):
            if got.tokens[i] != token:
                break
            drift = max(drift, abs(want.logprobs[i] - got.logprobs[i]))
    return drift
