"""Fill a server's prefix cache past its capacity, then count what is still there.

Order matters, because a probe is a request like any other: it renews its prompt in the LRU order, and on a miss it
inserts the prompt again and evicts others. So the prompts are probed from the most recently sent backwards, which
leaves the LRU order of those still to be probed as it was, and the count stops at the first miss. SGLang evicts the
shortfall of an allocation in whole prompts, so after the last prompt less than one prompt's room is free; a probe that
hits needs one page of room, at worst takes it from the oldest prompt, once, and the probes after it reuse that room.
The count is therefore low by less than one prompt and one page.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

PAGE_TOKENS = 64
# A cache so much larger than the server says is a wrong report or a wrong probe.
MAX_ROUNDS = 4

# Wraps the prompts of one phase, to show progress.
Track = Callable[[str, Sequence[int]], Iterator[int]]


class Server(Protocol):
    """What the probe needs of a server."""

    def flush(self) -> None:
        """Empty the cache."""

    def prefill(self, input_ids: list[int]) -> int:
        """Run one prompt; return how many of its tokens came from the cache."""


@dataclass(frozen=True)
class Prompts:
    """Distinct prompts of `length` tokens, ids in [low, high); prompt i is the same in every process."""

    length: int
    low: int
    high: int
    seed: int

    def __getitem__(self, index: int) -> list[int]:
        """The ids of one prompt. First ids differ while they last, so that prompts share no first token by chance."""
        generator = random.Random(f"{self.seed} prompt {index}")
        first = self.low + index % (self.high - self.low)
        return [first, *generator.choices(range(self.low, self.high), k=self.length - 1)]

    @property
    def full_hit(self) -> int:
        """Cached tokens from which a prompt counts as held: all its whole pages but one.

        A server always computes at least the last token, so a length of a multiple of a page loses a page.
        """
        return self.length // PAGE_TOKENS * PAGE_TOKENS - PAGE_TOKENS


def measure_held(
    server: Server, prompts: Prompts, expected_tokens: int, overfill: float, track: Track
) -> dict[str, Any]:
    """Tokens still cached after sending `overfill` times `expected_tokens`, with the raw probe rows.

    If every prompt is still there, the cache is larger than expected: start again with twice as many prompts, at most
    MAX_ROUNDS times. "overfilled" in the result says whether a miss was seen; without one the count is a lower bound.
    """
    count = max(2, math.ceil(overfill * expected_tokens / prompts.length))
    for rounds in range(1, MAX_ROUNDS + 1):
        server.flush()
        start = time.perf_counter()
        for index in track(f"send, round {rounds}", range(count)):
            server.prefill(prompts[index])
        send_s = time.perf_counter() - start
        rows = []
        for index in track(f"probe, round {rounds}", range(count - 1, -1, -1)):
            cached = server.prefill(prompts[index])
            rows.append({"prompt": index, "cached_tokens": cached, "held": cached >= prompts.full_hit})
            if not rows[-1]["held"]:
                break
        held = [row["cached_tokens"] for row in rows if row["held"]]
        if len(held) < count or rounds == MAX_ROUNDS:
            break
        count *= 2
    return {
        "held_tokens": sum(held),
        "prompts_held": len(held),
        "prompts_sent": count,
        "overfilled": len(held) < count,
        "send_s": send_s,
        "rows": rows,
    }
