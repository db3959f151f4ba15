"""Triton kernels that read a part of the context: scan, select, attend to what was selected, far field."""

import pytest
import torch

from frame_cases import make_batch, make_pool, make_queries
from mosaic_kernels.attend_selected.launch import attend_selected
from mosaic_kernels.far_field import reference as far_reference
from mosaic_kernels.far_field.launch import far_field
from mosaic_kernels.page_batch import Item, plan
from mosaic_kernels.scan import reference as scan_reference
from mosaic_kernels.scan.keys import KEYS, STEPS, keys_of
from mosaic_kernels.scan.launch import scan
from mosaic_kernels.select import reference as select_reference
from mosaic_kernels.select.launch import select
from mosaic_kernels.select.selection import Selected, plan_selection
from test_kernels_attend import SHAPES, SHORT, assert_close, pool_of
from triton_device import DEVICE


@pytest.mark.parametrize("shape", SHAPES | SHORT)
def test_scan(shape: str) -> None:
    pool, group = pool_of(shape)
    batch = make_batch(pool, [1, 0, 4], programs=4, least_pages=2)
    q = make_queries(batch, pool.heads, group, pool.table.k_dim)
    known = torch.randn(3, pool.heads * group, generator=torch.Generator().manual_seed(1)).to(DEVICE) * 4
    known[2, 0] = -torch.inf
    scale = pool.table.k_dim**-0.5
    keys, lse = scan(q, pool.data, known, batch, pool.table, scale)
    wanted = scan_reference.scan(q, pool.decoded(batch.frames.tolist(), scan=True)[0], known, batch, scale)
    assert (keys.int() - wanted[0].int()).abs().max() <= 1
    assert (keys != wanted[0]).float().mean() < 0.05
    assert (lse - wanted[1]).abs().max() < 0.02


def test_keys_of_what_a_scan_cannot_tell() -> None:
    logits = torch.tensor([[[0.0, 1e4, -1e4, torch.nan, torch.inf, -torch.inf]]])
    known = torch.zeros(1, 1)
    zero = 48 * STEPS
    assert keys_of(logits, known, 1).tolist() == [[[zero, KEYS - 1, 0, KEYS - 1, KEYS - 1, 0]]]
    assert keys_of(logits, torch.full((1, 1), -torch.inf), 1).tolist() == [[[zero, KEYS - 1, 0, KEYS - 1, KEYS - 1, 0]]]


KINDS = {
    "spread": lambda shape, g: torch.randint(0, KEYS, shape, generator=g),
    "crowded": lambda shape, g: torch.randint(300, 304, shape, generator=g),
    "equal": lambda shape, g: torch.full(shape, 17),
    "ends": lambda shape, g: torch.randint(0, 2, shape, generator=g) * (KEYS - 1),
}


@pytest.mark.parametrize(("top_p", "steps"), [(1.0, 1), (0.6, 1), (1.0, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_select_takes_the_references_tokens_in_order(kind: str, top_p: float, steps: int) -> None:
    pool = make_pool(heads=2, frames=6)
    lengths = [1, 40, 3]
    batch = make_batch(pool, lengths, programs=10, least_pages=2, capacity=20)
    assert len(batch.first_piece) == 4 and batch.first_piece[-1] > 4
    keys = KINDS[kind]((2, sum(lengths), 64), torch.Generator().manual_seed(3)).short().to(DEVICE)
    page_lse = torch.randn(2, sum(lengths), 3).to(DEVICE)
    most = [64, 300, 7]
    room = plan_selection(most, 2, 8, DEVICE, least_tokens=32)
    found = select(keys, page_lse, batch, room, pool.table, top_p, steps=steps)
    for item in range(3):
        pages = slice(*batch.first_page[item : item + 2].tolist())
        first = room.first[item].item()
        mine = keys[:, pages].flatten(1)
        chosen = select_reference.choose_tokens(mine, top_p, most[item], steps)
        for head in range(2):
            count = found.counts[head, item].item()
            wanted = chosen[head].nonzero().flatten() + pages.start * 64
            assert found.tokens[head, first : first + count].tolist() == wanted.tolist()
            assert top_p < 1 or count == min(most[item], mine.shape[1])
        lse = page_lse[:, pages].transpose(1, 2)
        far = select_reference.far_logits(mine[:, None], lse, chosen[:, None]).transpose(1, 2)
        far = far + pool.table.far_bias[0][:, None, None]
        torch.testing.assert_close(found.far[:, pages], far, rtol=1e-4, atol=1e-4)


def test_for_several_steps_what_follows_in_the_page_is_taken_as_well() -> None:
    keys = torch.randint(0, 20, (1, 3 * 64)).short()
    keys[0, 10], keys[0, 62], keys[0, 130] = 400, 300, 200
    chosen = select_reference.choose_tokens(keys, 1.0, 10, 4).nonzero()[:, 1].tolist()
    # As many as are allowed, none of them in the next page.
    assert chosen == [10, 11, 12, 13, 62, 63, 130, 131, 132, 133]
    assert torch.equal(select_reference.chosen_by(keys, 1), keys)


def test_selecting_by_mass_stops_before_the_cap() -> None:
    keys = torch.full((1, 1000), 100, dtype=torch.int16)
    keys[0, 7] = 48 * STEPS + 40  # e^5 of what is known
    assert select_reference.choose_tokens(keys, 0.9, 100).nonzero().tolist() == [[0, 7]]
    assert not select_reference.choose_tokens(keys, 0.005, 100).any()
    assert select_reference.choose_tokens(keys, 1.0, 100).sum() == 100


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_over_selected_tokens(shape: str) -> None:
    pool, group = pool_of(shape)
    batch = make_batch(pool, [2, 0, 3], programs=4, least_pages=2)
    q = make_queries(batch, pool.heads, group, pool.table.k_dim)
    scale = pool.table.k_dim**-0.5
    most = [40, 70]
    room = plan_selection(most, pool.heads, 4, DEVICE, least_tokens=24, capacity=9)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.zeros(pool.heads, room.room, dtype=torch.int32)
    counts = torch.tensor([[40, 41]] * pool.heads, dtype=torch.int32)
    counts[0, 0] = 0
    for head in range(pool.heads):
        for item, first in enumerate((0, 40)):
            start, stop = (64 * page for page in batch.first_page[item : item + 2].tolist())
            order = torch.randperm(stop - start, generator=generator)[: most[item]] + start
            tokens[head, first : first + most[item]] = order.sort().values
    tokens[:, 40 + 41 :] = -(1 << 30)  # never to be read
    selected = Selected(tokens.to(DEVICE), counts.to(DEVICE), torch.empty(0))
    out, lse = attend_selected(q, pool.data, batch, room, selected, pool.table, scale)
    keys, values = pool.decoded(batch.frames.tolist())
    for piece, (item, first, last) in enumerate(room.pieces.tolist()):
        for head in range(pool.heads if item >= 0 else 0):
            stop = min(last, room.first[item].item() + counts[head, item].item())
            if stop <= first:
                assert (lse[piece, head] == -torch.inf).all() and (out[piece, head] == 0).all()
                continue
            own = tokens[head, first:stop].long()
            logits = q[item, head] @ keys[head].flatten(0, 1)[own].T * scale
            assert_close(out[piece, head], logits.softmax(-1) @ values[head].flatten(0, 1)[own], 5e-3)
            assert (lse[piece, head] - logits.logsumexp(-1)).abs().max() < 0.02


def test_selecting_everything_reads_everything() -> None:
    """The whole chain: keys, lists, attention over them, nothing left for the far field."""
    pool = make_pool(heads=2, frames=9, epochs=2)
    batch = make_batch(pool, [2, 2], programs=4, least_pages=2)
    q = make_queries(batch, 2, 4, 64)
    known = torch.zeros(2, 8, device=DEVICE)
    keys, page_lse = scan(q, pool.data, known, batch, pool.table, 0.125)
    lengths = (batch.first_page[1:] - batch.first_page[:-1]).tolist()
    room = plan_selection([64 * length for length in lengths], 2, 4, DEVICE, least_tokens=64)
    selected = select(keys, page_lse, batch, room, pool.table)
    assert (selected.far == -torch.inf).all()
    _, far = far_field(selected.far, pool.data, batch, pool.table)
    assert (far == -torch.inf).all()
    out, lse = attend_selected(q, pool.data, batch, room, selected, pool.table, 0.125)
    all_keys, all_values = pool.decoded(batch.frames.tolist())
    for item in range(len(lengths)):
        pages = slice(*batch.first_page[item : item + 2].tolist())
        k, v = (x[:, pages].flatten(1, 2) for x in (all_keys, all_values))
        logits = q[item] @ k.transpose(1, 2) * 0.125
        pieces = slice(*room.first_piece[item : item + 2].tolist())
        shares = lse[pieces].softmax(0)[..., None]
        assert_close((out[pieces] * shares).sum(0), logits.softmax(-1) @ v, 5e-3)
        assert (lse[pieces].logsumexp(0) - logits.logsumexp(-1)).abs().max() < 0.02


@pytest.mark.parametrize("shape", SHAPES)
def test_far_field(shape: str) -> None:
    pool, group = pool_of(shape)
    batch = make_batch(pool, [2, 0, 19], programs=2, least_pages=2)
    _, values = pool.decoded(batch.frames.tolist())
    means = values.mean(2)
    for i, frame in enumerate(batch.frames.tolist()):
        for h, head in enumerate(pool.epochs[pool.epoch_of[frame]]):
            segment = pool.data[frame, head.start :].cpu()
            fmt = head.formats[int(segment[0])]
            if hasattr(fmt, "k_bits"):
                from mosaic_kernels.segment_decode.reference import decode_mean_values

                means[h, i] = decode_mean_values(segment[None], fmt)[0].to(DEVICE)
    far = 3 * torch.randn(pool.heads, len(batch.frames), group, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    far[:, 1], far[0] = -torch.inf, -torch.inf
    out, lse = far_field(far, pool.data, batch, pool.table)
    wanted = far_reference.far_field(far, means, batch)
    torch.testing.assert_close(lse, wanted[1], rtol=1e-5, atol=1e-5)
    assert_close(out, wanted[0], 5e-3)


def test_room_for_fewer_tokens_than_programs() -> None:
    room = plan_selection([1, 0, 5], 8, 1000, DEVICE)
    assert room.pieces.tolist() == [[0, 0, 1], [2, 1, 6]] and room.first.tolist() == [0, 1, 1, 6]
    with pytest.raises(ValueError, match="capacity is 1"):
        plan_selection([300, 300], 8, 1, DEVICE, capacity=1)
    with pytest.raises(ValueError, match="rising"):
        plan([Item(1, 0, [1]), Item(0, 0, [1])], 2, 8, 1, DEVICE)
