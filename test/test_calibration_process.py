"""Calibrations beside a server that has no manager, by a process of its own; a quick one where pages cannot wait."""

from __future__ import annotations

import time

import pytest
import torch

from sglang_mosaic.cache.calibration_process import CalibrationProcess
from sglang_mosaic.cache.memory import PageMemory
from sglang_mosaic.codec.calibration_job import statistics_from_bytes, statistics_to_bytes
from sglang_mosaic.codec.factory import make_codec
from sglang_mosaic.codec.planes import calibrate
from sglang_mosaic.layout import FrameBytes, MemoryPlan
from test_mixed_attention import DIM, HEADS, LAYERS, append, sealing, stored


@pytest.fixture
def beside():
    process = CalibrationProcess(1)
    yield process
    process.close()


def make_memory(beside: CalibrationProcess, **options) -> PageMemory:
    torch.manual_seed(0)
    codec = make_codec("planes", LAYERS, HEADS, DIM, DIM, ratio=3.0)
    k, v = ([torch.zeros(40 * 64, HEADS, DIM, dtype=torch.bfloat16) for _ in range(LAYERS)] for _ in range(2))
    plan = MemoryPlan(39, 30, 2, FrameBytes(LAYERS * HEADS * 64 * DIM * 2 * 2, codec.frame_bytes))
    return PageMemory(plan, sealing(**options), codec, k, v, beside=beside)


def fill(memory: PageMemory, *pages: int) -> None:
    append(memory, list(pages))
    memory.begin_forward()


def wait(memory: PageMemory, pages) -> None:
    """Serve until an epoch has come."""
    before, deadline = memory.epochs.current, time.monotonic() + 60
    while memory.epochs.current is before:
        assert time.monotonic() < deadline, "no epoch came"
        fill(memory, next(pages)) if pages else memory.begin_forward()
        time.sleep(0.05)


def is_quick(epoch):
    """Whether nothing was measured for selecting."""
    return all(head.selection.far_bias is None for layer in epoch.layers for head in layer.heads)


@pytest.mark.parametrize("encode", ["seal", "pressure"])
def test_the_first_epoch_is_made_before_a_page_needs_it(beside, encode):
    memory = make_memory(beside, encode=encode, refresh_pages=64)
    fill(memory, *range(1, 19))
    assert not beside.calibrating
    fill(memory, 19, 20)
    assert beside.calibrating and memory.epochs.current is None
    fill(memory, 21)
    assert not memory.lifecycle.mosaic.used
    wait(memory, None)
    assert memory.epochs.started == 1 and not is_quick(memory.epochs.current)
    fill(memory, 22)
    assert bool(memory.lifecycle.mosaic.used) == (encode == "seal") and not beside.calibrating


def test_a_quick_epoch_is_followed_by_one_of_the_process(beside):
    memory = make_memory(beside, encode="pressure", refresh_pages=64)
    fill(memory, *range(1, 18))
    # More than there are dense frames at once: somebody waits.
    append(memory, [*range(18, 45)])
    quick = memory.epochs.current
    assert quick is not None and memory.epochs.started == 0
    assert is_quick(quick)
    before = stored(memory, 0, 1)
    fill(memory, *range(45, 50))
    assert beside.calibrating and memory.epochs.current is quick
    wait(memory, None)
    assert memory.epochs.started == 1 and not beside.calibrating
    fill(memory, *range(50, 58))
    numbers = memory.epochs.numbers_of(memory.table.frames[torch.tensor([1, 18])]).tolist()
    assert numbers == [0, 1]
    assert torch.equal(stored(memory, 0, 1)[0], before[0])
    # It lasts.
    fill(memory, 58, 59, 60)
    assert not beside.calibrating


def test_where_none_follows_the_first_epoch_is_no_quick_one(beside):
    memory = make_memory(beside, refresh_pages=0)
    fill(memory, 1, 2, 3)
    assert memory.epochs.started == 1
    assert not is_quick(memory.epochs.current)


def test_a_process_that_fails_is_not_asked_again_and_the_server_calibrates_itself(beside):
    memory = make_memory(beside, refresh_pages=64)
    beside.calibrate(lambda: memory.codec.statistics([]))
    deadline = time.monotonic() + 30
    while beside.calibrating and time.monotonic() < deadline:
        assert beside.take_epoch() is None
        time.sleep(0.01)
    assert not beside.calibrates
    fill(memory, 1, 2, 3)
    fill(memory, 4)
    assert memory.epochs.started == 1


def test_statistics_come_back_as_they_were():
    memory = make_memory(None, refresh_pages=0)
    append(memory, [1, 2, 3])
    given = memory.codec.statistics(memory._samples.pages([2, 3]).layers(torch.device("cpu")))
    again = statistics_from_bytes(statistics_to_bytes(given))
    for one, other in zip(given.layers, again.layers, strict=True):
        assert torch.equal(one.sample.keys, other.sample.keys) and one.sample.sinks == other.sample.sinks
        assert torch.equal(one.query_energy, other.query_energy) and torch.equal(one.queries, other.queries)
    assert calibrate(given).hash == calibrate(again).hash
