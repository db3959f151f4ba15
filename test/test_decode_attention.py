"""The kernels' attention over the pool against its torch reference, both over the same frames."""

from __future__ import annotations

import itertools

import pytest
import torch

from sglang_mosaic.cache import decode_attention as module
from sglang_mosaic.cache import warm_up as warm_up_module
from sglang_mosaic.cache.continuing import Continuing
from sglang_mosaic.cache.decode_attention import DecodeAttention
from sglang_mosaic.cache.memory import PageMemory
from sglang_mosaic.cache.mixed_attention import MixedAttention
from sglang_mosaic.cache.reading import Reading, most_pages, room_for
from sglang_mosaic.cache.segment_tables import SegmentTables
from sglang_mosaic.cache.selection import Selections
from sglang_mosaic.config import MosaicConfig
from test_mixed_attention import GROUP, LAYERS, SCALE, sequence
from test_selection import CONTEXT, relative, selecting
from test_selection import make_memory as make_memory_on
from test_selection import queries as queries_on_host
from triton_device import DEVICE

CONTEXTS = ([1, 3, 4, 12, 20], [1, 9, 21])
SHORT = [1, 4, 8, 9, 20]


def make_memory(batches: int) -> PageMemory:
    return make_memory_on(batches, device=DEVICE)


def queries(*args, **options) -> torch.Tensor:
    return queries_on_host(*args, **options).to(DEVICE)


@pytest.fixture(scope="module")
def memory() -> PageMemory:
    """Of two epochs, the harder case; SHORT has pages of both."""
    return make_memory(2)


@pytest.fixture(scope="module", params=[1, 2], ids=["one-epoch", "two-epochs"])
def any_memory(request, memory) -> PageMemory:
    return memory if request.param == 2 else make_memory(request.param)


def lengths_of(contexts, more=0):
    return [64 * len(pages) - 24 + more for pages in contexts]


class Decoder:
    """Decode steps of requests with these pages."""

    def __init__(self, memory: PageMemory, contexts, config: MosaicConfig | None = None) -> None:
        memory.config = config or selecting(0.0)
        self.contexts = contexts
        self.attention = DecodeAttention(memory, SegmentTables(memory), GROUP)
        self.step = self.attention.allocate(len(contexts), sum(map(len, contexts)) + 5)
        self.rows = torch.zeros(len(contexts) + 1, 64 * 20, dtype=torch.int32, device=DEVICE)
        for row, pages in zip(self.rows[1:], contexts, strict=True):
            slots = (torch.tensor(pages)[:, None] * 64 + torch.arange(64)).flatten()
            row[: len(slots)] = slots.to(DEVICE)

    def plan(self, more: int = 0, reading: Reading = Reading.ALL) -> None:
        lengths = torch.tensor(lengths_of(self.contexts, more), device=DEVICE)
        self.attention.plan(self.step, reading, self.rows, torch.arange(1, len(lengths) + 1, device=DEVICE), lengths)

    def run(self, q, layer=0, reading=Reading.ALL):
        return self.attention.run(self.step, reading, layer, q, SCALE)


def with_kernels(memory, q, contexts, config=None, layer=0, reading=None):
    decoder = Decoder(memory, contexts, config)
    reading = reading or (Reading.SELECTED if config else Reading.ALL)
    decoder.plan(reading=reading)
    return decoder.run(q, layer, reading)


def with_torch(memory, q, contexts, config=None, layer=0):
    out = torch.full_like(q, torch.nan)
    sequences = [
        sequence(memory, pages, tokens, i, 1, key=i)
        for i, (pages, tokens) in enumerate(zip(contexts, lengths_of(contexts), strict=True))
    ]
    MixedAttention(memory, sequences, Selections(config) if config else None).run(layer, q, out, SCALE)
    return out


def test_reading_everything(any_memory):
    q = queries(2)
    for layer in range(LAYERS):
        found = with_kernels(any_memory, q, CONTEXTS, layer=layer)
        assert relative(found, with_torch(any_memory, q, CONTEXTS, layer=layer)) < 4e-3


def test_requests_without_compressed_pages(memory):
    q, contexts = queries(3), ([20, 21], CONTEXTS[0], [21])
    found = with_kernels(memory, q, contexts)
    assert relative(found, with_torch(memory, q, contexts)) < 4e-3
    alone = with_kernels(memory, q[[0, 2]], (contexts[0], contexts[2]), reading=Reading.NOTHING)
    assert relative(alone, found[[0, 2]]) < 4e-3


def test_a_request_does_not_depend_on_those_beside_it(memory):
    q = queries(3)
    found = with_kernels(memory, q, (SHORT, *CONTEXTS))
    assert relative(with_kernels(memory, q[:1], (SHORT,)), found[:1]) < 2e-3


def test_selecting_some_and_reading_the_short_ones_whole():
    memory = make_memory(1)
    config = selecting(0.2, select_from=4 * 64)
    contexts, q = (CONTEXT, [1, 9, 21]), queries(2)
    found, wanted = with_kernels(memory, q, contexts, config), with_torch(memory, q, contexts, config)
    # Float16 may move the last of the selected tokens.
    assert relative(found, wanted) < 0.03
    assert relative(found[1], wanted[1]) < 4e-3
    whole = with_torch(memory, q, contexts)
    assert 0.02 < relative(found, whole) < 0.5


def test_selecting_everything_is_reading_everything(memory):
    q = queries(2)
    found = with_kernels(memory, q, CONTEXTS, selecting(1.0))
    assert relative(found, with_torch(memory, q, CONTEXTS)) < 4e-3


def test_what_a_step_reads(monkeypatch):
    memory = make_memory(1)
    heads = memory.dense_k[0].shape[1]

    def reading(lengths, **options):
        memory.config = MosaicConfig(**options)
        return DecodeAttention(memory, SegmentTables(memory), GROUP).reading(lengths)

    monkeypatch.setattr(module, "CROSSOVER", 10_000 * heads)
    monkeypatch.setattr(module, "CROSSOVER_SHARED", 5_000 * heads)
    assert reading([1 << 20]) is Reading.ALL
    assert reading([9_999], select=0.1) is Reading.ALL
    assert reading([10_000], select=0.1) is Reading.SELECTED
    assert reading([5_000], select=0.1, select_steps=2) is Reading.SELECTED
    assert reading([5_000, 5_000], select=0.1) is Reading.SELECTED
    assert reading([4_000] * 9, select=0.1) is Reading.ALL  # each reads all that is fewer than 4,096
    assert reading([500], select=0.1, select_from=500) is Reading.SELECTED
    assert reading([499], select=0.1, select_from=500) is Reading.ALL
    monkeypatch.setattr(type(memory.lifecycle.mosaic), "used", property(lambda frames: 0))
    assert reading([1 << 20], select=0.1) is Reading.NOTHING


def test_later_steps_go_on_with_a_selection(memory):
    decoder, q = Decoder(memory, (SHORT,), selecting(0.1, select_steps=3)), queries(1)
    decoder.plan()
    first = [decoder.run(q, layer, Reading.SELECTED) for layer in range(LAYERS)]
    for layer in range(LAYERS):
        assert torch.equal(decoder.run(q, layer, Reading.AS_BEFORE), first[layer])
    # Of the same query, one token later, the selection is the same.
    decoder.plan(more=1)
    later = decoder.run(q, 0, Reading.AS_BEFORE)
    alone = Decoder(memory, (SHORT,), selecting(0.1, select_steps=3))
    alone.plan(more=1)
    assert relative(later, alone.run(q, 0, Reading.SELECTED)) < 0.02 and not torch.equal(first[0], later)
    # Of another query, it is not.
    other = queries(1, seed=9)
    assert not torch.equal(decoder.run(other, 0, Reading.AS_BEFORE), alone.run(other, 0, Reading.SELECTED))


def test_larger_steps_and_smaller_ones_share_the_room_for_selections(memory):
    config = selecting(0.1, select_steps=2)
    decoder = Decoder(memory, CONTEXTS, config)
    small = decoder.attention.allocate(1, 4)
    assert small.kept[0].lse.data_ptr() == decoder.step.kept[0].lse.data_ptr()
    larger = decoder.attention.allocate(3, 40)
    assert larger.kept[0].lse.data_ptr() != decoder.step.kept[0].lse.data_ptr()


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("steps", [1, 3])
def test_a_graph_replays_whatever_is_planned(memory, steps):
    """Captured over nothing but padding, as a server does before it has a page."""
    config = selecting(0.2, select_steps=steps)
    decoder = Decoder(memory, ([21], [21]), config)
    decoder.step = decoder.attention.allocate(2, 40)
    readings = decoder.attention.readings
    q = queries(2)
    graphs, outputs = {}, {}
    for reading in readings:
        decoder.plan(reading=reading)
        [decoder.run(q, layer, reading) for layer in range(LAYERS)]  # compiles
        torch.cuda.synchronize()
        graphs[reading] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[reading]):
            outputs[reading] = [decoder.run(q, layer, reading) for layer in range(LAYERS)]
    for seed, contexts in enumerate([(SHORT, CONTEXTS[0]), (CONTEXTS[1], CONTEXT), ([20, 21], [21]), (CONTEXT, SHORT)]):
        eager = Decoder(memory, contexts, config)
        decoder.contexts, decoder.rows = contexts, eager.rows
        compressed = any(
            memory.lifecycle.frame[page] >= memory.table.first_mosaic for page in itertools.chain(*contexts)
        )
        for more, reading in enumerate(readings):
            if reading is Reading.NOTHING and compressed:
                continue
            q.copy_(queries(2, seed=10 * seed + more))
            for each in (decoder, eager):
                each.plan(more, reading)
            graphs[reading].replay()
            for layer, found in enumerate(outputs[reading]):
                # Pieces are cut for as many pages as there is room for: the order of sums is the same.
                torch.testing.assert_close(found, eager.run(q, layer, reading), rtol=0, atol=1e-5)


def test_which_steps_go_on():
    continuing, buffers = Continuing(3), object()

    def goes_on(tokens, requests="ab", encoded=0, of=buffers):
        return continuing.goes_on(of, requests, [tokens, tokens + 7], encoded)

    assert [goes_on(tokens) for tokens in range(10, 17)] == [False, True, True] * 2 + [False]
    assert goes_on(17)
    assert not goes_on(18, encoded=1)
    assert goes_on(19, encoded=1)
    assert not goes_on(20, "ac", 1)
    assert not goes_on(22, "ac", 1)
    assert goes_on(23, "ac", 1)
    assert not goes_on(24, "ac", 1, object())
    continuing = Continuing(3)
    assert not goes_on(10)
    continuing.forget()
    assert not goes_on(11)
    continuing = Continuing(1)
    assert not any(goes_on(tokens) for tokens in range(5))


def test_room_for_batches():
    assert room_for(2, 100) == 4
    assert room_for(1 << 12, 1 << 17) == most_pages(1 << 17) == 1 << 16
    assert room_for(2, 1 << 23) == most_pages(1 << 23) == 1 << 17


def test_tables_stay_where_they_are_unless_more_is_needed(memory):
    tables = SegmentTables(memory)
    tables.update()
    before, sizes = tables.layer(0), tables.sizes
    number = memory.epochs.numbers[0]
    slot = memory.epochs.slots[number]
    written = before.formats.scalars.clone()
    tables.update()
    assert tables.layer(0) is before and torch.equal(before.formats.scalars, written)
    epoch = memory.epochs[number]
    torch.testing.assert_close(before.q_basis[slot], epoch.layers[0].basis.q_basis)
    try:
        epoch.rare = frozenset({"topk"})
        tables.update()
        assert tables.sizes != sizes and tables.sizes.holds(sizes) and tables.layer(0) is not before
    finally:
        epoch.rare = frozenset()


def test_compiling_in_advance_leaves_the_pool_as_it_is(memory, monkeypatch):
    monkeypatch.setattr(warm_up_module, "PAGES", 3)
    before = memory.slab.frames.clone()
    warm_up_module.warm_up(memory, memory.dense_k[0].shape[1] * GROUP, None)
    assert torch.equal(memory.slab.frames, before)
