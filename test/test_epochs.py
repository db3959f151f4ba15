"""Which calibration a page was written with: the table alone, and the memory around it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_mosaic.cache import samples as samples_module
from sglang_mosaic.cache.epochs import EpochTable
from sglang_mosaic.cache.memory import PageMemory
from sglang_mosaic.cache.mixed_attention import MixedAttention
from sglang_mosaic.codec.planes import PlanesEpoch
from sglang_mosaic.config import MosaicConfig
from test_mixed_attention import (
    DIM,
    GROUP,
    HEADS,
    LAYERS,
    SCALE,
    append,
    empty_memory,
    expected,
    sealing,
    sequence,
    stored,
    write,
)

FIRST = 11


@pytest.fixture(autouse=True)
def two_live_epochs(monkeypatch):
    """Two are soon full."""
    monkeypatch.setattr(MosaicConfig, "live_epochs", property(lambda config: 2 if config.refresh_pages else 1))


def table(refresh=0, most=2, frames=20) -> EpochTable:
    return EpochTable(FIRST, frames, refresh, most)


def written(epochs: EpochTable, *frames: int) -> None:
    epochs.written(frames)


def epoch_of(epochs: EpochTable, frame: int):
    return epochs[int(epochs.numbers_of(torch.tensor([frame])))]


# The table.


def test_nothing_is_current_before_the_first_epoch():
    epochs = table()
    assert epochs.current is None and epochs.live == [] and epochs.started == 0
    assert epochs.due([])


def test_without_refresh_one_epoch_serves_for_ever():
    epochs = table(refresh=0, most=1)
    epochs.start("a")
    for frame in range(FIRST, FIRST + 20):
        written(epochs, frame)
        assert not epochs.due([frame])
    assert epochs.current == "a" and epochs.started == 1


def test_every_epoch_lasts_twice_as_long_as_the_one_before():
    epochs = table(refresh=3, most=2)
    lasted = [0]
    epochs.start("first")
    for _ in range(3 + 6 + 12):
        if epochs.due([]):
            epochs.start("another")
            lasted.append(0)
        written(epochs, FIRST)
        lasted[-1] += 1
    assert lasted == [3, 6, 12]


def test_an_old_epoch_lives_as_long_as_a_page_needs_it():
    epochs = table(refresh=1, most=2)
    epochs.start("a")
    written(epochs, 11, 12)
    assert epochs.due([11, 12])
    epochs.start("b")
    written(epochs, 13, 14)
    assert epochs.live == ["a", "b"] and epochs.current == "b"
    assert not epochs.due([11, 13, 14])  # due, but there is no room
    assert epoch_of(epochs, 11) == "a" and epoch_of(epochs, 13) == "b"
    assert epochs.due([13, 14])
    assert epochs.live == ["b"]
    epochs.start("c")
    assert epochs.live == ["b", "c"] and epoch_of(epochs, 13) == "b"


def test_a_frame_belongs_to_the_epoch_that_wrote_it_last():
    epochs = table(refresh=1)
    epochs.start("a")
    written(epochs, 11, 12)
    epochs.start("b")
    written(epochs, 11)
    assert [epoch_of(epochs, frame) for frame in (11, 12)] == ["b", "a"]


@given(
    st.integers(0, 4),
    st.integers(1, 3),
    st.lists(st.tuples(st.sampled_from(["write", "free"]), st.integers(0, 7)), max_size=60),
)
def test_no_page_loses_its_epoch_and_never_too_many_live(refresh, most, steps):
    epochs = table(refresh, most, frames=8)
    owner: dict[int, int] = {}
    lifetimes = [0]
    for what, index in steps:
        frame = FIRST + index
        owner.pop(frame, None)
        if what == "free":
            continue
        if epochs.due(iter(owner)):
            epochs.start(epochs.started)  # an epoch is its number
            lifetimes.append(0)
        written(epochs, frame)
        owner[frame] = epochs.current
        lifetimes[-1] += 1
        assert len(epochs.live) <= most
        assert all(epoch_of(epochs, f) == number for f, number in owner.items())
        assert epochs.current == epochs.started - 1 == max(epochs.live)
    for number, pages in enumerate(lifetimes[1:-1]):
        assert pages >= refresh * 2**number
    if not refresh:
        assert epochs.started <= 1


# The memory.


def refreshing(refresh=2, mosaic=12, **options) -> PageMemory:
    torch.manual_seed(0)
    return empty_memory(sealing(refresh_pages=refresh, **options), 8, mosaic, ratio=3.0)


def fill(memory: PageMemory, *pages: int) -> None:
    """Fill pages and encode them."""
    append(memory, list(pages))
    memory.begin_forward()


def numbers(memory: PageMemory, pages) -> list[int]:
    return memory.epochs.numbers_of(memory.table.frames[torch.tensor(list(pages))]).tolist()


def test_one_request_reads_pages_of_several_epochs():
    memory = refreshing()
    for page in range(1, 8):
        fill(memory, page)
    assert numbers(memory, range(1, 8)) == [0, 0, 1, 1, 1, 1, 1]
    first, second = memory.epochs.live
    assert first.hash != second.hash
    append(memory, [8])
    q = torch.randn(3, HEADS * GROUP, DIM)
    out = torch.full_like(q, torch.nan)
    plan = MixedAttention(memory, [sequence(memory, list(range(1, 9)), 7 * 64 + 40, 0, 3)])
    for layer in range(LAYERS):
        plan.run(layer, q, out, SCALE)
        torch.testing.assert_close(
            out, expected(memory, layer, list(range(1, 9)), 7 * 64 + 40, q), atol=1e-4, rtol=1e-3
        )


def test_pages_read_the_same_after_the_codec_was_calibrated_anew():
    memory = refreshing()
    fill(memory, 1, 2)
    before = [stored(memory, layer, page) for layer in range(LAYERS) for page in (1, 2)]
    fill(memory, 3, 4)
    assert memory.stats()["epochs_started"] == 2
    after = [stored(memory, layer, page) for layer in range(LAYERS) for page in (1, 2)]
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_an_epoch_without_pages_gives_its_tables_back():
    memory = refreshing(refresh=1)
    fill(memory, 1, 2)
    fill(memory, 3, 4)
    fill(memory, 5, 6)
    assert memory.stats()["epochs_started"] == 2  # a third waits for the first to go
    tables = memory.codec.table_bytes
    assert sum(epoch.nbytes for epoch in memory.epochs.live) == 2 * tables
    memory.free([1, 2])
    fill(memory, 1)
    assert memory.stats()["epochs_started"] == 3 and len(memory.epochs.live) == 2
    assert memory.mosaic_bytes == memory.slab.nbytes + 2 * tables + memory.codec.state_bytes
    assert numbers(memory, [3, 4, 5, 6, 1]) == [1, 1, 1, 1, 2]


def test_frames_about_to_be_rewritten_do_not_hold_on_to_an_epoch():
    memory = refreshing(refresh=2, mosaic=4)
    fill(memory, 1, 2)
    fill(memory, 3, 4)
    assert numbers(memory, [1, 2, 3, 4]) == [0, 0, 1, 1]
    memory.free([1, 2])
    fill(memory, 5, 6)  # in the frames of 1 and 2
    assert numbers(memory, [5, 6]) == [1, 1] and memory.stats()["epochs_started"] == 2
    memory.free([5, 6])
    fill(memory, 1, 2)
    assert memory.stats()["epochs_started"] == 3 and numbers(memory, [3, 4, 1, 2]) == [1, 1, 2, 2]


def test_the_owner_hears_of_every_calibration_and_may_bring_the_first():
    heard = []
    memory = refreshing()
    memory._on_epoch = heard.append
    for page in range(1, 5):
        fill(memory, page)
    assert heard == memory.epochs.live and len(heard) == 2
    assert memory.stats()["epoch"] == heard[-1].hash
    other = PageMemory(
        memory.plan, MosaicConfig(), memory.codec, memory.dense_k, memory.dense_v, epoch=heard[0], on_epoch=heard.append
    )
    assert other.epochs.current is heard[0] and len(heard) == 2
    assert other.stats()["epoch"] == heard[0].hash


def test_calibration_samples_starts_of_sequences_first_and_never_too_many(monkeypatch):
    torch.manual_seed(0)
    memory = empty_memory(MosaicConfig(), 100, 20)
    seen = []
    calibrate = memory.codec.calibrate
    monkeypatch.setattr(
        memory.codec, "calibrate", lambda samples, quick: seen.append(samples) or calibrate(samples, quick)
    )
    sinks = list(range(1, 41))
    append(memory, list(range(1, 100)), sinks=sinks)
    memory.allocate([100, 101], [])
    memory.begin_forward()
    (samples,) = seen
    assert len(samples) == LAYERS
    for layer, sample in enumerate(samples):
        assert sample.sinks == samples_module.SINK_PAGES
        assert len(sample.keys) == len(sample.values) == samples_module.SINK_PAGES + samples_module.PAGES
        for which in (slice(0, sample.sinks), slice(sample.sinks, None)):
            written_to = memory.dense_k[layer].view(-1, 64, HEADS, DIM)
            pages = [
                page for page in range(1, 100) if any(torch.equal(written_to[page], x) for x in sample.keys[which])
            ]
            assert pages and all((page in sinks) == (which.start == 0) for page in pages)


# The limit of errors.


def over_limit(limit, loud=(), encode="seal", mosaic=12):
    """Pages 1..6; some of them hold tokens that the codec cannot do justice."""
    torch.manual_seed(0)
    memory = empty_memory(MosaicConfig(encode=encode, calibration_pages=4, max_error=limit), 8, mosaic, ratio=4.0)
    quiet = torch.randn(LAYERS, 64, HEADS, DIM) * 0.5 ** torch.arange(DIM)
    memory.allocate([*range(1, 7)], [])
    memory.begin_forward()
    k = quiet.repeat(1, 6, 1, 1)
    v = torch.cat([torch.randn_like(quiet) * (1.0 if page in loud else 0.1) for page in range(1, 7)], 1)
    write(memory, [*range(1, 7)], k, v)
    memory.begin_forward()
    return memory


def test_pages_over_the_limit_stay_uncompressed_while_others_can_go():
    memory = over_limit(0.05, loud=(2, 5))
    mosaic = [page for page in range(1, 7) if int(memory.table.frames[page]) >= memory.table.first_mosaic]
    assert memory.lifecycle.costly == {2, 5} and mosaic == [1, 3, 4, 6]
    memory.allocate([7, 8, 9, 10, 11, 12], [])
    assert memory.stats()["pages_encoded_over_error"] == 0
    memory.allocate([13], [])  # there is no other way
    memory.begin_forward()
    assert memory.stats()["pages_encoded_over_error"] == 1
    assert int(memory.table.frames[2]) >= memory.table.first_mosaic > int(memory.table.frames[5])


def test_costly_pages_go_after_recent_ones_and_before_sinks():
    memory = over_limit(0.05, loud=(2, 5), encode="pressure")
    assert memory.lifecycle.costly == {2, 5} and memory.lifecycle.mosaic.used == 0
    memory.lifecycle.sinks.add(1)
    memory.set_recent_pages(lambda: {3, 5})
    order = []
    for page in range(7, 15):
        memory.allocate([page], [])
        order += [encoding.page for encoding in memory.lifecycle._operations.values()]
        memory.begin_forward()
    assert order == [4, 6, 3, 2, 5, 1]
    stats = memory.stats()
    assert (stats["pages_encoded_recent"], stats["pages_encoded_over_error"], stats["pages_encoded_sinks"]) == (1, 2, 1)


@pytest.mark.parametrize(("limit", "costly"), [(10.0, set()), (1e-6, {1, 2, 3, 4, 5, 6}), (None, set())], ids=str)
def test_the_limit_decides(limit, costly):
    assert over_limit(limit, encode="pressure").lifecycle.costly == costly


def test_a_page_is_judged_once(monkeypatch):
    memory = over_limit(1e-6, encode="pressure")
    judged = []
    encode = PlanesEpoch.encode
    monkeypatch.setattr(
        PlanesEpoch, "encode", lambda self, layer, k, v: judged.append((layer, len(k))) or encode(self, layer, k, v)
    )
    for _ in range(3):
        memory.begin_forward()
    assert judged == []
    append(memory, [7, 8])
    memory.begin_forward()
    memory.begin_forward()
    assert judged == [(layer, 2) for layer in range(LAYERS)]
    memory.free([7])
    assert 7 not in memory.lifecycle.costly and 8 in memory.lifecycle.costly
