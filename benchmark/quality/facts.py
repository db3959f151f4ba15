"""Things to remember: names and numbers that no text gives away."""

from __future__ import annotations

import random

THINGS = (
    "lighthouse", "archive", "observatory", "greenhouse", "granary", "chapel", "foundry", "orchard", "aquarium",
    "workshop", "boathouse", "theatre", "vineyard", "quarry", "library", "laboratory",
)  # fmt: skip


def facts(count: int, generator: random.Random) -> list[tuple[str, str]]:
    """Pairs of a thing and its number of seven digits, all different."""
    numbers = generator.sample(range(1_000_000, 10_000_000), count)
    return list(zip(generator.sample(THINGS, count), map(str, numbers), strict=True))
