"""The codec as pool and attention use it."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch

from mosaic_kernels.attend.reference import attend
from mosaic_kernels.topk.segment import TopKFormat
from sglang_mosaic.codec import Codec, Epoch, LayerSample, PlanesCodec, PlanesEpoch, strategies
from sglang_mosaic.codec.statistics import SAMPLE_TOKENS
from sglang_mosaic.errors import MosaicError

LAYERS, HEADS, Q_HEADS, DIM, PAGES = 2, 3, 9, 64, 6
SCALE = DIM**-0.5


def tokens(count, heads, seed, dim=DIM):
    """Correlated channels with a falling spectrum, as real keys have."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator) * 0.93 ** torch.arange(dim)[:, None]
    return (torch.randn(count, heads, dim, generator=generator) @ mix).bfloat16()


def pages(count, heads, seed, dim=DIM):
    return tokens(count * 64, heads, seed, dim).unflatten(0, (count, 64))


class Shape(NamedTuple):
    layers: int = LAYERS
    heads: int = HEADS
    k_dim: int = DIM
    v_dim: int = DIM


def samples_of(shape, count=PAGES, sinks=1):
    return [
        LayerSample(
            pages(count, shape.heads, layer, shape.k_dim), pages(count, shape.heads, 10 + layer, shape.v_dim), sinks
        )
        for layer in range(shape.layers)
    ]


DEFAULT = Shape()


def calibrated(shape=DEFAULT, observe=True, device="cpu", **options):
    codec = PlanesCodec(*shape, device=device, **options)
    if observe:
        for layer in range(shape.layers):
            codec.observe_queries(layer, tokens(200, shape.heads * 3, 50 + layer, shape.k_dim).to(device))
    samples = [
        sample._replace(keys=sample.keys.to(device), values=sample.values.to(device)) for sample in samples_of(shape)
    ]
    return codec, codec.calibrate(samples)


@pytest.fixture(scope="module")
def epoch() -> PlanesEpoch:
    return calibrated()[1]


def heads_first(x):
    return x.transpose(0, 1).flatten(1, 2)


def output_error(epoch, k, v, q):
    """Relative error of the attention output over pages of layer 0."""
    k_rot, v_rot = epoch.decode(0, epoch.encode(0, k, v)[0])
    scale = k.shape[-1] ** -0.5
    out, _ = attend(epoch.rotate_queries(0, q), heads_first(k_rot), heads_first(v_rot), scale)
    wanted, _ = attend(q, k.flatten(0, 1).transpose(0, 1), v.flatten(0, 1).transpose(0, 1), scale)
    return float((epoch.unrotate_output(0, out) - wanted).norm() / wanted.norm())


def weighted_error(epoch, layer, head, exact, coded):
    """[P] of exact and coded (k_rot, v_rot), each [P, T, D]."""
    k, v = ((a.double() - b.double()).square() for a, b in zip(exact, coded, strict=True))
    plan, basis = epoch.layers[layer].heads[head], epoch.layers[layer].basis
    return (plan.k_weight * k.sum((1, 2)) + plan.v_weight * (v * basis.v_weights[head]).sum((1, 2))).sqrt()


def rotated(epoch, layer, head, k, v):
    basis = epoch.layers[layer].basis
    return k[:, :, head].float() @ basis.k_basis[head], v[:, :, head].float() @ basis.v_basis[head]


# Bytes.


SHAPES = [Shape(2, 3, 64, 64), Shape(1, 1, 16, 16), Shape(1, 2, 96, 96), Shape(2, 1, 128, 128), Shape(1, 3, 80, 48)]


@pytest.mark.parametrize("ratio", [3.0, 4.0, 5.5, 8.0])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_every_byte_is_counted_and_every_format_fits(shape, ratio):
    codec, epoch = calibrated(shape, ratio=ratio)
    assert isinstance(codec, Codec) and isinstance(epoch, Epoch)
    k, v = pages(2, shape.heads, 77, shape.k_dim), pages(2, shape.heads, 78, shape.v_dim)
    # The ratio is of all bytes, and no more than one alignment short of it.
    dense = shape.layers * (k.nbytes + v.nbytes) / 2
    assert codec.frame_bytes * ratio <= dense < (codec.frame_bytes + 16) * ratio
    segments = [head.segment_bytes for layer in epoch.layers for head in layer.heads]
    assert 0 <= codec.frame_bytes - epoch.frame_bytes < 16 * len(segments)
    assert sum(segments) == epoch.frame_bytes and not any(nbytes % 16 for nbytes in segments)
    at = 0
    for layer in range(shape.layers):
        data, errors = epoch.encode(layer, k, v)
        assert data.is_contiguous() and data.dtype == torch.uint8 and errors.shape == (2, shape.heads)
        assert epoch.span(layer) == slice(at, at + data.shape[1])
        at += data.shape[1]
        for head in epoch.layers[layer].heads:
            assert head.formats and all(fmt.segment_bytes <= head.segment_bytes for fmt in head.formats)
    assert at == epoch.frame_bytes
    assert epoch.nbytes == codec.table_bytes


def test_statistics_and_tables_report_their_bytes():
    codec = PlanesCodec(LAYERS, HEADS, DIM, DIM, query_budget=100)
    assert codec.state_bytes == 0
    codec.observe_queries(0, tokens(60, Q_HEADS, 1))
    codec.observe_queries(0, tokens(60, Q_HEADS, 2))
    full = codec.state_bytes
    assert full == HEADS * DIM * 8 + SAMPLE_TOKENS * Q_HEADS * DIM * 2
    codec.observe_queries(0, tokens(60, Q_HEADS, 3))
    assert codec.state_bytes == full
    epoch = codec.calibrate(samples_of(Shape()))
    assert epoch.nbytes == sum(matrix.nbytes for layer in epoch.layers for matrix in layer.basis)


# Meaning of the bytes.


def test_bytes_depend_on_the_page_and_the_epoch_alone(epoch):
    k, v = pages(5, HEADS, 3), pages(5, HEADS, 4)
    k[2] *= 30  # a page that takes another format than its neighbours
    data, errors = epoch.encode(1, k, v)
    for which in ([0], [4, 2], [2], [3, 3, 1]):
        alone, error = epoch.encode(1, k[which], v[which])
        assert torch.equal(alone, data[which]) and torch.equal(error, errors[which])
    strided = torch.empty(5, 64, HEADS, 2 * DIM, dtype=k.dtype)[..., ::2].copy_(k)
    assert torch.equal(epoch.encode(1, strided, v)[0], data)
    assert torch.equal(calibrated()[1].encode(1, k, v)[0], data)


def test_decoding_does_not_depend_on_batch_mates(epoch):
    data, _ = epoch.encode(0, pages(4, HEADS, 3), pages(4, HEADS, 4))
    k_rot, v_rot = epoch.decode(0, data)
    assert k_rot.transpose(0, 1).is_contiguous() and v_rot.transpose(0, 1).is_contiguous()
    for i in range(4):
        k_alone, v_alone = epoch.decode(0, data[i : i + 1])
        assert torch.equal(k_alone[0], k_rot[i]) and torch.equal(v_alone[0], v_rot[i])


def test_arguments_are_not_changed(epoch):
    k, v, q = pages(2, HEADS, 0), pages(2, HEADS, 10), tokens(4, Q_HEADS, 1)
    data, _ = epoch.encode(1, k, v)
    before = [x.clone() for x in (k, v, q, data)]
    epoch.encode(1, k, v)
    epoch.decode(1, data)
    epoch.scan(1, data)
    epoch.mean_values(1, data)
    epoch.rotate_queries(1, q)
    epoch.unrotate_output(1, q)
    assert all(torch.equal(a, b) for a, b in zip((k, v, q, data), before, strict=True))


def test_the_hash_identifies_formats_and_bases(epoch):
    assert epoch.hash == calibrated()[1].hash
    others = [calibrated(observe=False)[1], calibrated(ratio=5.0)[1], calibrated(Shape(1))[1]]
    assert len({epoch.hash, *(other.hash for other in others)}) == 4
    codec, first = calibrated()
    codec.observe_queries(0, tokens(500, Q_HEADS, 99))
    assert codec.calibrate(samples_of(Shape())).hash != first.hash


def test_a_later_calibration_leaves_earlier_epochs_alone():
    codec, first = calibrated(Shape(1))
    k, v = pages(2, HEADS, 3), pages(2, HEADS, 4)
    data, _ = first.encode(0, k, v)
    decoded = first.decode(0, data)
    codec.observe_queries(0, tokens(500, Q_HEADS, 99))
    second = codec.calibrate([LayerSample(pages(4, HEADS, 20), pages(4, HEADS, 21))])
    assert not torch.equal(second.encode(0, k, v)[0][:, : data.shape[1]], data)
    assert torch.equal(first.encode(0, k, v)[0], data)
    assert all(torch.equal(a, b) for a, b in zip(first.decode(0, data), decoded, strict=True))


def test_rotations_are_exact(epoch):
    k, v = pages(2, HEADS, 5), tokens(7, Q_HEADS, 6)
    q = tokens(5, Q_HEADS, 50)
    basis = epoch.layers[0].basis
    k_rot = torch.einsum("pthd,hde->hpte", k.double(), basis.k_basis.double()).flatten(1, 2)
    q_rot = epoch.rotate_queries(0, q).double().unflatten(1, (HEADS, -1))
    logits = torch.einsum("thgd,hkd->thgk", q_rot, k_rot)
    wanted = torch.einsum("thgd,khd->thgk", q.double().unflatten(1, (HEADS, -1)), k.flatten(0, 1).double())
    assert (logits - wanted).norm() <= 1e-5 * wanted.norm()
    # Outputs are weighted means of values: query head h has the values of KV head h // 3.
    v_rot = torch.einsum("thgd,hde->thge", v.float().unflatten(1, (HEADS, -1)), basis.v_basis).flatten(1, 2)
    assert (epoch.unrotate_output(0, v_rot) - v.float()).norm() <= 1e-5 * v.float().norm()


# Quality.


def test_attention_through_the_codec_is_close(epoch):
    k, v = pages(8, HEADS, 0), pages(8, HEADS, 10)
    q = tokens(5, Q_HEADS, 50) * 0.25
    k_rot, v_rot = epoch.decode(0, epoch.encode(0, k, v)[0])
    out, lse = attend(epoch.rotate_queries(0, q), heads_first(k_rot), heads_first(v_rot), SCALE)
    wanted, wanted_lse = attend(q, k.flatten(0, 1).transpose(0, 1), v.flatten(0, 1).transpose(0, 1), SCALE)
    assert out.shape == q.shape
    assert (epoch.unrotate_output(0, out) - wanted).norm() < 0.2 * wanted.norm()
    assert (lse - wanted_lse).abs().max() < 0.5


def test_the_error_falls_with_the_ratio():
    k, v, q = pages(PAGES, HEADS, 0), pages(PAGES, HEADS, 10), tokens(40, Q_HEADS, 50) * 0.25
    errors = [output_error(calibrated(Shape(1), ratio=ratio)[1], k, v, q) for ratio in (8.0, 5.0, 3.5, 2.5)]
    assert all(fewer_bytes > 1.2 * more_bytes for fewer_bytes, more_bytes in itertools.pairwise(errors))
    assert errors[-1] < 0.06


def test_queries_show_which_directions_matter():
    generator = torch.Generator().manual_seed(0)
    # Keys are strong where queries hardly look, and the other way round.
    slope = 0.9 ** torch.arange(DIM)
    keys = torch.randn(PAGES * 64, 1, DIM, generator=generator) * 4 * slope
    values = torch.randn(PAGES * 64, 1, DIM, generator=generator)
    queries = torch.randn(300, 3, DIM, generator=generator) * 4 * slope.flip(0)
    sample = LayerSample(keys.unflatten(0, (PAGES, 64)), values.unflatten(0, (PAGES, 64)))
    errors = []
    for observe in (True, False):
        codec = PlanesCodec(1, 1, DIM, DIM, ratio=5.0)
        if observe:
            codec.observe_queries(0, queries[:200])
        errors.append(output_error(codec.calibrate([sample]), sample.keys, sample.values, queries[200:]))
    assert errors[0] < 0.5 * errors[1]


def test_the_returned_error_is_the_weighted_error_of_what_is_decoded(epoch):
    k, v = pages(4, HEADS, 3), pages(4, HEADS, 4)
    k[1] *= 3
    data, errors = epoch.encode(0, k, v)
    k_rot, v_rot = epoch.decode(0, data)
    for h in range(HEADS):
        wanted = weighted_error(epoch, 0, h, rotated(epoch, 0, h, k, v), (k_rot[:, h], v_rot[:, h]))
        torch.testing.assert_close(errors[:, h].double(), wanted, rtol=0.01, atol=0)


@pytest.mark.parametrize("ratio", [3.0, 5.0])
def test_the_returned_error_foretells_that_of_the_attention_output(ratio):
    _, epoch = calibrated(Shape(1), ratio=ratio)
    k, v = samples_of(Shape(1))[0][:2]
    _, errors = epoch.encode(0, k, v)
    foretold = float(errors[1:].double().square().mean().sqrt())
    found = output_error(epoch, k, v, tokens(200, Q_HEADS, 50)[-64:])
    assert foretold / 2 < found < foretold * 2


def sparse_pages(count, seed):
    """Tokens with three channels each, whose covariance is diagonal: no basis gathers them."""
    generator = torch.Generator().manual_seed(seed)
    groups = count * 16
    which = torch.rand(groups, DIM, generator=generator).topk(3).indices[:, None].expand(-1, 4, -1)
    signs = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    x = torch.zeros(groups, 4, DIM).scatter_(-1, which, (signs * torch.tensor([3.0, 2.0, 2.5])).expand(groups, 4, 3))
    return (x.reshape(count, 64, 1, DIM) * torch.linspace(1.2, 0.8, DIM)).bfloat16()


def test_important_elements_are_kept_where_channels_differ_between_tokens():
    k, v = sparse_pages(PAGES, 0), sparse_pages(PAGES, 1)
    codec = PlanesCodec(1, 1, DIM, DIM, ratio=4.0)
    epoch = codec.calibrate([LayerSample(k, v)])
    data, _ = epoch.encode(0, k, v)
    (head,) = epoch.layers[0].heads
    chosen = [head.formats[i] for i in data[:, 0].tolist()]
    assert all(isinstance(fmt, TopKFormat) for fmt in chosen)
    # Weighing that format is most of the work of choosing: not where no known page would have it.
    _, ordinary = calibrated()
    assert not any(
        isinstance(fmt, TopKFormat) for plan in ordinary.layers for head in plan.heads for fmt in head.formats
    )
    assert data.shape[1] == epoch.frame_bytes <= codec.frame_bytes
    k_rot, v_rot = epoch.decode(0, data)
    basis = epoch.layers[0].basis
    for restored, exact in ((k_rot[:, 0] @ basis.q_basis[0].T, k), (v_rot[:, 0] @ basis.v_unrotate[0], v)):
        assert (restored - exact[:, :, 0].float()).norm() < 0.005 * exact.float().norm()


@pytest.mark.parametrize("kind", ["dense", "sparse", "outliers"])
def test_every_page_gets_about_the_best_of_its_heads_formats(kind):
    heads = 1 if kind == "sparse" else HEADS
    k, v = (sparse_pages(4, 5), sparse_pages(4, 6)) if kind == "sparse" else (pages(4, HEADS, 5), pages(4, HEADS, 6))
    if kind == "outliers":
        k[::2, 3] *= 60
    codec = PlanesCodec(1, heads, DIM, DIM, ratio=4.0)
    epoch = codec.calibrate([LayerSample(k, v)])
    _, errors = epoch.encode(0, k, v)
    for h, head in enumerate(epoch.layers[0].heads):
        exact = rotated(epoch, 0, h, k, v)
        reached = []
        for fmt in head.formats:
            data = torch.zeros(len(k), head.segment_bytes, dtype=torch.uint8)
            strategies.pack(fmt, *exact, data)
            reached.append(weighted_error(epoch, 0, h, exact, strategies.decode(fmt, data)))
        best = torch.stack(reached).amin(0)
        # Expected errors are coarse: no page takes twice the error that it needs to.
        assert (errors[:, h] <= 1.5 * best).all()
        if kind != "dense":
            assert (torch.stack(reached).amax(0) > 1.5 * best).any()  # there was something to choose


# What does not fit.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("ratio", [3.0, 8.0])
def test_a_broken_token_stays_broken_and_disturbs_no_other_page_or_head(value, ratio):
    codec = PlanesCodec(1, 2, 32, 32, ratio=ratio)
    epoch = codec.calibrate([LayerSample(torch.randn(5, 64, 2, 32), torch.randn(5, 64, 2, 32))])
    k, v = torch.randn(3, 64, 2, 32), torch.randn(3, 64, 2, 32)
    whole, errors = epoch.encode(0, k, v)
    k[0, 5, 1, 3] = v[0, 7, 1, 4] = value
    data, errors_now = epoch.encode(0, k, v)
    k_rot, v_rot = epoch.decode(0, data)
    assert not torch.isfinite(k_rot[0, 1, 5]).all()
    assert not torch.isfinite(v_rot[0, 1, 7]).all()
    assert not torch.isfinite(errors_now[0, 1])
    assert torch.equal(data[1:], whole[1:]) and torch.equal(errors_now[1:], errors[1:])
    first = epoch.layers[0].heads[0].segment_bytes
    assert torch.equal(data[0, :first], whole[0, :first]) and errors_now[0, 0] == errors[0, 0]


def test_wrong_shapes_are_named(epoch):
    k, v = pages(2, HEADS, 0), pages(2, HEADS, 1)
    for name, bad in (
        ("k", (k[..., :-16], v)),
        ("k", (k[:, :-1], v)),
        ("k", (k[:, :, :2], v)),
        ("v", (k, v[..., :-16])),
        ("v", (k, v[0])),
    ):
        with pytest.raises(ValueError, match=rf"^{name} must be \[P, 64, 3, 64\], got"):
            epoch.encode(0, *bad)
    data, _ = epoch.encode(0, k, v)
    for bad in (data[:, :-1], data.float(), data[0]):
        with pytest.raises(ValueError, match="data must be uint8"):
            epoch.decode(0, bad)
    for call in (lambda: epoch.span(LAYERS), lambda: epoch.encode(LAYERS, k, v), lambda: epoch.decode(LAYERS, data)):
        with pytest.raises(IndexError):
            call()


def test_a_frame_that_was_never_encoded_cannot_be_read(epoch):
    poison = torch.full((2, epoch.span(0).stop), 0xFF, dtype=torch.uint8)
    for read in (epoch.decode, epoch.scan, epoch.mean_values):
        with pytest.raises(MosaicError, match="never encoded"):
            read(0, poison)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("layers", {"layers": 0}),
        ("heads", {"heads": 0}),
        ("query_budget", {"query_budget": 0}),
        ("k_dim", {"k_dim": 40}),
        ("v_dim", {"v_dim": 40}),
    ],
)
def test_bad_arguments_are_named(name, options):
    with pytest.raises(ValueError, match=name):
        PlanesCodec(**{"layers": 1, "heads": 1, "k_dim": 64, "v_dim": 64} | options)


@pytest.mark.parametrize(
    "sample",
    [
        LayerSample(torch.ones(3, 64, 1, 64), torch.ones(3, 64, 1, 32)),
        LayerSample(torch.ones(3, 64, 2, 64), torch.ones(3, 64, 2, 64)),
        LayerSample(torch.ones(3, 32, 1, 64), torch.ones(3, 32, 1, 64)),
        LayerSample(torch.ones(3, 64, 1, 64), torch.full((3, 64, 1, 64), torch.nan)),
        LayerSample(torch.ones(0, 64, 1, 64), torch.ones(0, 64, 1, 64)),
    ],
    ids=["v-dim", "heads", "page-size", "nan", "nothing"],
)
def test_samples_of_another_cache_are_refused(sample):
    with pytest.raises(ValueError, match=r"\w"):
        PlanesCodec(1, 1, 64, 64).calibrate([sample])


def test_a_sample_of_every_layer_is_needed():
    sample = LayerSample(torch.ones(3, 64, 1, 64), torch.ones(3, 64, 1, 64))
    for count in (0, 1, 3):
        with pytest.raises(ValueError, match="samples"):
            PlanesCodec(2, 1, 64, 64).calibrate([sample] * count)
