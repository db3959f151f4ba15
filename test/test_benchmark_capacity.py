"""The cache-capacity benchmark's probe against an exact LRU cache in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import pytest

from benchmark.serving import cache_capacity
from benchmark.serving.capacity_probe import Prompts, measure_held


class LruCache:
    """SGLang's radix cache for prompts without shared prefixes: whole prompts, LRU, room made by the shortfall."""

    def __init__(self, tokens: int, page: int) -> None:
        self._tokens = tokens
        self._page = page
        self._held: OrderedDict[tuple[int, ...], int] = OrderedDict()

    def flush(self) -> None:
        self._held.clear()

    def prefill(self, input_ids: list[int]) -> int:
        key = tuple(input_ids)
        kept = len(key) // self._page * self._page
        hit = min(self._held.pop(key, 0), (len(key) - 1) // self._page * self._page)
        needed = -(-len(key) // self._page) * self._page - hit
        own = kept if hit else 0
        while self._tokens - sum(self._held.values()) - own < needed:
            self._held.popitem(last=False)
        self._held[key] = kept
        return hit


def _quiet(phase: str, indices: Sequence[int]) -> Iterator[int]:
    yield from indices


@pytest.mark.parametrize("page", [1, 64])
@pytest.mark.parametrize("length", [128, 129, 321])
@pytest.mark.parametrize("tokens", [4096, 5000 // 64 * 64, 10240])
def test_probe_counts_to_within_a_prompt(page: int, length: int, tokens: int) -> None:
    prompts = Prompts(length, 1000, 30000, seed=1)
    found = measure_held(LruCache(tokens, page), prompts, tokens, 1.5, _quiet)
    assert found["overfilled"]
    countable = (length - 1) // page * page
    per_prompt = length // page * page
    real_prompts = tokens / per_prompt
    assert real_prompts - 2.3 <= found["prompts_held"] <= real_prompts
    assert found["held_tokens"] == found["prompts_held"] * countable
    if length % 64 == 1:
        assert tokens - (length + 64) - found["prompts_held"] <= found["held_tokens"] <= tokens


def test_probe_grows_when_the_cache_is_larger_than_reported() -> None:
    prompts = Prompts(129, 1000, 30000, seed=1)
    found = measure_held(LruCache(14_000, 64), prompts, 4096, 1.5, _quiet)
    assert found["overfilled"]
    assert found["prompts_sent"] == 48 * 4
    endless = measure_held(LruCache(10**9, 64), prompts, 1024, 1.5, _quiet)
    assert not endless["overfilled"]
    assert endless["prompts_held"] == endless["prompts_sent"] == 12 * 8


def test_prompts_are_distinct_from_the_first_token() -> None:
    prompts = Prompts(129, 1000, 1200, seed=0)
    assert len({prompts[index][0] for index in range(200)}) == 200
    assert prompts[3] == prompts[3]
    assert {len(prompts[index]) for index in range(5)} == {129}


def test_ratio_is_given_with_its_bounds() -> None:
    def result(held: int) -> dict[str, dict[str, int]]:
        return {"summary": {"held_tokens": held, "held_tokens_at_most": held + 320}}

    results = {"stock": result(3840), "mosaic": result(12800)}
    assert cache_capacity.ratio_range(results) == pytest.approx((12800 / 4160, 13120 / 3840))
    text = cache_capacity.describe(results)
    assert "between 3.077 and 3.417" in text
    assert "stock: the count is coarse, 3,840 to 4,160 tokens" in text
    assert cache_capacity.ratio_range({"server": result(1)}) is None
