"""What every suite's builder is given."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterator

from benchmark.quality.passages import Passages
from benchmark.quality.prompting import Prompter


@dataclasses.dataclass(frozen=True)
class Workload:
    """A tokenizer, and how many samples of which seed."""

    prompter: Prompter
    samples: int
    """Per task and length."""
    seed: int

    @functools.cached_property
    def passages(self) -> Passages:
        """The novels, read on first use."""
        return Passages(self.prompter)

    def generator(self, *of: object) -> random.Random:
        """Random numbers for one thing; they depend on no other thing, so that more samples keep the first ones."""
        return random.Random(" ".join(map(str, (self.seed, *of))))

    def batches(self, per_context: int) -> Iterator[range]:
        """Indices of the samples, those of one context together."""
        for start in range(0, self.samples, per_context):
            yield range(start, min(start + per_context, self.samples))
