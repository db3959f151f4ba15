"""Pages leave the pool for a manager in process and come back into other frames, on whatever device there is."""

from __future__ import annotations

import pytest
import torch

import triton_device  # noqa: F401  (before anything that imports Triton)
from sglang_mosaic.cache.host_copies import pinned_memory
from sglang_mosaic.cache.host_page import HostPage
from sglang_mosaic.cache.host_tier import HostTier
from sglang_mosaic.cache.memory import PageMemory
from sglang_mosaic.codec.planes import PlanesCodec
from sglang_mosaic.config import MosaicConfig
from sglang_mosaic.layout import FrameBytes, MemoryPlan
from sglang_mosaic.manager.in_process import InProcessClient
from sglang_mosaic.manager.keys import namespace, page_keys
from sglang_mosaic.manager.options import ManagerOptions
from sglang_mosaic.page import PAGE_SIZE
from sglang_mosaic.wire.buffers import Buffers, usual_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS, HEADS, DIM, PAGES = 2, 2, 64, 8
DENSE_BYTES = LAYERS * PAGE_SIZE * HEADS * 2 * DIM * 2


def pool(encode: str = "seal", most_bytes: int = 1 << 26, max_error: float | None = None) -> PageMemory:
    """Eight pages in dense frames 1 to 8, the first a sink; with `seal` all but it and the last two are encoded by the
    next forward. `most_bytes` wait for the manager."""
    torch.manual_seed(0)
    codec = PlanesCodec(LAYERS, HEADS, DIM, DIM, device=DEVICE)
    plan = MemoryPlan(PAGES, 12, 1, FrameBytes(DENSE_BYTES, codec.frame_bytes))
    k, v = (
        [torch.randn((PAGES + 1) * PAGE_SIZE, HEADS, DIM, device=DEVICE).bfloat16() for _ in range(LAYERS)]
        for _ in range(2)
    )
    config = MosaicConfig(encode=encode, calibration_pages=1, refresh_pages=0, host_gb=1, max_error=max_error)
    memory = PageMemory(plan, config, codec, k, v)
    memory.set_recent_pages(lambda: {7, 8})
    for layer in range(LAYERS):
        codec.observe_queries(layer, torch.randn(64, 2 * HEADS, DIM, device=DEVICE))
    options = ManagerOptions(slot_bytes=DENSE_BYTES, slots=8)
    memory.connect(
        HostTier(
            InProcessClient(options),
            most_bytes,
            most_bytes,
            8,
            Buffers(most_bytes, pinned_memory if DEVICE == "cuda" else usual_memory),
            lambda hash_: memory.epochs.number(hash_) is not None,
            memory.adopt,
        )
    )
    return memory


def pool_with_room_for(pages: int) -> tuple[PageMemory, list[bytes]]:
    """A pool of written pages, most of them compressed, so many of which may wait for the manager, and their keys."""
    memory = pool(most_bytes=pages * PlanesCodec(LAYERS, HEADS, DIM, DIM, device=DEVICE).frame_bytes + 8)
    memory.allocate(list(range(1, PAGES + 1)), sinks=[1])
    memory.begin_forward()
    memory.will_write(torch.arange(PAGE_SIZE, (PAGES + 1) * PAGE_SIZE, device=DEVICE))
    memory.begin_forward()
    return memory, page_keys(namespace("test"), range(PAGES * PAGE_SIZE))


def contents(memory: PageMemory, pages: list[int]) -> list[list[torch.Tensor]]:
    """What attention would read of each page."""
    frames = memory.table.frames[pages]
    found = []
    for frame in frames.tolist():
        one = torch.tensor([frame], device=DEVICE)
        if frame < memory.table.first_mosaic:
            found.append([x for layer in range(LAYERS) for x in memory.dense_rows(layer, one)])
        else:
            number = int(memory.epochs.numbers_of(one.cpu()))
            found.append([memory.mosaic_data(layer, one, number) for layer in range(LAYERS)])
    return found


def assert_same(found: list[list[torch.Tensor]], wanted: list[list[torch.Tensor]]) -> None:
    for after, before in zip(found, wanted, strict=True):
        for x, y in zip(after, before, strict=True):
            assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))


@pytest.mark.parametrize("encoded", [True, False], ids=["encoded before", "encoded on the way out"])
def test_pages_come_back_as_they_were(encoded: bool) -> None:
    memory = pool()
    pages = list(range(1, PAGES + 1))
    memory.allocate(pages, sinks=[1])
    memory.begin_forward()
    memory.will_write(torch.arange(PAGE_SIZE, (PAGES + 1) * PAGE_SIZE, device=DEVICE))
    memory.begin_forward()
    first = memory.table.first_mosaic
    assert (memory.table.frames[pages] >= first).tolist() == [False, *[True] * 5, False, False]
    before = contents(memory, pages)
    wanted = pages[:6] if encoded else pages
    dense = torch.tensor([memory.lifecycle.frame[page] for page in (7, 8)], device=DEVICE)
    recent = [memory.epochs.current.encode(layer, *memory.dense_rows(layer, dense))[0] for layer in range(LAYERS)]
    before[6:] = [[layer[i : i + 1] for layer in recent] for i in range(2)]

    keys = page_keys(namespace("test"), range(len(wanted) * PAGE_SIZE))
    memory.free(wanted)
    memory.host.evicted(wanted, keys, 0)
    # Their frames are others' at once, and the forward writes to these.
    memory.allocate([9, 10, 11], sinks=[])
    memory.begin_forward()
    for frame in (memory.lifecycle.frame[page] for page in (9, 10, 11)):
        for x in (*memory.dense_k, *memory.dense_v):
            x.view(-1, PAGE_SIZE, HEADS, DIM)[frame] = torch.nan
    memory.slab.frames[[frame - first for frame in memory.lifecycle.mosaic.snapshot()]] = 255

    tier = memory.host.tier
    while tier.held(keys) < len(keys) or tier.stats()["outbox_pages"]:
        tier.poll()
    tier.restores.begin("request", keys, 60.0)
    found: list[HostPage] = []
    while not tier.restores.done("request"):
        tier.poll()
        found += tier.restores.take("request")
    assert [bool(page.epoch) for page in found] == [False, *[True] * (len(wanted) - 1)]
    assert [page.position for page in found] == [PAGE_SIZE * i for i in range(len(wanted))]
    assert memory.host.valid(found) == len(found) and memory.host.missing_frames(found) == 0

    memory.free([9, 10, 11])
    places = list(range(12, 12 + len(found)))
    memory.restore(places, found, sequence_start=True)
    # They are there before the next forward: host memory is not held until then.
    assert (memory.table.frames[places] >= first).tolist() == [bool(page.epoch) for page in found]
    assert_same(contents(memory, places), before[: len(places)])
    memory.begin_forward()
    assert_same(contents(memory, places), before[: len(places)])
    assert memory.lifecycle.sinks == {12}
    tier.close()


@pytest.mark.parametrize("together", [True, False], ids=["in one forward", "while the ends wait"])
def test_without_room_for_all_the_start_of_a_sequence_is_kept(together: bool) -> None:
    """Compressed pages take the room of compressed pages."""
    memory, keys = pool_with_room_for(3)
    tier = memory.host.tier
    taken, tier._spare_slots = tier._spare_slots, 8  # the manager takes nothing meanwhile
    # As a tree is evicted: the end of a sequence first.
    for pages in ([5, 6], [4], [2, 3]):
        memory.free(pages)
        memory.host.evicted(pages, keys[pages[0] - 1 : pages[-1]], (pages[0] - 1) * PAGE_SIZE)
        if not together:
            memory.begin_forward()
            while tier._copies.nbytes:
                tier.poll()
    memory.begin_forward()
    tier._spare_slots = taken
    while tier.busy:
        tier.poll()
    assert [bool(tier.held([key])) for key in keys[1:6]] == [True, True, True, False, False]
    assert (tier.counters.offered, tier.counters.dropped) == (5, 2)
    tier.close()


def test_the_first_page_has_room_before_those_of_another_kind() -> None:
    """It is kept as it is, and takes the room of several compressed ones."""
    memory, keys = pool_with_room_for(6)
    tier = memory.host.tier
    for pages in ([2, 3, 4, 5, 6], [1]):
        memory.free(pages)
        memory.host.evicted(pages, keys[pages[0] - 1 : pages[-1]], (pages[0] - 1) * PAGE_SIZE)
    memory.begin_forward()
    while tier.busy:
        tier.poll()
    held = [bool(tier.held([key])) for key in keys[:6]]
    assert held == sorted(held, reverse=True) and held[0] and not held[5], held
    tier.close()


def test_what_is_farther_than_all_that_wait_has_no_room() -> None:
    memory = pool()
    tier = memory.host.tier
    tier._outbox.update((bytes([i]), HostPage("", bytes(10), 64 * i)) for i in range(3))
    tier._outbox_bytes, tier._most_bytes = 30, 35
    assert tier.make_room([128, 192], 10) == 0 and tier.counters.dropped == 0
    assert tier.make_room([100], 25) == 0 and tier.counters.dropped == 0, "the one that is farther is too small"
    assert tier.make_room([64, 128], 10) == 1 and tier.counters.dropped == 1
    assert list(tier._outbox) == [bytes([0]), bytes([1])] and tier._outbox_bytes == 20
    assert tier.make_room([0, 64, 128], 5) == 3 and tier.counters.dropped == 1
    tier.close()


def test_a_tier_is_crowded_until_the_manager_has_taken_what_left() -> None:
    memory, keys = pool_with_room_for(8)
    tier = memory.host.tier
    assert not tier.crowded
    memory.free([2, 3, 4])
    memory.host.evicted([2, 3, 4], keys[1:4], PAGE_SIZE)
    memory.begin_forward()
    assert tier.crowded
    while tier.busy:
        tier.poll()
    assert not tier.crowded and tier.held(keys[1:4]) == 3
    tier.close()
    assert not tier._client.connected
    tier._outbox_bytes = tier._most_bytes
    assert not tier.crowded, "nobody takes them"


def test_what_the_host_has_is_not_copied_again() -> None:
    memory = pool()
    keys = page_keys(namespace("test"), range(2 * PAGE_SIZE))
    tier = memory.host.tier
    for times in (1, 2):
        memory.allocate([1, 2], sinks=[1])
        memory.begin_forward()
        memory.will_write(torch.arange(PAGE_SIZE, 3 * PAGE_SIZE, device=DEVICE))
        memory.begin_forward()
        memory.free([1, 2])
        memory.host.evicted([1, 2], keys, 0)
        memory.begin_forward()
        while tier.busy:
            tier.poll()
        assert tier.held(keys) == 2 and tier.counters.offered == 2, times
    tier.close()


@pytest.mark.parametrize(("encode", "max_error"), [("seal", None), ("pressure", 0.2)])
def test_the_first_calibration_waits_for_a_page_that_was_written_here(encode: str, max_error: float | None) -> None:
    """Uncompressed pages of an earlier server come back first; they are not in their frames yet."""
    memory = pool(encode, max_error=max_error)
    memory.restore([1, 2], [HostPage("", bytes(DENSE_BYTES))] * 2, sequence_start=True)
    memory.begin_forward()
    assert memory.epochs.current is None
    memory.allocate([3], sinks=[])
    memory.begin_forward()
    memory.will_write(torch.arange(3 * PAGE_SIZE, 4 * PAGE_SIZE, device=DEVICE))
    memory.begin_forward()
    assert memory.epochs.current is not None
    memory.host.tier.close()


def test_damaged_pages_are_not_valid() -> None:
    memory = pool()
    memory.allocate([1, 2, 3], sinks=[])
    memory.begin_forward()
    memory.will_write(torch.arange(PAGE_SIZE, 4 * PAGE_SIZE, device=DEVICE))
    memory.begin_forward()
    epoch = memory.epochs.current
    row = bytearray(
        memory.slab.frames[memory.lifecycle.frame[1] - memory.table.first_mosaic, : epoch.frame_bytes].cpu()
    )
    good = HostPage(epoch.hash, bytes(row))
    row[epoch.span(1).start] = 200  # a format that there is not
    for bad in (HostPage(epoch.hash, bytes(row)), HostPage(epoch.hash, good.data[:-1]), HostPage("", good.data)):
        assert memory.host.valid([good, bad, good]) == 1
    assert memory.host.valid([HostPage("another", good.data)]) == 0
    memory.host.tier.close()


@pytest.mark.parametrize("encode", ["off", "pressure"])
def test_without_a_calibration_pages_go_and_come_uncompressed(encode: str) -> None:
    memory = pool(encode)
    memory.allocate([1, 2, 3], sinks=[1])
    memory.begin_forward()
    for x in (*memory.dense_k, *memory.dense_v):
        x.copy_(torch.randn_like(x))
    memory.will_write(torch.arange(PAGE_SIZE, 4 * PAGE_SIZE, device=DEVICE))
    memory.begin_forward()
    before = contents(memory, [1, 2, 3])
    keys = page_keys(namespace("test"), range(3 * PAGE_SIZE))
    memory.free([1, 2, 3])
    memory.host.evicted([1, 2, 3], keys, 0)
    memory.begin_forward()
    tier = memory.host.tier
    while tier.held(keys) < 3 or tier.stats()["outbox_pages"]:
        tier.poll()
    tier.restores.begin("request", keys, 60.0)
    found: list[HostPage] = []
    while not tier.restores.done("request"):
        tier.poll()
        found += tier.restores.take("request")
    assert [page.epoch for page in found] == [""] * 3 and memory.host.valid(found) == 3
    memory.restore([4, 5, 6], found, sequence_start=True)
    memory.begin_forward()
    assert_same(contents(memory, [4, 5, 6]), before)
    assert tier.counters.dropped == 0 and memory.epochs.current is None
    tier.close()
