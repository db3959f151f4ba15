"""Calibrations as bytes: the same epoch as in this process, or one clear refusal."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manager_cases import frames
from sglang_mosaic.codec import LayerSample, PlanesCodec
from sglang_mosaic.codec.calibration_job import StatisticsError, run, statistics_from_bytes, statistics_to_bytes
from sglang_mosaic.codec.storage import epoch_from_bytes, epoch_to_bytes
from sglang_mosaic.errors import ConfigError


def test_another_process_gets_the_same_epoch() -> None:
    case = frames()
    data = statistics_to_bytes(case.codec.statistics(case.samples))
    assert epoch_from_bytes(run(data)).hash == case.codec.calibrate(case.samples).hash


def test_statistics_come_back() -> None:
    codec = PlanesCodec(1, 1, 16, 16, ratio=3.0)
    given_ = codec.statistics([LayerSample(torch.randn(2, 64, 1, 16).bfloat16(), torch.randn(2, 64, 1, 16), 1)])
    found = statistics_from_bytes(statistics_to_bytes(given_))
    assert found[1:] == given_[1:]
    assert found.layers[0].query_energy is None and found.layers[0].queries is None
    assert found.layers[0].sample.sinks == 1
    assert torch.equal(found.layers[0].sample.keys, given_.layers[0].sample.keys)


def test_statistics_that_are_not_finite_are_refused() -> None:
    codec = PlanesCodec(1, 1, 16, 16, ratio=3.0)
    keys = torch.full((2, 64, 1, 16), torch.nan)
    with pytest.raises(StatisticsError, match="finite"):
        run(statistics_to_bytes(codec.statistics([LayerSample(keys, keys.clone())])))


def test_epochs_come_back_as_bytes() -> None:
    epoch = frames().epoch
    assert epoch_from_bytes(epoch_to_bytes(epoch)).hash == epoch.hash


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_bytes_are_refused(data: st.DataObject) -> None:
    epoch = bytearray(frames().epoch_bytes)
    at = data.draw(st.one_of(st.integers(0, 400), st.integers(0, len(epoch) - 1)))
    epoch[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = epoch_from_bytes(bytes(epoch))
    except ConfigError:
        return
    # Nothing but what its meaning does not hang on may have changed.
    assert found.hash == frames().epoch.hash


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(StatisticsError):
        statistics_from_bytes(data)
    with pytest.raises(ConfigError):
        epoch_from_bytes(data)
