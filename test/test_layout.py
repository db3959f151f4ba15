"""The memory plan: fits, never fails what the theorem promises, and says what would work."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_mosaic.errors import ConfigError
from sglang_mosaic.layout import MIB, FrameBytes, minimum_dense_frames, plan_memory, reserve_dense_frames

FRAMES = FrameBytes(dense=1_474_560, mosaic=414_720)


def plan(kv_bytes: int, **changes):
    arguments = {
        "frame_bytes": FRAMES, "chunk_tokens": 512, "window_pages": 2, "dense_fraction": 0.1, "max_running_requests": 8,
    }  # fmt: skip
    return plan_memory(kv_bytes=kv_bytes, **{**arguments, **changes})


@given(
    st.integers(1, 2000), st.integers(1, 4096), st.integers(1, 8), st.floats(0, 1), st.none() | st.integers(1, 300),
    st.none() | st.integers(64, 200_000), st.booleans(),
)  # fmt: skip
def test_a_plan_fits_and_keeps_the_theorem(mib, chunk, window, fraction, running, limit, prefer_dense):
    try:
        made = plan(
            mib * MIB, chunk_tokens=chunk, window_pages=window, dense_fraction=fraction, max_running_requests=running,
            max_total_tokens=limit, prefer_dense=prefer_dense,
        )  # fmt: skip
    except ConfigError:
        return
    assert made.total_bytes <= mib * MIB
    assert made.dense_frames >= minimum_dense_frames(made.max_running_requests, chunk)
    assert made.mosaic_frames >= 0
    assert limit is None or made.logical_tokens <= limit


def test_windows_have_their_reserve_when_memory_allows():
    made = plan(200 * MIB)
    assert made.dense_frames >= reserve_dense_frames(8, 512, 2) == 24


def test_three_times_the_tokens_of_a_dense_pool():
    made = plan(200 * MIB)
    assert made.logical_tokens >= 3 * (200 * MIB // FRAMES.dense) * 64


def test_too_small_names_the_smallest_size_that_works():
    with pytest.raises(ConfigError, match=r"smallest size that works is 1024 tokens \(24\.0 MiB\)"):
        plan(20 * MIB)
    assert plan(int(24.0 * MIB)).dense_frames >= 16


def test_a_token_limit_below_the_reserve_is_named():
    with pytest.raises(ConfigError, match="--max-total-tokens 128 is too small"):
        plan(200 * MIB, max_total_tokens=128)


def test_nothing_is_compressed_when_the_limit_fits_uncompressed():
    made = plan(200 * MIB, max_total_tokens=4096)
    assert (made.dense_frames, made.mosaic_frames) == (64, 0)


def test_seal_policy_compresses_under_the_same_limit():
    made = plan(200 * MIB, max_total_tokens=4096, prefer_dense=False)
    assert (made.dense_frames, made.mosaic_frames) == (24, 40)


def test_without_compression_all_frames_are_dense():
    made = plan(100 * MIB, compress=False)
    assert made.mosaic_frames == 0
    assert made.dense_frames == 100 * MIB // FRAMES.dense - 1


def test_requests_are_chosen_to_fit_when_not_given():
    made = plan(100 * MIB, max_running_requests=None)
    assert 1 <= made.max_running_requests <= 8
    assert made.dense_frames >= reserve_dense_frames(made.max_running_requests, 512, 2)


def test_the_codecs_tables_come_out_of_the_memory():
    with_tables = plan(200 * MIB, table_bytes=6_000_000)
    assert with_tables.total_bytes <= 200 * MIB
    assert plan(200 * MIB).mosaic_frames - with_tables.mosaic_frames == pytest.approx(6_000_000 / FRAMES.mosaic, abs=1)
