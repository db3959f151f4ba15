"""The codec as pool and attention use it."""

import pytest
import torch

from mosaic_kernels.attend.reference import attend
from mosaic_kernels.segment import SegmentFormat
from sglang_mosaic.codec import PlanesCodec, SegmentCodec
from sglang_mosaic.codec.planes import default_format
from sglang_mosaic.errors import MosaicError

LAYERS, HEADS, Q_HEADS, DIM = 2, 3, 9, 64


def tokens(count, heads, seed, dim=DIM):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator) * 0.93 ** torch.arange(dim)[:, None]
    return (torch.randn(count, heads, dim, generator=generator) @ mix).bfloat16()


def calibrated(layers=LAYERS, **options):
    codec = PlanesCodec(layers, HEADS, DIM, DIM, **options)
    for layer in range(layers):
        codec.observe_queries(layer, tokens(200, Q_HEADS, 50 + layer))
        codec.calibrate(layer, tokens(512, HEADS, layer), tokens(512, HEADS, 10 + layer))
    return codec


def heads_first(x):
    return x.transpose(0, 1).flatten(1, 2)


def test_attention_through_the_codec_is_close():
    codec = calibrated()
    assert isinstance(codec, SegmentCodec)
    k, v = (tokens(64 * 8, HEADS, seed).unflatten(0, (8, 64)) for seed in (0, 10))
    q = tokens(5, Q_HEADS, 50) * 0.25
    data = codec.encode(0, k, v)
    k_rot, v_rot = codec.decode(0, data)
    out, lse = attend(codec.rotate_queries(0, q), heads_first(k_rot), heads_first(v_rot), DIM**-0.5)
    out = codec.unrotate_output(0, out)
    expected_out, expected_lse = attend(q, k.flatten(0, 1).transpose(0, 1), v.flatten(0, 1).transpose(0, 1), DIM**-0.5)
    # These values are Gaussian: 4 bits over a block's range of four deviations leave a tenth of their norm.
    assert out.shape == q.shape and (out - expected_out).norm() < 0.2 * expected_out.norm()
    assert (lse - expected_lse).abs().max() < 0.5


@pytest.mark.parametrize("fmt", [None, "8 bits"], ids=["default", "8-bits"])
def test_every_byte_is_counted(fmt):
    if fmt:
        fmt = SegmentFormat(k_dim=DIM, v_dim=DIM, k_bits=(8,) * 4, v_bits=(8,) * 4)
    codec = calibrated(1, fmt=fmt)
    k, v = (tokens(64, HEADS, seed)[None] for seed in (0, 10))
    data = codec.encode(0, k, v)
    assert data.numel() == codec.frame_bytes and data.is_contiguous()
    assert codec.ratio == (k.nbytes + v.nbytes) / data.nbytes
    assert codec.state_bytes == sum(matrix.nbytes for matrix in codec._bases[0])
    assert codec.table_bytes == codec.state_bytes


@pytest.mark.parametrize(("k_dim", "v_dim"), [(64, 64), (96, 96), (128, 128), (256, 256), (192, 128), (80, 80)])
def test_the_default_is_at_least_3_45_times_smaller(k_dim, v_dim):
    assert default_format(k_dim, v_dim).ratio >= 3.45
    codec = PlanesCodec(1, 2, k_dim, v_dim)
    codec.calibrate(0, tokens(9, 2, 0, k_dim), tokens(9, 2, 1, v_dim))
    data = codec.encode(0, tokens(64, 2, 2, k_dim)[None], tokens(64, 2, 3, v_dim)[None])
    assert 64 * 2 * (k_dim + v_dim) * 2 / data.numel() >= 3.45


def test_eight_bits_are_nearly_exact():
    codec = calibrated(1, fmt=SegmentFormat(k_dim=DIM, v_dim=DIM, k_bits=(8,) * 4, v_bits=(8,) * 4))
    k, v = (tokens(64, HEADS, seed)[None] for seed in (0, 10))
    k_rot, v_rot = codec.decode(0, codec.encode(0, k, v))
    q = tokens(64, Q_HEADS, 3)
    logits = torch.einsum("thgd,hkd->hgtk", codec.rotate_queries(0, q).unflatten(1, (HEADS, -1)), heads_first(k_rot))
    expected = torch.einsum("thgd,khd->hgtk", q.float().unflatten(1, (HEADS, -1)), k[0].float())
    assert (logits - expected).norm() < 0.01 * expected.norm()
    restored = codec.unrotate_output(0, v_rot[0].transpose(0, 1))
    assert (restored - v[0].float()).norm() < 0.01 * v.float().norm()


def test_life_of_a_layer():
    codec = PlanesCodec(LAYERS, HEADS, DIM, DIM, query_budget=100)
    page = tokens(64, HEADS, 0)[None]
    for call in (
        lambda: codec.encode(0, page, page),
        lambda: codec.rotate_queries(0, tokens(1, Q_HEADS, 0)),
        lambda: codec.unrotate_output(0, tokens(1, Q_HEADS, 0)),
    ):
        with pytest.raises(MosaicError, match="not calibrated"):
            call()
    assert not codec.calibrated and codec.state_bytes == 0
    codec.observe_queries(0, tokens(60, Q_HEADS, 1))
    codec.observe_queries(0, tokens(60, Q_HEADS, 2))
    assert codec.state_bytes == HEADS * DIM * DIM * 8
    revisions = [codec.revision]
    for layer in range(LAYERS):
        assert not codec.calibrated
        codec.calibrate(layer, page[0], page[0])
        revisions.append(codec.revision)
    assert codec.calibrated and len(set(revisions)) == LAYERS + 1
    bases = codec.state_bytes
    codec.observe_queries(0, tokens(10, Q_HEADS, 3))
    assert codec.state_bytes == bases and codec.revision == revisions[-1]
    with pytest.raises(MosaicError, match="layer 1"):
        codec.calibrate(1, page[0], page[0])
    with pytest.raises(IndexError):
        codec.encode(LAYERS, page, page)


def test_revision_identifies_format_and_bases():
    codec = calibrated()
    assert codec.revision == calibrated().revision
    other = SegmentFormat(k_dim=DIM, v_dim=DIM, k_bits=(8, 4, 4, 4), v_bits=(4,) * 4)
    assert codec.revision != calibrated(fmt=other).revision
    twin = PlanesCodec(LAYERS, HEADS, DIM, DIM)
    for layer in range(LAYERS):
        twin.calibrate(layer, tokens(512, HEADS, layer), tokens(512, HEADS, 10 + layer))
    assert twin.revision != codec.revision


def test_arguments_are_not_changed_and_bytes_repeat():
    codec = calibrated()
    k, v = (tokens(128, HEADS, seed).unflatten(0, (2, 64)) for seed in (0, 10))
    q = tokens(4, Q_HEADS, 1)
    before = [x.clone() for x in (k, v, q)]
    data = codec.encode(1, k, v)
    kept = data.clone()
    codec.decode(1, data)
    codec.rotate_queries(1, q)
    codec.unrotate_output(1, q)
    assert all(torch.equal(a, b) for a, b in zip((k, v, q, data), (*before, kept), strict=True))
    assert torch.equal(data[1:], codec.encode(1, k[1:], v[1:]))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("layers", {"layers": 0}),
        ("heads", {"heads": 0}),
        ("k_dim", {"k_dim": 40}),
        ("query_budget", {"query_budget": 0}),
    ],
)
def test_bad_arguments_are_named(name, options):
    with pytest.raises(ValueError, match=name):
        PlanesCodec(**{"layers": 1, "heads": 1, "k_dim": 64, "v_dim": 64} | options)
    with pytest.raises(ValueError, match="fmt"):
        PlanesCodec(1, 1, 128, 128, fmt=default_format(64, 64))
    with pytest.raises(ValueError, match="v_sample"):
        PlanesCodec(1, 1, 64, 64).calibrate(0, torch.ones(3, 1, 64), torch.ones(3, 1, 32))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_broken_token_stays_broken_and_disturbs_no_other_page_or_head(value):
    codec = PlanesCodec(1, 2, 32, 32)
    codec.calibrate(0, torch.randn(300, 2, 32), torch.randn(300, 2, 32))
    k, v = torch.randn(2, 64, 2, 32), torch.randn(2, 64, 2, 32)
    whole = codec.encode(0, k, v)
    k[0, 5, 1, 3] = v[0, 7, 1, 4] = value
    data = codec.encode(0, k, v)
    k_rot, v_rot = codec.decode(0, data)
    assert not torch.isfinite(k_rot[0, 1, 5]).any()
    assert not torch.isfinite(v_rot[0, 1, 7]).all()
    assert torch.equal(data[1], whole[1])
    assert torch.equal(data[0, 0], whole[0, 0])
