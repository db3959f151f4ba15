"""Triton kernels that decode and attend over compressed pages, against the references."""

import pytest
import torch

from frame_cases import make_batch, make_pool, make_queries
from mosaic_kernels.attend_pages import reference as attend_reference
from mosaic_kernels.attend_pages.launch import attend_pages
from mosaic_kernels.combine import reference as combine_reference
from mosaic_kernels.combine.launch import combine
from mosaic_kernels.page_batch import Item, cut, plan
from mosaic_kernels.segment import SegmentFormat
from mosaic_kernels.segment_decode.launch import decode_frames
from mosaic_kernels.segment_decode.reference import decode
from mosaic_kernels.segment_encode.reference import pack
from mosaic_kernels.segment_table import HeadFormats, make_table
from mosaic_kernels.topk.segment import TopKFormat
from triton_device import DEVICE, INTERPRETED

# float16 has 11 bits: products of a rounded query, or of rounded weights, with exact codes.
LOGITS, OUTPUT = 5e-3, 5e-3
SHAPES = {
    "d64": dict(k_dim=64, v_dim=64, group=7),
    "d128": dict(k_dim=128, v_dim=128, group=4),
    "one-head": dict(k_dim=64, v_dim=64, heads=1, group=1),
    "d256": dict(k_dim=256, v_dim=256, heads=1, group=2),
    "uneven": dict(k_dim=96, v_dim=48, heads=3, group=2),
    "planes-only": dict(k_dim=64, v_dim=64, group=8, sparse=False, exceptions=False, formats=1),
    "d128-planes": dict(k_dim=128, v_dim=128, group=4, sparse=False, exceptions=False, formats=4),
    "d256-planes": dict(k_dim=256, v_dim=256, heads=1, group=1, sparse=False, exceptions=False),
    "uneven-planes": dict(k_dim=96, v_dim=112, heads=3, group=3, sparse=False, exceptions=False),
    "wide-group": dict(k_dim=64, v_dim=128, group=16, sparse=False, exceptions=False),
}
# Of pages only.
SHORT = {"short-pages": dict(k_dim=64, v_dim=64, group=2, sparse=False, exceptions=False, page_size=32)}


def pool_of(shape, **options):
    shape = dict((SHAPES | SHORT)[shape])
    group = shape.pop("group")
    return make_pool(**shape, **options), group


def assert_close(found, wanted, relative):
    """Within a share of the largest value of each row."""
    bound = relative * wanted.abs().amax(-1, keepdim=True).clamp_min(1e-3)
    assert ((found - wanted).abs() <= bound).all(), f"off by {((found - wanted).abs() / bound).max():.2f} bounds"


@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_is_the_references_to_the_last_bit(shape: str) -> None:
    pool, _ = pool_of(shape)
    frames = torch.tensor([3, 0, 5, 1], device=DEVICE)
    k, v = decode_frames(pool.data, frames, pool.table)
    wanted = pool.decoded(frames.tolist())
    assert torch.equal(k, wanted[0]) and torch.equal(v, wanted[1])
    k, v = decode_frames(pool.data, frames.int(), pool.table, dtype=torch.bfloat16)
    # The interpreter cuts bits off where devices round.
    bound = 2**-7 if INTERPRETED else 2**-8
    for one, other in zip((k, v), wanted, strict=True):
        assert one.dtype == torch.bfloat16 and ((one.float() - other).abs() <= bound * other.abs()).all()


def test_each_epoch_decodes_its_own_frames() -> None:
    pool = make_pool(epochs=3, frames=10)
    for epoch in range(3):
        frames = [frame for frame in range(9) if pool.epoch_of[frame] == epoch]
        found = decode_frames(pool.data, torch.tensor(frames, device=DEVICE), pool.table, epoch)
        for one, other in zip(found, pool.decoded(frames), strict=True):
            assert torch.equal(one, other)


def test_a_frame_that_was_never_encoded_is_nan() -> None:
    pool = make_pool()
    k, v = decode_frames(pool.data, torch.tensor([len(pool.data) - 1], device=DEVICE), pool.table)
    assert k.isnan().all() and v.isnan().all()
    batch = plan([Item(0, 0, [0, len(pool.data) - 1])], 1, pool.heads, 1, DEVICE)
    out, _ = attend_pages(make_queries(batch, pool.heads, 2, 64), pool.data, batch, pool.table, 0.1)
    assert out.isnan().all()


@pytest.mark.parametrize("rare", ("topk", "exceptions"))
def test_what_is_not_to_occur_is_nan(rare: str) -> None:
    pool = make_pool(frames=12, sparse=rare == "topk", exceptions=rare == "exceptions")
    frames = list(range(11))
    k, v = pool.decoded(frames)
    table = make_table(pool.epochs, DEVICE, **{rare: False})
    found = decode_frames(pool.data, torch.tensor(frames, device=DEVICE), table)
    for h, head in enumerate(pool.epochs[0]):
        for frame in frames:
            fmt = head.formats[int(pool.data[frame, head.start])]
            unexpected = isinstance(fmt, TopKFormat) or fmt.exceptions > 0
            for one, other in zip(found, (k, v), strict=True):
                assert one[h, frame].isnan().all() if unexpected else torch.equal(one[h, frame], other[h, frame])


@pytest.mark.parametrize("shape", SHAPES | SHORT)
def test_attention_over_pages(shape: str) -> None:
    pool, group = pool_of(shape)
    batch = make_batch(pool, [1, 0, 5], programs=8, least_pages=2)
    q = make_queries(batch, pool.heads, group, pool.table.k_dim)
    scale = pool.table.k_dim**-0.5
    out, lse = attend_pages(q, pool.data, batch, pool.table, scale)
    wanted = attend_reference.attend_pages(q, *pool.decoded(batch.frames.tolist()), batch, scale)
    assert len(batch.pieces) > 2
    assert (lse - wanted[1]).abs().max() < LOGITS
    assert_close(out, wanted[0], OUTPUT)


@pytest.mark.parametrize("bits", (0, 1, 2, 3, 4, 5, 6, 8))
def test_attention_over_codes_of_any_width(bits: int) -> None:
    # K and V of very different channels and tokens, some of them 0: what is summed in integers has units of its own.
    generator = torch.Generator().manual_seed(bits)
    widths = tuple(sorted((bits, 8, 4, 3, 2, 1, 0, bits), reverse=True))
    fmt = SegmentFormat(k_dim=128, v_dim=128, k_bits=widths, v_bits=widths)
    k, v = (torch.randn(3, 64, 128, generator=generator) for _ in range(2))
    k = k * torch.logspace(1, -4, 128) + 5 * torch.randn(128, generator=generator)
    v = v * torch.logspace(-3, 3, 64)[:, None]
    v[0, 5], v[2] = 0, 0
    data = torch.zeros(3, fmt.segment_bytes, dtype=torch.uint8)
    pack(k, v, fmt, data)
    table = make_table([[HeadFormats(0, (fmt,))]], DEVICE)
    assert table.read_as_bytes
    batch = plan([Item(0, 0, [0, 1, 2, 1])], 1, 1, 1, DEVICE)
    q = torch.stack((torch.zeros(128), *torch.randn(3, 128, generator=generator) * torch.tensor([[0.01], [1], [4]])))
    q = q[None, None].to(DEVICE)
    out, lse = attend_pages(q, data.to(DEVICE), batch, table, 0.09)
    decoded = [x[batch.frames.cpu()][None].to(DEVICE) for x in decode(data, fmt)]
    wanted = attend_reference.attend_pages(q, *decoded, batch, 0.09)
    assert (lse - wanted[1]).abs().max() < LOGITS
    assert_close(out, wanted[0], OUTPUT)


def test_a_request_is_independent_of_its_batch_mates() -> None:
    pool = make_pool(frames=12)
    alone = plan([Item(0, 0, [4, 1, 7, 2, 2])], 1, pool.heads, 1, DEVICE, least_pages=8)
    among = plan(
        [Item(0, 0, [3]), Item(1, 0, [4, 1, 7, 2, 2]), Item(2, 0, [9] * 3)], 3, pool.heads, 1, DEVICE, least_pages=8
    )
    q = make_queries(among, pool.heads, 4, 64)
    found = attend_pages(q, pool.data, among, pool.table, 0.1)
    wanted = attend_pages(q[1:2].contiguous(), pool.data, alone, pool.table, 0.1)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one[1], other[0])


@pytest.mark.parametrize(("parts", "group"), [(1, 3), (2, 3), (2, 7)])
def test_combining(parts: int, group: int) -> None:
    pool = make_pool(epochs=2, frames=12)
    batch = make_batch(pool, [1, 0, 9, 6], programs=4, least_pages=2, capacity=32)
    generator = torch.Generator().manual_seed(0)
    heads, dim = pool.heads, 64

    def some(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    other = cut([3, 1, 4, 1, 5, 9, 2][: len(batch.epochs)], heads, 8, 1, 32)
    first_pieces = batch.first_piece, torch.tensor(other.first_piece, dtype=torch.int32, device=DEVICE)
    results = [(some(32, heads, group, dim), 4 * some(32, heads, group), first) for first in first_pieces[:parts]]
    results[-1][1][1] = -torch.inf
    results[-1][0][1] = torch.nan
    dense = some(4, heads * group, dim), 4 * some(4, heads * group)
    dense[1][0], dense[0][0] = -torch.inf, torch.nan
    unrotate = torch.linalg.qr(some(2, heads, dim, dim))[0].contiguous()
    found = combine(results, batch, unrotate, *dense)
    wanted = combine_reference.combine(results, batch, unrotate, *dense)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], dense[0][1])
