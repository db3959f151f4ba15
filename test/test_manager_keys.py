"""Keys, options and metrics: small parts that everything else relies on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_mosaic.errors import ConfigError
from sglang_mosaic.manager.keys import epoch_key, namespace, page_keys, statistics_key
from sglang_mosaic.manager.metrics import BOUNDS_S, Histogram, ManagerMetrics
from sglang_mosaic.manager.options import ManagerOptions
from sglang_mosaic.page import PAGE_SIZE

ROOT = namespace("model", 0, 3)
TOKENS = list(range(5 * PAGE_SIZE))


def test_a_key_says_all_tokens_before_it() -> None:
    keys = page_keys(ROOT, TOKENS)
    assert len(set(keys)) == 5
    assert {len(key) for key in keys} == {16}
    assert page_keys(ROOT, TOKENS[: 2 * PAGE_SIZE]) == keys[:2]
    assert page_keys(keys[1], TOKENS[2 * PAGE_SIZE :]) == keys[2:]
    # The same page after other tokens is another page.
    assert not set(page_keys(ROOT, [7, *TOKENS[1:]])) & set(keys)


@pytest.mark.parametrize("length, pages", [(0, 0), (63, 0), (64, 1), (65, 1), (127, 1), (128, 2)])
def test_what_fills_no_page_has_no_key(length: int, pages: int) -> None:
    assert len(page_keys(ROOT, TOKENS[:length])) == pages


def test_who_reads_the_tokens_counts() -> None:
    everything = [
        page_keys(ROOT, TOKENS),
        page_keys(namespace("model", 1, 3), TOKENS),
        page_keys(namespace("model", "0", 3), TOKENS),
        page_keys(namespace("model0", 3), TOKENS),
        page_keys(ROOT, TOKENS, "tenant"),
        page_keys(ROOT, TOKENS, ""),
    ]
    assert len({key for keys in everything for key in keys}) == 6 * 5


@given(st.lists(st.integers(0, 2**31 - 1), min_size=PAGE_SIZE, max_size=PAGE_SIZE), st.integers(0, PAGE_SIZE - 1))
def test_every_token_counts(tokens: list[int], at: int) -> None:
    changed = [*tokens[:at], tokens[at] + 1, *tokens[at + 1 :]]
    assert page_keys(ROOT, tokens) != page_keys(ROOT, changed)


def test_kinds_of_records_do_not_meet() -> None:
    assert len({epoch_key("1"), statistics_key(1), namespace("1"), namespace(1)}) == 4


@pytest.mark.parametrize(
    "field, value",
    [
        ("slot_bytes", 0),
        ("slots", 1),
        ("host_bytes", 0),
        ("host_raw_bytes", -1),
        ("host_max_error", -0.1),
        ("host_max_error", 1.0),
        ("host_max_error", float("nan")),
        ("nice", -5),
        ("silence_s", 0),
        ("rescan_s", float("nan")),
    ],
)
def test_options_that_cannot_be_are_named(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field.replace("_", "[_-]")):
        ManagerOptions(**{"slot_bytes": 1, field: value})


@pytest.mark.parametrize("text", ["", "[]", "1", '{"slot_bytes": 1, "unknown": 2}', "{}"])
def test_text_that_is_no_options_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        ManagerOptions.from_json(text)


def test_durations_are_counted_by_their_upper_bounds() -> None:
    histogram = Histogram()
    for seconds in (0.0, BOUNDS_S[0], BOUNDS_S[0] * 1.01, BOUNDS_S[-1], 99.0):
        histogram.add(seconds)
    assert histogram.counts[:2] == [2, 1]
    assert histogram.counts[-2:] == [1, 1]
    assert sum(histogram.counts) == 5
    metrics = ManagerMetrics(restore=histogram).as_dict()
    assert metrics["restore_counts"] == histogram.counts
    assert metrics["restore_seconds"] == pytest.approx(histogram.seconds)
