"""Requests that read a part of a long compressed context, through the attention of the pool."""

from __future__ import annotations

import pytest
import torch

from sglang_mosaic.cache import selection as selection_module
from sglang_mosaic.cache.memory import PageMemory
from sglang_mosaic.cache.mixed_attention import MixedAttention
from sglang_mosaic.cache.selection import Selections
from sglang_mosaic.codec.planes import PlanesEpoch
from sglang_mosaic.codec.selection import SelectionProfile
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
    write,
)

MOSAIC = 12
CONTEXT = [1, *range(2, 2 + MOSAIC), 20]  # a start of a sequence, compressed pages, a dense page
TOKENS = (MOSAIC + 1) * 64 + 40


def make_memory(batches: int = 1, q=None, k=None, v=None, device: str = "cpu") -> PageMemory:
    """Page 1 is a sink, 2..13 are mosaic in `batches` epochs, 20 and 21 are dense."""
    torch.manual_seed(0)
    memory = empty_memory(sealing(refresh_pages=batches - 1), 20, MOSAIC + 6, 3.0, device)
    if q is not None:
        for layer in range(LAYERS):
            memory.codec.observe_queries(layer, q)
    memory.allocate([1], [1])
    memory.begin_forward()
    write(memory, [1])
    for pages in torch.arange(2, 2 + MOSAIC).chunk(batches):
        of_pages = slice((int(pages[0]) - 2) * 64, (int(pages[-1]) - 1) * 64)
        append(memory, pages.tolist(), *(None if x is None else x[:, of_pages] for x in (k, v)))
        memory.begin_forward()
    memory.config = MosaicConfig()
    append(memory, [20, 21])
    return memory


@pytest.fixture(scope="module", params=[1, 2], ids=["one-epoch", "two-epochs"])
def memory(request) -> PageMemory:
    return make_memory(request.param)


def selecting(select=0.1, **options) -> MosaicConfig:
    return MosaicConfig(**{"select": select, "select_from": 1, "select_top_p": 1.0, **options})


def queries(count=1, seed=0, size=1.0):
    return torch.randn(count, HEADS * GROUP, DIM, generator=torch.Generator().manual_seed(seed)) * size


def attention(memory, q, config=None, layer=0, pages=CONTEXT, tokens=TOKENS, selections=None, key=0):
    if config is not None:
        selections = Selections(config)
    out = torch.full_like(q, torch.nan)
    plan = MixedAttention(memory, [sequence(memory, pages, tokens, 0, len(q), key)], selections)
    plan.run(layer, q, out, SCALE)
    return out


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture
def scans(monkeypatch):
    """Layers that were scanned, in order, once a block and request."""
    calls: list[int] = []
    scan = PlanesEpoch.scan
    monkeypatch.setattr(PlanesEpoch, "scan", lambda self, layer, data: calls.append(layer) or scan(self, layer, data))
    return calls


# What is read.


@pytest.mark.parametrize("count", [1, 5])
def test_selecting_everything_is_reading_everything(memory, count):
    q = queries(count)
    for layer in range(LAYERS):
        found = attention(memory, q, selecting(1.0), layer)
        torch.testing.assert_close(found, expected(memory, layer, CONTEXT, TOKENS, q), atol=1e-4, rtol=1e-3)


def test_a_needle_is_found_among_a_twentieth_of_the_tokens():
    q = queries(1).view(1, HEADS, GROUP, DIM)[:, :, :1].expand(-1, -1, GROUP, -1).reshape(1, HEADS * GROUP, DIM)
    q = q / q.norm(dim=-1, keepdim=True) * DIM**0.5
    k = torch.randn(LAYERS, MOSAIC * 64, HEADS, DIM)
    v = torch.randn(LAYERS, MOSAIC * 64, HEADS, DIM) * 0.3
    needle = 5 * 64 + 17
    k[:, needle] = q[0, ::GROUP] * 3
    v[:, needle] = 4.0
    memory = make_memory(k=k, v=v, q=q.expand(50, -1, -1))
    for layer in range(LAYERS):
        found = attention(memory, q, selecting(0.05), layer)
        wanted = attention(memory, q, layer=layer)
        assert relative(found, wanted) < 0.02
        assert wanted.mean() > 2  # the needle has most of the attention


def test_a_larger_share_is_read_more_exactly(memory):
    q = queries(8, size=2.0)
    wanted = attention(memory, q)
    errors = [relative(attention(memory, q, selecting(share)), wanted) for share in (0.02, 0.1, 0.4)]
    assert errors[0] > errors[1] > errors[2] > 0
    assert errors[2] < 0.1


def test_no_more_is_selected_than_the_mass_needs(memory, monkeypatch):
    chosen = []
    choose = selection_module.choose_tokens

    def remember(*args):
        chosen.append(choose(*args))
        return chosen[-1]

    monkeypatch.setattr(selection_module, "choose_tokens", remember)
    q = queries(1, size=4.0)
    for top_p in (0.5, 0.9, 1.0):
        attention(memory, q, selecting(0.25, select_top_p=top_p))
    counts = [selected.sum(-1) for selected in chosen]
    assert (counts[0] < counts[1]).all() and (counts[1] < counts[2]).all()
    assert (counts[2] <= MOSAIC * 64 // 4).all()
    attention(memory, queries(1, size=0.3), selecting(0.25))
    assert (chosen[-1].sum(-1) == MOSAIC * 64 // 4).all()


def test_the_far_field_stands_for_what_is_not_read_where_attention_is_diffuse():
    torch.manual_seed(1)
    # Pages have a value each, so their means tell most of what is not read.
    v = torch.randn(LAYERS, MOSAIC, 1, HEADS, DIM).expand(-1, -1, 64, -1, -1).reshape(LAYERS, MOSAIC * 64, HEADS, DIM)
    k = torch.randn(LAYERS, MOSAIC * 64, HEADS, DIM)
    q = queries(6, size=0.3)
    memory = make_memory(q=q, k=k, v=v + 0.1 * torch.randn_like(v))
    wanted = attention(memory, q)
    with_far = relative(attention(memory, q, selecting(0.05)), wanted)
    (epoch,) = memory.epochs.live
    assert torch.isfinite(epoch.far_bias(0)).all()
    for number, layer in enumerate(epoch.layers):
        heads = tuple(h._replace(selection=SelectionProfile(h.selection.scan_channels, None)) for h in layer.heads)
        epoch.layers[number] = layer._replace(heads=heads)
    without = relative(attention(memory, q, selecting(0.05)), wanted)
    assert with_far < 0.15 and with_far < 0.3 * without


def test_a_head_whose_dense_tokens_have_all_attention_reads_no_other(memory):
    q = queries(1).view(1, HEADS, GROUP, DIM)[:, :, :1].expand(-1, -1, GROUP, -1).reshape(1, HEADS * GROUP, DIM)
    row = int(memory.table.dense_slots(torch.tensor([21 * 64 + 5])))
    context = [1, *range(2, 2 + MOSAIC), 21]
    for layer in range(LAYERS):
        memory.dense_k[layer][row] = (q[0, ::GROUP] * 50).bfloat16()
    config = selecting(0.1, select_top_p=0.99, select_steps=3)
    selections = Selections(config)
    for step in range(3):
        found = attention(memory, q, pages=context, tokens=TOKENS + step, selections=selections)
        torch.testing.assert_close(
            found, attention(memory, q, pages=context, tokens=TOKENS + step), atol=1e-3, rtol=1e-3
        )


# Who selects.


def test_a_request_does_not_depend_on_its_batch_mates(memory):
    config = selecting(0.1)
    contexts = [CONTEXT, [1, *range(2, 9), 20], [*range(5, 14), 21], [13, 12, 3, 2, 21]]
    lengths = [64 * len(pages) - 20 + i for i, pages in enumerate(contexts)]
    q = queries(len(contexts))
    for layer in range(LAYERS):
        together = torch.full_like(q, torch.nan)
        sequences = [
            sequence(memory, pages, tokens, i, 1, key=i)
            for i, (pages, tokens) in enumerate(zip(contexts, lengths, strict=True))
        ]
        MixedAttention(memory, sequences, Selections(config)).run(layer, q, together, SCALE)
        for i, (pages, tokens) in enumerate(zip(contexts, lengths, strict=True)):
            alone = attention(memory, q[i : i + 1], config, layer, pages, tokens)
            torch.testing.assert_close(alone[0], together[i], atol=1e-4, rtol=1e-3)


def test_blocks_do_not_change_what_is_read(memory, monkeypatch):
    from sglang_mosaic.cache import mixed_attention

    q = queries(3)
    whole = attention(memory, q, selecting(0.1))
    monkeypatch.setattr(mixed_attention, "BLOCK_PAGES", 5)
    torch.testing.assert_close(attention(memory, q, selecting(0.1)), whole, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("start", "selects"), [(MOSAIC * 64 + 1, False), (MOSAIC * 64, True), (0, True)], ids=str)
def test_short_contexts_are_read_whole(memory, scans, start, selects):
    q = queries(1)
    found = attention(memory, q, selecting(0.05, select_from=start))
    assert bool(scans) == selects
    assert (relative(found, attention(memory, q)) < 1e-6) != selects


@pytest.mark.parametrize(("count", "selects"), [(4, True), (5, False)])
def test_forwards_of_many_new_tokens_read_everything(memory, scans, monkeypatch, count, selects):
    monkeypatch.setattr(selection_module, "MOST_QUERIES", 4)
    q = queries(count)
    found = attention(memory, q, selecting(0.05))
    assert bool(scans) == selects
    assert (relative(found, attention(memory, q)) < 1e-6) != selects


def test_the_longest_forward_that_selects_has_256_new_tokens():
    assert selection_module.MOST_QUERIES == 256


def test_one_long_request_among_short_ones(memory, scans):
    config = selecting(0.05, select_from=6 * 64)
    q = queries(2)
    together = torch.full_like(q, torch.nan)
    short = [2, 3, 21]
    sequences = [sequence(memory, CONTEXT, TOKENS, 0, 1, key=1), sequence(memory, short, 3 * 64, 1, 1, key=2)]
    MixedAttention(memory, sequences, Selections(config)).run(0, q, together, SCALE)
    torch.testing.assert_close(together[:1], attention(memory, q[:1], config), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(together[1:], attention(memory, q[1:], pages=short, tokens=3 * 64), atol=1e-4, rtol=1e-3)


def test_every_epoch_has_its_own_far_field():
    memory = make_memory(2)
    q = queries(4, size=0.3)

    def with_far(*wanted):
        """The output if these epochs have a far field and the others none."""
        for number, epoch in enumerate(memory.epochs.live):
            bias = 0.0 if number in wanted else None
            for i, layer in enumerate(epoch.layers):
                heads = (head._replace(selection=head.selection._replace(far_bias=bias)) for head in layer.heads)
                epoch.layers[i] = layer._replace(heads=tuple(heads))
        return attention(memory, q, selecting(0.05))

    outputs = [with_far(), with_far(0), with_far(1), with_far(0, 1)]
    for i, a in enumerate(outputs):
        assert all(relative(b, a) > 0.05 for b in outputs[i + 1 :])


# Steps that share a selection.


def decode(memory, selections, tokens, q, pages=CONTEXT, key=0, layers=(0,)):
    return [
        attention(memory, q, layer=layer, pages=pages, tokens=tokens, selections=selections, key=key)
        for layer in layers
    ]


def test_a_selection_serves_so_many_steps(memory, scans):
    selections = Selections(selecting(0.1, select_steps=3))
    blocks = len(memory.epochs.live)
    counts = []
    for step in range(7):
        scans.clear()
        decode(memory, selections, TOKENS + step, queries(1, seed=step), layers=range(LAYERS))
        counts.append(len(scans))
    assert counts == [LAYERS * blocks if step % 3 == 0 else 0 for step in range(7)]


def test_without_sharing_every_step_selects(memory, scans):
    selections = Selections(selecting(0.1, select_steps=1))
    for step in range(3):
        scans.clear()
        decode(memory, selections, TOKENS + step, queries(1))
        assert scans


def test_an_earlier_selection_is_good_for_the_same_query(memory):
    q = queries(1)
    selections = Selections(selecting(0.1, select_steps=3))
    first = decode(memory, selections, TOKENS, q)[0]
    again = decode(memory, selections, TOKENS + 1, q)[0]
    fresh = decode(memory, Selections(selecting(0.1, select_steps=3)), TOKENS + 1, q)[0]
    # One more token that is read anyway moves keys between steps of an eighth, and with them the last of the selected.
    assert relative(again, fresh) < 0.01
    assert relative(again, first) < 0.5


def test_requests_share_no_selection(memory, scans):
    selections = Selections(selecting(0.1, select_steps=3))
    decode(memory, selections, TOKENS, queries(1), key=1)
    scans.clear()
    decode(memory, selections, TOKENS + 1, queries(1), key=2)
    assert scans
    scans.clear()
    decode(memory, selections, TOKENS + 2, queries(1), key=1)  # was away for a step: forgotten
    assert scans


def test_a_new_request_does_not_inherit_the_selection_of_the_last_one_with_its_key(memory, scans):
    # SGLang gives a slot to the next request: same key, same prefix, a few tokens more.
    selections = Selections(selecting(0.05, select_steps=8))
    decode(memory, selections, TOKENS - 4, queries(1, size=3.0))
    decode(memory, selections, TOKENS, queries(2, seed=1, size=3.0))  # prefill of the new one
    scans.clear()
    q = queries(1, seed=2, size=3.0)
    found = decode(memory, selections, TOKENS + 1, q)[0]
    assert scans
    alone = decode(memory, Selections(selecting(0.05, select_steps=8)), TOKENS + 1, q)[0]
    torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-3)


def aging_memory(loudness: float) -> tuple[PageMemory, torch.Tensor]:
    """A dense page 20 that will become mosaic, with keys that attract the query."""
    memory = make_memory()
    q = queries(1, size=0.5)
    towards = q.view(HEADS, GROUP, DIM).mean(1)
    k = torch.randn(LAYERS, 64, HEADS, DIM) + towards * loudness
    memory.free([20, 21])
    append(memory, [20], k)
    append(memory, [21])
    return memory, q


def encode_page(memory: PageMemory, page: int) -> None:
    memory.lifecycle._reserve([page])
    memory.begin_forward()
    assert int(memory.table.frames[page]) >= memory.table.first_mosaic


AGING = [1, *range(2, 2 + MOSAIC), 20, 21]


def test_pages_compressed_since_are_read_whole():
    memory, q = aging_memory(0.0)
    tokens = len(AGING) * 64 - 5
    selections = Selections(selecting(0.05, select_steps=3))
    decode(memory, selections, tokens, q, AGING)
    reads = []
    attend_selected = selection_module.attend_selected

    def remember(q, k, v, selected, scale):
        reads.append(selected)
        return attend_selected(q, k, v, selected, scale)

    encode_page(memory, 20)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(selection_module, "attend_selected", remember)
        decode(memory, selections, tokens + 1, q, AGING)
    selected = reads[0]
    by_page = selected.unflatten(-1, (-1, 64)).sum(-1)[:, 0]
    assert by_page.shape == (HEADS, MOSAIC + 1)
    whole = (by_page == 64).sum(-1)
    assert (whole == 1).all() and (by_page.sum(-1) == 64 + int(0.05 * MOSAIC * 64)).all()


@pytest.mark.parametrize("loudness", [0.0, 8.0], ids=["quiet", "loud"])
def test_a_page_compressed_since_leaves_the_far_field_alone(loudness):
    memory, q = aging_memory(loudness)
    tokens = len(AGING) * 64 - 5
    selections = Selections(selecting(0.05, select_steps=3))
    decode(memory, selections, tokens, q, AGING)
    encode_page(memory, 20)
    found = decode(memory, selections, tokens + 1, q, AGING)[0]
    wanted = attention(memory, q, pages=AGING, tokens=tokens + 1)
    # Half of what this query looks at is in the page that changed its kind; the rest has not become more.
    before = attention(memory, q, selecting(0.05), pages=AGING, tokens=tokens + 1)
    assert relative(found, wanted) < max(1.5 * relative(before, wanted), 0.1)
