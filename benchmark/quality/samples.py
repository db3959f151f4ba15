"""One question about one context, as token ids."""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Sample:
    """A question, asked after its context is in the server's cache."""

    suite: str
    task: str
    length: int
    """The length asked for, in tokens; prompts may fall short of it."""
    index: int
    question: Sequence[int]
    """Everything between the context and the answer, at least one token."""
    answer: Sequence[int]
    """The right answer, for forced scoring."""
    scored: Sequence[int]
    """Offsets in `answer` of the tokens that count, ascending; the others are separators."""
    references: Sequence[str]
    """For generated replies: the strings that `metric` looks for."""
    metric: str
    """A name in metrics.METRICS, or LIKELIHOOD."""
    budget: int
    """Tokens that a generated reply may have."""

    @property
    def key(self) -> str:
        """Names the sample in every run with the same settings."""
        return f"{self.suite}/{self.task}/{self.length}/{self.index}"


@dataclasses.dataclass(frozen=True)
class Group:
    """A context and all questions about it."""

    context: Sequence[int]
    samples: Sequence[Sample]
    steps: Sequence[int] = ()
    """Lengths of the context's prefixes to send before the whole, ascending: the earlier turns of a conversation."""


def fingerprint(context: Sequence[int], sample: Sample) -> str:
    """Equal for equal prompts and answers; 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for ids in (context, sample.question, sample.answer, sample.scored):
        digest.update(array("q", [len(ids), *ids]).tobytes())
    digest.update("\0".join([sample.metric, *sample.references]).encode())
    return digest.hexdigest()[:16]
